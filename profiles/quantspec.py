"""What an INT8 graph rounds, in plain values: the export says it, a quantisation-aware training computes with it."""

from __future__ import annotations

from typing import Literal

from profiles.section import Section


class QuantSpec(Section):
    """The grids of one INT8 dialect. Weights are symmetric, one scale for each output channel."""

    activations: Literal["uint8", "int8"]
    symmetric: bool
    """The activations' zero point is 0."""
    weight_limit: int = 127
    """Weights are integers from -weight_limit to weight_limit: 127, or 64 for 7 bits (x86 without VNNI)."""

    @property
    def activation_limits(self) -> tuple[int, int]:
        """Smallest and largest integer of an activation.

        >>> QuantSpec(activations="uint8", symmetric=False).activation_limits
        (0, 255)
        """
        return (0, 255) if self.activations == "uint8" else (-128, 127)
