"""Every builder call of the adapter against TensorRT-RTX's own builder, for each architecture that it builds for."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import tensorrt
from export.candidate import Engine
from export.section import ExportSection
from export.tensorrt import Adapter, BuildOptions
from profiles.artifact import file_hash
from profiles.device import load_device
from profiles.engine_check import this_gpu
from profiles.errors import EdgestillError, InputError

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra tensorrt-rtx)")
OPTIONS = BuildOptions(more_profiles=((1, 1, 1), (8, 8, 8)), workspace_mib=64, optimization_level=2)
TENSORRT_10 = {
    "module": "Builder BuilderFlag HardwareCompatibilityLevel ILogger MemoryPoolType NetworkDefinitionCreationFlag "
    "OnnxParser ProfilingVerbosity",
    "IBuilderConfig": "add_optimization_profile builder_optimization_level create_timing_cache get_timing_cache "
    "hardware_compatibility_level profiling_verbosity set_flag set_memory_pool_limit set_timing_cache",
    "Builder": "build_serialized_network create_builder_config create_network create_optimization_profile",
}
"""Names that TensorRT 10 and 11 bind (NVIDIA/TensorRT, python/src/infer/pyCore.cpp) and that the adapter may use."""


def adapter() -> Adapter:
    found = tensorrt.load_adapter(rtx=True)
    assert found is not None
    return found


def small(half: bool, quantized: bool = False) -> onnx.ModelProto:
    """A convolution and a head: image (n, 3, 16, 16) -> logits (n, 10)."""
    rng = np.random.default_rng(0)
    kind = np.float16 if half else np.float32
    proto = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    stored = [
        numpy_helper.from_array(rng.normal(size=(16, 3, 3, 3)).astype(kind), "weight"),
        numpy_helper.from_array(rng.normal(size=(16, 10)).astype(kind), "head"),
        numpy_helper.from_array(np.array([2, 3], np.int64), "axes"),
        numpy_helper.from_array(np.array(0.02, kind), "scale"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
    ]
    image, weight, nodes = "image", "weight", []
    if quantized:
        for name in ("image", "weight"):
            nodes.append(helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"], name=f"q_{name}"))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_d"]))
        image, weight = "image_d", "weight_d"
    nodes += [
        helper.make_node("Conv", [image, weight], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("ReduceMean", ["r", "axes"], ["m"], name="mean", keepdims=0),
        helper.make_node("MatMul", ["m", "head"], ["logits"], name="fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", proto, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", proto, ["n", 10])],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    found = {}
    for name, model in {
        "fp32": small(half=False),
        "fp16": small(half=True),
        "int8-fp16": small(half=True, quantized=True),
        "int8-fp32": small(half=False, quantized=True),
    }.items():
        found[name] = folder / f"{name}.onnx"
        onnx.save(model, str(found[name]))
    return found


def build(graph: Path, folder: Path, capability: str = "8.9", **options: Any) -> Engine:
    given: dict[str, Any] = {"batch": (1, 4, 8), "precision": "", "options": OPTIONS} | options
    return tensorrt.build_engine(
        given.pop("adapter", adapter()), graph, folder / "model.engine", capability=capability, **given
    )


class Documented:
    """TensorRT-RTX's real module, builder or configuration; what is called of the last two is noted.

    names: those alone that TensorRT 10 has as well; "": all. capability: what configurations are made for.
    """

    def __init__(
        self, inside: Any, names: str = "", called: set[str] | None = None, capability: str | None = None
    ) -> None:
        self.__dict__.update(inside=inside, names=names.split(), called=called, capability=capability)

    def __getattr__(self, name: str) -> Any:
        self.note(name)
        found = getattr(self.inside, name)
        if name == "Builder":
            return lambda logger: self.around(found(logger), name)
        if name == "create_builder_config":
            return lambda: self.around(self.configured(found()), "IBuilderConfig")
        if name == "build_serialized_network":
            return lambda network, config: found(network, config.inside)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        self.note(name)
        setattr(self.inside, name, value)

    def note(self, name: str) -> None:
        if self.names and name not in self.names:
            raise AttributeError(f"TensorRT 10 is not known to have {name}")
        if self.called is not None and self.inside is not trt:
            self.called.add(name)

    def around(self, inside: Any, kind: str) -> Documented:
        return Documented(inside, TENSORRT_10[kind] if self.names else "", self.called, self.capability)

    def configured(self, config: Any) -> Any:
        if self.capability is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{self.capability.replace('.', '')}"), 0)
        return config


def builder_calls() -> set[str]:
    """What export/tensorrt.py calls or sets of a builder and of its configuration, read from its source."""
    return {
        node.attr
        for node in ast.walk(ast.parse(Path(tensorrt.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).rpartition(".")[2] in ("builder", "config")
    }


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0", "7.5"])
def test_every_builder_call_is_made_for_every_architecture(
    graphs: dict[str, Path], tmp_path: Path, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: set[str] = set()
    rtx = Adapter(Documented(trt, "", called), "TensorRT-RTX", trt.__version__, rtx=True)
    engine = build(graphs["fp16"], tmp_path, capability, adapter=rtx)
    assert engine.more_profiles == ((1, 1, 1), (8, 8, 8))
    static = build(graphs["fp16"], tmp_path, capability, adapter=rtx, batch=(1, 1, 1), options=tensorrt.PLAIN)
    assert static.sha256 != engine.sha256
    # what TensorRT alone is asked: its way on the same builder, whose configuration is for this architecture
    monkeypatch.setattr(tensorrt, "this_gpu", lambda: {"device": "a GPU", "compute_capability": capability})
    ten = Adapter(Documented(trt, TENSORRT_10["module"], called, capability), "TensorRT", "10.3.0", rtx=False)
    level: Any = "same-capability" if capability == "7.5" else "ampere+"
    options = BuildOptions(hardware_compatibility=level, timing_cache=tmp_path / "timing.cache")
    compatible = build(graphs["fp16"], tmp_path, capability, adapter=ten, options=options)
    assert (compatible.hardware_compatibility, compatible.builder) == (level, "TensorRT 10.3.0")
    # the flag is taken; TensorRT-RTX lacks the library that such an engine carries, and its builder says so
    with pytest.raises(EdgestillError, match="cannot build an engine") as caught:
        build(graphs["fp16"], tmp_path, capability, adapter=ten, options=BuildOptions(version_compatible=True))
    assert "libnvinfer_lean" in str(caught.value.evidence)
    assert called == builder_calls()


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0", "7.5"])
@pytest.mark.parametrize("form", ["fp32", "int8-fp16", "int8-fp32"])
def test_every_precision_builds_for_every_architecture(
    graphs: dict[str, Path], tmp_path: Path, capability: str, form: str
) -> None:
    if capability == "7.5" and form in ("fp32", "int8-fp32"):
        with pytest.raises(EdgestillError, match=r"compute capability 7\.5"):
            build(graphs[form], tmp_path, capability)
        return
    engine = build(graphs[form], tmp_path, capability)
    assert engine.more_profiles == ((1, 1, 1), (8, 8, 8))
    assert engine.workspace_mib == 64
    assert engine.size_bytes > 10_000


def test_portable_engine_of_rtx_is_for_several_architectures(graphs: dict[str, Path], tmp_path: Path) -> None:
    engine = build(graphs["fp16"], tmp_path, options=BuildOptions(hardware_compatibility="ampere+"))
    assert engine.hardware_compatibility == "ampere+"


def test_rtx_refuses_version_compatible_engines(graphs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EdgestillError, match="no version-compatible engines"):
        build(graphs["fp16"], tmp_path, options=BuildOptions(version_compatible=True))


@pytest.fixture
def tensorrt_10(monkeypatch: pytest.MonkeyPatch) -> Adapter:
    """The adapter's way for TensorRT 10 and 11, which need a GPU, on a builder that needs none."""
    gpu = {"device": "NVIDIA L4", "compute_capability": "8.9", "memory_mib": 23034}
    monkeypatch.setattr(tensorrt, "this_gpu", lambda: gpu)
    return Adapter(Documented(trt, TENSORRT_10["module"]), "TensorRT", "10.3.0", rtx=False)


def test_tensorrt_10_is_driven_by_names_that_it_has(
    graphs: dict[str, Path], tmp_path: Path, tensorrt_10: Adapter
) -> None:
    cache = tmp_path / "timing" / "a.cache"
    options = BuildOptions(
        more_profiles=((1, 1, 1),),
        workspace_mib=64,
        hardware_compatibility="same-capability",
        optimization_level=3,
        timing_cache=cache,
    )
    engine = build(graphs["int8-fp16"], tmp_path, adapter=tensorrt_10, options=options)
    assert engine.builder == "TensorRT 10.3.0"
    assert engine.device == "NVIDIA L4"
    first = cache.read_bytes()
    assert first
    cache.write_bytes(b"not a cache")
    build(graphs["int8-fp16"], tmp_path, adapter=tensorrt_10, options=options)
    assert cache.read_bytes() == first


def test_tensorrt_builds_for_the_gpu_of_its_machine_alone(
    graphs: dict[str, Path], tmp_path: Path, tensorrt_10: Adapter
) -> None:
    with pytest.raises(EdgestillError, match="GPU of its own machine alone") as caught:
        build(graphs["fp16"], tmp_path, "8.7", adapter=tensorrt_10)
    assert "NVIDIA L4 with 8.9" in str(caught.value.evidence)
    old = Adapter(tensorrt_10.module, "TensorRT", "8.5.2", rtx=False)
    with pytest.raises(EdgestillError, match="weak typing only"):
        build(graphs["fp16"], tmp_path, adapter=old)


def test_engine_is_built_here_for_the_device_that_is_here(
    tensorrt_10: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "load_adapter", lambda *, rtx: tensorrt_10)
    device = load_device("h200")
    ten = next(stack for stack in device.stacks if stack.runtime_version.startswith("10."))
    l4 = load_device("l4")
    assert tensorrt.adapter_for(l4, ten.model_copy(update={"runtime_version": "10.3.0"})) is tensorrt_10
    assert tensorrt.adapter_for(l4, l4.stacks[0]) is None  # another version
    assert tensorrt.adapter_for(load_device("rtx-4060-laptop"), ten) is None  # its capability, another GPU
    assert tensorrt.adapter_for(device, ten) is None


def scalar_input(shape_input: bool) -> onnx.ModelProto:
    """A Loop whose trip count is an input of rank 0, or a Reshape whose shape is an input."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    true = helper.make_tensor("true", TensorProto.BOOL, [], [True])
    if shape_input:
        given = helper.make_tensor_value_info("shape", TensorProto.INT64, [2])
        nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    else:
        given = helper.make_tensor_value_info("trips", TensorProto.INT64, [])
        flag = helper.make_tensor_value_info
        body = helper.make_graph(
            [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["s", "s"], ["t"])],
            "body",
            [flag("i", TensorProto.INT64, []), flag("go", TensorProto.BOOL, []), flag("s", TensorProto.FLOAT, None)],
            [flag("on", TensorProto.BOOL, []), flag("t", TensorProto.FLOAT, None)],
        )
        nodes = [helper.make_node("Loop", ["trips", "true", "x"], ["y"], body=body)]
    graph = helper.make_graph(nodes, "scalar", [given, x], [y], [true])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("batch", [(1, 1, 1), (1, 2, 4)])
def test_trip_count_keeps_its_rank(tmp_path: Path, batch: tuple[int, int, int]) -> None:
    onnx.save(scalar_input(shape_input=False), str(tmp_path / "loop.onnx"))
    assert build(tmp_path / "loop.onnx", tmp_path, batch=batch, options=tensorrt.PLAIN).size_bytes > 10_000


def test_input_that_decides_shapes_is_refused_by_name(tmp_path: Path) -> None:
    onnx.save(scalar_input(shape_input=True), str(tmp_path / "reshape.onnx"))
    with pytest.raises(EdgestillError, match='input "shape" decides shapes'):
        build(tmp_path / "reshape.onnx", tmp_path)


def test_dynamic_size_that_is_not_the_batch_is_refused_by_name(tmp_path: Path) -> None:
    model = small(half=True)
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"
    onnx.save(model, str(tmp_path / "wide.onnx"))
    with pytest.raises(EdgestillError, match='"image" is dynamic in dimension 3'):
        build(tmp_path / "wide.onnx", tmp_path)


def test_profiles_follow_the_batch_sizes() -> None:
    assert tensorrt.profiles_of(1) == ((1, 1, 1),)
    assert tensorrt.profiles_of(4) == ((1, 4, 4), (1, 1, 1))
    assert tensorrt.profiles_of(4, (2, 8)) == ((1, 4, 8), (1, 1, 1), (2, 2, 2), (8, 8, 8))
    assert tensorrt.profiles_of(1, (8,)) == ((1, 1, 8), (8, 8, 8))


def test_workspace_leaves_memory_for_the_rest() -> None:
    orin, laptop = load_device("jetson-orin-nano"), load_device("rtx-4060-laptop")
    assert tensorrt.workspace_of(ExportSection(), orin) == 2048  # CPU and GPU share 8 GiB
    assert tensorrt.workspace_of(ExportSection(), laptop) == 4096
    assert tensorrt.workspace_of(ExportSection(workspace_mib=100), laptop) == 100
    assert tensorrt.workspace_of(ExportSection(), laptop.model_copy(update={"memory_gib": None})) is None


@pytest.mark.parametrize(
    ("device", "asked", "words"),
    [
        ("rtx-4060-laptop", {"version_compatible": True}, "run on the version that built them only"),
        ("jetson-nano", {"version_compatible": True}, "from TensorRT 8.6 on"),
        ("jetson-orin-nano", {"version_compatible": True}, None),
        ("jetson-orin-nano", {"hardware_compatibility": "ampere+"}, "TensorRT has none on Jetson"),
        ("t4", {"hardware_compatibility": "ampere+"}, "NVIDIA T4 has 7.5"),
        ("l4", {"hardware_compatibility": "ampere+"}, None),
        ("rtx-4060-laptop", {"hardware_compatibility": "ampere+"}, None),
        ("raspberry-pi-5", {"version_compatible": True}, None),
    ],
)
def test_what_a_stack_cannot_build_is_refused_before_anything_is_made(
    device: str, asked: dict[str, Any], words: str | None
) -> None:
    known = load_device(device)
    found = tensorrt.refusal_of_options(ExportSection(**asked), known, known.stacks[0])
    assert found is None if words is None else words in str(found)


def test_plan_is_loaded_only_where_it_belongs(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(graphs["fp16"], tmp_path)
    built = json.loads(engine.model_dump_json())
    if this_gpu() is None:
        assert "needs an NVIDIA GPU" in str(tensorrt.loadable(adapter(), engine.file, built))
        with pytest.raises(InputError, match="needs an NVIDIA GPU"):
            tensorrt.inspect_engine(adapter(), engine)
    gpu = {"device": "NVIDIA GeForce RTX 3060", "compute_capability": "8.6", "memory_mib": 12044}
    monkeypatch.setattr(tensorrt, "this_gpu", lambda: gpu)
    assert "8.9, this GPU has 8.6" in str(tensorrt.loadable(adapter(), engine.file, built))
    monkeypatch.setitem(gpu, "compute_capability", "8.9")
    older = built | {"builder": "TensorRT-RTX 1.6.0.3"}
    assert "1.6.0.3 and runs on that version only" in str(tensorrt.loadable(adapter(), engine.file, older))
    # its own word is no reason to load code: only this process's, which built it, or the user's
    foreign = tmp_path / "foreign.engine"
    foreign.write_bytes(engine.file.read_bytes() + b"code")
    claims = built | {"version_compatible": True, "sha256": file_hash(foreign)}
    with monkeypatch.context() as patch:
        patch.setattr(tensorrt, "_validity", lambda adapter, plan: None)
        with pytest.raises(InputError, match="brings code that would run here"):
            tensorrt.open_plan(adapter(), foreign, claims)
        for plan, facts, allow in ((foreign, claims, True), (engine.file, built | {"version_compatible": True}, False)):
            with pytest.raises(EdgestillError, match="cannot load the engine"):  # the runtime was asked: no driver here
                tensorrt.open_plan(adapter(), plan, facts, allow_code=allow)
    # the manifest agrees, so the runtime itself is asked; without a driver it cannot vouch for it
    assert "refuses the engine" in str(tensorrt.loadable(adapter(), engine.file, built))
    engine.file.write_bytes(b"something else")
    assert "another SHA-256" in str(tensorrt.loadable(adapter(), engine.file, built))
