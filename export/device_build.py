"""`build_engine.sh`: builds a bundle's engine on the device, with the `trtexec` flags of the TensorRT that is there.

TensorRT 8 (JetPack 4 and 5) types weakly: flags choose the precisions. From TensorRT 10 on the graph does.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.section import HardwareCompatibility
from export.tensorrt import Batches

SCRIPT = "build_engine.sh"
_TEMPLATE = Path(__file__).with_name("build_engine_template.sh")


@dataclass(frozen=True)
class Dialect:
    """How `trtexec` is told things from a version on, read from its own source or help of that version.

    typed: flag for strong typing; "": it always is. weak: precisions are flags. workspace: with the size in MiB for %s.
    build_only: flag against the inference run. profiles: several optimisation profiles. versions: flag for plans that
    run on later versions; "": it has none. hardware: flag for other GPUs, with the level for %s; "": it has none.
    """

    since: str
    weak: bool
    workspace: str
    build_only: str
    typed: str = ""
    profiles: bool = False
    versions: str = ""
    hardware: str = ""


_POOL = "--memPoolSize=workspace:%s"
_HARDWARE = "--hardwareCompatibilityLevel=%s"
DIALECTS = (
    # --explicitBatch does nothing from 8.2 on: an ONNX graph always has its batch
    Dialect("8.2", weak=True, workspace="--workspace=%s", build_only="--buildOnly"),
    Dialect("8.4", weak=True, workspace=_POOL, build_only="--buildOnly"),
    Dialect(
        "8.6",
        weak=True,
        workspace=_POOL,
        build_only="--skipInference",
        versions="--versionCompatible",
        hardware=_HARDWARE,
    ),
    Dialect(
        "10.0",
        weak=False,
        workspace=_POOL,
        build_only="--skipInference",
        typed="--stronglyTyped",
        profiles=True,
        versions="--versionCompatible",
        hardware=_HARDWARE,
    ),
    Dialect(
        "11.0",
        weak=False,
        workspace=_POOL,
        build_only="--skipInference",
        profiles=True,
        versions="--versionCompatible",
        hardware=_HARDWARE,
    ),
)
"""Oldest first. --minShapes, --optShapes, --maxShapes, --timingCacheFile, --profilingVerbosity, --exportLayerInfo and
--exportProfile are the same in all of them."""


def build_script(
    *,
    model: str,
    inputs: Sequence[Mapping[str, Any]],
    form: str,
    rtx: bool,
    stack_version: str,
    profiles: Sequence[Batches],
    engines: tuple[str, str],
    workspace_mib: int | None,
    hardware_compatibility: HardwareCompatibility = "none",
    version_compatible: bool = False,
) -> str:
    """The script's text, POSIX sh.

    Args:
        model: file name of the graph.
        inputs: name and shape of each input; a dimension that is a text is dynamic.
        form: candidate's name, such as "int8-fp16": TensorRT 8 needs the flags for what the graph holds.
        stack_version: of TensorRT, that the graph was made and checked for.
        profiles: see `tensorrt.profiles_of`.
        engines: file names: of the engine, and of the one for batch 1 alone.
    """
    first, *others = profiles
    facts = {
        "MODEL": model,
        "ENGINE": engines[0],
        "STATIC_ENGINE": engines[1] if first[0] != first[2] else "",
        "MADE_FOR": stack_version,
        "RTX": "yes" if rtx else "",
        "PRECISION": weak_precision(form),
        "QUANTIZED": "yes" if form.startswith("int8") else "",
        "WORKSPACE": str(workspace_mib or ""),
        "HARDWARE": {"none": "", "same-capability": "sameComputeCapability"}.get(
            hardware_compatibility, hardware_compatibility
        ),
        "VERSIONS": "yes" if version_compatible else "",
        "SHAPES": _flags(inputs, first),
        "PROFILES": " ".join(
            f"--profile={place} {_flags(inputs, batches)}" for place, batches in enumerate([first, *others])
        )
        if others and _flags(inputs, first)
        else "",
        "STATIC_SHAPES": _flags(inputs, (1, 1, 1)),
        "RUN_SHAPES": _words(inputs, {"shapes": first[1]}),
        "BATCH": " ".join(str(size) for size in first),
    }
    settings = "\n".join(f"{name}={shlex.quote(value)}" for name, value in facts.items())
    text = _TEMPLATE.read_text(encoding="utf-8")
    return text.replace("# @facts@", settings).replace("    # @dialects@", _cases())


def weak_precision(form: str) -> str:
    """What TensorRT 8 is told for such a graph: fp32, fp16, int8, or int8+fp16 where the remainder is FP16."""
    if form.startswith("int8"):
        return "int8" if form.endswith("-fp32") else "int8+fp16"
    return "fp16" if form == "fp16" else "fp32"


def _flags(inputs: Sequence[Mapping[str, Any]], batches: Batches) -> str:
    return _words(inputs, dict(zip(("minShapes", "optShapes", "maxShapes"), batches, strict=True)))


def _words(inputs: Sequence[Mapping[str, Any]], flags: Mapping[str, int]) -> str:
    """Each flag with the shapes of the inputs that have a dynamic batch, as shell words; "" when there is none."""
    dynamic = [entry for entry in inputs if any(isinstance(size, str) for size in entry["shape"])]
    words = []
    for flag, batch in flags.items() if dynamic else ():
        shapes = [
            f"{entry['name']}:{'x'.join(str(batch if isinstance(size, str) else size) for size in entry['shape'])}"
            for entry in dynamic
        ]
        words.append(shlex.quote(f"--{flag}={','.join(shapes)}"))
    return " ".join(words)


def _cases() -> str:
    """The table as the tests of an `if` chain, newest first: `version` is major * 100 + minor."""
    lines: list[str] = []
    for dialect in reversed(DIALECTS):
        major, minor = dialect.since.split(".")
        settings = {
            "weak": "yes" if dialect.weak else "",
            "typed": dialect.typed,
            "workspace_flag": dialect.workspace.replace("%s", ""),
            "build_only": dialect.build_only,
            "several": "yes" if dialect.profiles else "",
            "versions_flag": dialect.versions,
            "hardware_flag": dialect.hardware.replace("%s", ""),
        }
        word = "if" if not lines else "elif"
        lines.append(f'    {word} [ "$version" -ge {int(major) * 100 + int(minor)} ]; then  # TensorRT {dialect.since}')
        lines.append("        " + " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items()))
    return "\n".join(lines)
