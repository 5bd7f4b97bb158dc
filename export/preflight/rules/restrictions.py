"""Operators that TensorRT has, with attributes or operands that it does not take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from export.preflight.finding import EVERYWHERE, TENSORRT, Case, Finding, Groups, named, note, refused, rule
from export.preflight.graph import Node

_TABLE = "onnx-tensorrt, docs/operators.md"
_PARSED = "TensorRT-RTX 1.7.1's parser refuses it"
_TOPK_MAX = 3840
_RESIZE_MODES = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
_RANDOM = (
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
)


@rule("conv-dimensions", "convolutions have one to three spatial dimensions", on=TENSORRT)
def conv_dimensions(case: Case) -> Iterator[Finding]:
    def wrong(node: Node) -> bool:
        rank = case.graph.rank(node.inputs[0])
        return rank is not None and rank > 5

    yield from _each(
        case,
        ("Conv", "ConvTranspose"),
        wrong,
        "convolutions of more than three spatial dimensions",
        f"TensorRT has 2D and 3D convolutions, 1D through them ({_TABLE}; {_PARSED})",
        "split the convolution into sums of 3D ones",
    )


@rule("conv-weights", "the weights of a convolution are constants before TensorRT 8.5", on=("tensorrt",))
def conv_weights(case: Case) -> Iterator[Finding]:
    if case.tensorrt >= (8, 5):
        return
    yield from _each(
        case,
        ("Conv", "ConvTranspose"),
        lambda node: not case.graph.is_constant(node.inputs[1]),
        "weights of a convolution are computed",
        f"weights must be an initializer ({_TABLE} of TensorRT 8.4: Conv)",
        "MatMul takes computed weights, or a stack with TensorRT 8.5",
    )


@rule("pooling", "pooling without dilation, indices, or more than three spatial dimensions", on=TENSORRT)
def pooling(case: Case) -> Iterator[Finding]:
    pools = ("MaxPool", "AveragePool", "LpPool")

    def too_deep(node: Node) -> bool:
        rank = case.graph.rank(node.inputs[0])
        return rank is not None and rank > 5

    yield from _each(
        case,
        pools,
        too_deep,
        "pooling of more than three spatial dimensions",
        f"2D or 3D pooling only ({_TABLE}: MaxPool; {_PARSED})",
        "pool the dimensions one after the other",
    )
    yield from _each(
        case,
        pools,
        lambda node: any(step != 1 for step in node.attribute("dilations", [])),
        "pooling with dilation",
        f"dilations must be empty or all ones ({_TABLE} of TensorRT 10.15: MaxPool; {_PARSED})",
        "pool without dilation, or gather the elements with Slice",
    )
    yield from _each(
        case,
        ("MaxPool",),
        lambda node: len([name for name in node.outputs if name]) > 1,
        "MaxPool with indices",
        f"the output Indices is unsupported ({_TABLE}: MaxPool; {_PARSED})",
        "return_indices=False; MaxUnpool has no TensorRT form either, use Resize",
    )


@rule("resize", "Resize in a mode that TensorRT has", on=TENSORRT)
def resize(case: Case) -> Iterator[Finding]:
    source = f"{_TABLE}: Resize"

    def attribute(name: str, good: tuple[Any, ...], default: Any) -> Callable[[Node], bool]:
        return lambda node: node.attribute(name, default) not in good

    yield from _each(
        case,
        ("Resize",),
        attribute("coordinate_transformation_mode", _RESIZE_MODES, "half_pixel"),
        "Resize in a coordinate mode that TensorRT does not have",
        f"it has {', '.join(_RESIZE_MODES)} ({source}; {_PARSED})",
        'coordinate_transformation_mode="half_pixel"',
    )
    yield from _each(
        case,
        ("Resize",),
        lambda node: bool(node.attribute("antialias", 0)),
        "Resize with antialiasing",
        f"antialiasing is not supported ({source}; {_PARSED})",
        "interpolate(..., antialias=False), or resize before the graph",
    )
    yield from _each(
        case,
        ("Resize",),
        attribute("keep_aspect_ratio_policy", ("stretch",), "stretch"),
        "Resize that keeps the aspect ratio",
        f"only stretch is supported ({source}; {_PARSED})",
        "compute the size before exporting",
    )
    yield from _each(
        case,
        ("Resize",),
        lambda node: (
            node.attribute("mode", "nearest") == "nearest"
            and node.attribute("coordinate_transformation_mode") == "tf_half_pixel_for_nn"
            and node.attribute("nearest_mode", "round_prefer_floor") != "round_prefer_floor"
        ),
        "Resize with tf_half_pixel_for_nn and another rounding",
        "only round_prefer_floor is supported there (onnx-tensorrt, onnxOpCheckers.cpp)",
        'nearest_mode="round_prefer_floor"',
    )
    if case.tensorrt < (9, 0):
        yield from _each(
            case,
            ("Resize",),
            lambda node: node.attribute("mode", "nearest") == "cubic",
            "cubic Resize",
            f"TensorRT 8 has nearest and linear ({_TABLE} of TensorRT 8.5: Resize)",
            'mode="linear"',
        )


@rule("topk", f"the K of TopK is known and at most {_TOPK_MAX}", on=TENSORRT)
def topk(case: Case) -> Iterator[Finding]:
    def asked(node: Node) -> int | None:
        found = case.graph.constant(node.inputs[1]) if len(node.inputs) > 1 else node.attribute("k")
        return None if found is None or np.size(found) != 1 else int(np.ravel(found)[0])

    yield from _each(
        case,
        ("TopK",),
        lambda node: (asked(node) or 0) > _TOPK_MAX,
        f"TopK of more than {_TOPK_MAX}",
        f"K exceeds the maximum value allowed ({_TOPK_MAX}: TensorRT-RTX 1.7.1's builder; {_TABLE}: TopK)",
        f"take the top of parts, then the top of their tops; or K <= {_TOPK_MAX}",
    )
    if case.tensorrt < (8, 6):
        yield from _each(
            case,
            ("TopK",),
            lambda node: len(node.inputs) > 1 and not case.graph.is_constant(node.inputs[1]),
            "the K of TopK is computed",
            f"K must be an initializer ({_TABLE} of TensorRT 8.5: TopK); dynamic K came with 8.6",
            "a constant K",
        )


@rule("einsum", "Einsum in a form that TensorRT has", on=TENSORRT)
def einsum(case: Case) -> Iterator[Finding]:
    def labels(node: Node) -> list[str]:
        return str(node.attribute("equation", "")).replace(" ", "").split("->")[0].split(",")

    yield from _each(
        case,
        ("Einsum",),
        lambda node: any(letter.isupper() for letter in str(node.attribute("equation", ""))),
        "Einsum with capital letters",
        f"labels are a to z (onnx-tensorrt, onnxOpCheckers.cpp; {_PARSED})",
        "rename them to small letters",
    )
    if case.tensorrt < (9, 0):
        yield from _each(
            case,
            ("Einsum",),
            lambda node: (
                "..." in str(node.attribute("equation", "")) or any(len(set(term)) < len(term) for term in labels(node))
            ),
            "Einsum with an ellipsis or a diagonal",
            f"ellipsis and diagonal operations are not supported ({_TABLE} of TensorRT 8.5: Einsum)",
            "write it as Transpose, MatMul and ReduceSum",
        )


@rule("training-mode", "no node is in training mode", on=EVERYWHERE)
def training_mode(case: Case) -> Iterator[Finding]:
    nodes = [node.name for node in case.graph.of("BatchNormalization") if node.attribute("training_mode", 0)]
    # operator sets before 14 said it by the running statistics that they gave
    if case.graph.opset < 14:
        nodes += [node.name for node in case.graph.of("BatchNormalization") if len(node.outputs) > 1]
    for node in case.graph.of("Dropout"):
        flag = case.graph.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
        asked = len(node.inputs) > 2 and bool(node.inputs[2])
        if (flag is not None and bool(flag.any())) or (asked and not case.graph.is_constant(node.inputs[2])):
            nodes.append(node.name)
    if not nodes:
        return
    fix = "model.eval() before the export"
    if case.stack.runtime == "onnxruntime":
        source = "ONNX, docs/Operators.md: training_mode"
        yield note("nodes are in training mode", f"{named(nodes)}; outputs depend on the batch ({source})", fix, nodes)
    else:
        said = f"{named(nodes)}; TensorRT does not support training_mode == 1 ({_TABLE}: Dropout; {_PARSED})"
        yield refused("nodes are in training mode", said, fix, nodes)


@rule("random", "no node draws random numbers")
def random(case: Case) -> Iterator[Finding]:
    nodes = [node.name for node in case.graph.of(*_RANDOM)]
    if nodes:
        said = (
            "without a seed attribute every run differs (ONNX, docs/Operators.md)"
            if case.stack.runtime == "onnxruntime"
            else f"TensorRT ignores the seed ({_TABLE}: RandomNormal)"
        )
        yield note(
            "the graph draws random numbers",
            f"{named(nodes)}; {said}, so its outputs cannot be compared",
            "make the noise an input",
            nodes,
        )


@rule("scatter-reduction", "ScatterND overwrites", on=TENSORRT)
def scatter_reduction(case: Case) -> Iterator[Finding]:
    yield from _each(
        case,
        ("ScatterND",),
        lambda node: node.attribute("reduction", "none") != "none",
        "ScatterND with a reduction",
        f"reduction other than none is not supported ({_TABLE} of TensorRT 10.15: ScatterND; {_PARSED})",
        "ScatterElements takes reductions since TensorRT 10.0",
    )


@rule("normalization-outputs", "LayerNormalization gives its first output only", on=TENSORRT)
def normalization_outputs(case: Case) -> Iterator[Finding]:
    yield from _each(
        case,
        ("LayerNormalization",),
        lambda node: len([name for name in node.outputs if name]) > 1,
        "LayerNormalization with mean and deviation",
        f"only the first output is supported ({_TABLE} of TensorRT 10.15: LayerNormalization; {_PARSED})",
        "remove the outputs Mean and InvStdDev; inference does not use them",
    )


@rule("constant-operand", "axes and depths are constants", on=TENSORRT)
def constant_operand(case: Case) -> Iterator[Finding]:
    graph, groups = case.graph, Groups()
    reductions = [name for name in _operators(case) if name.startswith("Reduce")]
    operands = dict.fromkeys((*reductions, "Squeeze", "Unsqueeze", "OneHot"), 1)
    if case.tensorrt < (11, 0):
        operands["CumSum"] = 1
    for node in graph.of(*operands):
        place = operands[node.op]
        asked = node.inputs[place] if len(node.inputs) > place and not node.function else ""
        if asked and not graph.is_constant(asked):
            groups.add(node.op, node.name)
    for operator, nodes in groups:
        what = "depth" if operator == "OneHot" else "axis" if operator == "CumSum" else "axes"
        yield refused(
            f"the {what} of {operator} are computed",
            f"{named(nodes)}; it must resolve to a build-time constant ({_TABLE} of TensorRT 10.15: {operator})",
            "pass a Python number in forward(), not a tensor",
            nodes,
        )
    yield from _each(
        case,
        ("EyeLike",),
        lambda node: not all(isinstance(dim, int) for dim in graph.value(node.inputs[0]).shape or (None,)),
        "EyeLike of a dynamic size",
        f"the input must have static dimensions ({_TABLE} of TensorRT 10.15: EyeLike; {_PARSED})",
        "torch.eye of a fixed size, stored as a constant",
    )


@rule("attention", "Attention in a form that TensorRT has", on=TENSORRT)
def attention(case: Case) -> Iterator[Finding]:
    source = f"{_TABLE} of TensorRT 10.15: Attention; {_PARSED}"
    operator = ("Attention",)
    cache = 6 if case.tensorrt >= (11, 0) else 7  # what follows the cache is the number of valid keys

    def head_size(node: Node, place: int) -> int | str | None:
        shape = case.graph.value(node.inputs[place]).shape if len(node.inputs) > place else None
        return shape[-1] if shape and len(shape) == 4 else None

    yield from _each(
        case,
        operator,
        lambda node: len([name for name in node.outputs if name]) > 1 or any(node.inputs[4:cache]),
        "Attention with a cache",
        f"past and present keys and values and further outputs are unsupported ({source})",
        "write the cache with Concat or TensorScatter beside an Attention of one output",
    )
    yield from _each(
        case,
        operator,
        lambda node: bool(node.attribute("softcap", 0.0)) or node.attribute("softmax_precision") is not None,
        "Attention with softcap or a softmax precision",
        f"both attributes are unsupported ({source})",
        "write it as MatMul, Tanh, Softmax and MatMul",
    )
    yield from _each(
        case,
        operator,
        lambda node: bool(node.attribute("is_causal", 0)) and len(node.inputs) > 3 and bool(node.inputs[3]),
        "causal Attention with a mask",
        f"a mask excludes is_causal ({_PARSED})",
        "put the causal mask into the mask",
    )
    yield from _each(
        case,
        operator,
        lambda node: head_size(node, 1) != head_size(node, 2),
        "Attention with keys and values of different sizes",
        f"key and value must have the same shape ({_PARSED})",
        "pad the smaller one, or write it as MatMul, Softmax and MatMul",
    )


@rule("norm-order", "norms are of order 1 or 2", on=TENSORRT)
def norm_order(case: Case) -> Iterator[Finding]:
    yield from _each(
        case,
        ("LpPool", "LpNormalization"),
        lambda node: node.attribute("p", 2) not in (1, 2),
        "a norm of another order than 1 or 2",
        f"only L1 and L2 are supported (onnx-tensorrt, onnxOpCheckers.cpp; {_PARSED})",
        "write it with Abs, Pow and ReduceSum",
    )


@rule("recurrent", "LSTM without coupled gates or batch-first layout", on=EVERYWHERE)
def recurrent(case: Case) -> Iterator[Finding]:
    if case.stack.runtime != "onnxruntime":
        yield from _each(
            case,
            ("LSTM",),
            lambda node: bool(node.attribute("input_forget", 0)),
            "LSTM with coupled input and forget gates",
            f"input_forget must be 0 ({_TABLE} of TensorRT 10.15: LSTM; {_PARSED})",
            "an LSTM without coupling",
        )
        return
    yield from _each(
        case,
        ("LSTM", "GRU", "RNN"),
        lambda node: bool(node.attribute("layout", 0)),
        "recurrent nodes in batch-first layout",
        "ONNX Runtime's CPU provider takes layout = 0 only (found by loading in 1.31.1)",
        "batch_first=False, or a Transpose before and after",
    )


@rule("instance-norm", "InstanceNormalization with constant scales before TensorRT 9", on=("tensorrt",))
def instance_norm(case: Case) -> Iterator[Finding]:
    if case.tensorrt >= (9, 0):
        return

    def wrong(node: Node) -> bool:
        rank = case.graph.rank(node.inputs[0])
        return (rank is not None and not 3 <= rank <= 5) or not all(
            case.graph.is_constant(name) for name in node.inputs[1:3]
        )

    yield from _each(
        case,
        ("InstanceNormalization",),
        wrong,
        "InstanceNormalization with computed scales or of more than three spatial dimensions",
        f"scale and bias must be initializers, the rank 3 to 5 ({_TABLE} of TensorRT 8.5: InstanceNormalization)",
        "constant scales, or a stack with TensorRT 10",
    )


def _operators(case: Case) -> list[str]:
    return list(dict.fromkeys(node.op for node in case.graph.nodes))


def _each(
    case: Case, operators: tuple[str, ...], wrong: Callable[[Node], bool], message: str, fact: str, fix: str
) -> Iterator[Finding]:
    """One refusal for all nodes of these operators that are wrong."""
    nodes = [
        node.name
        for node in case.graph.of(*operators)
        if node.inputs and not (node.function and _needs_values(operators)) and wrong(node)
    ]
    if nodes:
        yield refused(message, f"{named(nodes)}; {fact}", fix, nodes)


def _needs_values(operators: tuple[str, ...]) -> bool:
    """Inside a function of the model nothing is known about inputs, and these operators are judged by them."""
    return bool({"Attention", "Conv", "MaxPool", "TopK", "EyeLike", "InstanceNormalization"} & set(operators))
