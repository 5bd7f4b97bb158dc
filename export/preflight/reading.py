"""Opening an ONNX file that anybody may have made."""

from __future__ import annotations

from pathlib import Path

import onnx

from profiles.errors import EdgestillError, InputError

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


def open_model(path: Path) -> onnx.ModelProto:
    """The model without its external data.

    Raises:
        InputError: no such file, or not an ONNX model.
        EdgestillError: the file cannot be read.
    """
    where = str(path)
    if path.is_dir():
        inside = sorted(path.glob("*.onnx"))
        fix = f"edgestill check {inside[0]} ..." if inside else "name an .onnx file"
        raise InputError("a folder, not an ONNX file", where=where, fix=fix)
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
