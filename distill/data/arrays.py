"""Readers of array files: IDX (MNIST's format) and NumPy .npz."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import InputError

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
            data = gzip.decompress(data)
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
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(
                f"{path.name} is not an .npz archive",
                where=str(path),
                fix="write it with numpy.savez_compressed(path, images=..., labels=...)",
            )
        with archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path.name} cannot be read",
            where=str(path),
            evidence=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="write it with numpy.savez_compressed(path, images=..., labels=...), labels as numbers or strings",
        ) from error
