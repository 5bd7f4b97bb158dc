"""How limits become a target's verdict, and targets the exit status. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

Verdict = Literal["pass", "fail", "inconclusive", "not measured"]
RowVerdict = Literal["pass", "fail", "inconclusive", "not measured", "error"]
"""A target's verdict; `error` says that edgestill could not make or measure its artefact."""

WORST_FIRST: tuple[RowVerdict, ...] = ("error", "fail", "inconclusive", "not measured", "pass")


class Judged(Protocol):
    """Anything that carries a verdict: a limit, or a target's row."""

    @property
    def verdict(self) -> RowVerdict:
        """The verdict."""
        ...


def overall_verdict(limits: Iterable[Judged], *, measured: bool = True, error: str | None = None) -> RowVerdict:
    """The worst of a target's limits, in the order fail, inconclusive, not measured, pass.

    Args:
        limits: the target's limits, each with its verdict.
        measured: False when the artefact never ran on its device. A target without limits then is `not measured`, not
            `pass`, and so is one whose limits (a file size, say) were all decided without the device.
        error: why edgestill could not do its work for this target; then the verdict is `error`, whatever the limits.
    """
    if error is not None:
        return "error"
    found: set[RowVerdict] = {limit.verdict for limit in limits}
    found.add("pass" if measured else "not measured")
    return next(verdict for verdict in WORST_FIRST if verdict in found)


def exit_status(rows: Iterable[Judged], require_measured: bool = False) -> int:
    """0 nothing failed, 1 edgestill could not do it, 3 a limit failed, 4 inconclusive; worst wins in the order 1, 3, 4.

    `not measured` leaves the status alone, unless `require_measured`: then it counts as undecided, which is 4.
    """
    found = {row.verdict for row in rows}
    if "error" in found:
        return 1
    if "fail" in found:
        return 3
    if "inconclusive" in found or (require_measured and "not measured" in found):
        return 4
    return 0
