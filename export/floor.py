"""The metric that an exported graph has to keep. Light: pydantic only."""

from __future__ import annotations

from profiles.section import Section

KEPT_SHARE = 0.99
"""Without a floor of its own, a target accepts what keeps 99 % of the FP32 student's metric (MLPerf's rule)."""


class Floor(Section):
    """A target's own limits, as fractions; with neither of them, `KEPT_SHARE` of the FP32 metric."""

    metric_floor: float | None = None
    max_metric_drop: float | None = None

    def lowest(self, fp32: float) -> float:
        """The lowest metric that is accepted beside an FP32 graph whose metric is `fp32`.

        >>> Floor(metric_floor=0.9, max_metric_drop=0.01).lowest(0.95)
        0.94
        """
        limits = [] if self.metric_floor is None else [self.metric_floor]
        if self.max_metric_drop is not None:
            limits.append(round(fp32 - self.max_metric_drop, 12))
        return max(limits) if limits else KEPT_SHARE * fp32
