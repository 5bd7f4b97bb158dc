"""What every teacher is, and the teacher that wraps a torch module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.dataset import Dataset, SplitName
from distill.networks import fingerprint
from distill.outputs import TeacherOutput
from distill.teachers.single_logit import is_single_logit, two_logits
from profiles.artifact import content_key
from profiles.errors import EdgestillError


class TeacherBatch(NamedTuple):
    """What a teacher may look at: the inputs (as a student gets them, already augmented), and where they come from.

    inputs: uint8 (N, C, H, W) or int64 (N, T). split: name of the split. rows: int64 (N,), rows of that split.
    """

    inputs: Tensor
    split: SplitName
    rows: np.ndarray[tuple[int], np.dtype[np.int64]]


class Teacher(ABC):
    """A frozen source of embeddings and logits.

    Attributes:
        embedding_dim: D_t, or None when it gives no embedding.
        num_logits: C, or None when it gives no logits for the classes of the data set.
        single_logit: it has one logit z for two classes and gives [0, z]: z speaks for the second class.
        sees_views: whether its outputs follow the augmented inputs; False: it only knows clean samples.
        splits: the splits that it has outputs for.
        head_weight, head_bias: float32 (C, D_t) and (C,) of its linear head, when it is known to have one.
    """

    embedding_dim: int | None = None
    num_logits: int | None = None
    single_logit: bool = False
    sees_views: bool = True
    splits: tuple[SplitName, ...] = ("train", "validation", "test")
    head_weight: Tensor | None = None
    head_bias: Tensor | None = None

    def __init__(self, preprocessing: object) -> None:
        self._preprocessing = preprocessing

    @property
    def key(self) -> str:
        """Hash of weights and preprocessing: what its outputs depend on besides the data."""
        # only where it holds, so that all other teachers keep the key that their caches were made under
        expanded = ["single logit"] if self.single_logit else []
        return content_key(type(self).__name__, self.fingerprint(), self._preprocessing, *expanded)

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that is fixed in it (parameters and buffers, file, arrays), computed anew at every call."""

    @abstractmethod
    def outputs(self, batch: TeacherBatch) -> TeacherOutput:
        """Float32 embedding (N, D_t) and logits (N, C), each None where it has none; no gradient."""

    def assert_frozen(self) -> None:
        """Raises EdgestillError when anything in it could still learn."""
        return

    def _know_logits(self, shape: Sequence[int], dataset: Dataset) -> None:
        """Sets `num_logits` and `single_logit` for outputs of `shape` (N, C), or (N,) for a single logit."""
        self.single_logit = is_single_logit(shape, dataset)
        self.num_logits = 2 if self.single_logit else shape[1]

    def _class_logits(self, output: Tensor) -> Tensor:
        """What it gives as logits for its raw `output`: (N, C) as it is, a single logit as (N, 2)."""
        return two_logits(output) if self.single_logit else output


class NetworkTeacher(Teacher):
    """A teacher whose outputs come from torch parameters: put into eval mode and frozen here, once.

    Args:
        network: all modules that its outputs depend on. Changed in place: eval mode, no gradients, moved to `device`.
        preprocessing: plain values that name what happens before the network.
    """

    def __init__(self, network: nn.Module, preprocessing: object, device: torch.device) -> None:
        super().__init__(preprocessing)
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = device

    def fingerprint(self) -> str:
        return fingerprint(self.network)

    def assert_frozen(self) -> None:
        for name, module in self.network.named_modules():
            if module.training:
                raise EdgestillError(f'the teacher\'s module "{name or "(itself)"}" is in train mode', where="teacher")
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                raise EdgestillError(f'the teacher\'s parameter "{name}" is not frozen', where="teacher")

    def to_device(self, inputs: Tensor) -> Tensor:
        """The inputs on the teacher's device, images in channels-last order."""
        inputs = inputs.to(self.device, non_blocking=True)
        return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs

    def set_head(self, head: nn.Linear) -> None:
        """Makes `head` known as the linear map from its embedding to its logits, [[0], [w]] and [0, b] for a single
        logit."""
        weight = head.weight.detach().float().cpu()
        bias = head.bias.detach().float().cpu() if head.bias is not None else torch.zeros(head.out_features)
        self.head_weight = self._class_logits(weight.T).T.contiguous()
        self.head_bias = self._class_logits(bias.unsqueeze(0)).squeeze(0)


class ModuleTeacher(NetworkTeacher):
    """A module that returns (embedding (N, D), head output (N, C)), such as a trained student of the conv family.

    The head output must be class logits, which holds for the `supervised` objective, or subclass logits, as which
    `SubclassCache` then marks them. `embedding_dim` and `head_size` are the module's attributes; a Linear called `head`
    becomes the known head.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu") -> None:
        super().__init__(module, {"arch": str(getattr(module, "arch", ""))}, torch.device(device))
        self.embedding_dim = int(module.embedding_dim)  # type: ignore[arg-type]
        self.num_logits = int(module.head_size)  # type: ignore[arg-type]
        head = getattr(module, "head", None)
        if isinstance(head, nn.Linear):
            self.set_head(head)

    @torch.no_grad()
    def outputs(self, batch: TeacherBatch) -> TeacherOutput:
        embedding, logits = self.network(self.to_device(batch.inputs))
        return TeacherOutput(embedding.float(), logits.float())


def pool_features(features: Tensor) -> Tensor:
    """(N, D) as it is; (N, D, H, W) averaged over the map; (N, T, D) averaged over the tokens -> (N, D)."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features
