from __future__ import annotations

from pathlib import Path

import pytest

from export import Plan, tensorrt
from export.planning import plan
from profiles.errors import EdgestillError
from tests.export.conftest import IMAGES, device_and_stack
from tests.export.models import calibration, trained

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra tensorrt-rtx)")


def adapter() -> tensorrt.Adapter:
    found = tensorrt.load_adapter(rtx=True)
    assert found is not None
    return found


def graph(rtx_plan: Plan, name: str) -> Path:
    file = rtx_plan[name].file
    assert file is not None
    return file


def test_rtx_target_gets_engines_without_a_gpu(rtx_plan: Plan) -> None:
    for candidate in rtx_plan.usable:
        assert candidate.engine is not None
        assert candidate.static_engine is not None
        assert candidate.engine.compute_capability == "8.9"
        assert candidate.engine.batch == (1, 4, 4)
        assert candidate.static_engine.batch == (1, 1, 1)
        assert candidate.engine.more_profiles == ((1, 1, 1),)
        assert candidate.engine.workspace_mib == 4096
        assert candidate.engine.device is None
        assert candidate.engine.file.stat().st_size == candidate.engine.size_bytes > 10_000
        assert "unverified" in candidate.engine.realised_precision


def test_engines_are_reused(rtx_plan: Plan) -> None:
    device, stack = device_and_stack("rtx-4060-laptop")
    before = {candidate.name: candidate.engine for candidate in rtx_plan.candidates}
    again = plan(
        trained(),
        held_out=IMAGES,
        calibration=calibration(),
        stack=stack,
        device=device,
        folder=rtx_plan.folder,
        model_key="tiny",
        batch=4,
    )
    assert again.reused == ()  # no score was given, so the figures are made anew
    assert {candidate.name: candidate.engine for candidate in again.candidates} == before


@pytest.mark.parametrize("capability", ["8.0", "8.6", "12.0"])
@pytest.mark.parametrize("name", ["fp32", "fp16", "int8-fp16", "int8-fp32"])
def test_every_precision_builds_from_ampere_on(rtx_plan: Plan, tmp_path: Path, capability: str, name: str) -> None:
    built = tensorrt.build_engine(
        adapter(), graph(rtx_plan, name), tmp_path / "e", capability=capability, batch=(1, 1, 1), precision=name
    )
    assert built.size_bytes > 10_000


def test_turing_takes_fp16_and_refuses_fp32(rtx_plan: Plan, tmp_path: Path) -> None:
    options = {"capability": "7.5", "batch": (1, 1, 1), "precision": ""}
    tensorrt.build_engine(adapter(), graph(rtx_plan, "fp16"), tmp_path / "e", **options)  # type: ignore[arg-type]
    with pytest.raises(EdgestillError, match="cannot build an engine") as caught:
        tensorrt.build_engine(adapter(), graph(rtx_plan, "fp32"), tmp_path / "e", **options)  # type: ignore[arg-type]
    assert "SM75" in str(caught.value.evidence)


def test_capability_that_rtx_does_not_know_is_named(rtx_plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(EdgestillError, match=r"no engine for compute capability 8\.7"):
        tensorrt.build_engine(
            adapter(), graph(rtx_plan, "fp32"), tmp_path / "e", capability="8.7", batch=(1, 1, 1), precision="fp32"
        )


def test_missing_tensorrt_is_a_note_and_not_a_crash(
    rtx_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    tensorrt.load_adapter.cache_clear()
    try:
        device, stack = device_and_stack("rtx-4060-laptop")
        found = plan(
            trained(),
            held_out=IMAGES,
            calibration=None,
            stack=stack,
            device=device,
            folder=tmp_path,
            model_key="tiny",
            precisions=("fp32",),
        )
    finally:
        monkeypatch.undo()
        tensorrt.load_adapter.cache_clear()
    assert found["fp32"].usable
    assert found["fp32"].engine_note == "not built: pip install 'edgestill[tensorrt-rtx]'"
