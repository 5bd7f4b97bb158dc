"""Device files are complete and consistent, this machine is detected, and impossible targets are refused by a fact."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from profiles import device as devices
from profiles.device import Device, Peaks, TargetSection, load_device, resolve_target
from profiles.errors import InputError

SHIPPED = sorted(path.stem for path in (Path(devices.__file__).parent / "devices").glob("*.toml"))


@pytest.fixture(autouse=True)
def no_devices_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_CONFIG", str(tmp_path / "config"))


def resolve(device: str, base: Path = Path(), **keys: Any) -> devices.Target:
    return resolve_target(TargetSection(name="camera", device=device, **keys), base=base)


def test_every_device_of_the_table_has_a_file() -> None:
    wanted = {
        "jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-agx-xavier", "jetson-nano", "jetson-thor",
        "rtx-4060-laptop", "rtx-a2000", "rtx-a2000-12gb", "rtx-5060", "t4", "l4", "h200", "raspberry-pi-5",
    }  # fmt: skip
    assert wanted <= set(SHIPPED)
    assert devices.list_devices() == ["this-machine", *SHIPPED]


@pytest.mark.parametrize("name", SHIPPED)
def test_device_file_states_sources_date_and_the_evidence_of_every_fact(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    assert device.sources
    assert device.date.startswith("2026-")
    facts = [fact for fact in (*Peaks.model_fields, "memory_gib") if getattr(device, fact) is not None]
    assert set(facts) == set(device.evidence)
    for mode in device.power_modes:
        stated = {fact for fact in Peaks.model_fields if getattr(mode, fact) is not None}
        assert stated <= set(mode.evidence)
    for stack in device.stacks:
        assert stack.source
        assert {"max_opset", "max_ir"} <= set(stack.evidence)


@pytest.mark.parametrize("name", SHIPPED)
def test_precisions_are_those_of_the_compute_capability(name: str) -> None:
    device = load_device(name)
    if device.compute_capability is None:
        assert device.kind == "cpu"
        return
    major, minor = (int(part) for part in device.compute_capability.split("."))
    expected = {"fp32"} | {
        precision for precision, needs in devices._NEEDS_CAPABILITY.items() if (major, minor) >= needs
    }
    assert set(device.precisions) == expected


@pytest.mark.parametrize("name", SHIPPED)
def test_dialect_follows_from_the_runtime(name: str) -> None:
    for stack in load_device(name).stacks:
        major = int(stack.runtime_version.split(".")[0])
        if stack.runtime == "tensorrt" and major <= 8:
            assert stack.dialect == "weak-tensorrt"
            assert stack.max_opset <= 17
        else:
            assert stack.dialect == "qdq-s8s8"


@pytest.mark.parametrize("name", SHIPPED)
def test_peaks_are_ordered_as_the_hardware_is(name: str) -> None:
    device = load_device(name)
    fp32, fp16, int8 = (device.peak(precision) for precision in ("fp32", "fp16", "int8"))
    assert fp32 is not None
    assert device.bandwidth() is not None
    assert fp16 is None or fp16 > fp32
    assert int8 is None or int8 >= 1.9 * (fp16 or fp32)


def test_super_is_a_power_mode_of_the_orin_nano() -> None:
    device = load_device("jetson-orin-nano")
    target = {mode: resolve("jetson-orin-nano", power_mode=mode).power_mode for mode in ("15W", "25W", "MAXN_SUPER")}
    assert device.peak("int8", target["15W"]) == 20e12
    assert device.peak("int8", target["MAXN_SUPER"]) == 33e12
    assert device.bandwidth(target["15W"]) == 68e9
    assert device.bandwidth(target["25W"]) == 102e9
    assert device.peak("fp32") == device.peak("fp32", target["MAXN_SUPER"])


def test_stack_facts_of_jetpack() -> None:
    stacks = {stack.name: stack for name in SHIPPED for stack in load_device(name).stacks}
    assert stacks["jetpack-6.2"].runtime_version == "10.3.0"
    assert stacks["jetpack-6.2"].python == "3.10"
    assert stacks["jetpack-6.2"].onnxruntime == "1.23.2"
    assert stacks["jetpack-5.1"].runtime_version == "8.5.2"
    assert stacks["jetpack-4.6"].runtime_version == "8.2.1"
    assert stacks["jetpack-7.2.2"].runtime_version == "11.4.1"


def test_rates_of_bf16_and_tf32_derive_from_fp16() -> None:
    orin, h200 = load_device("jetson-agx-orin"), load_device("h200")
    assert orin.peak("bf16") == orin.peak("fp16") == 42.6e12
    assert orin.peak("tf32") == 21.3e12
    assert h200.peak("tf32") == 494.5e12
    assert load_device("t4").peak("bf16") is None
    assert load_device("jetson-thor").peak("int8") is None  # usable, but its peak was not found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jetson-nano", "small"),
        ("raspberry-pi-5", "small"),
        ("jetson-orin-nano", "medium"),
        ("jetson-orin-nx", "medium"),
        ("this-machine", "medium"),
        ("jetson-agx-orin", "large"),
        ("rtx-a2000", "large"),
        ("h200", "large"),
    ],
)
def test_size_class(name: str, expected: str) -> None:
    if name == "this-machine" and devices.detect().machine != "x86-64":
        pytest.skip("the size class of another processor depends on its peak")
    assert resolve(name).size_class == expected


def test_default_stack_is_the_newest() -> None:
    assert resolve("jetson-agx-orin").stack.name == "jetpack-7.2.2"
    assert resolve("jetson-agx-orin", stack="jetpack-6.2").stack.runtime_version == "10.3.0"


@pytest.mark.parametrize(
    ("device", "precision", "fact"),
    [
        ("rtx-a2000", "fp8", "compute capability 8.6; FP8 needs 8.9 or higher"),
        ("jetson-orin-nano", "fp8", "compute capability 8.7; FP8 needs 8.9 or higher"),
        ("jetson-nano", "int8", "compute capability 5.3; INT8 needs 6.1 or higher"),
        ("t4", "bf16", "compute capability 7.5; BF16 needs 8.0 or higher"),
        ("t4", "tf32", "compute capability 7.5; TF32 needs 8.0 or higher"),
        ("h200", "fp4", "compute capability 9.0; FP4 needs 10.0 or higher"),
        ("raspberry-pi-5", "fp16", "computes FP16 graphs in FP32"),
        ("raspberry-pi-5", "fp8", "no FP8 kernels"),
    ],
)
def test_impossible_precision_is_refused_by_the_fact(device: str, precision: str, fact: str) -> None:
    with pytest.raises(InputError, match=f"cannot compute in {precision.upper()}") as caught:
        resolve(device, precision=precision)
    assert fact in str(caught.value.evidence)
    assert 'precision = "auto"' in str(caught.value.fix)
    assert caught.value.where == "target[0].precision"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_listed_precision_is_accepted(name: str) -> None:
    for precision in ("auto", *load_device(name).precisions):
        assert resolve(name, precision=precision).section.precision == precision


def test_unknown_names_suggest_the_nearest() -> None:
    cases = [
        ({"device": "jetson-orin-nan"}, "device", "jetson-orin-nano"),
        ({"device": "jetson-nano", "stack": "jetpack-4.5"}, "stack", "jetpack-4.6"),
        ({"device": "jetson-orin-nano", "power_mode": "15w"}, "power_mode", "15W"),
    ]
    for keys, key, nearest in cases:
        with pytest.raises(InputError) as caught:
            resolve(**keys)
        assert caught.value.where == f"target[0].{key}"
        assert f'did you mean "{nearest}"' in str(caught.value.fix)


def test_power_mode_that_the_stack_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="MAXN_SUPER") as caught:
        resolve("jetson-orin-nano", stack="jetpack-6.1", power_mode="MAXN_SUPER")
    assert 'stack = "jetpack-6.2"' in str(caught.value.fix)


def test_device_without_power_modes_says_so() -> None:
    with pytest.raises(InputError) as caught:
        resolve("raspberry-pi-5", power_mode="15W")
    assert caught.value.fix == "leave power_mode out"


def test_this_machine_is_detected() -> None:
    target = resolve("this-machine")
    device = target.device
    assert target.is_this_machine
    assert target.name == "camera"
    assert device.kind == "cpu"
    assert device.cores is not None
    assert device.cores >= 1
    assert device.memory_gib is not None
    assert device.memory_gib > 0.1
    assert device.bandwidth() is None
    assert "fp32" in device.precisions
    assert not resolve("t4").is_this_machine


def test_stack_of_this_machine_is_the_installed_onnxruntime() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    stack = resolve("this-machine").stack
    assert stack.runtime == "onnxruntime"
    assert stack.runtime_version == onnxruntime.__version__
    assert stack.name == f"onnxruntime-{onnxruntime.__version__}"
    expected = "qdq-s8s8" if devices.detect().machine == "aarch64" else "qdq-u8s8"
    assert stack.dialect == expected


def test_installed_onnxruntime_loads_the_stated_opset_and_ir() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    stack = resolve("this-machine").stack
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", stack.max_opset)])
    model.ir_version = stack.max_ir
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("release", "expected"),
    [("1.23.2", (23, 11)), ("1.24.0", (23, 11)), ("1.25.1", (26, 13)), ("1.31.1", (26, 13)), ("1.99.0", (26, 13)),
     ("1.20.0", (23, 11)), ("2.0.0", (26, 13))],
)  # fmt: skip
def test_onnxruntime_limits(release: str, expected: tuple[int, int]) -> None:
    assert devices.onnxruntime_limits(release) == expected


@pytest.mark.parametrize(
    ("machine", "entries", "expected"),
    [
        ("x86-64", {"flags": "fpu sse4_2 avx2 fma"}, ("avx2",)),
        ("x86-64", {"flags": "avx2 avx512f avx512_vnni"}, ("avx2", "avx512", "vnni")),
        ("x86-64", {"flags": "avx2 avx_vnni"}, ("avx2", "vnni")),
        ("x86-64", {}, ()),
        ("aarch64", {"Features": "fp asimd asimdhp asimddp"}, ("neon", "dotprod")),
        ("aarch64", {"Features": "fp asimd"}, ("neon",)),
        ("aarch64", {"Features": "asimd asimddp i8mm"}, ("neon", "dotprod", "i8mm")),
    ],
)
def test_instruction_sets_are_read_from_cpuinfo(
    machine: str, entries: dict[str, str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_sysctl", lambda key: None)
    assert devices._isa(machine, entries) == expected


@pytest.mark.parametrize(("isa", "per_clock"), [("avx2", 32), ("avx2 avx512f", 64)])
def test_peak_of_this_machine_is_cores_times_clock_times_width(
    isa: str, per_clock: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_machine", lambda: "x86-64")
    monkeypatch.setattr(devices, "_cpuinfo", lambda: {"flags": isa, "model name": "Test CPU"})
    monkeypatch.setattr(devices, "_highest_clock_ghz", lambda: 3.0)
    device = devices.detect.__wrapped__()
    assert device.peak("fp32") == pytest.approx((device.cores or 0) * 3e9 * per_clock)
    assert device.peak("int8") == pytest.approx(4 * (device.peak("fp32") or 0))
    assert device.title.startswith("Test CPU, ")


def test_peak_of_this_machine_is_absent_without_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_highest_clock_ghz", lambda: None)
    assert devices.detect.__wrapped__().peak("fp32") is None


def own_device(folder: Path, **changes: Any) -> Path:
    """A device file of the user's, from the shipped one of the T4."""
    text = (Path(devices.__file__).parent / "devices" / "t4.toml").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_device_file_is_relative_to_the_recipe(tmp_path: Path) -> None:
    own_device(tmp_path, **{'title = "NVIDIA T4"': 'title = "My card"'})
    assert resolve("mine.toml", base=tmp_path).device.title == "My card"
    assert load_device(str(tmp_path / "mine.toml")).title == "My card"


@pytest.mark.parametrize(
    ("change", "message", "fix"),
    [
        ({"fp32_tflops = 8.1": "fp32_tflop = 8.1"}, "fp32_tflop", 'did you mean "fp32_tflops"?'),
        ({"fp32_tflops = 8.1": "fp32_tflops = -1"}, "fp32_tflops", None),
        ({"fp32_tflops = 8.1": 'fp32_tflops = "fast"'}, "fp32_tflops", None),
        ({'dialect = "qdq-s8s8"': 'dialect = "qdq"'}, "stack.0.dialect", None),
        ({"max_opset = 25": "opset = 25"}, "stack.0.max_opset", None),
        ({"watts = 70": "watt = 70"}, "power_mode.0.watt", 'did you mean "watts"?'),
        ({"watts = 70": "fp32_tflops = 9.0"}, "above the device's own", None),
        ({"watts = 70": 'stacks = ["jetpack-1"]'}, "unknown stacks: jetpack-1", None),
        ({'compute_capability = "7.5"': 'compute_capability = "sm75"'}, "compute_capability", None),
        ({'precisions = ["fp32", "fp16", "int8"]': 'precisions = ["fp12"]'}, "precisions", None),
        ({'name = "t4"': ""}, "name", None),
        ({"[[power_mode]]": "[[power_modes]]"}, 'unknown key "power_modes"', "write [[power_mode]]"),
    ],
)
def test_mistake_in_a_device_file_is_located(
    tmp_path: Path, change: dict[str, str], message: str, fix: str | None
) -> None:
    path = own_device(tmp_path, **change)
    with pytest.raises(InputError) as caught:
        load_device(str(path))
    assert message in caught.value.message
    assert caught.value.where == str(path)
    assert fix is None or caught.value.fix == fix


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"[[", b""])
def test_damaged_device_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(InputError):
        resolve("mine.toml", base=tmp_path)


@pytest.mark.parametrize("content", ["stack = 3", 'name = "x"\nstack = {}', "power_mode = [1]"])
def test_device_file_with_wrong_shapes_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "mine.toml").write_text(content)
    with pytest.raises(InputError):
        resolve("mine.toml", base=tmp_path)


def test_missing_device_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such device file"):
        resolve("missing.toml", base=tmp_path)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(InputError, match="cannot read"):
        resolve("folder.toml", base=tmp_path)


def test_file_may_not_pass_for_this_machine(tmp_path: Path) -> None:
    own_device(tmp_path, **{'name = "t4"': 'name = "this-machine"'})
    assert not resolve("mine.toml", base=tmp_path).is_this_machine


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ""),
        ("name", "a/b"),
        ("name", "../up"),
        ("latency_ms", 0),
        ("latency_ms", float("nan")),
        ("latency_ms", float("inf")),
        ("percentile", 98),
        ("batch", 0),
        ("memory_mib", -1),
        ("file_size_mib", 0),
        ("metric_floor", 1.5),
        ("metric_floor", -0.1),
        ("max_metric_drop", 2),
        ("precision", "int4"),
        ("latency_scope", "wall"),
        ("latncy_ms", 3),
    ],
)
def test_target_outside_its_range_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValidationError):
        TargetSection.model_validate({"name": "camera"} | {key: value})


@given(st.floats(0.001, 1e6), st.sampled_from([50, 90, 95, 99, 99.9]), st.integers(1, 4096), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_target_survives_being_stored(latency: float, percentile: float, batch: int, floor: float) -> None:
    section = TargetSection(name="a", latency_ms=latency, percentile=percentile, batch=batch, metric_floor=floor)
    assert TargetSection.model_validate_json(section.model_dump_json()) == section


@pytest.mark.parametrize("name", ["this-machine", *SHIPPED])
def test_device_survives_being_stored(name: str) -> None:
    device = load_device(name)
    assert Device.model_validate_json(device.model_dump_json()) == device


def test_device_files_hold_no_machine_of_ours() -> None:
    for path in (Path(devices.__file__).parent / "devices").glob("*.toml"):
        assert tomllib.loads(path.read_text())["name"] == path.stem
