"""What every teacher is, and the teacher that wraps a torch module."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.dataset import Dataset, SplitName
from distill.networks import fingerprint, seeded
from distill.outputs import TeacherOutput
from distill.teachers.section import TeacherKind
from distill.teachers.single_logit import is_single_logit, two_logits
from profiles.artifact import content_key
from profiles.errors import EdgestillError, InputError


class TeacherBatch(NamedTuple):
    """What a teacher may look at: the inputs (as a student gets them, already augmented), and where they come from.

    inputs: uint8 (N, C, H, W) or int64 (N, T); float32 pixels 0 to 255 where a gradient with respect to them is wanted.
    split: name of the split. rows: int64 (N,), rows of that split. texts: the N raw texts of inputs that are in no
    split, such as generated ones; None: those of split and rows.
    """

    inputs: Tensor
    split: SplitName
    rows: np.ndarray[tuple[int], np.dtype[np.int64]]
    texts: tuple[str, ...] | None = None


class Teacher(ABC):
    """A source of embeddings and logits; frozen, unless it is the live copy of a NetworkTeacher.

    Attributes:
        kind: the recipe's word for it.
        embedding_dim: D_t, or None when it gives no embedding.
        num_logits: C, or None when it gives no logits for the classes of the data set.
        single_logit: it has one logit z for two classes and gives [0, z]: z speaks for the second class.
        sees_views: whether its outputs follow the augmented inputs; False: it only knows clean samples.
        runs_live: whether it can be asked about inputs that are in no split (`TeacherBatch.texts` for texts).
        splits: the splits that it has outputs for.
        head_weight, head_bias: float32 (C, D_t) and (C,) of its linear head, when it is known to have one.
    """

    kind: ClassVar[TeacherKind]
    embedding_dim: int | None = None
    num_logits: int | None = None
    single_logit: bool = False
    sees_views: bool = True
    runs_live: bool = True
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

    `live` gives a copy whose parameters learn; the teacher itself stays frozen for good.

    Args:
        network: all modules that its outputs depend on. Changed in place: eval mode, no gradients, moved to `device`.
        preprocessing: plain values that name what happens before the network.
    """

    def __init__(self, network: nn.Module, preprocessing: object, device: torch.device) -> None:
        super().__init__(preprocessing)
        fixed = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
        # fixed tables (sinusoids) stay so in a live copy; but a network that came wholly frozen tells nothing
        self._fixed = fixed if len(fixed) < len(list(network.parameters())) else set()
        self.network = network.to(device).eval().requires_grad_(False)
        self.device = device

    @abstractmethod
    def compute(self, batch: TeacherBatch) -> TeacherOutput:
        """As `outputs`, float32 on the teacher's device, with a gradient where parameters require it."""

    @torch.no_grad()
    def outputs(self, batch: TeacherBatch) -> TeacherOutput:
        return self.compute(batch)

    def live(self, layers: int | None = None) -> Self:
        """An own copy on the same device that can learn: `compute` passes gradients to its parameters.

        It is in eval mode (dropout off, BatchNorm keeps its statistics: our reading), gives class logits, and at first
        the same outputs as this teacher. A teacher of embeddings alone gets a new Linear on them for its logits, zero
        at first, as in LGTM's official code, which zeroes the student's head as well; ours starts as it was drawn. What
        requires a gradient is exactly what reaches the logits.

        Args:
            layers: so many of a transformer's last layers learn; None: everything does.

        Raises:
            InputError: `layers` for a teacher without such layers, a network that cannot be copied, or one that passes
                no gradient.
        """
        if layers is not None:
            raise InputError(
                f'a teacher of kind "{self.kind}" has no transformer layers to count',
                where="teacher.coached.trainable_layers",
                fix="leave it out: all layers learn",
            )
        return self._copy()

    def parameters_that_learn(self) -> list[nn.Parameter]:
        """Parameters that require a gradient; none in a frozen teacher."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def learn_only_for_logits(self, batch: TeacherBatch) -> None:
        """Freezes the learning parameters that do not reach the logits of `batch` (a pooler that nobody asks).

        Raises:
            InputError: nothing reaches them, or the network cannot be differentiated.
        """
        reached = self._reached(self._differentiable(batch).logits)
        for parameter in self.parameters_that_learn():
            parameter.requires_grad_(id(parameter) in reached)
        if not self.parameters_that_learn():
            raise _no_gradient("no parameter of the teacher reaches its logits", self.kind, "its outputs have no graph")

    def _differentiable(self, batch: TeacherBatch) -> TeacherOutput:
        with torch.enable_grad():
            return self.compute(batch)

    def _reached(self, output: Tensor | None) -> set[int]:
        """Identities of the learning parameters that `output` depends on."""
        parameters = self.parameters_that_learn()
        if output is None or not output.requires_grad or not parameters:
            return set()
        try:
            gradients = torch.autograd.grad(output.sum(), parameters, allow_unused=True, retain_graph=True)
        except RuntimeError as error:  # such as tensors that were changed in place
            raise _no_gradient("the teacher cannot be differentiated", self.kind, str(error).splitlines()[0]) from error
        return {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None}

    def _shared(self) -> list[object]:
        """What a live copy reads and does not own."""
        return []

    def _copy(self) -> Self:
        """A deep copy, hooks included, all of whose floating-point parameters learn but those that came fixed."""
        try:
            # the teacher, not only its network: hooks are bound to the teacher, and must be bound to the copy
            copied = copy.deepcopy(self, {id(shared): shared for shared in self._shared()})
        except Exception as error:  # a user's network may hold anything
            raise InputError(
                "the teacher's network cannot be copied, and a teacher that learns is a copy",
                where=f"teacher.{_NETWORK_KEY.get(self.kind, 'kind')}",
                evidence=f"{type(error).__name__}: {error}",
                fix='build the network from parameters and buffers alone, or teacher.strategy = "frozen"',
            ) from error
        copied.head_weight = copied.head_bias = None  # they told the frozen head, and this one moves
        for name, parameter in copied.network.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and name not in self._fixed)
        return copied

    def _add_head(self, classes: int) -> None:
        """Gives logits (N, classes) to a teacher of embeddings alone: `network["head"]`, zero at first."""
        assert isinstance(self.network, nn.ModuleDict)
        assert self.embedding_dim is not None
        with seeded(0):  # drawn for nothing, so the generators must not move
            head = nn.Linear(self.embedding_dim, classes)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.network["head"] = head.to(self.device).eval()
        self.num_logits = classes

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
    """A module that returns (embedding (N, D), head output (N, C)), such as a trained student.

    The head output must be class logits, which holds for the `supervised` objective, or subclass logits, as which
    `SubclassCache` then marks them. `embedding_dim` and `head_size` are the module's attributes; a Linear called `head`
    becomes the known head.
    """

    kind = "train"

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu") -> None:
        super().__init__(module, {"arch": str(getattr(module, "arch", ""))}, torch.device(device))
        self.embedding_dim = int(module.embedding_dim)  # type: ignore[arg-type]
        self.num_logits = int(module.head_size)  # type: ignore[arg-type]
        head = getattr(module, "head", None)
        if isinstance(head, nn.Linear):
            self.set_head(head)

    def compute(self, batch: TeacherBatch) -> TeacherOutput:
        embedding, logits = self.network(self.to_device(batch.inputs))
        return TeacherOutput(embedding.float(), logits.float())


_NETWORK_KEY: dict[TeacherKind, str] = {"torch": "factory", "transformers": "model"}
"""Recipe key that names the network of a teacher of that kind."""


def _no_gradient(message: str, kind: TeacherKind, evidence: str) -> InputError:
    return InputError(
        f"{message}, so it cannot learn",
        where=f"teacher.{_NETWORK_KEY.get(kind, 'kind')}",
        evidence=evidence,
        fix='take no_grad, detach and in-place changes out of its forward, or teacher.strategy = "frozen"',
    )


def pool_features(features: Tensor) -> Tensor:
    """(N, D) as it is; (N, D, H, W) averaged over the map; (N, T, D) averaged over the tokens -> (N, D)."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features
