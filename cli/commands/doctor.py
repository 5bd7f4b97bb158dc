"""`edgestill doctor`: what this machine can do, and the command that adds what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import typer

from cli import console
from cli.commands.shared import JsonOption, examples, plain_table

app = typer.Typer()

_GIB = 2**30
_ROOM_GIB = 2.0
"""Free disk below which a run of a few students may not fit."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `fix` is the command that would add it, where there is one."""

    name: str
    state: Literal["yes", "no", "bad"]
    """yes: there; no: absent, and only needed by those who want it; bad: needed, and absent or broken."""
    found: str
    fix: str | None = None


@app.command(epilog=examples("edgestill doctor", "edgestill doctor --json"))
def doctor(as_json: JsonOption = False) -> None:
    """What this machine can do: runtimes, GPUs, TensorRT, sensors, disk; and how to install the rest.

    It changes nothing and always exits 0.
    """
    checks = [
        check
        for group in (_machine, _libraries, _gpus, _runtimes, _extras, _sensors, _data)
        for check in _safely(group)
    ]
    if as_json:
        console.emit_json({"checks": [asdict(check) for check in checks]})
        return
    marks = {"yes": "ok", "no": "-", "bad": "BAD"}
    console.emit(plain_table(("", "What", "Found"), [(marks[c.state], c.name, c.found) for c in checks]))
    fixes = [(check.name, check.fix) for check in checks if check.fix]
    if fixes:
        console.emit("\nto add what is missing:")
        for name, fix in fixes:
            console.emit(f"  {name}: {fix}")


def _safely(group: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The checks of a group; a broken installation, which is what a doctor is asked about, ends only this group."""
    try:
        yield from group()
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        fix = f"pip install {missing}" if missing else "pip install --force-reinstall edgestill"
        yield Check(group.__name__.strip("_"), "bad", found, fix)


def _machine() -> Iterator[Check]:
    import psutil

    from profiles.agent import cpu_model

    yield Check("edgestill", "yes", _version("edgestill") or "from a source folder, not installed")
    yield Check("Python", "yes", f"{platform.python_version()} in {sys.prefix}")
    yield Check("system", "yes", f"{platform.system()} {platform.release()}, {platform.machine()}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    physical = psutil.cpu_count(logical=False) or os.cpu_count()
    yield Check("processor", "yes", f"{cpu_model()}; {physical} cores, {usable} threads that may be used")
    memory = psutil.virtual_memory()
    yield Check("memory", "yes", f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} GiB free")
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    writable = os.access(Path.cwd(), os.W_OK)
    yield Check(
        "disk",
        "yes" if free >= _ROOM_GIB and writable else "bad",
        f"{free:.1f} GiB free in {Path.cwd()}" + ("" if writable else ", which cannot be written"),
        None
        if free >= _ROOM_GIB and writable
        else "run from a folder with room that you may write, or name one with --out",
    )


def _libraries() -> Iterator[Check]:
    """The packages that every run needs."""
    for module, package in (
        ("torch", "torch"),
        ("onnxruntime", "onnxruntime"),
        ("onnx", "onnx"),
        ("onnxscript", "onnxscript"),
        ("datasets", "datasets"),
        ("accelerate", "accelerate"),
        ("scipy", "scipy"),
        ("tokenizers", "tokenizers"),
    ):
        found, broken = (
            _imported(module) if module in ("torch", "onnxruntime") else (find_spec(module) is not None, None)
        )
        if not found:
            yield Check(package, "bad", broken or "not installed", f"pip install {package}")
        elif module == "torch":
            import torch

            yield Check(package, "yes", f"{torch.__version__}, {torch.get_num_threads()} threads")
        elif module == "onnxruntime":
            import onnxruntime

            names = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
            providers = [name for name in names if name != "Azure"]  # calls a cloud service, runs nothing here
            yield Check(package, "yes", f"{onnxruntime.__version__}, runs on: {', '.join(providers)}")
        else:
            yield Check(package, "yes", _version(package) or "installed")


def _gpus() -> Iterator[Check]:
    nvidia = _has_nvidia_gpu()
    if not _imported("torch")[0]:
        return
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            yield Check(
                f"GPU {index}",
                "yes",
                f"{facts.name}, {facts.total_memory / _GIB:.0f} GiB, compute capability {facts.major}.{facts.minor}, "
                f"CUDA {torch.version.cuda}",
            )
    elif not nvidia:
        yield Check("GPU", "no", "none found; training runs on the processor")
    elif torch.version.cuda is None:
        yield Check(
            "GPU", "bad", "there, but this PyTorch is built without CUDA", "pip install --force-reinstall torch"
        )
    else:
        found = f"there, but PyTorch for CUDA {torch.version.cuda} cannot use it"
        yield Check("GPU", "bad", found, "update the NVIDIA driver; nvidia-smi must list the GPU")
    has_provider = False
    if _imported("onnxruntime")[0]:
        import onnxruntime

        has_provider = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if nvidia and not has_provider:
        from profiles.runtimes.providers import SWAP

        yield Check("ONNX Runtime on the GPU", "no", "this onnxruntime has no CUDA provider", SWAP)


def _has_nvidia_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def _extras() -> Iterator[Check]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    for module, name, what, fix in (
        (
            "tensorrt_rtx",
            "TensorRT-RTX",
            "builds engines for RTX cards, no GPU needed",
            'pip install "edgestill[tensorrt-rtx]"',
        ),
        ("tensorrt", "TensorRT", "builds engines for the NVIDIA GPU in this machine", "pip install tensorrt"),
        ("transformers", "transformers", "teachers from the Hugging Face hub", 'pip install "edgestill[transformers]"'),
        ("tensorboard", "TensorBoard", "training curves in a browser", 'pip install "edgestill[tensorboard]"'),
    ):
        if find_spec(module) is None:
            possible = module != "tensorrt_rtx" or (x86 and platform.system() in ("Linux", "Windows"))
            reason = "not installed" if possible else "not made for this system"
            possible = possible and (module != "tensorrt" or _has_nvidia_gpu())
            yield Check(name, "no", f"{reason}; {what}", fix if possible else None)
            continue
        ok, broken = _imported(module) if module.startswith("tensorrt") else (True, None)
        if ok:
            yield Check(name, "yes", _module_version(module) or "installed")
        else:
            yield Check(name, "bad", f"installed, but cannot be imported: {broken}", fix)


def _runtimes() -> Iterator[Check]:
    """What `edgestill bench --runtime` takes."""
    from profiles.runtimes import available, usable

    for name in available():
        found = usable(name)
        yield Check(f"runtime {name}", "yes" if found.ok else "no", found.found, found.fix)


def _sensors() -> Iterator[Check]:
    from profiles.agent import read

    found = read()
    clocks = found.get("clocks_mhz")
    yield Check(
        "clock sensor",
        "yes" if clocks else "no",
        f"{max(clocks.values()):.0f} MHz now" if clocks else "not told here (as on most virtual machines)",
    )
    governor = found.get("governor")
    yield Check("frequency governor", "yes" if governor else "no", ", ".join(governor) if governor else "not told here")
    temperatures = found.get("temperatures_c")
    yield Check(
        "temperature sensors",
        "yes" if temperatures else "no",
        f"{len(temperatures)}, the hottest {max(temperatures.values()):.0f} °C" if temperatures else "not told here",
    )
    from profiles.energy import find_power

    for title, on_gpu in (("energy sensor", False), ("energy sensor of the GPU", True)):
        if not on_gpu or _has_nvidia_gpu():
            power = find_power(on_gpu=on_gpu)
            yield Check(title, "yes" if power.readable else "no", power.how)
    load = found.get("load")
    if load:
        yield Check("load", "yes", f"{load[0]:.1f} now; measurements want a quiet machine")


def _data() -> Iterator[Check]:
    from cli.commands.data import place_of
    from distill.data.catalogue import list_catalogue

    for entry in list_catalogue():
        place = place_of(entry.name)
        fix = None if place else f"edgestill data fetch {entry.name}"
        found = str(place) if place else f"not fetched; {entry.size_mib:g} MiB from: {entry.obtained_from}"
        yield Check(f"data {entry.name}", "yes" if place else "no", found, fix)


def _imported(module: str) -> tuple[bool, str | None]:
    """Whether it can be imported, and why not where it is installed but broken."""
    from importlib import import_module

    if find_spec(module) is None:
        return False, None
    try:
        import_module(module)
    except Exception as error:  # a broken installation fails in any way: OSError of a library, ImportError, ...
        return False, " ".join(str(error).split())[:200]
    return True, None


def _module_version(module: str) -> str | None:
    from importlib import import_module

    found = getattr(import_module(module), "__version__", None) if module.startswith("tensorrt") else _version(module)
    return None if found is None else str(found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
