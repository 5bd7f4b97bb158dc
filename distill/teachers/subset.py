"""A teacher cache restricted to some training rows, for learning curves that share one teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from distill.teachers.cache import TeacherCache
from profiles.artifact import content_key

Array = np.ndarray[Any, Any]


def cache_rows(cache: TeacherCache, rows: Array) -> TeacherCache:
    """The cache for `distill.data.dataset.subset(dataset, rows)`; validation, test and head stay as they are.

    Args:
        cache: of the whole training split; its folder and parts remain named in the result.
        rows: int64 (n,), of the training split. Those outputs are copied into memory.
    """

    def taken(outputs: Array | None) -> Array | None:
        return None if outputs is None else np.ascontiguousarray(outputs[:, rows])

    return replace(
        cache,
        key=content_key("cache rows", cache.key, rows),
        train_embedding=taken(cache.train_embedding),
        train_logits=taken(cache.train_logits),
    )
