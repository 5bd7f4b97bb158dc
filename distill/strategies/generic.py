"""The generic teacher: one network, trained once, that teaches any student of a pool (GTN; of one student: SFTN).

GTN, Binici et al. 2024, arXiv 2407.16040, on the ground of SFTN, Park et al. 2021, arXiv 2102.07650: while the teacher
learns from the labels, parts of students are grafted on its stage boundaries. What they need flows back into it.

    z_i(a)    = head(S_{>i}(A_i(f_T^i(x)); W, a))
    L_cond(a) = mean_i [ lambda_CE CE(z_i, y) + lambda_KL tau^2 KL(p_i || p_T) ]
    L         = CE(z_T, y) + mean_a L_cond(a),  a ~ p_phi, K draws a step

Weights, sampler and architecture loss of GTN were not available: the weights are SFTN's (lambda_CE 1, lambda_KL 3,
tau 1), the sampler is our reading (`PathSampler`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distill.data.dataset import Dataset, InputSpec
from distill.networks import load_state, read_state
from distill.objectives.base import at_least_float32
from distill.objectives.kd import binary_kd_loss, kd_loss
from distill.outputs import StudentOutput
from distill.strategies.sampler import PathSampler, draws
from distill.strategy import Step, Strategy
from distill.students.arch import Arch, parse_arch
from distill.students.conv import ConvNet
from distill.students.pool import stage_boundaries
from distill.students.student import save_student
from distill.students.supernet import Supernet
from distill.students.text import TextNet
from distill.teachers.strategy_section import GenericSection
from profiles.errors import InputError

if TYPE_CHECKING:
    from distill.training import Run

FORM = 1
"""Raise when what the strategy does changes, so that older teachers are trained anew."""
SUPERNET_FILE = "supernet.safetensors"
POOL_FILE = "pool.json"
_LEARNED = frozenset({"entropy", "sampler_learning_rate"})
"""Keys of the section that only a distribution that learns reads."""
_BRANCHES = frozenset({"ce_weight", "kl_weight", "tau", "inherit"})
"""Keys of the section that decide what a branch learns."""


class Generic(Strategy):
    """Conditions the network that is trained, the teacher, on students sampled from a pool. A pool of one is SFTN.

    In every step, K architectures are drawn, with replacement. Each trains its branches behind all stage boundaries at
    once, on the features and class logits of the teacher's one forward pass; its backward pass follows immediately and
    stops at these, so the activations of one architecture exist at a time. An architecture drawn n times is computed
    once and counts n times. The gradients so gathered join the teacher's backward pass.

    p_i comes first in the divergence, F.kl_div(log p_T, p_i), and both sides get a gradient. Several labels (our
    reading): one Bernoulli divergence per label, averaged over labels. With mixup, the branches see the mixed batch and
    the mixed labels.

    `inherit` (our reading): the whole sub-student, from the input on, counts as one more boundary in mean_i, so that
    every weight of the pool's shared network is trained and students can start from it.

    Several processes draw the same architectures and step phi alike; branches work on each process's share. A branch's
    BatchNorm has the statistics of its process's share, and the main process's running statistics are kept; whoever
    scores a sub-student recalibrates it first. L_cond is the mean over processes of each one's own mean: with class
    weights or unknown labels a process divides by the weight or the labels of its share, as `Step.truth` does, so that
    L_cond is not quite that of one process with the whole batch. Without them, shares of one size make it the same, but
    for BatchNorm.

    A learned distribution reads K losses back in every step, after the optimiser has been told to step: the next draw
    depends on them. "uniform" reads nothing.

    Args:
        section: the recipe's `[teacher.generic]`.
        archs: the pool, of the teacher's family.
        teacher: the architecture of the network that will be trained.
        dataset: what it will be trained on.
        seed: of the pool's initial weights and of the draws.

    Raises:
        InputError: no architecture, one of another family, a teacher without stage boundaries, or one path per step
            where the distribution learns.
    """

    mixup = True

    def __init__(
        self, section: GenericSection, archs: Sequence[Arch], teacher: Arch, dataset: Dataset, *, seed: int
    ) -> None:
        self.section, self.archs, self.teacher_arch = section, tuple(archs), teacher
        self.spec, self.classes, self.seed = dataset.input, len(dataset.classes), seed
        self.divergence = kd_loss if dataset.task == "multiclass" else binary_kd_loss
        self.sampler = self._sampler()
        _check(self.sampler, section, teacher, dataset.input)
        self.paths = section.paths if len(self.archs) > 1 else 1
        self.sampled = [0] * len(self.archs)
        """How often each architecture was drawn."""
        self._drawn = torch.zeros(0, dtype=torch.int64)
        self._losses = torch.zeros(0)
        self._features: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def key(self) -> object:
        """Pool, teacher, seed, and what of the section decides the weights: nothing that this pool has no use for."""
        learned = _LEARNED if self.sampler.learns else frozenset[str]()
        unused = {"tau"} if self.section.kl_weight == 0 else set[str]()
        settings = self.section.model_dump(mode="json", include={*_BRANCHES, *learned} - unused)
        settings |= {"paths": self.paths, "distribution": self._distribution}
        return ["generic", FORM, [str(arch) for arch in self.archs], str(self.teacher_arch), self.seed, settings]

    def start(self, run: Run) -> None:
        """Builds the pool's shared network on the run's device.

        Raises:
            InputError: the trained network is not of the shipped families, so its stages are not known.
        """
        body = run.student.body
        if not isinstance(body, ConvNet | TextNet):
            raise InputError(
                "a teacher without stage boundaries cannot be conditioned on students",
                where="teacher.strategy",
                evidence=f"{run.student.arch} is not of the conv or text family",
                fix='teacher.kind = "train", or teacher.strategy = "frozen"',
            )
        self.run = run
        self.sampler = self._sampler()
        self.sampled = [0] * len(self.archs)
        self.supernet = Supernet(self.archs, self.spec, self.classes, teacher=self.teacher_arch, seed=self.seed)
        self.supernet.to(run.device).train()

    def modules(self) -> list[nn.Module]:
        return [self.supernet]

    def before_step(self, step: Step) -> None:
        self._drawn = self.sampler.sample(self.paths, draws(self.seed, step.number))
        body = self.run.student.body
        layers = body.stages if isinstance(body, ConvNet) else body.blocks
        assert isinstance(layers, nn.ModuleList)
        self._forget()
        # only for the one forward pass that follows: neither validation nor a copy of the network meets a hook
        for boundary in range(self.supernet.boundaries):
            self._handles.append(layers[boundary].register_forward_hook(partial(self._keep, boundary)))

    def _keep(self, boundary: int, _layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._features[boundary] = output

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._features.clear()

    def terms(self, step: Step, output: StudentOutput) -> dict[str, Tensor]:
        """Weighted generic/ce and generic/kl: means over boundaries, draws, samples and processes.

        The first carries the whole gradient to the teacher (of this process's share); that to the pool's shared
        network is already in its parameters.
        """
        features = [self._features[boundary] for boundary in range(self.supernet.boundaries)]
        self._forget()
        logits = self.run.objective.class_logits(output.head)
        watched = [*features, logits]
        leaves = [value.detach().requires_grad_() for value in watched]
        body = self.run.student.body
        real = body.real(step.inputs) if isinstance(body, TextNet) else None

        values = []
        shares = []
        for index, count in self._counts():
            ce, kl = self._conditioning(self.archs[index], step, leaves[:-1], leaves[-1], real)
            shares.append(count / self.paths)
            ((ce + kl) * shares[-1]).backward()  # type: ignore[no-untyped-call]
            values.append(torch.stack([ce.detach(), kl.detach()]))
            self.sampled[index] += count
        joined = self.run.processes.sum(torch.stack(values)) / self.run.processes.world
        self._losses = joined.sum(1)
        ce, kl = torch.stack([share * value for share, value in zip(shares, joined, strict=True)]).sum(0)
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        carried: Tensor = _Carried.apply(ce, *watched, *gradients)  # type: ignore[no-untyped-call]
        return {"generic/ce": carried, "generic/kl": kl}

    def _counts(self) -> list[tuple[int, int]]:
        """(index, times drawn) of this step's architectures, by index."""
        return sorted(Counter(self._drawn.tolist()).items())

    def _conditioning(
        self, arch: Arch, step: Step, features: list[Tensor], teacher: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both parts of L_cond(arch), weighted, each a mean over the boundaries and this process's share."""
        with self.run.autocast():
            outputs = [self.supernet.branch(arch, i, feature, real) for i, feature in enumerate(features)]
            if self.section.inherit:
                outputs.append(self.supernet.path(arch, step.inputs).head)
        outputs = [at_least_float32(output) for output in outputs]
        # the student's distribution stands where kd_loss has the teacher's: KL(p_i || p_T)
        kl = torch.stack([self.divergence(teacher, output, self.section.tau) for output in outputs]).mean()
        ce = torch.stack([step.truth(output) for output in outputs]).mean()
        return self.section.ce_weight * ce, self.section.kl_weight * kl

    def after_step(self, step: Step) -> None:
        if self.sampler.learns:
            position = {index: place for place, (index, _) in enumerate(self._counts())}
            losses = self._losses.cpu()[[position[index] for index in self._drawn.tolist()]]
            self.sampler.update(self._drawn, losses)

    def logs(self) -> dict[str, float]:
        """The entropy of the distribution (nats) and, where it learns, the probability of every choice."""
        if len(self.archs) == 1:
            return {}
        found = {"generic/entropy": float(self.sampler.entropy().detach())}
        if self.sampler.learns:
            masses = self.sampler.choice_probabilities()
            found |= {f"generic/probability/{name}": mass for name, mass in masses.items()}
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict(), "sampled": list(self.sampled)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.sampled = list(state["sampled"])

    def save(self, folder: Path) -> None:
        """The pool's shared weights after the last epoch, and what was drawn; `load_supernet` reads them back."""
        save_student(self.supernet, folder / SUPERNET_FILE)
        probabilities = self.sampler.probabilities().tolist()
        pool = {
            "teacher": str(self.teacher_arch),
            "distribution": self._distribution,
            "paths": self.paths,
            "archs": [
                {"arch": str(arch), "sampled": sampled, "probability": probability}
                for arch, sampled, probability in zip(self.archs, self.sampled, probabilities, strict=True)
            ],
        }
        (folder / POOL_FILE).write_text(json.dumps(pool, indent=2) + "\n", encoding="utf-8")

    @property
    def _distribution(self) -> str:
        """The distribution of the draws: that of a pool of one is uniform, whatever is asked for."""
        return self.section.distribution if self.sampler.learns else "uniform"

    def _sampler(self) -> PathSampler:
        section = self.section
        return PathSampler(
            self.archs,
            section.distribution,
            entropy_weight=section.entropy,
            learning_rate=section.sampler_learning_rate,
        )


def load_supernet(folder: Path, spec: InputSpec, head_size: int) -> Supernet:
    """The pool's shared network that `Generic.save` wrote, on the CPU, in eval mode.

    Its BatchNorm statistics are those of all members together: `recalibrate` one before it is scored.

    Args:
        folder: the finished artefact of the teacher.
        spec: one sample's shape.
        head_size: classes.

    Raises:
        InputError: files missing, damaged, or of other data; the message names the file.
    """
    file = folder / POOL_FILE
    try:
        pool = json.loads(file.read_text(encoding="utf-8"))
        archs = [parse_arch(entry["arch"], where=str(file)) for entry in pool["archs"]]
        teacher = parse_arch(pool["teacher"], where=str(file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "no pool of a generic teacher there",
            where=str(file),
            evidence=f"{type(error).__name__}: {error}",
            fix=f"delete {folder}; the same command trains this teacher anew",
        ) from error
    supernet = Supernet(archs, spec, head_size, teacher=teacher, seed=0)
    weights = folder / SUPERNET_FILE
    load_state(supernet, read_state(weights, where=str(weights)), file=weights, where=str(weights))
    return supernet.eval()


class _Carried(torch.autograd.Function):
    """value (), whose gradient to `watched` is known already: (value, *watched, *their gradients) -> value.

    The same as value + sum <w, g> - the same number, without computing it, in any precision.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs[len(pairs) // 2 :])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.saved_tensors
        return (None, *(outer[0] * gradient for gradient in known), *(None for _ in known))


def _check(sampler: PathSampler, section: GenericSection, teacher: Arch, spec: InputSpec) -> None:
    """Refuses a pool that cannot be grafted on this teacher.

    Raises:
        InputError: see `Generic`.
    """
    for arch in sampler.archs:
        if arch.family != teacher.family:
            raise InputError(
                f"{arch} cannot be grafted on {teacher}",
                where="teacher.generic.archs",
                evidence=f"one is of the {arch.family} family, the other of the {teacher.family} family",
                fix=f"architectures of the {teacher.family} family",
            )
    if not stage_boundaries(teacher, spec) and not section.inherit:
        raise InputError(
            "the teacher has no stage boundary that a student could be grafted on",
            where="teacher.arch",
            evidence=f"{teacher} has a single block",
            fix="two blocks or more (-d2), or teacher.generic.inherit = true",
        )
    if sampler.learns and section.paths < 2:
        raise InputError(
            f'distribution = "{section.distribution}" compares the architectures of a step',
            where="teacher.generic.paths",
            evidence=f"paths = {section.paths}",
            fix="paths = 2",
        )
