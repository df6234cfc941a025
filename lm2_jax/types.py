"""Array types and the project's dimension letters; docs/dimensions.md is the key to them."""

from typing import TypeAlias

from jaxtyping import Array, Bool, Float, Int, PyTree

State: TypeAlias = PyTree[Array]  # a tree of NamedTuples of arrays
Axes: TypeAlias = tuple[str | None, ...]  # logical axis names of one array

__all__ = ["Array", "Axes", "Bool", "Float", "Int", "PyTree", "State"]
