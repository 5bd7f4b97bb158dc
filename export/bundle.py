"""The bundle: a folder that a device can use without edgestill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from export import parity
from export.candidate import GRAPH, Candidate, Engine, Plan
from export.device_build import SCRIPT, build_script
from export.planning import ENGINE, STATIC_ENGINE
from export.section import ExportSection
from export.tensorrt import profiles_of, workspace_of
from profiles import engine_check
from profiles.artifact import content_key, create, current, write_text
from profiles.device import Device, Stack
from profiles.errors import InputError
from profiles.metrics import Metric

KIND = "bundle"
BUNDLE_VERSION = 1
GOLDEN_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "int8": 1e-1}
"""Share of the largest golden logit. Another processor sums in another order and, in INT8, rounds at other places."""
IN_GRAPH = {"image": "cast to float and normalisation", "tokens": "nothing but the embedding lookup"}
"""What the student's first layer does to the prepared sample, by the kind of the data."""


def write_bundle(
    folder: Path,
    plan: Plan,
    candidate: Candidate,
    *,
    name: str,
    device: Device,
    stack: Stack,
    golden: NDArray[Any] | Mapping[str, NDArray[Any]],
    labels: Sequence[str] = (),
    exclusive: bool = True,
    preprocessing: Mapping[str, Any] | None = None,
    metric: Metric | None = None,
    tokenizer: Path | None = None,
    licence: str = "",
    facts: Mapping[str, Any] | None = None,
    section: ExportSection | None = None,
) -> Path:
    """Writes the bundle of one target and returns its folder; what is there from the same content stays.

    Args:
        name: of the target.
        golden: one or a few real held-out samples (N, ...), or such an array per input name.
        exclusive: classes exclude each other: `infer.py` prints a softmax, else sigmoids. Where the plan's output is no
            class scores it prints the output itself.
        preprocessing: what was done to the raw data before the graph. Its "kind" ("image" or "tokens") says what
            `infer.py` reads besides arrays; None: arrays only.
        metric: of this candidate on the test split.
        tokenizer: the JSON file of token data.
        licence: notes on the data's and the teacher's licences.
        facts: more for the manifest, such as the student's architecture and the recipe's seed.
        section: what it says of engines is for the script that builds them on the device.

    Raises:
        InputError: the candidate was refused.
    """
    if candidate.file is None or candidate.to_score is None or not candidate.usable:
        raise InputError(f"{candidate.name} cannot be bundled", where=name, evidence=candidate.refused)
    inputs = {plan.input_name: golden} if isinstance(golden, np.ndarray) else dict(golden)
    engines = [engine for engine in (candidate.engine, candidate.static_engine) if engine is not None]
    info = _info(
        plan, candidate, name=name, device=device, stack=stack, exclusive=exclusive, preprocessing=preprocessing,
        metric=metric, licence=licence, facts=facts, labels=labels,
    )  # fmt: skip
    template = Path(__file__).with_name("infer_template.py").read_text(encoding="utf-8")
    check = Path(engine_check.__file__).read_text(encoding="utf-8")
    script = _script(plan, candidate, info, device, stack, section or ExportSection())
    key = content_key(
        BUNDLE_VERSION,
        info,
        candidate.sha256,
        [engine.sha256 for engine in engines],
        inputs,
        list(labels),
        tokenizer.read_text(encoding="utf-8") if tokenizer is not None else None,
        template,
        check,
        script,
    )
    if current(folder, KIND, key, whole=True) is not None:
        return folder
    session = parity.open_session(candidate.to_score)
    output = parity.run_session(session, inputs, len(next(iter(inputs.values()))))
    largest = float(np.max(np.abs(output), initial=0.0))
    info["golden"] = {
        "file": "golden.npz",
        "samples": len(output),
        "tolerance": max(GOLDEN_TOLERANCE.get(candidate.precision, 1e-1) * largest, 1e-6),
    }
    shipped = {key: array.astype(candidate.input_dtype or array.dtype) for key, array in inputs.items()}
    with create(folder, KIND, key, info) as temporary:
        for path in candidate.file.parent.glob(f"{GRAPH}*"):
            shutil.copyfile(path, temporary / path.name)
        for engine, file in zip(engines, (ENGINE, STATIC_ENGINE), strict=False):
            shutil.copyfile(engine.file, temporary / file)
        arrays: dict[str, Any] = {f"input_{key}": array for key, array in shipped.items()}
        np.savez(temporary / "golden.npz", output=output, **arrays)
        if labels:
            write_text(temporary / "labels.txt", "".join(f"{label}\n" for label in labels))
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / "tokenizer.json")
        write_text(temporary / "infer.py", template)
        write_text(temporary / "engine_check.py", check)
        if script is not None:
            write_text(temporary / SCRIPT, script)
        write_text(temporary / "README.txt", _readme(name, device, stack, candidate, engines, info))
    return folder


def _script(
    plan: Plan,
    candidate: Candidate,
    info: Mapping[str, Any],
    device: Device,
    stack: Stack,
    section: ExportSection,
) -> str | None:
    """What builds the engine on the device; None where the stack runs none."""
    if stack.runtime == "onnxruntime":
        return None
    return build_script(
        model=GRAPH,
        inputs=info["inputs"],
        form=candidate.name,
        rtx=stack.runtime == "tensorrt-rtx",
        stack_version=stack.runtime_version,
        profiles=profiles_of(plan.batch, section.engine_batches),
        engines=(ENGINE, STATIC_ENGINE),
        workspace_mib=workspace_of(section, device),
        hardware_compatibility=section.hardware_compatibility,
        version_compatible=section.version_compatible,
    )


def _info(
    plan: Plan,
    candidate: Candidate,
    *,
    name: str,
    device: Device,
    stack: Stack,
    exclusive: bool,
    preprocessing: Mapping[str, Any] | None,
    metric: Metric | None,
    licence: str,
    facts: Mapping[str, Any] | None,
    labels: Sequence[str],
) -> dict[str, Any]:
    """The manifest's facts, as plain values."""
    graph = onnx.load(str(candidate.file), load_external_data=False).graph

    def engine_facts(engine: Engine | None, file: str) -> dict[str, Any] | None:
        return None if engine is None else {**json.loads(engine.model_dump_json(exclude={"file"})), "file": file}

    return {
        "bundle_version": BUNDLE_VERSION,
        "name": name,
        "model": GRAPH,
        "engine": engine_facts(candidate.engine, ENGINE),
        "static_engine": engine_facts(candidate.static_engine, STATIC_ENGINE),
        "engine_files": [ENGINE, STATIC_ENGINE],
        "engine_note": candidate.engine_note,
        "parsed_by": candidate.parsed_by,
        "inputs": [_value(entry) for entry in graph.input],
        "outputs": [_value(entry) for entry in graph.output],
        "batch": plan.batch,
        "precision": candidate.precision,
        "form": candidate.name,
        "compute_precision": candidate.compute_precision,
        "fuse_quantized": stack.runtime == "onnxruntime",
        "opset": candidate.opset,
        "ir_version": candidate.ir_version,
        "device": {
            "name": device.name,
            "title": device.title,
            "compute_capability": device.compute_capability,
            "memory_gib": device.memory_gib,
        },
        "stack": json.loads(stack.model_dump_json(exclude={"evidence"})),
        "decides": plan.decides,
        "exclusive": exclusive,
        "classes": len(labels),
        "preprocessing": _preprocessing(preprocessing),
        "calibration_sha256": plan.calibration_sha256 if candidate.precision in ("int8", "fp8") else None,
        "metric": json.loads(metric.model_dump_json()) if metric is not None else None,
        "validation": json.loads(candidate.validation.model_dump_json()) if candidate.validation is not None else None,
        "parity": [json.loads(rung.model_dump_json()) for rung in candidate.parity],
        "notes": list(candidate.notes),
        "licence": licence,
        "facts": dict(facts or {}),
    }


def _preprocessing(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What was given, and what the graph does by itself where that is known."""
    known = dict(given or {})
    return {**known, "in_graph": IN_GRAPH[known["kind"]]} if known.get("kind") in IN_GRAPH else known


def _value(entry: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = entry.type.tensor_type
    return {
        "name": entry.name,
        "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)),
        "shape": [dim.dim_param or int(dim.dim_value) for dim in kind.shape.dim],
    }


def _readme(
    name: str,
    device: Device,
    stack: Stack,
    candidate: Candidate,
    engines: Sequence[Engine],
    info: Mapping[str, Any],
) -> str:
    raw = {
        "image": ["python infer.py photo.jpg       the same for an image; needs Pillow"],
        "tokens": ["python infer.py texts.txt       the same for texts, one per line; needs tokenizers"],
    }
    what = "the classes of" if info["decides"] else "what it gives for"
    several = len(info["inputs"]) > 1
    own = f"python infer.py samples.np{'z' if several else 'y'}     prints {what} your own samples"
    lines = [
        f"{name}: {candidate.name} for {device.title}, {stack.name} ({stack.runtime} {stack.runtime_version})",
        "",
        "python infer.py --selftest      checks this folder on the device: PASS or FAIL",
        own + ("; an array for each input, by its name" if several else ""),
        *raw.get(info["preprocessing"].get("kind", ""), []),
        "",
        "It needs NumPy and "
        + ("onnxruntime." if stack.runtime == "onnxruntime" else "TensorRT, or onnxruntime for a check."),
        "manifest.json says what the inputs are, how the model was made, what it scored and what was compared.",
    ]
    if engines:
        lines.append(f"{ENGINE} runs {_where(engines[0])}; {GRAPH} builds everywhere.")
    if stack.runtime != "onnxruntime":
        lines += [
            "Build the engine on the device:" if not engines else "Build another one on another device:",
            f"  sh {SCRIPT}",
            f"  python infer.py --engine {ENGINE} --selftest",
        ]
    return "\n".join(lines) + "\n"


def _where(engine: Engine) -> str:
    """On which GPUs and versions the engine runs."""
    if engine.hardware_compatibility == "ampere+":
        gpu = "on compute capability 8.0 and later"
    elif engine.device is not None and engine.hardware_compatibility == "none":
        gpu = f"on {engine.device}"
    else:
        gpu = f"on compute capability {engine.compute_capability}"
    return f"{gpu} with {engine.builder}{' and later' if engine.version_compatible else ''} and nowhere else"
