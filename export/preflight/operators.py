"""Which operators a runtime has: TensorRT by version, ONNX Runtime's CPU provider by version, operator set and type."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

import onnx

Version = tuple[int, int]

TENSORRT_SOURCE = "onnx-tensorrt, docs/operators.md of TensorRT 8.4, 8.5, 9.2 and 10.15, docs/Changelog.md"
RTX_SOURCE = "found by parsing with TensorRT-RTX 1.7.1"
KERNEL_SOURCE = "the kernels that ONNX Runtime itself lists"

# The first TensorRT version whose parser has an operator. operators.md of 8.4, 8.5, 9.2 and 10.15 says which ones are
# in; Changelog.md says when one came between them. What 8.4 lists and no later change brought was in 8.2 already.
_FIRST: dict[Version, str] = {
    (8, 2): """
        Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip
        Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout
        Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool
        GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GRU HardSigmoid Identity If ImageScaler InstanceNormalization
        IsNaN LeakyRelu Less LessOrEqual Log LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul Max MaxPool Mean Min
        Mul Neg NonMaxSuppression Not Or Pad ParametricSoftplus Pow PRelu QuantizeLinear RandomUniform RandomUniformLike
        Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare Relu Reshape Resize ReverseSequence RNN Round ScaledTanh Scan Scatter ScatterElements ScatterND
        Selu Shape Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum
        Tan Tanh ThresholdedRelu Tile TopK Transpose Unsqueeze Upsample Where
    """,
    (8, 4): "Shrink Xor",
    (8, 5): """
        GridSample HardSwish MeanVarianceNormalization Mod NonZero OneHot RandomNormal RandomNormalLike Reciprocal
        RoiAlign Trilu
    """,
    (8, 6): "GroupNormalization IsInf LayerNormalization",
    (9, 2): "CastLike Hardmax",
    (10, 1): "DeformConv",
    (10, 4): "BlackmanWindow HammingWindow HannWindow",
    (10, 5): "STFT",
    (10, 14): "Attention",
    (11, 0): "Swish",
}

# (last version that is known not to have it, first version that is known to have it): the step between was not found.
# The checkers of the 10.0 parser refuse Gelu, those before 10.10 take Gelu and Mish; the rest is in 10.15's table only.
_BETWEEN: dict[str, tuple[Version, Version]] = {
    "Gelu": ((10, 0), (10, 9)),
    "Mish": ((9, 2), (10, 9)),
    "RMSNormalization": ((9, 2), (10, 15)),
    "RotaryEmbedding": ((10, 9), (10, 15)),
    "TensorScatter": ((10, 9), (10, 15)),
}

# Operators that the parser hands to a plugin which TensorRT-RTX does not ship.
_NOT_IN_RTX = frozenset({"DeformConv", "NonZero", "RoiAlign"})


@lru_cache(maxsize=1)
def _tensorrt_first() -> dict[str, Version]:
    return {operator: release for release, operators in _FIRST.items() for operator in operators.split()}


def tensorrt_has(operator: str, release: Version, *, rtx: bool = False) -> tuple[bool | None, str]:
    """Whether the TensorRT parser of that version has an operator of ONNX's own domain, and the fact that says so.

    None: the version lies where the tables do not reach.

    >>> tensorrt_has("LayerNormalization", (8, 5))[0], tensorrt_has("LayerNormalization", (8, 6))[0]
    (False, True)
    """
    if rtx and operator in _NOT_IN_RTX:
        return False, f"TensorRT makes {operator} from a plugin that TensorRT-RTX does not have ({RTX_SOURCE})"
    if operator in _BETWEEN:
        absent, present = _BETWEEN[operator]
        if release >= present:
            return True, TENSORRT_SOURCE
        known = f"TensorRT {_text(absent)} does not have it, {_text(present)} does ({TENSORRT_SOURCE})"
        return (False if release <= absent else None), known
    first = _tensorrt_first().get(operator)
    if first is None:
        return False, f"no version of TensorRT up to 11 lists it ({TENSORRT_SOURCE})"
    return release >= first, f"TensorRT has it from {_text(first)} on ({TENSORRT_SOURCE})"


def _text(release: Version) -> str:
    return f"{release[0]}.{release[1]}"


@dataclass(frozen=True)
class Kernels:
    """The kernels of ONNX Runtime's CPU provider. `release`: the version that the table was read from."""

    release: str
    table: dict[str, list[tuple[int, int | None, dict[str, frozenset[str]]]]]

    def has(self, operator: str, domain: str, since: int) -> bool:
        """Whether there is a kernel for the operator as it is since that operator set (0: any).

        A kernel that is open to later sets serves only the set that it was written for, as ONNX Runtime matches them.
        """
        found = self.table.get(f"{domain}:{operator}" if domain else operator)
        return found is not None and (not since or not found or any(_serves(kernel, since) for kernel in found))

    def types(self, operator: str, since: int, parameter: str) -> frozenset[str] | None:
        """Types that the kernels take for a type parameter such as "T"; None where they say nothing."""
        matching = [kernel[2] for kernel in self.table.get(operator, []) if _serves(kernel, since)]
        if not matching or any(parameter not in types for types in matching):
            return None
        return frozenset().union(*(types[parameter] for types in matching))


def _serves(kernel: tuple[int, int | None, dict[str, frozenset[str]]], since: int) -> bool:
    first, last, _ = kernel
    return first == since or (last is not None and first <= since <= last)


def kernels_of(release: str) -> Kernels:
    """The kernels of that version: its own list where it is installed, else the stored one that is not newer."""
    try:
        installed = version("onnxruntime") == release
    except PackageNotFoundError:
        installed = False
    return (_installed_kernels(release) if installed else None) or stored_kernels(release)


@lru_cache(maxsize=1)
def _installed_kernels(release: str) -> Kernels | None:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if not hasattr(state, "get_all_opkernel_def"):  # a build without operator schemas
        return None
    table: dict[str, list[Any]] = {}
    for kernel in state.get_all_opkernel_def():
        if kernel.provider != "CPUExecutionProvider" or kernel.domain == "com.microsoft.nchwc":
            continue
        domain = "" if kernel.domain in ("", "ai.onnx") else f"{kernel.domain}:"
        first, last = kernel.version_range
        types = {name: frozenset(_short(kind) for kind in kinds) for name, kinds in kernel.type_constraints.items()}
        rows = table.setdefault(domain + kernel.op_name, [])
        if not domain:
            rows.append((first, None if last == 2**31 - 1 else last, types))
    return Kernels(release, table)


@lru_cache(maxsize=4)
def stored_kernels(release: str) -> Kernels:
    """The newest stored table that is not newer than the version; the oldest for what is older.

    `onnxruntime_cpu.json` holds what `get_all_opkernel_def()` of 1.31.1 lists, and where 1.23.2 and 1.19.2 differ. Of
    other domains than ONNX's own it holds the names.
    """
    document = json.loads(files("export.preflight").joinpath("onnxruntime_cpu.json").read_text(encoding="utf-8"))
    known = sorted(document["kernels"], key=_release)
    chosen = next((name for name in reversed(known) if _release(name) <= _release(release)), known[0])
    rows = dict(document["kernels"][known[-1]])
    if chosen != known[-1]:
        rows.update(document["kernels"][chosen])
    sets = [frozenset(document["types"][index] for index in group) for group in document["sets"]]
    table = {
        name: [(first, last, {key: sets[index] for key, index in types.items()}) for first, last, types in entries]
        for name, entries in rows.items()
        if entries is not None
    }
    return Kernels(chosen, table)


def _release(text: str) -> Version:
    numbers = [int(part) for part in text.split(".")[:2] if part.isdigit()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)


def _short(kind: str) -> str:
    return kind.removeprefix("tensor(").removesuffix(")") if kind.startswith("tensor(") else kind


def schema_of(operator: str, opset: int) -> Any | None:
    """ONNX's definition of an operator of its own domain in an operator set; None when there is none."""
    try:
        return onnx.defs.get_schema(operator, opset, "")
    except onnx.defs.SchemaError:
        return None
