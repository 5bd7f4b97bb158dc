"""Training data and cached teacher outputs as tensors, so that a batch is one gather."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.dataset import Dataset
from distill.data.section import AugmentSection
from distill.data.views import augment, view_of
from distill.objectives.base import CachedTeacher, FitData
from distill.outputs import TeacherOutput
from profiles.errors import InputError

_SHARE_OF_FREE_MEMORY = 0.6


class Resident:
    """The training split and its cached teacher outputs.

    They live on `device` when they fit into 60 % of its free memory; else in (mapped) host memory, from which each
    batch is copied through pinned memory without waiting. Nothing here makes the host wait for the device.

    Args:
        dataset: gives the training split.
        cache: the teacher's outputs for it, None without a teacher.
        augmentation: of the images.
        seed: of what objectives draw while they are fitted.
        view_seed: of the augmented views.
        device: where training happens.

    Raises:
        InputError: the cache has other rows or views than the data.
    """

    def __init__(
        self,
        dataset: Dataset,
        cache: CachedTeacher | None,
        augmentation: AugmentSection,
        seed: int,
        view_seed: int,
        device: torch.device,
    ) -> None:
        split = dataset.train
        self.rows = len(split)
        self.device = device
        self.seed = seed
        self.view_seed = view_seed
        self.augmentation = augmentation
        self._is_image = dataset.input.kind == "image"
        embedding = cache.train_embedding if cache is not None else None
        logits = cache.train_logits if cache is not None else None
        if cache is not None:
            _check_cache(cache, embedding if embedding is not None else logits, self.rows, augmentation)
        self.teacher_views = cache.views if cache is not None else 0
        arrays = [split.inputs, *(array for array in (embedding, logits) if array is not None)]
        self.on_device = device.type == "cpu" or sum(array.nbytes for array in arrays) < _budget(device)
        place = device if self.on_device else torch.device("cpu")
        self._inputs = _tensor(split.inputs).to(place)
        self.embedding = None if embedding is None else _tensor(embedding).to(place)
        self.logits = None if logits is None else _tensor(logits).to(place)
        self._head = None if cache is None else (cache.head_weight, cache.head_bias)
        labels = _tensor(split.labels)
        self.labels = (labels.long() if dataset.task == "multiclass" else labels.float()).to(device)
        self.mask = None if split.mask is None else _tensor(split.mask).bool().to(device)

    def inputs(self, rows: Tensor, host_rows: Tensor, epoch: int) -> Tensor:
        """Augmented inputs of `rows` as epoch `epoch` sees them: (n, *shape), channels_last for images, on the device.

        rows, host_rows: the same int64 (n,) on the device and on the host.
        """
        batch = self._take(self._inputs, rows, host_rows)
        if not self._is_image:
            return batch
        view = view_of(epoch, self.augmentation.views)
        batch = batch.contiguous(memory_format=torch.channels_last)
        return augment(batch, rows, view, self.view_seed, self.augmentation)

    def clean_inputs(self, rows: Tensor, host_rows: Tensor) -> Tensor:
        """As `inputs`, without augmentation."""
        batch = self._take(self._inputs, rows, host_rows)
        return batch.contiguous(memory_format=torch.channels_last) if self._is_image else batch

    def teacher(self, rows: Tensor, host_rows: Tensor, epoch: int) -> TeacherOutput:
        """Cached outputs of `rows` for the view that `inputs` gives in the same epoch, float32."""
        view = view_of(epoch, self.augmentation.views) if self.teacher_views > 1 else 0
        embedding = None if self.embedding is None else self._take(self.embedding[view], rows, host_rows).float()
        logits = None if self.logits is None else self._take(self.logits[view], rows, host_rows).float()
        return TeacherOutput(embedding, logits)

    def fit_data(self, device: torch.device) -> FitData:
        """The training split as objectives' `prepare` wants it."""
        place = self._inputs.device
        weight, bias = self._head or (None, None)
        return FitData(
            embedding=self.embedding,
            logits=self.logits,
            labels=self.labels.to(place),
            mask=None if self.mask is None else self.mask.to(place),
            seed=self.seed,
            device=device,
            head_weight=None if weight is None else _tensor(weight).to(place),
            head_bias=None if bias is None else _tensor(bias).to(place),
        )

    def teacher_checksum(self) -> tuple[int, ...]:
        """Sums over the bits of the cached outputs: any change of one value changes them."""
        return tuple(
            int(outputs.view(torch.int16 if outputs.element_size() == 2 else torch.int32).sum(dtype=torch.int64))
            for outputs in (self.embedding, self.logits)
            if outputs is not None
        )

    def _take(self, source: Tensor, rows: Tensor, host_rows: Tensor) -> Tensor:
        if self.on_device:
            return source.index_select(0, rows)
        return source.index_select(0, host_rows).pin_memory().to(self.device, non_blocking=True)


class Stored:
    """One array of samples, resident as `Resident` holds its own: rows of it come without waiting for the device.

    Args:
        array: (N, ...), may be mapped from disk.
        device: where batches are wanted.
    """

    def __init__(self, array: np.ndarray[Any, Any], device: torch.device) -> None:
        self.device = device
        self._on_device = device.type == "cpu" or array.nbytes < _budget(device)
        self._array = _tensor(array).to(device if self._on_device else "cpu")

    def take(self, rows: Tensor) -> Tensor:
        """Rows (n,), int64 on the host, as (n, ...) on the device."""
        if self.device.type == "cpu":
            return self._array.index_select(0, rows)
        if self._on_device:
            return self._array.index_select(0, rows.pin_memory().to(self.device, non_blocking=True))
        return self._array.index_select(0, rows).pin_memory().to(self.device, non_blocking=True)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    with warnings.catch_warnings():
        # mapped files are read-only, and nothing here writes into them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(array))


def _budget(device: torch.device) -> float:
    free, _total = torch.cuda.mem_get_info(device)
    return _SHARE_OF_FREE_MEMORY * free


def _check_cache(
    cache: CachedTeacher, outputs: np.ndarray[Any, Any] | None, rows: int, augmentation: AugmentSection
) -> None:
    if outputs is not None and outputs.shape[1] != rows:
        raise InputError(
            "the teacher cache belongs to other data",
            where="cache",
            evidence=f"{outputs.shape[1]} cached samples, {rows} in the training split",
            fix="delete the run's cache folder; it is made anew",
        )
    if cache.views not in (1, augmentation.views):
        raise InputError(
            "the teacher cache belongs to another augmentation",
            where="data.augment.views",
            evidence=f"{cache.views} cached views, {augmentation.views} asked for",
            fix="delete the run's cache folder; it is made anew",
        )
