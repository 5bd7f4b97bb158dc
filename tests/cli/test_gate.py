"""The gates of `edgestill compare`: what is written is what is meant."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.report.gate import UNITS, Gate, Quantity, higher_is_better, parse_gates
from profiles.errors import InputError

quantities = st.sampled_from(get_args(Quantity))
ends = st.floats(-1e3, 1e3)


@st.composite
def gates(draw: st.DrawFn) -> Gate:
    thousandths = draw(st.integers(-100_000, 100_000))
    relative = draw(st.booleans())
    return Gate(draw(quantities), thousandths / 1000 / (100 if relative else 1), relative)


@given(st.lists(gates(), min_size=1, max_size=5, unique_by=lambda gate: gate.quantity))
def test_what_is_written_is_read_back(wanted: list[Gate]) -> None:
    found = parse_gates(" , ".join(str(gate) for gate in wanted))
    assert [(gate.quantity, gate.relative) for gate in found] == [(gate.quantity, gate.relative) for gate in wanted]
    assert all(math.isclose(a.amount, b.amount, abs_tol=1e-12) for a, b in zip(found, wanted, strict=True))
    assert [str(gate) for gate in found] == [str(gate) for gate in wanted]


@given(st.text(max_size=30))
def test_any_text_is_a_gate_or_explained(text: str) -> None:
    fix = "none was needed"
    found: tuple[Gate, ...] = ()
    try:
        found = parse_gates(text)
    except InputError as error:
        fix = error.fix or ""
    assert fix
    assert all(math.isfinite(gate.amount) for gate in found)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not a gate"),
        ("latency", "not a gate"),
        ("speed=+5%", "latency, metric, size, memory, energy"),
        ("latency=5%", "no sign"),
        ("latency=+5pt", "in % or ms"),
        ("metric=-0.3ms", "in % or pt"),
        ("latency=+nan%", "not a change"),
        ("latency=+1e3%", "not a change"),
        ("latency=+5%,latency=+6%", "two gates"),
    ],
)
def test_a_wrong_gate_is_refused_with_what_would_be_right(text: str, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        parse_gates(text)
    assert caught.value.fix


@pytest.mark.parametrize(("text", "amount"), [("latency=+5%", 0.05), ("metric=-0.3pt", -0.3), ("size=0%", 0.0)])
def test_units(text: str, amount: float) -> None:
    (gate,) = parse_gates(text)
    assert gate.amount == pytest.approx(amount)
    assert gate.relative == text.endswith("%")
    assert set(UNITS) == set(get_args(Quantity))


@given(gates(), ends, ends, ends)
def test_a_decision_holds_for_every_change_in_the_interval(gate: Gate, one: float, other: float, share: float) -> None:
    low, high = min(one, other), max(one, other)
    inside = min(max(low + (share / 2000 + 0.5) * (high - low), low), high)
    kept = inside >= gate.amount if higher_is_better(gate.quantity) else inside <= gate.amount
    decision = gate.decide(low, high)
    assert decision == "inconclusive" or (decision == "pass") == kept
    # an exact figure is always decided
    assert gate.decide(inside, inside) == ("pass" if kept else "fail")
