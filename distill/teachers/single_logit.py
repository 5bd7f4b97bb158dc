"""The single logit (sigmoid) of a teacher of two exclusive classes, as the two class logits that objectives expect."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.dataset import Dataset


def is_single_logit(shape: Sequence[int], dataset: Dataset) -> bool:
    """Whether outputs of `shape` (N, 1) or (N,) are one logit for the two classes of a multiclass data set.

    With several labels one column is one label, so there is nothing to expand.
    """
    one_per_sample = len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)
    return dataset.task == "multiclass" and len(dataset.classes) == 2 and one_per_sample


def two_logits(logit: Tensor) -> Tensor:
    """The class logits [0, z] of a single logit z, whose softmax is [1 - sigmoid(z), sigmoid(z)].

    z speaks for the second class in the data set's order.

    Args:
        logit: (N, 1) or (N,), of any type.

    Returns:
        (N, 2), of the same type.
    """
    column = logit.reshape(-1, 1)
    return torch.cat([torch.zeros_like(column), column], dim=1)
