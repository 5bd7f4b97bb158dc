"""For every rule of the preflight a graph that passes and one that does not, on a device and stack of the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

F, F16, BF16, F64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE
I64, I32, I8, U8, BOOL, TEXT = (
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.BOOL,
    TensorProto.STRING,
)
Shape = Sequence[int | str] | None


@dataclass(frozen=True)
class Pair:
    """A rule, a graph that passes, and one that does not. `builder`: TensorRT finds it when it builds, and its parser
    lets it through."""

    rule: str
    good: onnx.ModelProto
    bad: onnx.ModelProto
    device: str
    stack: str | None = None
    level: str = "refused"
    batch: int = 1
    builder: bool = False
    label: str = ""

    def __str__(self) -> str:
        return f"{self.rule}{'-' + self.label if self.label else ''}"


@dataclass
class Made:
    """A model being written: constants by their values, then nodes."""

    constants: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        *nodes: NodeProto,
        inputs: dict[str, tuple[int, Shape]] | None = None,
        outputs: dict[str, int] | None = None,
        opset: int = 17,
        ir: int = 8,
        domains: Sequence[str] = (),
        functions: Sequence[onnx.FunctionProto] = (),
    ) -> onnx.ModelProto:
        inputs = {"x": (F, [1, 4])} if inputs is None else inputs
        graph = helper.make_graph(
            list(nodes),
            "g",
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(name, kind, None) for name, kind in (outputs or {"y": F}).items()],
            [
                value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), name)
                for name, value in self.constants.items()
            ],
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)],
            ir_version=ir,
            functions=list(functions),
        )


def constants(**values: Any) -> Made:
    return Made(values)


def node(operator: str, inputs: str, outputs: str = "y", /, **attributes: Any) -> NodeProto:
    """`node("Add", "x b")`: names apart by spaces, "-" for one that is left out."""
    read = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(
        operator, read, outputs.split(), name=f"{operator}_{outputs.split(maxsplit=1)[0]}", **attributes
    )


def relu(**options: Any) -> onnx.ModelProto:
    return Made()(node("Relu", "x"), **options)


def image(size: int = 8, channels: int = 3, kind: int = F) -> dict[str, tuple[int, Shape]]:
    return {"x": (kind, [1, channels, size, size])}


def typed(kind: int, operator: str = "Identity", **options: Any) -> onnx.ModelProto:
    return Made()(node(operator, "x"), inputs={"x": (kind, [1, 4])}, outputs={"y": kind}, **options)


def weighted(value: Any, **options: Any) -> onnx.ModelProto:
    return constants(w=np.asarray(value, np.float32))(node("Add", "x w"), inputs={"x": (F, [1, 1])}, **options)


def doubled() -> onnx.ModelProto:
    model = relu()
    model.graph.output.append(model.graph.output[0])
    return model


def external(location: str) -> onnx.ModelProto:
    model = weighted([1, 2, 3, 4])
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return model


def sized(rows: int) -> onnx.ModelProto:
    """A weight of `rows` MiB by its shape; no bytes are stored."""
    model = relu()
    tensor = model.graph.initializer.add(name="w", data_type=F)
    tensor.dims.extend([rows, 2**18])
    return model


def product(rows: int, **options: Any) -> onnx.ModelProto:
    """(rows, 1024) through two products, so that three activations of 4 KiB a row exist, two of them at once."""
    made = constants(w=np.zeros([1024, 1024], np.float32))
    return made(node("MatMul", "x w", "h"), node("MatMul", "h w"), inputs={"x": (F, [rows, 1024])}, **options)


def quantized(
    kind: int = I8, zero: int = 0, *, scales: int = 0, scale: str = "s", opset: int = 21, **options: Any
) -> onnx.ModelProto:
    """x (1, 4) quantised and back; `scales` > 0: one for each channel."""
    shape = [scales] if scales else []
    made = constants(s=np.full(shape, 0.1, np.float32), z=helper.make_tensor("z", kind, shape, [zero] * max(scales, 1)))
    inputs: dict[str, tuple[int, Shape]] = {"x": (F, [1, 4])}
    if scale != "s":
        inputs[scale] = (F, [])
    return made(
        node("QuantizeLinear", f"x {scale} z", "q"),
        node("DequantizeLinear", f"q {scale} z", "d"),
        node("Relu", "d"),
        inputs=inputs,
        opset=opset,
        **({"ir": 10} | options),
    )


def biased(kind: int) -> onnx.ModelProto:
    made = constants(b=helper.make_tensor("b", kind, [4], [1] * 4), s=np.float32(0.1))
    return made(node("DequantizeLinear", "b s", "d"), node("Add", "x d"))


def shaped(*origin: NodeProto, operand: str = "s") -> onnx.ModelProto:
    made = constants(zero=np.array([0]), one=np.array([1]), rest=np.array([-1]), fixed=np.array([2]))
    return made(
        *origin,
        node("Concat", f"{operand} rest", "to", axis=0),
        node("Reshape", "x to"),
        inputs={"x": (F, [2, 4])},
    )


def from_real() -> tuple[NodeProto, ...]:
    return (node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "i", to=I64), node("Unsqueeze", "i zero", "s"))


def from_argmax() -> tuple[NodeProto, ...]:
    return (node("ArgMax", "x", "i", axis=1, keepdims=0), node("Slice", "i zero one", "s"))


def branches(second: NodeProto) -> onnx.ModelProto:
    def body(inner: NodeProto) -> onnx.GraphProto:
        result = inner.output[0]
        return helper.make_graph([inner], result, [], [helper.make_tensor_value_info(result, F, None)])

    return Made()(
        node("ReduceMax", "x", "m", keepdims=0),
        node("Cast", "m", "c", to=BOOL),
        node("If", "c", then_branch=body(node("Relu", "x", "t")), else_branch=body(second)),
        inputs={"x": (F, [1, 4, 4])},
    )


def looped(step: NodeProto, *, collect: bool = False, computed: bool = False) -> onnx.ModelProto:
    """x carried through `step` three times, or as often as its largest value says."""
    info = helper.make_tensor_value_info
    inner = [node("Identity", "on", "go"), step]
    outputs = [info("go", BOOL, []), info("next", F, None)]
    if collect:
        inner.append(node("Identity", "state", "kept"))
        outputs.append(info("kept", F, None))
    body = helper.make_graph(
        inner, "body", [info("turn", I64, []), info("on", BOOL, []), info("state", F, None)], outputs
    )
    made = constants(go0=np.array(True), three=np.array(3))
    trip = [node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "n", to=I64)] if computed else []
    return made(
        *trip,
        node("Loop", f"{'n' if computed else 'three'} go0 x", "y all" if collect else "y", body=body),
        outputs={"y": F, "all": F} if collect else {"y": F},
    )


def convolved(dimensions: int, *, given: bool = False) -> onnx.ModelProto:
    weights = np.ones([2, 2] + [3] * dimensions, np.float32)
    inputs: dict[str, tuple[int, Shape]] = {"x": (F, [1, 2] + [8] * dimensions)}
    if given:
        return Made()(node("Conv", "x w"), inputs=inputs | {"w": (F, list(weights.shape))})
    return constants(w=weights)(node("Conv", "x w"), inputs=inputs)


def pooled(dimensions: int = 2, outputs: str = "y", **attributes: Any) -> onnx.ModelProto:
    inputs: dict[str, tuple[int, Shape]] = {"x": (F, [1, 2] + [8] * dimensions)}
    kinds = {"y": F, "i": I64} if " " in outputs else {"y": F}
    return Made()(
        node("MaxPool", "x", outputs, kernel_shape=[2] * dimensions, **attributes), inputs=inputs, outputs=kinds
    )


def resized(**attributes: Any) -> onnx.ModelProto:
    attributes = {"mode": "linear"} | attributes
    made = constants(scales=np.array([1, 1, 2, 2], np.float32), roi=np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32))
    return made(node("Resize", "x roi scales", **attributes), inputs=image(), opset=19, ir=9)


def stretched(policy: str) -> onnx.ModelProto:
    made = constants(size=np.array([1, 3, 16, 16]))
    resize = node("Resize", "x - - size", mode="linear", keep_aspect_ratio_policy=policy)
    return made(resize, inputs=image(), opset=19, ir=9)


def top(k: int | None) -> onnx.ModelProto:
    inputs: dict[str, tuple[int, Shape]] = {"x": (F, [1, 8000])}
    made = Made() if k is None else constants(k=np.array([k]))
    if k is None:
        inputs["k"] = (I64, [1])
    return made(node("TopK", "x k", "y i"), inputs=inputs, outputs={"y": F, "i": I64})


def summed(equation: str) -> onnx.ModelProto:
    names = "x z" if "," in equation else "x"
    inputs: dict[str, tuple[int, Shape]] = {name: (F, [4, 4]) for name in names.split()}
    return Made()(node("Einsum", names, equation=equation), inputs=inputs)


def normalized(training: int) -> onnx.ModelProto:
    made = constants(s=np.ones(3, np.float32))
    outputs = "y m v" if training else "y"
    kinds = dict.fromkeys(outputs.split(), F)
    return made(node("BatchNormalization", "x s s s s", outputs, training_mode=training), inputs=image(), outputs=kinds)


def dropped(training: bool) -> onnx.ModelProto:
    return constants(r=np.float32(0.5), t=np.array(training))(node("Dropout", "x r t"), inputs=image())


def scattered(reduction: str) -> onnx.ModelProto:
    made = constants(i=np.array([[1]]))
    return made(node("ScatterND", "x i u", reduction=reduction), inputs={"x": (F, [4]), "u": (F, [1])})


def layer_normalized(outputs: str) -> onnx.ModelProto:
    made = constants(s=np.ones(4, np.float32))
    return made(node("LayerNormalization", "x s", outputs), outputs=dict.fromkeys(outputs.split(), F))


def reduced(axes: str) -> onnx.ModelProto:
    inputs: dict[str, tuple[int, Shape]] = {"x": (F, [1, 4])}
    if axes != "one":
        inputs[axes] = (I64, [1])
    return constants(one=np.array([1]))(node("ReduceSum", f"x {axes}"), inputs=inputs)


def attended(causal: int = 0, softcap: float = 0.0, mask: bool = False, cached: bool = False, size: int = 4) -> Any:
    inputs: dict[str, tuple[int, Shape]] = {"x": (F, [1, 2, 3, 4]), "v": (F, [1, 2, 3, size])}
    read, made = "x x v", "y"
    if mask:
        inputs["m"] = (F, [3, 3])
        read += " m"
    if cached:
        inputs |= {"pk": (F, [1, 2, 5, 4]), "pv": (F, [1, 2, 5, size])}
        read, made = f"{read} - pk pv", "y k w"
    kinds = dict.fromkeys(made.split(), F)
    return Made()(
        node("Attention", read, made, is_causal=causal, softcap=softcap), inputs=inputs, outputs=kinds, opset=23, ir=10
    )


def recurrent(**attributes: Any) -> onnx.ModelProto:
    shape = [1, 5, 3] if attributes.get("layout") else [5, 1, 3]
    made = constants(w=np.ones([1, 8, 3], np.float32), r=np.ones([1, 8, 2], np.float32))
    return made(node("LSTM", "x w r", hidden_size=2, **attributes), inputs={"x": (F, shape)})


def instance_normalized(given: bool) -> onnx.ModelProto:
    inputs = image() | ({"s": (F, [3])} if given else {})
    made = Made() if given else constants(s=np.ones(3, np.float32))
    return made(node("InstanceNormalization", "x s s"), inputs=inputs)


def foreign(operator: str, domain: str) -> onnx.ModelProto:
    return Made()(
        helper.make_node(operator, ["x"], ["y"], domain=domain), domains=[domain] if domain != "ai.onnx" else []
    )


def own_function(inline: bool) -> onnx.ModelProto:
    if inline:
        return relu()
    function = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [node("Add", "a a", "b")], [helper.make_opsetid("", 17)]
    )
    call = helper.make_node("Twice", ["x"], ["y"], domain="mine")
    return Made()(call, domains=["mine"], functions=[function])


ORIN, NANO, RTX, PI, HERE = "jetson-orin-nano", "jetson-nano", "rtx-4060-laptop", "raspberry-pi-5", "this-machine"
J5, J6 = "jetpack-5.1", "jetpack-6.2"

PAIRS: tuple[Pair, ...] = (
    # the file
    Pair("invalid-graph", relu(), Made()(node("Relu", "nothing")), HERE),
    Pair("invalid-graph", relu(), Made()(node("Relux", "x")), RTX, label="operator"),
    Pair("external-data-outside", external("w.data"), external("../w.data"), HERE),
    Pair("external-data-outside", external("w.data"), external("/etc/passwd"), HERE, label="absolute"),
    Pair("external-data-outside", external("w.data"), external("C:\\w.data"), HERE, label="windows"),
    Pair("external-data-missing", external("w.data"), external("gone.data"), HERE),
    Pair("external-data-missing", external("w.data"), external("short.data"), HERE, label="short"),
    Pair("weights-not-read", external("w.data"), external("gone.data"), HERE, level="note"),
    Pair("weights-inline", sized(1), sized(2049), "h200"),
    Pair("weights-not-finite", weighted([1, 2]), weighted([1, np.nan]), HERE),
    Pair("weights-not-finite", weighted([1, 2]), weighted([0, -np.inf]), HERE, level="note", label="infinite"),
    Pair("fp16-overflow", weighted([1, 65504]), weighted([1, 7e4]), ORIN, level="note"),
    Pair("fp16-underflow", weighted([1, 1e-6]), weighted([1, 1e-9]), ORIN, level="note"),
    Pair(
        "duplicate-output",
        relu(),
        doubled(),
        HERE,
        level="note",
    ),
    Pair("unused-input", relu(), relu(inputs={"x": (F, [1, 4]), "z": (F, [1, 4])}), HERE, level="note"),
    # versions, precisions, memory
    Pair("opset", relu(opset=20, ir=9), relu(opset=21, ir=10), ORIN, J6),
    Pair("opset", relu(opset=26, ir=10), relu(opset=27, ir=10), PI, label="onnxruntime"),
    Pair("opset", relu(opset=13, ir=7), relu(opset=14, ir=7), NANO, label="8.2"),
    Pair("ir-version", relu(opset=17, ir=10), relu(opset=17, ir=11), ORIN, J6),
    Pair("opset-old", relu(opset=9, ir=4), relu(opset=8, ir=4), RTX, level="note"),
    Pair("precision", typed(F16, "Relu"), typed(BF16, "Relu"), "t4"),
    Pair("precision", quantized(), quantized(TensorProto.FLOAT8E4M3FN), "rtx-a2000", label="fp8"),
    Pair("precision", typed(F, "Relu"), typed(F16, "Relu"), PI, label="fp16-on-a-cpu"),
    Pair("precision", typed(F16, "Relu"), quantized(opset=13, ir=7), NANO, label="int8"),
    Pair("weak-typing", typed(F, "Relu"), typed(F16, "Relu"), ORIN, J5, level="note"),
    Pair("turing-fp32", typed(F, "Relu"), product(1), "turing", builder=True),
    Pair("memory", sized(1024), sized(9 * 1024), ORIN),
    Pair("memory", sized(1024), sized(5 * 1024), ORIN, level="note", label="shared"),
    Pair("memory", product(1024), product(2**20), ORIN, label="activations"),
    Pair("local-functions", own_function(True), own_function(False), ORIN, J5),
    # types
    Pair("string-tensor", relu(), typed(TEXT), RTX),
    Pair("data-type", typed(I64), typed(TensorProto.INT16), RTX),
    Pair(
        "data-type",
        Made()(node("Cast", "x", to=I32), outputs={"y": I32}),
        Made()(node("Cast", "x", to=TensorProto.UINT16), outputs={"y": TensorProto.UINT16}),
        RTX,
        label="cast",
    ),
    Pair("data-type", typed(F16), typed(BF16), ORIN, J5, label="bf16-in-8"),
    Pair("int64", typed(I32), typed(I64), ORIN, J5, level="note"),
    Pair("double", typed(F), typed(F64), RTX, level="note"),
    Pair("uint8-input", typed(F), typed(U8), NANO),
    Pair("uint8-compute", Made()(node("Cast", "x", to=F), inputs={"x": (U8, [1, 4])}), typed(U8, "Neg", opset=13), RTX),
    Pair("uint8-compute", typed(U8), typed(U8, "Transpose"), RTX, label="layout"),
    # quantisation
    Pair("int32-bias", biased(I8), biased(I32), RTX),
    Pair("zero-point", quantized(), quantized(I8, 3), RTX),
    Pair("zero-point", quantized(U8), quantized(U8, 128), RTX, label="unsigned"),
    Pair("quantized-type", quantized(), quantized(TensorProto.INT16), RTX),
    Pair("quantized-type", quantized(TensorProto.FLOAT8E4M3FN), quantized(TensorProto.FLOAT8E5M2), RTX, label="fp8"),
    Pair("quantized-type", quantized(opset=17, ir=8), quantized(TensorProto.INT4), ORIN, J5, label="int4-in-8"),
    Pair("dynamic-scale", quantized(opset=17, ir=8), quantized(scale="t", opset=17, ir=8), ORIN, J5),
    Pair("per-channel-activation", quantized(), quantized(scales=4), RTX, level="note"),
    # shapes and control flow
    Pair("batch", relu(inputs={"x": (F, ["n", 4])}), relu(), HERE, batch=4),
    Pair("batch", relu(), relu(inputs={"x": (F, [8, 4])}), HERE, level="note", label="larger"),
    Pair(
        "dynamic-dimension",
        relu(inputs={"x": (F, ["n", 4])}),
        relu(inputs={"x": (F, ["n", 3, "h", "w"])}),
        RTX,
        level="note",
    ),
    Pair("unknown-rank", relu(), relu(inputs={"x": (F, None)}), RTX, builder=True),
    Pair("rank", relu(inputs={"x": (F, [1] * 8)}), relu(inputs={"x": (F, [1] * 9)}), RTX),
    Pair("data-dependent-shape", shaped(operand="fixed"), shaped(*from_real()), RTX),
    Pair("data-dependent-shape", shaped(operand="fixed"), shaped(*from_argmax()), RTX, level="note", label="indices"),
    Pair(
        "data-dependent-shape",
        relu(),
        Made()(node("NonZero", "x"), outputs={"y": I64}),
        ORIN,
        J6,
        level="note",
        label="nonzero",
    ),
    Pair(
        "shape-input",
        shaped(operand="fixed"),
        Made()(node("Reshape", "x s"), inputs={"x": (F, [2, 4]), "s": (I64, [2])}),
        RTX,
        level="note",
    ),
    Pair("if-rank", branches(node("Neg", "x", "e")), branches(node("Flatten", "x", "e")), RTX, builder=True),
    Pair(
        "loop-carried-shape",
        looped(node("Add", "state state", "next")),
        looped(node("Concat", "state state", "next", axis=1)),
        RTX,
        builder=True,
    ),
    Pair(
        "loop-scan-length",
        looped(node("Add", "state state", "next"), collect=True),
        looped(node("Add", "state state", "next"), collect=True, computed=True),
        RTX,
    ),
    # what operators are restricted to
    Pair("conv-dimensions", convolved(3), convolved(4), RTX),
    Pair("conv-dimensions", convolved(1), convolved(4), ORIN, J6, label="one"),
    Pair("conv-weights", convolved(2), convolved(2, given=True), NANO),
    Pair("pooling", pooled(1), pooled(4), RTX),
    Pair("pooling", pooled(), pooled(dilations=[2, 2]), RTX, label="dilations"),
    Pair("pooling", pooled(), pooled(outputs="y i"), RTX, label="indices"),
    Pair("resize", resized(), resized(coordinate_transformation_mode="tf_crop_and_resize"), RTX),
    Pair("resize", resized(), resized(coordinate_transformation_mode="half_pixel_symmetric"), RTX, label="symmetric"),
    Pair("resize", resized(mode="cubic"), resized(antialias=1), RTX, label="antialias"),
    Pair("resize", stretched("stretch"), stretched("not_larger"), RTX, label="aspect"),
    Pair(
        "resize",
        resized(mode="nearest", nearest_mode="floor"),
        resized(mode="nearest", nearest_mode="floor", coordinate_transformation_mode="tf_half_pixel_for_nn"),
        RTX,
        label="rounding",
    ),
    Pair("resize", resized(), resized(mode="cubic"), ORIN, J5, label="cubic-in-8"),
    Pair("topk", top(3840), top(3841), RTX, builder=True),
    Pair("topk", top(5), top(None), ORIN, J5, label="computed-in-8"),
    Pair("einsum", summed("ij,jk->ik"), summed("iJ,Jk->ik"), RTX),
    Pair("einsum", summed("ij,jk->ik"), summed("...j,jk->...k"), ORIN, J5, label="ellipsis-in-8"),
    Pair("einsum", summed("ij->i"), summed("ii->i"), ORIN, J5, label="diagonal-in-8"),
    Pair("training-mode", normalized(0), normalized(1), RTX),
    Pair("training-mode", dropped(False), dropped(True), RTX, label="dropout"),
    Pair("training-mode", dropped(False), dropped(True), HERE, level="note", label="onnxruntime"),
    Pair("random", relu(), Made()(node("RandomNormalLike", "x")), RTX, level="note"),
    Pair("scatter-reduction", scattered("none"), scattered("add"), RTX),
    Pair("normalization-outputs", layer_normalized("y"), layer_normalized("y m d"), RTX),
    Pair("constant-operand", reduced("one"), reduced("a"), RTX),
    Pair(
        "constant-operand",
        Made()(node("EyeLike", "x"), inputs={"x": (F, [4, 4])}),
        Made()(node("EyeLike", "x"), inputs={"x": (F, ["n", 4])}),
        RTX,
        label="eye",
    ),
    Pair("attention", attended(), attended(softcap=2.0), RTX),
    Pair("attention", attended(), attended(cached=True), RTX, label="cache"),
    Pair("attention", attended(causal=1), attended(causal=1, mask=True), RTX, label="mask"),
    Pair("attention", attended(), attended(size=6), RTX, label="sizes"),
    Pair(
        "norm-order",
        Made()(node("LpPool", "x", kernel_shape=[2, 2], p=2), inputs=image()),
        Made()(node("LpPool", "x", kernel_shape=[2, 2], p=3), inputs=image()),
        RTX,
    ),
    Pair("recurrent", recurrent(), recurrent(input_forget=1), RTX),
    Pair("recurrent", recurrent(), recurrent(layout=1), HERE, label="layout"),
    Pair("instance-norm", instance_normalized(False), instance_normalized(True), ORIN, J5),
    # operators
    Pair("operator", relu(), Made()(node("Unique", "x")), RTX),
    Pair("operator", relu(), Made()(node("NonZero", "x"), outputs={"y": I64}), RTX, label="plugin"),
    Pair("operator", relu(), layer_normalized("y"), ORIN, J5, label="layer-norm-in-8.5"),
    Pair("operator", typed(F, "HardSwish"), typed(F, "Gelu", opset=20, ir=9), ORIN, J6, level="note", label="gelu"),
    Pair("operator", relu(opset=13, ir=7), typed(F, "HardSwish", opset=14, ir=7), NANO, label="hardswish-in-8.2"),
    Pair("custom-operator", relu(), foreign("Mine", "my.domain"), RTX),
    Pair(
        "custom-operator",
        foreign("Gelu", "com.microsoft"),
        foreign("QuickGelu", "com.microsoft"),
        RTX,
        label="onnxruntimes-own",
    ),
    Pair("custom-operator", foreign("Gelu", "com.microsoft"), foreign("Mine", "my.domain"), HERE, label="onnxruntime"),
    Pair("kernel", typed(F, "Relu"), typed(BF16, "Relu"), HERE),
    Pair("kernel", typed(I32, "Relu"), typed(I64, "Relu"), HERE, label="int64"),
    Pair("kernel", typed(F, "Sigmoid"), typed(TensorProto.INT4, opset=21, ir=10), PI, label="int4"),
)
