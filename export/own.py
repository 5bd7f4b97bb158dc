"""Export of a model that was not distilled here: any torch module with any number of inputs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export import parity
from export.bundle import write_bundle
from export.candidate import Engine, Plan, Rung
from export.foreign import OneOutput
from export.planning import TIMING, failure_text, plan
from export.publish import publishing, refuse_in_the_way
from export.section import ExportSection
from profiles.artifact import file_hash
from profiles.device import Device, Stack
from profiles.errors import EdgestillError, InputError, nearest
from profiles.opening import refuse_zip_bomb
from profiles.progress import Progress

_DTYPES = ("float32", "uint8", "int32", "int64", "bool")
_SIZE = r"(?:[A-Za-z_][A-Za-z0-9_]*=)?\d+"
_EXAMPLE = re.compile(
    rf"^(?:(?P<name>[A-Za-z_][A-Za-z0-9_.]*):)?(?P<shape>{_SIZE}(?:x{_SIZE})*)(?::(?P<dtype>[A-Za-z0-9]+))?$"
)
_RANDOM_SAMPLES = 32
_OTHER_SIZES_SAMPLES = 64
GRAPHS = "graphs"
"""Folder of the graphs that the bundles are made of."""


@dataclass(frozen=True)
class Example:
    """One input of a model: `shape` with the batch first, `dtype` a NumPy name.

    sizes: (position, name) of the dimensions that are dynamic besides the batch; equal names are equal sizes. typed:
    what the user wrote for it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sizes: tuple[tuple[int, str], ...] = ()
    typed: str = field(default="", compare=False)

    def __str__(self) -> str:
        names = dict(self.sizes)
        shape = [f"{names[place]}={size}" if place in names else str(size) for place, size in enumerate(self.shape)]
        return f"{self.name}:{'x'.join(shape)}:{self.dtype}"


def parse_example(text: str, *, position: int = 0) -> Example:
    """`[NAME:]1x3x224x224[:int64]` as an Example; without a name "input", "input_1" and so on; without a type float32.

    A size that is written as `tokens=64` is dynamic; the first one, the batch, always is.

    Raises:
        InputError: malformed, a zero in the shape, or an unknown type.

    >>> str(parse_example("tokens:1x64:int64"))
    'tokens:1x64:int64'
    """
    found = _EXAMPLE.match(text)
    if found is None:
        raise InputError(
            f'"{text}" is not an example input',
            where="--example",
            fix="[NAME:]1x3x224x224[:int64]; a dynamic size is written with a name: tokens:1xlength=64:int64",
        )
    parts = re.findall(r"(?:([A-Za-z_][A-Za-z0-9_]*)=)?(\d+)(?:x|$)", found["shape"])
    shape = tuple(int(size) for _, size in parts)
    sizes = tuple((place, name) for place, (name, _) in enumerate(parts) if name and place)
    if 0 in shape:
        raise InputError(f'"{text}" has a size of 0', where="--example", fix="write the batch as 1")
    dtype = found["dtype"] or "float32"
    if dtype not in _DTYPES:
        raise InputError(f'unknown type "{dtype}"', where=f"--example {text}", fix=nearest(dtype, list(_DTYPES)))
    return Example(found["name"] or ("input" if position == 0 else f"input_{position}"), shape, dtype, sizes, text)


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
    output: str | None = None,
    labels: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Plan, list[Path]]:
    """Exports a module through the same ladder, without a task metric; one bundle per usable candidate.

    Always made anew: the code of a foreign model may have changed. `folder` then holds what this export made and
    nothing of an earlier one; when it fails, the earlier one is left as it is. See `export.publish`.

    Args:
        model: put into eval mode and onto the CPU here.
        examples: named as forward()'s parameters, or in their order.
        folder: gets `graphs/` and one bundle folder per candidate.
        samples: real samples per input name (N, ...); half of them calibrate INT8, the other half is compared. None:
            FP32 and FP16 only, compared on random inputs, which is said in the manifest.
        section: there is no task metric, so its `int8_tolerance` and, for class scores, `int8_agreement` say whether
            INT8 is sound.
        weights: .safetensors, or a .pth state dict (loaded with weights_only=True).
        output: name of the output to export, see `OneOutput`; None: "logits", else the first tensor.
        labels: of the classes, when the output is one score per class; empty: see `OneOutput.decides`.

    Raises:
        InputError: names, shapes or types of `samples` do not fit; weights that do not fit the model; an output that
            does not exist, or has not one score for each label; dynamic sizes for a stack that runs engines; something
            else in `folder` where an artefact would come to lie.
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
    _check_sizes(examples, stack)
    typed = [example.typed or str(example) for example in examples]
    wrapped = OneOutput(model, _tensors(examples, held_out, 2), output, typed).eval()
    if progress is not None and len(wrapped.outputs) > 1:
        others = ", ".join(name for name in wrapped.outputs if name != wrapped.output)
        progress.note(f'the output "{wrapped.output}" is exported; --output chooses another: {others}')
    if labels and wrapped.width != len(labels):
        raise InputError(
            f'the output "{wrapped.output}" is not one score for each of {len(labels)} labels',
            where="--labels",
            evidence="it has " + (f"{wrapped.width} values" if wrapped.width is not None else "not two dimensions"),
            fix="one label per line, in the order of the scores; --output chooses another output: "
            + ", ".join(wrapped.outputs),
        )
    name = re.sub(r"[^A-Za-z0-9_]", "_", wrapped.output)
    section = section or ExportSection()
    refuse_in_the_way(folder, (GRAPHS, "fp32"))  # before the work is done
    with publishing(folder) as new:
        if (folder / GRAPHS / TIMING).is_dir():  # engines are built the same way again
            shutil.copytree(folder / GRAPHS / TIMING, new / GRAPHS / TIMING)
        made = plan(
            wrapped,
            held_out=held_out,
            calibration=calibration,
            stack=stack,
            device=device,
            folder=new / GRAPHS,
            # never one that was there: weights do not tell what forward() and the constructor's arguments make of them
            model_key=uuid4().hex,
            batch=batch or max(1, examples[0].shape[0]),
            precisions=precisions,
            section=section,
            exclusive=wrapped.exclusive,
            decides=bool(labels) or wrapped.decides,
            progress=progress,
            output_name=f"output_{name}" if name[0].isdigit() or name in held_out else name,
            dynamic={example.name: dict(example.sizes) for example in examples if example.sizes},
        )
        made = _at_other_sizes(wrapped, examples, held_out, made, section, "auto" not in precisions)
        golden = {name: array[:1] for name, array in held_out.items()}
        source = "random inputs" if samples is None else "the samples given"
        bundles = [
            write_bundle(
                new / candidate.name,
                made,
                candidate,
                name=type(model).__name__,
                device=device,
                stack=stack,
                golden=golden,
                labels=labels,
                exclusive=wrapped.exclusive,
                facts={"compared_on": source, "output": wrapped.output, "weights": _hash_of(weights)},
                section=section,
            )
            for candidate in made.usable
        ]
    return _moved(made, new, folder), [folder / bundle.name for bundle in bundles]


def _moved(made: Plan, old: Path, new: Path) -> Plan:
    """The plan with its files in another place."""

    def place(path: Path | None) -> Path | None:
        return None if path is None else new / path.relative_to(old)

    def engine(found: Engine | None) -> Engine | None:
        return None if found is None else found.model_copy(update={"file": place(found.file)})

    candidates = tuple(
        entry.model_copy(
            update={
                "file": place(entry.file),
                "scored_file": place(entry.scored_file),
                "engine": engine(entry.engine),
                "static_engine": engine(entry.static_engine),
            }
        )
        for entry in made.candidates
    )
    return made.model_copy(update={"folder": place(made.folder), "candidates": candidates})


def _tensors(examples: Sequence[Example], inputs: Mapping[str, NDArray[Any]], count: int) -> dict[str, Tensor]:
    """The first rows of every input, in the order of the examples."""
    return {example.name: torch.from_numpy(np.array(inputs[example.name][:count])) for example in examples}


def _check_sizes(examples: Sequence[Example], stack: Stack) -> None:
    dynamic = next((example for example in examples if example.sizes), None)
    if dynamic is not None and stack.runtime != "onnxruntime":
        raise InputError(
            f"{stack.name} runs engines, which are built for fixed sizes",
            where=f"--example {dynamic}",
            evidence="dynamic besides the batch: " + ", ".join(name for _, name in dynamic.sizes),
            fix="--example " + re.sub(r"[A-Za-z_][A-Za-z0-9_]*=", "", str(dynamic)),
        )


def _at_other_sizes(
    model: OneOutput,
    examples: Sequence[Example],
    held_out: Mapping[str, NDArray[Any]],
    made: Plan,
    section: ExportSection,
    strict: bool,
) -> Plan:
    """Compares every usable graph with PyTorch at smaller dynamic sizes, on the beginnings of the held-out inputs.

    Args:
        strict: a precision was asked for by name, so one that fails is an error.

    Returns:
        The plan, with a rung more for each graph, and without those that fail it.

    Raises:
        EdgestillError: the FP32 graph does not compute the same, or no graph of the precision that was asked for.
    """
    dynamic = {example.name: dict(example.sizes) for example in examples}
    if not any(dynamic.values()):
        return made
    rows = parity.spread(len(next(iter(held_out.values()))), _OTHER_SIZES_SAMPLES)
    inputs = {}
    for name, array in parity.take(held_out, rows).items():
        ends = [_smaller(size) if place in dynamic[name] else size for place, size in enumerate(array.shape)]
        inputs[name] = np.ascontiguousarray(array[tuple(slice(end) for end in ends)])
    expected = parity.run_torch(model, inputs)
    candidates, failed = [], []
    for candidate in made.candidates:
        graph = candidate.to_score
        if graph is None or not candidate.usable:
            candidates.append(candidate)
            continue
        limits = parity.limits_of(candidate.precision, section, judged=False)
        rung: Rung | None = None
        refused: str | None
        try:
            rung = parity.climb(
                f"{candidate.name} at other sizes", parity.open_session(graph), expected, inputs, rows, (2,), limits,
                exclusive=model.exclusive, decides=made.decides,
            )  # fmt: skip
            refused = None if rung.passed else failure_text(rung)
        except Exception as failure:  # the runtime's exceptions share no base class
            refused = str(failure).splitlines()[0]
        if refused is not None:
            failed.append((candidate.precision, refused))
        parities = candidate.parity if rung is None else (*candidate.parity, rung)
        candidates.append(candidate.model_copy(update={"parity": parities, "refused": refused}))
    left = {candidate.precision for candidate in candidates if candidate.usable}
    for precision, refused in failed:
        if precision == "fp32" or (strict and precision not in left):
            shapes = [f"{name}:{'x'.join(map(str, array.shape))}" for name, array in inputs.items()]
            raise EdgestillError(
                "the exported graph does not compute what the model does at other sizes",
                where=" ".join(shapes),
                evidence=refused,
                fix="leave the size's name out of --example, so that it is fixed",
            )
    return made.model_copy(update={"candidates": tuple(candidates)})


def _smaller(size: int) -> int:
    return min(size, max(2, size // 2 + 1))


def _hash_of(weights: Path | None) -> str | None:
    return None if weights is None else file_hash(weights)


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
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
        model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
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
        dynamic = dict(example.sizes)
        fits = len(array.shape) == len(example.shape) and all(
            place in dynamic or size == wanted
            for place, (size, wanted) in enumerate(zip(array.shape, example.shape, strict=True))
            if place
        )
        if not fits or str(array.dtype) != example.dtype:
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
