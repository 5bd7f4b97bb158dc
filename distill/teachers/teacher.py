"""What every teacher is, and the teacher that wraps a torch module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.dataset import SplitName
from distill.networks import fingerprint
from distill.outputs import TeacherOutput
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
        sees_views: whether its outputs follow the augmented inputs; False: it only knows clean samples.
        splits: the splits that it has outputs for.
        head_weight, head_bias: float32 (C, D_t) and (C,) of its linear head, when it is known to have one.
    """

    embedding_dim: int | None = None
    num_logits: int | None = None
    sees_views: bool = True
    splits: tuple[SplitName, ...] = ("train", "validation", "test")
    head_weight: Tensor | None = None
    head_bias: Tensor | None = None

    def __init__(self, preprocessing: object) -> None:
        self._preprocessing = preprocessing

    @property
    def key(self) -> str:
        """Hash of weights and preprocessing: what its outputs depend on besides the data."""
        return content_key(type(self).__name__, self.fingerprint(), self._preprocessing)

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that is fixed in it (parameters and buffers, file, arrays), computed anew at every call."""

    @abstractmethod
    def outputs(self, batch: TeacherBatch) -> TeacherOutput:
        """Float32 embedding (N, D_t) and logits (N, C), each None where it has none; no gradient."""

    def assert_frozen(self) -> None:
        """Raises EdgestillError when anything in it could still learn."""
        return


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
        """Makes `head` known as the linear map from its embedding to its logits."""
        self.head_weight = head.weight.detach().float().cpu()
        bias = head.bias.detach() if head.bias is not None else torch.zeros(head.out_features)
        self.head_bias = bias.float().cpu()


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
