"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from profiles.artifact import explain_os_errors
from profiles.errors import InputError
from profiles.opening import refuse_zip_bomb


def save_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values to `file` (temporary file, synced, renamed).

    Raises:
        EdgestillError: the disk is full or the place cannot be written; an older checkpoint stays as it was.
    """
    # serialised in memory first: torch reports a full disk as a RuntimeError without its cause
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with explain_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
        try:
            with os.fdopen(descriptor, "wb") as target:
                target.write(buffer.getbuffer())
                target.flush()
                os.fsync(target.fileno())
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def load_checkpoint(file: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        InputError: truncated, corrupt, or not a checkpoint.
    """
    refuse_zip_bomb(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise InputError(
            "damaged checkpoint",
            where=str(file),
            evidence=f"{file.stat().st_size} bytes; {(str(error) or type(error).__name__).splitlines()[0]}",
            fix=f"delete {file.parent}; this training then starts anew",
        ) from error
    if not isinstance(state, dict) or "key" not in state:
        raise InputError(
            "not a checkpoint of edgestill",
            where=str(file),
            fix=f"delete {file.parent}; this training then starts anew",
        )
    return state
