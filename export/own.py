"""Export of a model that was not distilled here: any torch module with any number of inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.bundle import write_bundle
from export.candidate import Plan
from export.planning import plan
from export.section import ExportSection
from profiles.device import Device, Stack
from profiles.errors import InputError, nearest
from profiles.opening import refuse_zip_bomb
from profiles.progress import Progress

_DTYPES = ("float32", "uint8", "int32", "int64", "bool")
_EXAMPLE = re.compile(r"^(?:(?P<name>[A-Za-z_][A-Za-z0-9_.]*):)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>[A-Za-z0-9]+))?$")
_RANDOM_SAMPLES = 32


@dataclass(frozen=True)
class Example:
    """One input of a model: `shape` with the batch first, `dtype` a NumPy name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}:{self.dtype}"


def parse_example(text: str, *, position: int = 0) -> Example:
    """`[NAME:]1x3x224x224[:int64]` as an Example; without a name "input", "input_1" and so on; without a type float32.

    Raises:
        InputError: malformed, a zero in the shape, or an unknown type.

    >>> str(parse_example("tokens:1x64:int64"))
    'tokens:1x64:int64'
    """
    found = _EXAMPLE.match(text)
    if found is None:
        raise InputError(f'"{text}" is not an example input', where="--example", fix="[NAME:]1x3x224x224[:int64]")
    shape = tuple(int(size) for size in found["shape"].split("x"))
    if 0 in shape:
        raise InputError(f'"{text}" has a size of 0', where="--example", fix="write the batch as 1")
    dtype = found["dtype"] or "float32"
    if dtype not in _DTYPES:
        raise InputError(f'unknown type "{dtype}"', where=f"--example {text}", fix=nearest(dtype, list(_DTYPES)))
    return Example(found["name"] or ("input" if position == 0 else f"input_{position}"), shape, dtype)


def export_model(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    device: Device,
    stack: Stack,
    folder: Path,
    samples: Mapping[str, NDArray[Any]] | None = None,
    precisions: Sequence[str] = ("auto",),
    batch: int | None = None,
    section: ExportSection | None = None,
    weights: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, list[Path]]:
    """Exports a module through the same ladder, without a task metric; one bundle per usable candidate.

    Always made anew: the code of a foreign model may have changed.

    Args:
        model: put into eval mode and onto the CPU here.
        examples: in the order of forward()'s arguments.
        folder: gets `graphs/` and one bundle folder per candidate.
        samples: real samples per input name (N, ...); half of them calibrate INT8, the other half is compared. None:
            FP32 and FP16 only, compared on random inputs, which is said in the manifest.
        weights: .safetensors, or a .pth state dict (loaded with weights_only=True).

    Raises:
        InputError: names, shapes or types of `samples` do not fit; weights that do not fit the model.
        EdgestillError: as `plan`.
    """
    if not examples:
        raise InputError("no example input", where="--example", fix="--example 1x3x224x224")
    if len({example.name for example in examples}) != len(examples):
        raise InputError("two example inputs share a name", where="--example", fix="name them: NAME:1x3x224x224")
    if weights is not None:
        load_weights(model, weights)
    model = model.cpu().eval()
    calibration: dict[str, NDArray[Any]] | None = None
    if samples is None:
        held_out = _random(examples)
    else:
        held_out, calibration = _halves(samples, examples)
    _check_runs(model, examples, held_out)
    made = plan(
        model,
        held_out=held_out,
        calibration=calibration,
        stack=stack,
        device=device,
        folder=folder / "graphs",
        # never one that was there: weights do not tell what forward() and the constructor's arguments make of them
        model_key=uuid4().hex,
        batch=batch or max(1, examples[0].shape[0]),
        precisions=precisions,
        section=section,
        progress=progress,
    )
    golden = {name: array[:1] for name, array in held_out.items()}
    source = "random inputs" if samples is None else "the samples given"
    bundles = [
        write_bundle(
            folder / candidate.name,
            made,
            candidate,
            name=type(model).__name__,
            device=device,
            stack=stack,
            golden=golden,
            facts={"compared_on": source},
        )
        for candidate in made.usable
    ]
    return made, bundles


def _check_runs(model: nn.Module, examples: Sequence[Example], inputs: Mapping[str, NDArray[Any]]) -> None:
    """Runs the model once, because the exporter answers inputs that do not fit with pages of its own state."""
    try:
        with torch.no_grad():
            model(*(torch.from_numpy(np.array(inputs[example.name][:2])) for example in examples))
    except Exception as error:  # a user's model may raise anything
        raise InputError(
            "the model does not run on the example inputs",
            where="--example " + " ".join(str(example) for example in examples),
            evidence=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            fix="--example must name every input of forward() in its order, with shape and type",
        ) from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a state dict into the model, strictly.

    Raises:
        InputError: missing or damaged file, a file that wants to run code, or names and shapes that do not fit.
    """
    if not path.is_file():
        raise InputError("no such weights file", where=str(path))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(str(path))
        else:
            refuse_zip_bomb(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except InputError:
        raise
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error)[:200])
        raise InputError(f"the weights do not fit {type(model).__name__}", where=str(path), evidence=first) from error


def _random(examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
    """Random inputs for the comparison alone: pixels 0 to 255, standard normal floats, integers 0 or 1."""
    rng = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = {}
    for example in examples:
        shape = (_RANDOM_SAMPLES, *example.shape[1:])
        if example.dtype == "float32":
            found[example.name] = rng.standard_normal(shape).astype(np.float32)
        else:
            found[example.name] = rng.integers(0, 256 if example.dtype == "uint8" else 2, shape).astype(example.dtype)
    return found


def _halves(
    samples: Mapping[str, NDArray[Any]], examples: Sequence[Example]
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """(held-out, calibration): odd and even rows."""
    for example in examples:
        if example.name not in samples:
            raise InputError(
                f'the samples have no "{example.name}"',
                where="--samples",
                evidence="arrays: " + ", ".join(samples),
                fix=f"--example NAME:{'x'.join(map(str, example.shape))} with one of those names",
            )
        array = samples[example.name]
        if array.shape[1:] != example.shape[1:] or str(array.dtype) != example.dtype:
            raise InputError(
                f'samples of "{example.name}" do not fit the example',
                where="--samples",
                evidence=f"{array.dtype} {array.shape}, the example is {example}",
            )
    counts = {len(samples[example.name]) for example in examples}
    if len(counts) != 1 or min(counts) < 4:
        raise InputError(
            "the samples need the same number of rows, 4 or more", where="--samples", evidence=f"rows: {sorted(counts)}"
        )
    chosen = {example.name: samples[example.name] for example in examples}
    return {name: array[1::2] for name, array in chosen.items()}, {name: array[::2] for name, array in chosen.items()}
