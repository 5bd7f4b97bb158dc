"""How much worse a run may be than another: `latency=+5%,metric=-0.3pt`. Pure functions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, get_args

from profiles.errors import InputError

Quantity = Literal["latency", "metric", "size", "memory", "energy"]
Decision = Literal["pass", "fail", "inconclusive"]

UNITS: Final[dict[Quantity, str]] = {"latency": "ms", "metric": "pt", "size": "MiB", "memory": "MiB", "energy": "mJ"}
"""What an absolute gate is written in; every one may be a percentage of the first run's figure instead."""
_AMOUNT = re.compile(r"([+-]?)(\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})\s*(%|[A-Za-z]+)")
_EXAMPLE = "for example --gate latency=+5%,metric=-0.3pt"


def higher_is_better(quantity: Quantity) -> bool:
    """Of all that is compared, only the metric should grow."""
    return quantity == "metric"


@dataclass(frozen=True)
class Gate:
    """The worst change of a quantity that is let through, from the first run to the second.

    amount: a fraction of the first run's figure when `relative`, else in the unit of `UNITS`, as it is written.
    A latency of -0.05 asks for a second run that is 5 % faster.
    """

    quantity: Quantity
    amount: float
    relative: bool

    def __str__(self) -> str:
        return f"{self.quantity}={self.limit}"

    @property
    def limit(self) -> str:
        """The amount as it is written: "+5%"."""
        value = self.amount * 100 if self.relative else self.amount
        sign = "-" if value < 0 or (value == 0 and higher_is_better(self.quantity)) else "+"
        text = f"{abs(value):.9f}".rstrip("0").rstrip(".")
        return f"{sign}{text}{'%' if self.relative else UNITS[self.quantity]}"

    def decide(self, low: float, high: float) -> Decision:
        """ "pass" when the whole interval of the change is let through, "fail" when none of it is.

        Args:
            low: lower end of the change's interval, in the unit of `amount`.
            high: its upper end; equal to `low` for an exact figure.
        """
        if higher_is_better(self.quantity):
            return "pass" if low >= self.amount else "fail" if high < self.amount else "inconclusive"
        return "pass" if high <= self.amount else "fail" if low > self.amount else "inconclusive"


def parse_gates(text: str) -> tuple[Gate, ...]:
    """The gates of one `--gate`, in their order.

    Raises:
        InputError: an unknown quantity or unit, no sign, a quantity twice, or nothing at all.

    >>> [str(gate) for gate in parse_gates("latency=+5%,metric=-0.3pt")]
    ['latency=+5%', 'metric=-0.3pt']
    """
    gates = [_parse(part.strip()) for part in text.split(",")]
    names = [gate.quantity for gate in gates]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two gates for {name}", where="--gate", evidence=text, fix="keep one of them")
    return tuple(gates)


def _parse(part: str) -> Gate:
    name, equals, amount = (piece.strip() for piece in part.partition("="))
    found = next((quantity for quantity in get_args(Quantity) if quantity == name), None)
    if not equals or found is None:
        names = ", ".join(get_args(Quantity))
        raise InputError(f'"{part}" is not a gate; there is {names}', where="--gate", fix=_EXAMPLE)
    quantity: Quantity = found
    unit, worse = UNITS[quantity], "-" if higher_is_better(quantity) else "+"
    match = _AMOUNT.fullmatch(amount)
    if match is None or match[3] not in ("%", unit):
        raise InputError(
            f'"{amount}" is not a change of {quantity} in % or {unit}',
            where="--gate",
            fix=f"for example {quantity}={worse}5% or {quantity}={worse}0.3{unit}",
        )
    sign, value = match[1], float(match[2])
    if not sign and value:
        raise InputError(
            f'"{amount}" has no sign', where="--gate", fix=f"{quantity}={worse}{amount} lets that much worse through"
        )
    relative = match[3] == "%"
    signed = -value if sign == "-" and value else value
    return Gate(quantity, signed / 100 if relative else signed, relative)
