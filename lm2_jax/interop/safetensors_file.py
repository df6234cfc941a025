"""The safetensors format, tensor by tensor: an 8-byte length, a JSON header, then the bytes of all tensors.

The format is that of https://github.com/huggingface/safetensors. The reader and the writer hold one tensor at a time,
so that a model never needs twice its size of host memory.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lm2_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes, as in the reference implementation


class Tensor(NamedTuple):
    """One entry of a header."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file
    end: int


class SafetensorsFile:
    """A file, open for reading.

    Args:
      path: of the file.
    Raises:
      UserError: the file is missing, truncated or not in the format.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        try:
            self.tensors, self.metadata = _read_header(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}", status=1) from error

    def read(self, name: str) -> np.ndarray:
        """The array of one tensor."""
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{self.path}: tensor {name!r} has type {tensor.dtype}; expected one of {sorted(DTYPES)}", status=1
            )
        dtype = DTYPES[tensor.dtype]
        numbers = np.fromfile(self.path, dtype, math.prod(tensor.shape), offset=tensor.start)
        if numbers.size != math.prod(tensor.shape):
            raise UserError(f"{self.path}: truncated while it was read, at tensor {name!r}", status=1)
        return numbers.reshape(tensor.shape)


def _read_header(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise UserError(f"{path}: not a safetensors file, or truncated in its header ({size} bytes)", status=1)
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        tensors = {name: _entry(plain, 8 + length) for name, plain in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file: its header is damaged ({error})", status=1) from error
    at = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        itemsize = DTYPES[tensor.dtype].itemsize if tensor.dtype in DTYPES else None
        expected = None if itemsize is None else math.prod(tensor.shape) * itemsize
        if tensor.start != at or expected not in (None, tensor.end - tensor.start):
            raise UserError(f"{path}: damaged: the bytes of tensor {name!r} do not fit its shape", status=1)
        at = tensor.end
    if at != size:
        raise UserError(f"{path}: truncated or damaged: expected {at} bytes, found {size}; get it again", status=1)
    return tensors, metadata


def _entry(plain: Mapping[str, Any], first: int) -> Tensor:
    start, end = (int(offset) for offset in plain["data_offsets"])
    shape = tuple(int(length) for length in plain["shape"])
    if not 0 <= start <= end or min(shape, default=0) < 0:
        raise ValueError("negative sizes")
    return Tensor(str(plain["dtype"]), shape, first + start, first + end)


def write_safetensors(
    path: str | os.PathLike[str],
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file and flushes it to the disk.

    Args:
      path: a new file.
      shapes: shape and type by name, in the order in which the tensors are written.
      read: gives the array of a name; it is called once for each.
      metadata: texts for the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (shape, dtype) in shapes.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in shapes.items():
            array = np.ascontiguousarray(read(name))
            if array.shape != tuple(shape) or array.dtype != dtype:
                raise ValueError(f"{name}: expected {shape} {dtype}, got {array.shape} {array.dtype}")
            file.write(array.view(np.uint8).reshape(-1).data if array.ndim else array.tobytes())
        file.flush()
        os.fsync(file.fileno())
