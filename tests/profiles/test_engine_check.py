from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.artifact import file_hash
from profiles.engine_check import changed, mismatch, this_gpu

BUILT: dict[str, Any] = {"builder": "TensorRT 10.3.0", "compute_capability": "8.7", "device": "Orin"}
HERE: dict[str, Any] = {
    "runtime": "TensorRT",
    "version": "10.3.0",
    "compute_capability": "8.7",
    "device": "Orin",
    "memory_mib": 7620,
}
RTX: dict[str, Any] = {"builder": "TensorRT-RTX 1.7.1.116", "compute_capability": "8.9", "device": None}
RTX_HERE = {"runtime": "TensorRT-RTX", "version": "1.7.1.116", "compute_capability": "8.9", "device": "RTX 4060"}


@pytest.mark.parametrize(
    ("built", "here", "words"),
    [
        ({}, {}, None),
        ({"builder": "TensorRT 10.3.0.30"}, {}, None),  # trtexec tells three numbers, the module may tell four
        ({}, {"version": "10.3.1"}, "10.3.0 and runs on that version only; here is TensorRT 10.3.1"),
        ({"builder": "TensorRT 10.3.0.30"}, {"version": "10.3.0.26"}, "runs on that version only"),
        ({}, {"runtime": "TensorRT-RTX", "version": "1.7.1"}, "here is TensorRT-RTX 1.7.1, which reads none"),
        ({}, {"compute_capability": "8.6"}, "built for compute capability 8.7, this GPU has 8.6"),
        ({}, {"device": "Orin NX"}, "built on Orin and is tuned to that GPU; this one is Orin NX"),
        ({"hardware_compatibility": "same-capability"}, {"device": "Orin NX"}, None),
        ({"hardware_compatibility": "same-capability"}, {"compute_capability": "8.6"}, "this GPU has 8.6"),
        ({"hardware_compatibility": "ampere+"}, {"compute_capability": "9.0", "device": "H200"}, None),
        ({"hardware_compatibility": "ampere+"}, {"compute_capability": "7.5"}, "8.0 and later, this GPU has 7.5"),
        ({"version_compatible": True}, {"version": "10.16.2"}, None),
        ({"version_compatible": True}, {"version": "11.4.1"}, None),
        ({"version_compatible": True}, {"version": "10.2.0"}, "later versions of TensorRT 10 and 11"),
        ({"version_compatible": True}, {"version": "12.0.0"}, "later versions of TensorRT 10 and 11"),
        ({"version_compatible": True, "builder": "TensorRT 8.5.2"}, {}, "later versions of TensorRT 8 and 10"),
        ({"version_compatible": True, "builder": "TensorRT 8.6.1"}, {}, None),
        ({"version_compatible": True, "builder": "TensorRT 8.6.1"}, {"version": "11.0.0"}, "here is TensorRT 11.0.0"),
        ({"builder": "", "device": None, "compute_capability": None}, {}, None),
    ],
)
def test_engine_is_refused_with_the_reason(built: dict[str, Any], here: dict[str, Any], words: str | None) -> None:
    found = mismatch(BUILT | built, HERE | here)
    assert found is None if words is None else words in str(found)


@pytest.mark.parametrize(
    ("built", "capability", "words"),
    [
        ({}, "8.9", None),
        ({}, "12.0", "built for compute capability 8.9, this GPU has 12.0"),
        ({"hardware_compatibility": "ampere+"}, "8.6", None),
        ({"hardware_compatibility": "ampere+"}, "12.1", None),
        ({"hardware_compatibility": "ampere+"}, "7.5", "8.0 and later"),
        ({"hardware_compatibility": "ampere+"}, "9.0", "8.0 and later"),
    ],
)
def test_rtx_engines_are_for_capabilities_and_not_for_one_gpu(
    built: dict[str, Any], capability: str, words: str | None
) -> None:
    found = mismatch(RTX | built, RTX_HERE | {"compute_capability": capability})
    assert found is None if words is None else words in str(found)
    assert "that version only" in str(mismatch(RTX | built, RTX_HERE | {"version": "1.8.0"}))


@given(
    version=st.lists(st.integers(0, 400), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts))),
    capability=st.tuples(st.integers(5, 13), st.integers(0, 9)).map(lambda parts: f"{parts[0]}.{parts[1]}"),
    device=st.text(),
    level=st.sampled_from(["none", "same-capability"]),
    compatible=st.booleans(),
)
def test_engine_runs_where_it_was_built(
    version: str, capability: str, device: str, level: str, compatible: bool
) -> None:
    built = {
        "builder": f"TensorRT {version}",
        "compute_capability": capability,
        "device": device,
        "hardware_compatibility": level,
        "version_compatible": compatible,
    }
    here = {"runtime": "TensorRT", "version": version, "compute_capability": capability, "device": device}
    assert mismatch(built, here) is None


@given(builder=st.text(), version=st.text(), capability=st.text())
def test_whatever_a_manifest_says_is_answered(builder: str, version: str, capability: str) -> None:
    here = HERE | {"version": version}
    answer = mismatch({"builder": builder, "compute_capability": capability, "version_compatible": True}, here)
    assert answer is None or answer.startswith("the engine was built")


def test_altered_engine_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    assert changed(str(path), "0" * 64) is not None
    assert changed(str(path), file_hash(path)) is None
    assert changed(str(path), None) is None


def test_gpu_is_told_or_there_is_none() -> None:
    gpu = this_gpu()
    assert gpu is None or (gpu["device"] and "." in gpu["compute_capability"] and gpu["memory_mib"] > 0)
