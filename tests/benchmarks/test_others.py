"""A short turn of `python -m tests.benchmarks.others`: the real LoadGen and the real loop of benchmark_app."""

from __future__ import annotations

import math
import threading

import pytest

from tests.benchmarks.others import Baton, Ratio, compare, page

pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is not installed")
pytest.importorskip("openvino", reason="openvino is not installed")


def test_the_three_measure_the_same_queries_and_the_page_tells_the_ratios() -> None:
    rows = compare(repetitions=1, queries=70)
    assert [(row.other, row.percentile) for row in rows] == [
        ("loadgen", 50),
        ("loadgen", 90),
        ("benchmark_app", 50),
        ("benchmark_app", 90),
    ]
    assert all(math.isfinite(row.middle) and row.middle > 0 for row in rows)
    assert all(low.ours_ms[0] <= high.ours_ms[0] for low, high in ((rows[0], rows[1]), (rows[2], rows[3])))
    facts = dict.fromkeys(("created", "cpu", "loadgen", "openvino", "onnxruntime"), "x") | {
        "repetitions": 1,
        "queries": 70,
    }
    assert page(rows, facts).count("\n| ") == 1 + len(rows)


def test_a_ratio_off_by_more_than_is_allowed_does_not_hold() -> None:
    def ratio(*ours: float) -> Ratio:
        return Ratio("loadgen", "onnxruntime", 50, ours, (1.0,) * len(ours))

    assert ratio(1.02, 2.0, 0.99).holds, "the median counts, not one repetition"
    assert not ratio(1.04, 1.05, 1.0).holds


def test_the_parties_take_turns_of_their_length_until_each_is_through() -> None:
    baton, order = Baton({"a": 2, "b": 3}), []

    def work(party: str, queries: int) -> None:
        for _ in range(queries):
            baton.take(party)
            order.append(party)
        baton.leave(party)

    threads = [threading.Thread(target=work, args=each) for each in (("a", 5), ("b", 7))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert "".join(order) == "aabbbaabbbab"
