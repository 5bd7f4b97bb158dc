"""What the tools that are installed here say about a file, in their own words and labelled as what they are.

They run in a process of their own: a parser that stops on a damaged file, or prints what nobody asked for, does so
there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from export.preflight.graph import printable
from profiles.device import Device, Stack
from profiles.section import Section

_SECONDS = 300
_LARGEST = 2**30
_LINES = 3
_LETTERS = 600


class Evidence(Section):
    """One tool's answer. `decides`: the tool is what the stack runs, so its refusal is the stack's."""

    tool: str
    verdict: Literal["takes it", "refuses it", "stopped", "not asked"]
    detail: str = ""
    decides: bool = False


def ask_tools(path: Path, device: Device, stack: Stack) -> tuple[Evidence, ...]:
    """Asks ONNX Runtime for its own stacks, the parser of TensorRT-RTX for those of TensorRT."""
    if stack.runtime == "onnxruntime":
        return (_onnxruntime(path, device, stack),)
    return (_rtx(path, stack),)


def _onnxruntime(path: Path, device: Device, stack: Stack) -> Evidence:
    try:
        installed = version("onnxruntime")
    except PackageNotFoundError:
        return Evidence(tool="ONNX Runtime", verdict="not asked", detail="it is not installed")
    same = installed == stack.runtime_version
    tool = f"ONNX Runtime {installed} here"
    if not same:
        tool += f", not {stack.runtime_version}"
    elif device.name != "this-machine":
        tool += f", not on {device.title}"
    return _ask("onnxruntime", path, tool, decides=same)


def _rtx(path: Path, stack: Stack) -> Evidence:
    if find_spec("tensorrt_rtx") is None:
        detail = "not installed: pip install 'edgestill[tensorrt-rtx]'"
        return Evidence(tool="TensorRT-RTX", verdict="not asked", detail=detail)
    installed = _rtx_version()
    own = stack.runtime == "tensorrt-rtx"
    tool = f"the parser of TensorRT-RTX {installed}" + ("" if own else f", not TensorRT {stack.runtime_version}")
    return _ask("tensorrt-rtx", path, tool, decides=own and installed.startswith(stack.runtime_version))


def _rtx_version() -> str:
    for name in ("tensorrt-rtx-cu13", "tensorrt_rtx_cu13", "tensorrt-rtx"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def _ask(kind: str, path: Path, tool: str, *, decides: bool) -> Evidence:
    size = path.stat().st_size
    if size > _LARGEST:
        return Evidence(tool=tool, verdict="not asked", detail=f"the file has {size / 2**30:.1f} GiB")
    here = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    }
    # -P: a module of the working folder that has one of our names is not ours
    command = [sys.executable, "-P", "-m", "export.preflight.evidence", kind, str(path.resolve())]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            env=environment,
            cwd=path.resolve().parent,  # where external data is looked for
        )
    except subprocess.TimeoutExpired:
        return Evidence(tool=tool, verdict="stopped", detail=f"no answer within {_SECONDS} s")
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        refusal = answer["refusal"]
    except (IndexError, ValueError, KeyError, TypeError):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        detail = f"exit status {done.returncode}" + (f": {printable(lines[-1].strip(), _LETTERS)}" if lines else "")
        return Evidence(tool=tool, verdict="stopped", detail=detail)
    if refusal is None:
        return Evidence(tool=tool, verdict="takes it", decides=decides)
    return Evidence(tool=tool, verdict="refuses it", detail=printable(refusal, _LETTERS), decides=decides)


def _answer(kind: str, path: Path) -> str | None:
    """In the other process: the tool's refusal, None when it takes the file."""
    if kind == "tensorrt-rtx":
        from export.tensorrt import load_adapter, parse

        adapter = load_adapter(rtx=True)
        return "its libraries do not load" if adapter is None else parse(adapter, path)
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it raises many kinds, all of which mean the same here
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return " ".join(lines[:_LINES]) or type(error).__name__
    return None


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps({"refusal": _answer(sys.argv[1], Path(sys.argv[2]))}) + "\n")
