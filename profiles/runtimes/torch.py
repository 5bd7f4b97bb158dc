"""PyTorch, eager and compiled, as the reference that users know: programs that `torch.export.save` wrote (.pt2)."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from profiles.errors import EdgestillError, InputError
from profiles.runtimes import Clock, RuntimeOptions, TensorSpec, Timed, Usable, run_error
from profiles.runtimes.onnxruntime import check_inputs

Array = np.ndarray[Any, Any]


def usable(name: str) -> Usable:
    """See `profiles.runtimes.usable`. Compiling wants a C++ compiler on the CPU."""
    if find_spec("torch") is None:
        return Usable(False, "not installed", "pip install torch")
    import torch

    device = "GPU" if torch.cuda.is_available() else "CPU"
    compiler = next((found for tool in ("c++", "g++", "clang++") if (found := shutil.which(tool))), None)
    if name == "torch-compiled" and device == "CPU" and compiler is None:
        return Usable(False, f"PyTorch {torch.__version__}, but no C++ compiler", "apt install g++")
    return Usable(True, f"PyTorch {torch.__version__} on the {device}")


def make(name: str, options: RuntimeOptions) -> Torch:
    """See `get_runtime`."""
    return Torch(compiled=name == "torch-compiled", options=options)


class Torch:
    """See `Runtime`."""

    def __init__(self, *, compiled: bool, options: RuntimeOptions) -> None:
        self.name = "torch-compiled" if compiled else "torch"
        self._compiled, self._options = compiled, options

    @property
    def version(self) -> str:
        """The installed version."""
        import torch

        return str(torch.__version__)

    def load(self, model: Path, *, threads: int | None) -> TorchSession:
        """See `Runtime.load`. The thread count is the process's: with several sessions the last one's holds."""
        return TorchSession(model, threads, compiled=self._compiled, cuda_graph=self._options.cuda_graph)


class TorchSession:
    """One exported program. On a GPU: pinned host buffers, `compute` by CUDA events on the stream."""

    def __init__(self, model: Path, threads: int | None, *, compiled: bool, cuda_graph: bool) -> None:
        import torch

        if not model.is_file():
            raise InputError("no such model file", where=str(model), fix="name a .pt2 file that exists")
        try:
            # PyTorch itself would first log pages about a file that is no archive
            if not zipfile.is_zipfile(model):
                raise ValueError("no archive")
            program = torch.export.load(str(model))
        except Exception as error:
            raise InputError(
                "not a program that torch.export.save wrote",
                where=str(model),
                evidence=(str(error).splitlines() or [type(error).__name__])[0],
                fix="PyTorch runs .pt2 files; an ONNX file runs in ONNX Runtime, OpenVINO or TensorRT",
            ) from error
        self._torch, self._model = torch, model
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        mode = "reduce-overhead" if cuda_graph and self._device.type == "cuda" else "default"
        module: Any = program.module().to(self._device)
        self._run: Any = torch.compile(module, mode=mode, dynamic=False) if compiled else module
        values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
        self.inputs = tuple(_spec(name, values[name]) for name in program.graph_signature.user_inputs)
        self.outputs = tuple(_spec(str(name), values[str(name)]) for name in program.graph_signature.user_outputs)
        self.options: dict[str, Any] = {
            "device": str(self._device),
            "intra_op_threads": threads,
            "mode": f"compiled, {mode}" if compiled else "eager",
        }
        self._pinned: dict[str, Any] = {}
        self._there: dict[str, Any] = {}

    def query(self, inputs: Mapping[str, Array], clock: Clock) -> Timed:
        """See `Session.query`."""
        if set(inputs) != set(self._pinned) or any(
            tuple(self._pinned[name].shape) != array.shape for name, array in inputs.items()
        ):
            self._bind(inputs)
        try:
            with self._torch.inference_mode():
                return self._on_gpu(inputs, clock) if self._device.type == "cuda" else self._on_cpu(inputs, clock)
        except Exception as error:
            raise run_error(error, f"PyTorch {self._torch.__version__}", self._model) from error

    def close(self) -> None:
        """Frees the program and its buffers."""
        self._run, self._pinned, self._there = None, {}, {}

    def _bind(self, inputs: Mapping[str, Array]) -> None:
        check_inputs(inputs, self.inputs, self._model)
        torch, on_gpu = self._torch, self._device.type == "cuda"
        try:
            self._pinned = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
            if on_gpu:
                self._pinned = {name: tensor.pin_memory() for name, tensor in self._pinned.items()}
            self._there = {name: tensor.to(self._device) for name, tensor in self._pinned.items()}
        except Exception as error:
            raise run_error(error, f"PyTorch {torch.__version__}", self._model) from error

    def _on_cpu(self, inputs: Mapping[str, Array], clock: Clock) -> Timed:
        start = clock.now()
        for name, array in inputs.items():
            np.copyto(self._there[name].numpy(), array)
        ready = clock.now()
        found = self._run(*(self._there[spec.name] for spec in self.inputs))
        computed = clock.now()
        outputs = [value.numpy().copy() for value in self._flat(found)]
        end = clock.now()
        return Timed(computed - ready, end - start, self._named(outputs))

    def _on_gpu(self, inputs: Mapping[str, Array], clock: Clock) -> Timed:
        cuda = self._torch.cuda
        before, after = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start = clock.now()
        for name, array in inputs.items():
            np.copyto(self._pinned[name].numpy(), array)
            self._there[name].copy_(self._pinned[name], non_blocking=True)
        before.record()
        found = self._run(*(self._there[spec.name] for spec in self.inputs))
        after.record()
        outputs = [value.cpu().numpy() for value in self._flat(found)]
        end = clock.now()
        return Timed(int(before.elapsed_time(after) * 1e6), end - start, self._named(outputs))

    def _flat(self, found: Any) -> list[Any]:
        return list(self._torch.utils._pytree.tree_leaves(found))

    def _named(self, outputs: list[Array]) -> dict[str, Array]:
        if len(outputs) != len(self.outputs):
            raise EdgestillError(
                f"the program returned {len(outputs)} outputs, not {len(self.outputs)}", where=str(self._model)
            )
        return {spec.name: output for spec, output in zip(self.outputs, outputs, strict=True)}


def _spec(name: str, value: Any) -> TensorSpec:
    sizes = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), sizes)
