"""Inputs without labels, `[data.unlabelled]`: what generators learn from and what is explored around."""

from __future__ import annotations

from dataclasses import dataclass

from distill.data.arrays import Array


@dataclass(frozen=True)
class Unlabelled:
    """Inputs without labels, in the shape of the data that they go with.

    inputs: (M, *shape), uint8 images or int64 tokens, memory-mapped. texts: the raw texts of token data, else None.
    key: hash of the content. name: what they are, for people.
    """

    inputs: Array
    texts: tuple[str, ...] | None
    key: str
    name: str

    def __len__(self) -> int:
        return len(self.inputs)
