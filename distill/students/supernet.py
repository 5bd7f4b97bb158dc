"""A pool of students in one set of weights: each member is a part of the largest, sliced out of it on every use."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distill.data.dataset import InputSpec
from distill.networks import seeded
from distill.outputs import StudentOutput
from distill.students.arch import Arch, ConvArch, TextArch
from distill.students.conv import ConvNet
from distill.students.pool import kind_of, largest, stage_boundaries
from distill.students.section import StudentSection
from distill.students.student import Student, build_student
from distill.students.text import TextNet

_ADAPTER_SEED = 0x5AD9
"""Mixed into the seed, so that adapters do not start from the numbers that the shared network starts from."""


class Supernet(nn.Module):
    """All architectures of a pool, sharing the weights of one `Student` of the largest width, depth and kernel.

    A member has the leading channels, the first blocks and the centre of the kernels of the shared network. Its forward
    pass is that of a plain `Student` of its architecture which is lent views of the shared tensors: gradients reach
    exactly what was sliced (autograd fills the rest of a gradient with zeros), BatchNorm updates its running statistics
    through the views, and only the activations of this one member exist. Heads read the same query, key and value
    channels in other groups (our reading: neither paper has elastic heads).

    Members share leading channels, hence their BatchNorm statistics, too: see `recalibrate`.

    With a `teacher`, one elastic adapter per stage boundary leads from the teacher's features to the students' (methods
    of SFTN, Park et al. 2021, and GTN, Binici et al. 2024): conv, a 1x1 convolution and BatchNorm; texts, a Linear over
    the token width and LayerNorm (our reading).

    Args:
        archs: the pool, of one kind (conv, convi, text or textc).
        spec: one sample's shape.
        head_size: outputs of the head, H, which all members share.
        teacher: architecture of the network that students are grafted on, of the same family; None: no adapters.
        seed: of the initial weights; the global generators are not touched. A pool of one starts from the very weights
            that `build_student` gives its member with this seed.

    Raises:
        ValueError: no architecture, several kinds, or a teacher of another family.
    """

    def __init__(
        self, archs: Sequence[Arch], spec: InputSpec, head_size: int, *, teacher: Arch | None = None, seed: int
    ) -> None:
        super().__init__()
        self.archs: tuple[Arch, ...] = tuple(archs)
        self._largest = largest(self.archs)
        if teacher is not None and teacher.family != self._largest.family:
            raise ValueError(f"students of kind {kind_of(self._largest)} cannot follow {teacher}")
        self._spec = spec
        self._head_size = head_size
        self._teacher = teacher
        self.boundaries = 0 if teacher is None else stage_boundaries(teacher, spec)
        self.shared = self._student(self._largest, seed)
        with seeded(seed ^ _ADAPTER_SEED):
            self.adapters = nn.ModuleList(self._adapter(self._largest, i) for i in range(self.boundaries))
        # Modules without storage, one per member (and boundary) that was used. Not registered as children: they hold no
        # weights, so they belong in no state, in no optimiser and on no device.
        self._templates: dict[tuple[Arch, int | None], nn.Module] = {}

    def path(self, arch: Arch, inputs: Tensor) -> StudentOutput:
        """The whole sub-student: uint8 (N, C, H, W) or int64 (N, T) -> embedding (N, D_arch), head (N, H).

        Train or eval mode is that of the supernet.

        Raises:
            ValueError: an architecture that is no part of the shared network.
        """
        template = self._template(arch, None)
        output: StudentOutput = functional_call(template, self._slices(arch, template), (inputs,), strict=True)
        return output

    def branch(self, arch: Arch, boundary: int, features: Tensor, real: Tensor | None = None) -> Tensor:
        """A sub-student grafted on the teacher: adapter, then what follows its own stage or block at that depth.

        Conv: after stage `boundary` of the teacher, the student goes on with stage `boundary` + 1. Texts: after block
        `boundary` of the teacher's D, a student of depth d goes on with block floor((boundary + 1) d / D).

        Args:
            arch: the sub-student.
            boundary: 0 is after the teacher's first stage or block.
            features: the teacher's, (N, C, H, W) or (N, T, W).
            real: texts: (N, T, 1), see `TextNet.real`.

        Returns:
            The head's raw output, (N, H).

        Raises:
            ValueError: no such boundary, a text branch without `real`, or an architecture that is no part of the shared
                network.
        """
        if not 0 <= boundary < self.boundaries:
            raise ValueError(f"boundary {boundary} of {self.boundaries}")
        if isinstance(arch, TextArch) and real is None:
            raise ValueError("a text branch needs to know which tokens are real")
        template = self._template(arch, boundary)
        slices = self._slices(arch, template, boundary)
        result: Tensor = functional_call(template, slices, (features, real), strict=True)
        return result

    def standalone(self, arch: Arch) -> Student:
        """The sub-student with weights and buffers of its own (contiguous copies), in the supernet's mode.

        Raises:
            ValueError: an architecture that is no part of the shared network.
        """
        template = self._template(arch, None)
        assert isinstance(template, Student)
        student = copy.deepcopy(template)
        state = {
            name: value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in self._slices(arch, template).items()
        }
        student.load_state_dict(state, strict=True, assign=True)
        return student

    @torch.no_grad()
    def recalibrate(self, arch: Arch, batches: Iterable[Tensor]) -> None:
        """BatchNorm statistics of one path anew: the mean over the batches of their means and unbiased variances.

        To be called before a sub-student is scored: while the pool trains, every member moves the statistics of the
        channels that it shares with others. For the same reason this call changes what the other members find in these
        channels: score or copy out (`standalone`) one member before the next is recalibrated. Weights, the channels and
        blocks outside the path, the adapters' statistics and the shared counters of batches stay as they are. Nothing
        changes when reading a batch fails. A member without BatchNorm is left alone, and no batch is read.

        Args:
            arch: the sub-student.
            batches: its inputs, each uint8 (N, C, H, W) or int64 (N, T), on the supernet's device.

        Raises:
            ValueError: no batch, or an architecture that is no part of the shared network.
        """
        template = self._student_template(arch)
        norms = {
            name: module
            for name, module in template.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        }
        if not norms:
            return
        slices = self._slices(arch, template)
        found = dict(slices)
        for name in norms:
            for buffer, start in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
                found[f"{name}.{buffer}"] = torch.full_like(slices[f"{name}.{buffer}"], start)
        template.train()
        count = 0
        for count, inputs in enumerate(batches, start=1):
            for norm in norms.values():
                norm.momentum = 1 / count  # the mean so far; None does the same, but reads a counter off the device
            functional_call(template, found, (inputs,), strict=True)
        if not count:
            raise ValueError("statistics need at least one batch")
        for name in norms:
            for buffer in ("running_mean", "running_var"):
                slices[f"{name}.{buffer}"].copy_(found[f"{name}.{buffer}"])

    def _template(self, arch: Arch, boundary: int | None) -> nn.Module:
        """The code of a sub-student (boundary None) or of a branch, without weights, in the supernet's mode."""
        template = self._templates.get((arch, boundary))
        if template is None:
            template = self._student_template(arch) if boundary is None else self._branch_template(arch, boundary)
            self._templates[arch, boundary] = template
        if template.training != self.training:
            template.train(self.training)
        return template

    def _student_template(self, arch: Arch) -> Student:
        most = self._largest
        fits = arch.width <= most.width and arch.depth <= most.depth and arch.kernel <= most.kernel
        if kind_of(arch) != kind_of(most) or not fits:
            raise ValueError(f"{arch} is no part of {most}")
        with torch.device("meta"):
            return self._student(arch, 0)

    def _branch_template(self, arch: Arch, boundary: int) -> nn.Module:
        student = self._student_template(arch)
        with torch.device("meta"):
            return Branch(self._adapter(arch, boundary), student, self._first(arch, boundary))

    def _student(self, arch: Arch, seed: int) -> Student:
        return build_student(StudentSection(), self._spec, self._head_size, arch=str(arch), seed=seed, base=Path())

    def _first(self, arch: Arch, boundary: int) -> int:
        """The first stage or block of a student that is grafted on the teacher there."""
        if isinstance(arch, ConvArch):
            return boundary + 1
        assert self._teacher is not None
        return (boundary + 1) * arch.depth // self._teacher.depth

    def _adapter(self, arch: Arch, boundary: int) -> nn.Sequential:
        assert self._teacher is not None
        if isinstance(arch, ConvArch):
            source, width = (net.width * 2**boundary for net in (self._teacher, arch))
            return nn.Sequential(nn.Conv2d(source, width, 1, bias=False), nn.BatchNorm2d(width))
        return nn.Sequential(nn.Linear(self._teacher.width, arch.width), nn.LayerNorm(arch.width))

    def _slices(self, arch: Arch, template: nn.Module, boundary: int | None = None) -> dict[str, Tensor]:
        """Views of the shared tensors under the template's names, in the template's shapes."""
        shared: dict[str, Tensor] = {**dict(self.shared.named_parameters()), **dict(self.shared.named_buffers())}
        if boundary is not None:
            adapter = self.adapters[boundary]
            own: dict[str, Tensor] = {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}
            shared |= {f"adapter.{name}": value for name, value in own.items()}
        wanted: dict[str, Tensor] = {**dict(template.named_parameters()), **dict(template.named_buffers())}
        return {name: _sliced(shared[name], value.shape) for name, value in wanted.items()}


class Branch(nn.Module):
    """What is left of a student behind a teacher's boundary: (N, C, H, W) or (N, T, W) -> the head's output (N, H).

    Takes the student apart. The names of what stays are those in the student.
    """

    def __init__(self, adapter: nn.Module, student: Student, first: int) -> None:
        super().__init__()
        body = student.body
        assert isinstance(body, ConvNet | TextNet)
        if isinstance(body, ConvNet):
            body.normalize, body.stem = nn.Identity(), nn.Identity()  # type: ignore[assignment]
            layers = body.stages
        else:
            body.tokens = nn.Identity()  # type: ignore[assignment]
            del body.positions
            layers = body.blocks
        for index in range(first):
            layers[index] = nn.Identity()
        self.adapter = adapter
        self.body = body
        self.head = student.head
        self.first = first

    def forward(self, features: Tensor, real: Tensor | None) -> Tensor:
        x: Tensor = self.adapter(features)
        if isinstance(self.body, TextNet):
            assert real is not None
            embedding = self.body.rest(x, real, self.first)
        else:
            embedding = self.body.rest(x, self.first)
        result: Tensor = self.head(embedding)
        return result


def _sliced(shared: Tensor, shape: torch.Size) -> Tensor:
    """The part of a shared tensor that a smaller network has: leading channels, and the centre of a k x k kernel."""
    index: list[slice] = []
    for axis, (size, wanted) in enumerate(zip(shared.shape, shape, strict=True)):
        start = (size - wanted) // 2 if axis > 1 else 0
        index.append(slice(start, start + wanted))
    return shared if shared.shape == shape else shared[tuple(index)]
