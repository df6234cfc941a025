"""Random choices that are functions of a key: equal on every host, in every library version and after a resume."""

import hashlib

import numpy as np


def draw(*key: int | str) -> int:
    """A 64-bit number that looks random and is a function of `key`."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def shuffled(count: int, *key: int | str) -> np.ndarray:
    """The numbers below `count`, [count] int64, in an order that is a function of `key`."""
    # Sorting by splitmix64 of (index + key): numpy's own shuffles may change from one release to the next.
    with np.errstate(over="ignore"):
        mixed = (np.arange(count, dtype=np.uint64) + np.uint64(draw(*key))) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")
