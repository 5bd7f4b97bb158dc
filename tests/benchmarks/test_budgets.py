"""The evidence of budgets: what the compared rules choose, and one whole run in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.students.arch import Arch, parse_arch
from tests.benchmarks.budgets.__main__ import main
from tests.benchmarks.budgets.report import Priced, broken, by_flops, by_hand, shape, spread


def priced(**latencies: float) -> dict[Arch, Priced]:
    """Members by their words with _ for -, with their FP32 latency; INT8 takes half. Work grows with the square."""
    found = {}
    for word, latency in latencies.items():
        arch = parse_arch(word.replace("_", "-"))
        work = arch.width**2 * arch.depth * arch.kernel**2
        found[arch] = Priced(work, {"fp32": latency, "int8": latency / 2})
    return found


PRICES = priced(conv_w8_d1_k3=0.1, conv_w16_d1_k3=0.2, conv_w32_d1_k3=0.6, conv_w16_d2_k3=0.5, conv_w16_d1_k5=0.3)


def words(archs: list[Arch]) -> list[str]:
    return [str(arch) for arch in archs]


def test_scaling_by_hand_starts_from_the_widest_of_one_shape_that_fits() -> None:
    assert words(shape(PRICES)) == ["conv-w32-d1-k3", "conv-w16-d1-k3", "conv-w8-d1-k3"]
    assert words(by_hand(PRICES, 0.3))[0] == "conv-w32-d1-k3"
    assert words(by_hand(PRICES, 0.15))[0] == "conv-w16-d1-k3"
    assert words(by_hand(PRICES, 0.01)) == ["conv-w8-d1-k3"]


def test_counting_flops_takes_the_most_work_at_the_rate_of_a_reference() -> None:
    # 2,304 multiply-adds in 0.2 ms: twice as many should take 0.4 ms, but take 0.5
    assert str(by_flops(PRICES, 0.4)) == "conv-w16-d2-k3"
    assert str(by_flops(PRICES, 0.2)) == "conv-w16-d1-k3"
    assert str(by_flops(PRICES, 0.001)) == "conv-w8-d1-k3"
    assert broken(PRICES, [0.2, 0.4]) == 0.5


def test_limits_spread_from_the_fastest_member_to_the_slowest() -> None:
    limits = spread(PRICES, 3)
    assert limits[0] == pytest.approx(0.1)
    assert limits[-1] == pytest.approx(0.6)
    assert limits[1] / limits[0] == pytest.approx(limits[2] / limits[1])


@pytest.mark.slow
def test_the_whole_evidence_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGESTILL_CONFIG", str(tmp_path / "config"))
    # what a busy machine measured of the pool is not stored, and the benchmark then asks for a quiet one
    monkeypatch.setattr("profiles.measure.warnings_of", lambda *_: ())
    assert main(["--quick", "--folder", str(tmp_path), "--minutes", "0"]) == 130
    assert main(["--quick", "--folder", str(tmp_path)]) == 0
    assert "## Against simpler rules" in capsys.readouterr().out
    found = json.loads((tmp_path / "budgets.json").read_text())
    assert set(found["rules"]) == {"chosen", "hand", "flops"}
    assert found["not_run"] == []
    assert found["time"]["students"]
    assert all(row["verdict"] == "pass" for row in found["rules"]["chosen"].values())
