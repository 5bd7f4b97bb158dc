from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from export import Rung
from export.parity import (
    Limits,
    agreement,
    climb,
    first_divergence,
    graph_values,
    open_session,
    relative_error,
    run_torch,
    spread,
    torch_values,
)
from tests.export.conftest import IMAGES, paired
from tests.export.models import trained

LIMITS = Limits(1e-4, 0.995)
ROWS = np.arange(64)


def rung(path: Path, batches: tuple[int, ...] = (1, 2, 5)) -> Rung:
    some = {"image": IMAGES[:64]}
    return climb(
        "onnx",
        open_session(path),
        run_torch(trained(), some),
        some,
        ROWS,
        batches,
        LIMITS,
        exclusive=True,
        difference=paired,
    )


def damage(path: Path, name: str, folder: Path) -> Path:
    """The same graph with 10 % more in one weight."""
    model = onnx.load(str(path))
    tensor = next(entry for entry in model.graph.initializer if entry.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.1), name))
    damaged = folder / "damaged.onnx"
    damaged.write_bytes(model.SerializeToString())
    return damaged


def test_exported_graph_passes_at_every_batch(fp32_graph: Path) -> None:
    found = rung(fp32_graph)
    assert found.passed
    assert found.batches == (1, 2, 5)
    assert found.difference.value == 0


def test_damaged_graph_fails_and_the_damaged_node_is_named(fp32_graph: Path, tmp_path: Path) -> None:
    damaged = damage(fp32_graph, "mix.weight", tmp_path)
    assert not rung(damaged).passed
    few = {"image": IMAGES[:4]}
    by_torch = first_divergence(torch_values(trained(), few), damaged, few, 1e-4)
    by_graph = first_divergence(graph_values(fp32_graph, few), damaged, few, 1e-4)
    producer = next(node for node in onnx.load(str(damaged)).graph.node if "mix.weight" in node.input)
    assert by_graph is not None
    assert by_torch is not None
    assert by_graph.startswith(f"Conv {producer.output[0]} ")
    assert by_torch.startswith(f"Conv {producer.output[0]} ")
    assert first_divergence(torch_values(trained(), few), fp32_graph, few, 1e-4) is None


@given(st.integers(1, 2000), st.integers(1, 600))
@settings(max_examples=60, deadline=None)
def test_spread_rows_are_distinct_ordered_and_reach_both_ends(count: int, wanted: int) -> None:
    rows = spread(count, wanted)
    assert len(rows) <= min(count, wanted)
    assert np.all(np.diff(rows) > 0)
    assert rows[0] == 0
    assert rows[-1] == count - 1 or wanted == 1


@given(st.floats(1e-3, 1e3), st.floats(-0.5, 0.5))
@settings(max_examples=50, deadline=None)
def test_relative_error_does_not_depend_on_the_scale(scale: float, noise: float) -> None:
    reference = np.array([[1.0, -2.0, 0.5]])
    _, error = relative_error(reference * scale, (reference + noise) * scale)
    assert error == pytest.approx(abs(noise) / 2, rel=1e-6, abs=1e-12)


def test_not_finite_output_is_an_infinite_error() -> None:
    assert relative_error(np.ones(3), np.array([1.0, np.nan, 1.0]))[1] == np.inf


def test_agreement_counts_signs_when_classes_are_not_exclusive() -> None:
    reference, other = np.array([[1.0, -1.0], [3.0, 1.0]]), np.array([[2.0, 1.0], [1.0, 2.0]])
    assert agreement(reference, other, exclusive=True) == 0.5
    assert agreement(reference, other, exclusive=False) == 0.75
