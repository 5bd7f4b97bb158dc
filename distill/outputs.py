"""What flows through one training step."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StudentOutput(NamedTuple):
    """`embedding`: (N, D_s), the input of the head. `head`: (N, H), the head's raw output."""

    embedding: Tensor
    head: Tensor


class TeacherOutput(NamedTuple):
    """`embedding`: (N, D_t) or None. `logits`: (N, C) or None (a teacher of another task has none)."""

    embedding: Tensor | None
    logits: Tensor | None


class Batch(NamedTuple):
    """One training batch as objectives see it.

    labels: int64 (N,) multiclass or float (N, C) multilabel. mask: bool (N, C) or None. indices: int64 (N,), rows of
    the training split. step: optimiser steps done so far. epoch: the same in epochs. progress: the same as a share of
    the whole training, 0..1.
    """

    labels: Tensor
    mask: Tensor | None
    indices: Tensor
    step: int
    epoch: float
    progress: float = 0.0
