"""Opening files that anybody may have made: ONNX graphs, bundles, archives of arrays.

Reading one must not run code, reach outside of its folder or fill the memory. What would is refused here, so every
command that opens such a file does it through these functions.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from profiles.artifact import Manifest, is_inside, verify
from profiles.errors import EdgestillError, InputError

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc")
"""Operator domains that are opened: ONNX's own, and those that ONNX Runtime implements itself. Any other would need a
shared library, which is code."""
BUNDLE = "bundle"
"""Kind of the artefact that a device gets."""
_PROTOBUF_BYTES = 2**31 - 1
_OTHERS = {
    b"PK\x03\x04": "a zip archive, as PyTorch's .pt files are",
    b"\x80\x02": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"{": "JSON",
    b"GGUF": "GGUF",
    b"\x89HDF": "HDF5",
    b"ftrt": "a TensorRT engine",
    b"version https://git-lfs": "a Git LFS pointer: run git lfs pull",
}
_BOMB_BYTES = 2**28
_BOMB_RATIO = 200
"""From so many bytes on, content that shrank by more than this is taken for a bomb. Pictures and tokens shrink by 2 to
50, zeros by 1000."""


# ---------------------------------------------------------------------------------------------------- graphs


class Stored(NamedTuple):
    """A tensor whose bytes lie in another file."""

    name: str
    place: str
    """As the graph writes it."""
    end: int
    """Bytes that the file must have."""


class Misplaced(NamedTuple):
    """External data that is not read. `kind`: what is wrong with it."""

    kind: Literal["outside", "missing", "short"]
    place: str
    names: tuple[str, ...]
    """Of the tensors."""


def open_graph(path: Path) -> onnx.ModelProto:
    """The model in a file, without its external data, which is checked: a runtime may load the file.

    Raises:
        InputError: as `read_graph`; external data that is missing, too short, or lies outside of the file's folder;
            operators of a domain that is not in `DOMAINS` and that the file does not define itself.
        EdgestillError: the file cannot be read.
    """
    model = read_graph(path)
    for found in misplaced(model, path.parent):
        raise _misplaced_error(found, path)
    domains = foreign_domains(model)
    if domains:
        domain, operators = next(iter(domains.items()))
        raise InputError(
            "the file has custom operators",
            where=str(path),
            evidence=f'domain "{domain}": {", ".join(operators[:3])}',
            fix="export it with ONNX's own operators; a library of custom operators is code, which is not loaded",
        )
    return model


def read_graph(path: Path) -> onnx.ModelProto:
    """The model in a file, without its external data, of which nothing is checked.

    Raises:
        InputError: no such file, or not an ONNX model.
        EdgestillError: the file cannot be read.
    """
    import onnx

    where = str(path)
    if path.is_dir():
        inside = sorted(path.glob("*.onnx"))
        raise InputError("a folder, not an ONNX file", where=where, fix=f"name {inside[0] if inside else 'a file'}")
    if not path.is_file():
        raise InputError("no such file", where=where, fix="check the path")
    try:
        size = path.stat().st_size
        if size > _PROTOBUF_BYTES:
            raise InputError(
                "not an ONNX file: it is larger than one can be",
                where=where,
                evidence=f"{size / 2**30:.1f} GiB; a protobuf ends at 2 GiB",
                fix="onnx.save_model(model, path, save_as_external_data=True)",
            )
        content = path.read_bytes()
    except OSError as error:
        raise EdgestillError("the file cannot be read", where=where, evidence=str(error)) from error
    if not content:
        raise InputError("the file is empty", where=where, fix="export the model again")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # a DecodeError of protobuf, whose module has no types and comes with onnx
        kind = next((kind for start, kind in _OTHERS.items() if content.startswith(start)), None)
        raise InputError(
            "not an ONNX file, or damaged",
            where=where,
            evidence=f"it looks like {kind}" if kind else f"{size:,} bytes; {' '.join(str(error).split())}",
            fix="export the model to ONNX" if kind else "export or copy it again",
        ) from error
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise InputError(
            "the file holds no graph", where=where, evidence=f"{size:,} bytes", fix="export the model to ONNX again"
        )
    if not any(entry.domain in ("", "ai.onnx") for entry in model.opset_import):
        raise InputError(
            "the file does not say which operator set it uses",
            where=where,
            evidence=f"IR version {model.ir_version}, {len(model.graph.node)} nodes",
            fix='model.opset_import.append(onnx.helper.make_opsetid("", 17))',
        )
    return model


def stored_apart(model: onnx.ModelProto) -> list[Stored]:
    """Every tensor whose bytes lie in another file, in subgraphs and functions, too."""
    import onnx

    found = []
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: str(entry.value) for entry in tensor.external_data}
        length = _count(entries.get("length")) or tensor_bytes(tensor)
        found.append(Stored(tensor.name, entries.get("location", ""), _count(entries.get("offset")) + length))
    return found


def misplaced(model: onnx.ModelProto, folder: Path | None) -> list[Misplaced]:
    """What is wrong with the external data of a model in `folder` (None: not on disk, its files are not looked at)."""
    found: dict[tuple[Literal["outside", "missing", "short"], str], list[str]] = {}
    for entry in stored_apart(model):
        if escapes(entry.place) or (folder is not None and not is_inside(folder / entry.place, folder)):
            found.setdefault(("outside", entry.place), []).append(entry.name)
        elif folder is not None and not (folder / entry.place).is_file():
            found.setdefault(("missing", entry.place), []).append(entry.name)
        elif folder is not None and (folder / entry.place).stat().st_size < entry.end:
            found.setdefault(("short", entry.place), []).append(entry.name)
    order = ("outside", "missing", "short")
    return [
        Misplaced(kind, place, tuple(names))
        for (kind, place), names in sorted(found.items(), key=lambda item: order.index(item[0][0]))
    ]


def escapes(place: str) -> bool:
    """A location that is absolute on any system, empty, or leads out of its folder."""
    windows = PureWindowsPath(place)
    parts = PurePosixPath(place.replace("\\", "/")).parts
    absolute = Path(place).is_absolute() or bool(windows.drive or windows.root)
    return not place or absolute or ".." in parts or "\0" in place


def open_tensor(tensor: onnx.TensorProto, folder: Path | None) -> Array | None:
    """The value of a stored tensor; bytes in another file are mapped into memory, not read, where their type allows it.

    Args:
        folder: of the model's file, from which external data may come; None: the model is not on disk.

    Returns:
        None where there is no value to be had: bytes that are missing, too few, or outside of the folder; text.
    """
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        try:
            return np.asarray(onnx.numpy_helper.to_array(tensor))
        except (ValueError, TypeError):
            return None
    entries = {entry.key: str(entry.value) for entry in tensor.external_data}
    place, offset, size = entries.get("location", ""), _count(entries.get("offset")), tensor_bytes(tensor)
    if folder is None or escapes(place) or not is_inside(folder / place, folder):
        return None
    path = folder / place
    if not path.is_file() or path.stat().st_size < offset + size or _count(entries.get("length")) not in (0, size):
        return None
    shape = tuple(tensor.dims)
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if size and size == math.prod(shape) * dtype.itemsize:
        return np.memmap(path, dtype, "r", offset, shape or (1,)).reshape(shape)
    with path.open("rb") as file:  # two values in a byte, or none at all
        file.seek(offset)
        inside = onnx.TensorProto(data_type=tensor.data_type, dims=shape, raw_data=file.read(size))
    return open_tensor(inside, None)


def foreign_domains(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Operators of domains that are neither in `DOMAINS` nor defined by the file's own functions, by domain."""
    own = {(function.domain, function.name) for function in model.functions}
    found: dict[str, list[str]] = {}
    for node in _nodes(model):
        if node.domain not in DOMAINS and (node.domain, node.op_type) not in own:
            operators = found.setdefault(str(node.domain), [])
            if node.op_type not in operators:
                operators.append(str(node.op_type))
    return found


def _misplaced_error(found: Misplaced, path: Path) -> InputError:
    names = ", ".join(found.names[:3]) + (f" and {len(found.names) - 3} more" if len(found.names) > 3 else "")
    if found.kind == "outside":
        return InputError(
            "external data points out of the model's folder",
            where=str(path),
            evidence=f'"{found.place}" ({names}); a location is relative, without .., and no link leads elsewhere',
            fix=f'onnx.save_model(model, path, save_as_external_data=True, location="{path.name}.data")',
        )
    return InputError(
        f'the external data "{found.place}" is {"missing" if found.kind == "missing" else "too short"}',
        where=str(path),
        evidence=f"{len(found.names)} tensors lie in it: {names}",
        fix=f"copy {found.place} beside {path.name}, from where that came from",
    )


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                waiting.extend(graph.node)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [model.graph]
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs.extend(attribute.graphs)
    for graph in graphs:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a stored tensor by its shape and type; 0 for text."""
    import onnx

    size = int(math.prod(tensor.dims))
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1):
        return (size + 1) // 2
    return size * itemsize(tensor.data_type)


def itemsize(data_type: int) -> int:
    """Bytes of one element of an ONNX type; 0 for text."""
    import onnx

    try:
        return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)
    except (KeyError, TypeError):
        return 0


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


# --------------------------------------------------------------------------------------------------- bundles


def open_bundle(folder: Path) -> Manifest:
    """The manifest of a bundle that is whole: every file has its hash, and the model lies inside and may be loaded.

    Raises:
        InputError: no bundle, a file that is missing, changed, a link that leads out of the folder, or not in the
            manifest; a model as `open_graph` refuses it.
    """
    manifest = verify(folder, BUNDLE)
    info = manifest.info
    engines = [entry for key in ("engine", "static_engine") if isinstance(entry := info.get(key), dict)]
    needed = [info.get("model"), "golden.npz", *(entry.get("file") for entry in engines)]
    for name in needed:
        if name not in manifest.files:
            raise InputError(
                f"{folder} is no whole bundle",
                where=str(folder / "manifest.json"),
                evidence=f'its list of files has no "{name}"',
                fix="export it again",
            )
    model = folder / info["model"]
    beside = {entry.place for entry in stored_apart(open_graph(model))}
    for place in sorted(beside):
        if PurePosixPath(place).as_posix() not in manifest.files:
            raise InputError(
                f'the external data "{place}" is not in the manifest',
                where=str(folder / place),
                evidence="so its hash is not known",
                fix="export it again",
            )
    return manifest


# ---------------------------------------------------------------------------------------------------- arrays


def open_arrays(path: Path, *, where: str | None = None, fix: str | None = None) -> dict[str, Array]:
    """All arrays of an .npz file, or the one of an .npy file under the name "array"; nothing in them is unpickled.

    Args:
        where: of the option or key that named the file, for the message; None: the file itself.
        fix: what would be right when it cannot be read.

    Raises:
        InputError: no such file, damaged, Python objects, or a zip bomb.
    """
    if not path.is_file():
        raise InputError(f"no file {path}", where=where or str(path), fix="check the path")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                refuse_bomb(path, archive)
                for entry in archive.infolist():
                    _check_header(archive, entry)
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise ValueError("it is neither .npz nor .npy")
        return {"array": np.array(np.load(path, mmap_mode="r", allow_pickle=False))}
    except InputError:
        raise
    except (OSError, EOFError, ValueError, KeyError, MemoryError, NotImplementedError, RuntimeError, struct.error,
            zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        raise InputError(
            f"{path.name} cannot be read",
            where=where or str(path),
            evidence=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix=fix or "write it with numpy.savez(path, NAME=array), numbers or strings, no objects",
        ) from error


def refuse_bomb(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuses a zip archive that unpacks to far more than it holds.

    Raises:
        InputError: see `_BOMB_RATIO`.
    """
    _refuse_ratio(path, sum(entry.file_size for entry in archive.infolist()))


def refuse_zip_bomb(path: Path) -> None:
    """Like `refuse_bomb`, for a file that may be a zip archive, as PyTorch's are; other files pass.

    Raises:
        InputError: see `_BOMB_RATIO`.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                refuse_bomb(path, archive)
    except (OSError, zipfile.BadZipFile):
        return  # its reader says what is wrong with it


def unzip(path: Path, limit: int) -> bytes:
    """The content of a gzip file, at most `limit` bytes of it.

    Raises:
        InputError: a bomb, see `_BOMB_RATIO`.
        OSError, EOFError, zlib.error: damaged.
    """
    _refuse_ratio(path, min(limit, 1032 * path.stat().st_size))  # deflate shrinks by 1032 at most
    with gzip.open(path) as file:
        return file.read(limit)


def _refuse_ratio(path: Path, unpacked: int) -> None:
    packed = max(path.stat().st_size, 1)
    if unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * packed:
        raise InputError(
            f"{path.name} unpacks to {unpacked / 2**20:,.0f} MiB",
            where=str(path),
            evidence=f"it has {packed / 2**20:,.2f} MiB; an archive that shrank {unpacked // packed:,}-fold may be a "
            "bomb",
            fix="if it is yours, write it without compression: numpy.savez(path, NAME=array)",
        )


def _check_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Compares an array's shape with its bytes: NumPy allocates what the header says before it reads.

    Raises:
        ValueError: they do not fit.
    """
    if not entry.filename.endswith(".npy"):
        return
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if not dtype.hasobject and file.tell() + math.prod(shape) * dtype.itemsize != entry.file_size:
            raise ValueError(f"{entry.filename} says shape {shape} of {dtype}, and has {entry.file_size} bytes")
