"""Readers of array files: IDX (MNIST's format) and NumPy .npz."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import InputError
from profiles.opening import open_arrays, unzip

Array = np.ndarray[Any, Any]

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> Array:
    """The array of an IDX file, plain or gzip-compressed, in native byte order.

    The format: two zero bytes, a type byte, the number of dimensions, each as a big-endian 32-bit integer, data.

    Raises:
        InputError: not there, not IDX, truncated, or longer than its header says.
    """
    if not path.is_file():
        raise InputError(f"no file {path.name}", where=str(path))
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = _decompressed(path)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path.name} cannot be decompressed", where=str(path), evidence=str(error), fix="download the file again"
        ) from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES or not 1 <= data[3] <= 8:
        raise InputError(
            f"{path.name} is not an IDX file",
            where=str(path),
            evidence=f"it starts with {data[:4].hex(' ') or 'nothing'}",
            fix="an IDX file starts with 00 00, a type byte and the number of dimensions",
        )
    dtype, header = np.dtype(_IDX_TYPES[data[2]]), 4 + 4 * data[3]
    shape = tuple(int(side) for side in np.frombuffer(data[4:header], ">u4")) if len(data) >= header else ()
    expected = header + math.prod(shape) * dtype.itemsize
    if len(shape) != data[3] or len(data) != expected:
        raise InputError(
            f"{path.name} is {'truncated' if len(data) < expected else 'longer than its header says'}",
            where=str(path),
            evidence=f"header says {shape or 'nothing complete'}, so {expected} bytes; found {len(data)}",
            fix="download the file again",
        )
    array = np.frombuffer(data, dtype, offset=header).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def _decompressed(path: Path) -> bytes:
    """What a gzip-compressed IDX file holds, and no more than its header says, plus the byte that shows that it does.

    Raises:
        InputError: a bomb. OSError, EOFError, zlib.error: damaged.
    """
    start = unzip(path, 4 + 4 * 8)
    if len(start) < 4 or start[2] not in _IDX_TYPES or not 1 <= start[3] <= 8:
        return start
    header = 4 + 4 * start[3]
    if len(start) < header:
        return start
    shape = np.frombuffer(start[4:header], ">u4").tolist()
    return unzip(path, header + math.prod(shape) * np.dtype(_IDX_TYPES[start[2]]).itemsize + 1)


def write_idx(path: Path, array: Array) -> None:
    """Writes a uint8 array as a plain IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(header + np.ascontiguousarray(array, np.uint8).tobytes())


def read_npz(path: Path) -> dict[str, Array]:
    """All arrays of an .npz file, without pickles.

    Raises:
        InputError: not there, damaged, or an array of Python objects.
    """
    if not path.is_file():
        raise InputError(f"no file {path.name}", where=str(path))
    fix = "write it with numpy.savez_compressed(path, images=..., labels=...), labels as numbers or strings"
    with path.open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise InputError(f"{path.name} is not an .npz archive", where=str(path), fix=fix)
    return open_arrays(path, fix=fix)
