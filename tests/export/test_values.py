"""Models whose output is no class logits: INT8 is held to its error, since there are no decisions to keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export.own import export_model, parse_example
from export.parity import spread_error
from export.section import ExportSection
from profiles.errors import EdgestillError
from tests.export.conftest import device_and_stack

WIDE = 3e4


class Regression(nn.Module):
    """features (N, 6) to one value each (N, 1)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.value = nn.Linear(6, 16), nn.Linear(16, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.value(nn.functional.silu(self.hidden(features)))


class Collapsing(Regression):
    """The same with one hidden channel that is so wide that the others are lost in INT8; what reads it is narrower."""

    def forward(self, features: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.hidden(features))
        wide = hidden * torch.where(torch.arange(16) == 3, WIDE, 1.0)
        return nn.functional.linear(wide, self.value.weight / torch.where(torch.arange(16) == 3, WIDE, 1.0))


SAMPLES = {"features": np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)}
EXAMPLES = [parse_example("features:1x6")]


def test_a_regression_whose_int8_is_sound_gets_it(tmp_path: Path) -> None:
    device, stack = device_and_stack("this-machine")
    made, _ = export_model(Regression(), EXAMPLES, device=device, stack=stack, folder=tmp_path, samples=SAMPLES)
    assert [candidate.name for candidate in made.usable] == ["fp32", "int8"]
    rung = made["int8"].parity[-1]
    assert rung.agreement is None
    assert rung.spread_error is not None
    assert 0 < rung.spread_error < 0.1


def test_a_regression_whose_int8_collapses_is_refused_and_rescued(tmp_path: Path) -> None:
    device, stack = device_and_stack("this-machine")
    options = {"device": device, "stack": stack, "samples": SAMPLES}
    made, _ = export_model(Collapsing(), EXAMPLES, folder=tmp_path / "auto", **options)  # type: ignore[arg-type]
    assert "of the outputs' spread" in str(made["int8"].refused)
    assert [candidate.name for candidate in made.usable] == ["fp32", "int8-mixed"]
    collapsed, rescued = (made[name].parity[-1].spread_error for name in ("int8", "int8-mixed"))
    assert collapsed is not None
    assert collapsed > 0.5
    assert rescued is not None
    assert rescued < 0.1
    # whoever accepts it says so
    lenient = ExportSection(int8_tolerance=1.0)
    accepted, _ = export_model(Collapsing(), EXAMPLES, folder=tmp_path / "any", section=lenient, **options)  # type: ignore[arg-type]
    assert accepted["int8"].usable


def test_int8_that_was_asked_for_and_cannot_be_sound_is_an_error(tmp_path: Path) -> None:
    device, stack = device_and_stack("this-machine")
    with pytest.raises(EdgestillError, match='rung "int8"') as caught:
        export_model(
            Regression(), EXAMPLES, device=device, stack=stack, folder=tmp_path, samples=SAMPLES, precisions=("int8",),
            section=ExportSection(int8_tolerance=1e-4),
        )  # fmt: skip
    assert "of the outputs' spread" in str(caught.value.evidence)


shapes = st.sampled_from([(8,), (8, 1), (8, 5), (8, 3, 4), (8, 2, 3, 3)])


@given(shapes, st.integers(0, 99), st.floats(1e-3, 1e3), st.floats(-100, 100))
@settings(max_examples=60, deadline=None)
def test_error_against_the_spread_depends_on_neither_scale_nor_offset(
    shape: tuple[int, ...], seed: int, scale: float, offset: float
) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal(shape)
    other = reference + 0.1 * rng.standard_normal(shape)
    error = spread_error(reference, other)
    assert 0 < error < 0.5
    assert spread_error(scale * (reference + offset), scale * (other + offset)) == pytest.approx(error, rel=1e-3)
    assert spread_error(reference, reference) == 0


@given(shapes, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_an_output_that_does_not_depend_on_the_sample_has_an_error_of_one(shape: tuple[int, ...], seed: int) -> None:
    reference = np.random.default_rng(seed).standard_normal(shape)
    constant = np.broadcast_to(reference.mean(0), shape)
    assert spread_error(reference, constant) == pytest.approx(1)
    assert spread_error(reference, np.full(shape, np.nan)) == 1


def test_columns_of_small_numbers_count_like_those_of_large_ones() -> None:
    rng = np.random.default_rng(0)
    boxes, scores = rng.uniform(0, 640, (16, 4, 50)), rng.uniform(0, 1, (16, 8, 50))
    reference = np.concatenate([boxes, scores], 1)
    lost = np.concatenate([boxes, np.zeros_like(scores)], 1)  # one INT8 scale for both
    assert spread_error(reference, lost) > 0.8
    assert spread_error(np.moveaxis(reference, 1, 2), np.moveaxis(lost, 1, 2)) > 0.8


def test_columns_in_which_samples_do_not_differ_are_left_out() -> None:
    reference = np.stack([np.arange(8.0), np.full(8, 5.0)], 1)
    assert spread_error(reference, reference + np.array([0.0, 0.3])) == 0
    assert spread_error(np.full((8, 1), 5.0), np.full((8, 1), 6.0)) == pytest.approx(0.2)
    assert spread_error(np.zeros((8, 1)), np.full((8, 1), 0.5)) == 0.5


class Lengths(nn.Module):
    """Rows (N, T, 4) to values (N, 2), by way of numbers that are 25 times as large with 7 steps as with 12."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.value = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, rows: Tensor) -> Tensor:
        length = torch.ones_like(rows[..., :1]).sum(1)
        hidden = torch.relu(self.hidden(rows)).mean(1) * (12 / length) ** 6
        return self.value(hidden * 1e4) / 1e4


def test_every_precision_is_compared_at_other_sizes(tmp_path: Path) -> None:
    device, stack = device_and_stack("this-machine")
    # a graphics card whose stack is ONNX Runtime gets FP16, too
    device = device.model_copy(update={"kind": "gpu", "precisions": ("fp32", "fp16", "int8")})
    rows = {"rows": np.random.default_rng(0).standard_normal((64, 12, 4)).astype(np.float32)}
    options = {"device": device, "stack": stack, "samples": rows}
    fixed, _ = export_model(Lengths(), [parse_example("rows:1x12x4")], folder=tmp_path / "fixed", **options)  # type: ignore[arg-type]
    assert [candidate.name for candidate in fixed.usable] == ["fp32", "fp16", "int8"]
    named = [parse_example("rows:1xsteps=12x4")]
    made, bundles = export_model(Lengths(), named, folder=tmp_path / "dynamic", **options)  # type: ignore[arg-type]
    assert [path.name for path in bundles] == ["fp32"]
    for name in ("fp16", "int8"):
        assert f'parity rung "{name} at other sizes" fails' in str(made[name].refused)
        assert made[name].parity[0].passed
    assert made["fp32"].parity[-1].name == "fp32 at other sizes"
    with pytest.raises(EdgestillError, match="at other sizes"):
        export_model(Lengths(), named, folder=tmp_path / "asked", precisions=("int8",), **options)  # type: ignore[arg-type]
