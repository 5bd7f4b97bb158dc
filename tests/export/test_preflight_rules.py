"""Every rule on a graph that passes and one that does not, and against what the installed runtimes say."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from export import tensorrt
from export.preflight import RULES, Finding, preflight
from export.preflight.operators import kernels_of, stored_kernels, tensorrt_has
from profiles.device import Device, Stack
from tests.export.conftest import device_and_stack
from tests.export.preflight_cases import HERE, PAIRS, RTX, Pair

RTX_PAIRS = [pair for pair in PAIRS if pair.device == RTX and pair.rule != "invalid-graph"]
ORT_PAIRS = [
    pair for pair in PAIRS if pair.device == HERE and not pair.rule.startswith(("external", "weights-not-read"))
]


def target(pair: Pair) -> tuple[Device, Stack]:
    if pair.device != "turing":
        return device_and_stack(pair.device, pair.stack)
    # no Turing card of the catalogue has TensorRT-RTX
    device, stack = device_and_stack(RTX)
    return device.model_copy(update={"compute_capability": "7.5"}), stack


def found(pair: Pair, model: onnx.ModelProto, folder: Path) -> list[Finding]:
    folder.mkdir(exist_ok=True)
    file = folder / "model.onnx"
    file.write_bytes(model.SerializeToString())
    (folder / "w.data").write_bytes(bytes(16))
    (folder / "short.data").write_bytes(bytes(8))
    device, stack = target(pair)
    return [entry for entry in preflight(file, device, stack, batch=pair.batch) if entry.rule == pair.rule]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_rule_passes_one_graph_and_stops_at_the_other(pair: Pair, tmp_path: Path) -> None:
    assert found(pair, pair.good, tmp_path) == []
    stopped = found(pair, pair.bad, tmp_path)
    assert pair.level in {entry.level for entry in stopped}
    for entry in stopped:
        assert entry.message
        assert entry.fact.rstrip().endswith(")") or ": " in entry.fact or "(" in entry.fact  # its source
        assert entry.fix


APART = [
    pair
    for pair in PAIRS
    if pair.bad.graph.initializer
    and not pair.rule.startswith(("external", "memory", "weights-inline", "weights-not-read"))
]


@pytest.mark.parametrize("pair", APART, ids=str)
def test_a_rule_finds_the_same_where_the_weights_lie_beside_the_graph(pair: Pair, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(pair.bad)
    for tensor in model.graph.initializer:
        if not tensor.HasField("raw_data"):  # onnx moves raw bytes alone
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    place = tmp_path / "model.onnx"
    onnx.save_model(model, str(place), save_as_external_data=True, location="model.data", size_threshold=0)
    apart = onnx.load(str(place), load_external_data=False)
    assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in apart.graph.initializer)
    expected = {(entry.message, entry.nodes) for entry in found(pair, pair.bad, tmp_path / "inside")}
    assert expected
    assert {(entry.message, entry.nodes) for entry in found(pair, apart, tmp_path)} == expected


def test_every_rule_has_a_pair_of_graphs() -> None:
    assert {pair.rule for pair in PAIRS} == set(RULES)
    assert len(RULES) >= 25


@pytest.fixture(scope="module")
def rtx() -> tensorrt.Adapter:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra tensorrt-rtx)")
    adapter = tensorrt.load_adapter(rtx=True)
    assert adapter is not None
    return adapter


@pytest.mark.parametrize("pair", RTX_PAIRS, ids=str)
def test_the_rtx_parser_agrees(pair: Pair, rtx: tensorrt.Adapter, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(pair.good.SerializeToString())
    assert tensorrt.parse(rtx, file) is None
    file.write_bytes(pair.bad.SerializeToString())
    refuses = tensorrt.parse(rtx, file) is not None
    assert refuses == (pair.level == "refused" and not pair.builder)


@pytest.mark.parametrize("pair", [pair for pair in RTX_PAIRS if pair.builder and pair.rule != "unknown-rank"], ids=str)
def test_the_rtx_builder_refuses_what_its_parser_lets_through(
    pair: Pair, rtx: tensorrt.Adapter, tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    options = {"capability": "8.9", "batch": (1, 1, 1), "precision": "fp32"}
    file.write_bytes(pair.good.SerializeToString())
    tensorrt.build_engine(rtx, file, tmp_path / "engine", **options)  # type: ignore[arg-type]
    file.write_bytes(pair.bad.SerializeToString())
    with pytest.raises(tensorrt.EdgestillError, match="cannot build an engine"):
        tensorrt.build_engine(rtx, file, tmp_path / "engine", **options)  # type: ignore[arg-type]


def test_the_table_of_operators_is_that_of_the_rtx_parser(rtx: tensorrt.Adapter) -> None:
    module = rtx.module
    logger = module.Logger(module.Logger.ERROR)
    builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)
    operators = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    ours = {name for name in operators if tensorrt_has(name, (11, 0), rtx=True)[0]}
    theirs = {name for name in operators if parser.supports_operator(name)}
    assert ours - theirs == set()
    # it names them, and then misses the plugin: found by parsing a graph of each
    assert theirs - ours == {"NonZero", "RoiAlign", "LinearAttention", "CausalConvWithState"}


@pytest.mark.parametrize("pair", ORT_PAIRS, ids=str)
def test_onnx_runtime_agrees(pair: Pair, tmp_path: Path) -> None:
    import onnxruntime

    def loads(model: onnx.ModelProto) -> bool:
        file = tmp_path / "model.onnx"
        file.write_bytes(model.SerializeToString())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception:  # ONNX Runtime's exceptions share no base class
            return False
        return True

    assert loads(pair.good)
    by_numbers = pair.rule in ("batch", "weights-not-finite", "duplicate-output", "memory")
    assert loads(pair.bad) == (pair.level == "note" or by_numbers)


def test_stored_kernels_are_those_of_the_version_they_name() -> None:
    stored = stored_kernels("1.31.1")
    installed = kernels_of("1.31.1")
    if installed.release != "1.31.1":
        pytest.skip("onnxruntime 1.31.1 is not installed")
    assert {name for name in stored.table if ":" not in name} == {name for name in installed.table if ":" not in name}
    for name in ("Conv", "Relu", "Cast", "TopK", "QuantizeLinear"):
        schema = onnx.defs.get_schema(name, 25)
        assert stored.types(name, schema.since_version, "T") == installed.types(name, schema.since_version, "T")


@pytest.mark.parametrize(
    ("release", "chosen"), [("1.20.0", "1.19"), ("1.23.2", "1.23"), ("1.40", "1.31"), ("1.8", "1.19")]
)
def test_an_unknown_version_takes_the_kernels_of_the_next_older_one(release: str, chosen: str) -> None:
    assert stored_kernels(release).release == chosen
    assert stored_kernels(release).has("DeformConv", "", 22) == (chosen == "1.31")


@pytest.mark.parametrize(
    ("operator", "release", "expected"),
    [
        ("NonZero", (8, 4), False),
        ("NonZero", (8, 5), True),
        ("LayerNormalization", (8, 5), False),
        ("Gelu", (10, 3), None),
        ("Gelu", (10, 13), True),
        ("Attention", (10, 13), False),
        ("RotaryEmbedding", (10, 15), True),
        ("Swish", (10, 15), False),
        ("DeformConv", (11, 4), True),
        ("Det", (11, 4), False),
    ],
)
def test_operators_of_tensorrt_by_version(operator: str, release: tuple[int, int], expected: bool | None) -> None:
    has, fact = tensorrt_has(operator, release)
    assert has is expected
    assert "onnx-tensorrt" in fact
