"""Teacher-guided training (Zaheer et al. 2022, arXiv 2208.06825) and its controls, as a strategy of the one loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.dataset import Dataset, Task
from distill.exploration.further import Judge, Made, Maker, Pool, Seeds, no_unlabelled
from distill.exploration.generator import ImageGenerator, TextGenerator
from distill.exploration.section import (
    GENERATED,
    KEPT,
    SMALLEST_KEEP_RATE,
    ExploreSection,
    given,
    least_kept,
    starved_classes,
)
from distill.exploration.space import Draws, Orders, divergence
from distill.networks import seeded
from distill.objectives.base import at_least_float32
from distill.objectives.compose import Composition
from distill.objectives.kd import binary_kd_loss, kd_loss
from distill.objectives.section import AnyObjective, LELPSection
from distill.objectives.split_head import class_logits_of
from distill.outputs import Batch, StudentOutput, TeacherOutput
from distill.resident import Stored
from distill.strategy import Step, Strategy
from distill.students import Student
from distill.teachers.section import TeacherKind
from distill.teachers.teacher import NetworkTeacher, Teacher, TeacherBatch
from distill.training import Run
from profiles.errors import EdgestillError, InputError

if TYPE_CHECKING:
    from distill.data.unlabelled import Unlabelled
    from distill.exploration.generated import GeneratedSet

FORM = 1
"""Raise when what is explored or learned of it changes, so that older students are made anew."""
_PILOT = 512
"""Real inputs that are explored around before anything is trained."""
_PILOT_BATCH = 128
_SMALLEST_SHARE = 2
"""Further inputs of one process in a step: a BatchNorm knows no variance of one."""
_LOOK = 10
"""Every tenth step of an epoch the student is asked in eval mode how far it is from the teacher."""
_RADII = (0.5, 1.0, 2.0)


class _Ready(NamedTuple):
    """What a step learns from: inputs (n, *shape), the teacher's outputs, which to keep (n,) bool or None for all, and
    whether what was decoded is finite."""

    inputs: Tensor
    told: TeacherOutput
    keep: Tensor | None
    finite: Tensor


class Exploration(Strategy):
    """Further inputs, labelled by the teacher, in every step of a student's training.

    For seeds x, real inputs that are not augmented and whose labels nobody reads, the further inputs are

        real            x
        augmented       a strong augmentation of x, see `distill.exploration.further.Maker`
        reconstructed   Dec(Enc(x))
        random          Dec(Enc(x) + nu), nu ~ N(0, sigma^2 diag(std^2)); texts: masked tokens refilled
        gradient        Dec(z), z by steps from Enc(x) along grad_z KL(h(Dec z) || f(Dec z)), see `ascend`

    and the loss gets weight * tau^2 KL(h || f) on them (match = "kd"), or weight times the recipe's own distillation
    terms (match = "objective", with the teacher's most likely class as the label of what asks for one).

    Exploring happens with student and teacher in eval mode, before the real batch passes; the gradient is that of
    unrounded pixels, and student and teacher get rounded ones. Where the paper is silent, our reading: the student
    learns on the further inputs in a forward pass of its own, in train mode, so that a BatchNorm normalises them with
    their own statistics; the running statistics, and those of an objective, are of real data alone. With weight 0 all
    of this is done but that pass, so the student is, to the bit, the one without exploration.

    A filter drops an input: its place is taken by one of those that are kept, in turn, so that a batch keeps its size
    and nothing is read back from the device. "confidence" keeps what the teacher gives at least `threshold` to its
    likeliest class; "agreement" what it calls as it calls the seed, for which it is asked about the seeds, too.

    Under several processes each explores its own share of the seeds, with draws of its own. Figures in the metrics are
    of the main process's share.

    Args:
        section: the recipe's `[explore]`, not of kind "none".
        teacher: who labels; one that a coached strategy moves is asked as it is then.
        dataset: what the student learns on.
        generator: of kinds random, gradient and reconstructed; moved to the training's device.
        unlabelled: what `around` asks for besides the training split.
        tau: of the recipe's own kd, where the section has none; None: 1.
        subclasses: per class, where the teacher's logits are those of subclasses.
        generated: the fixed set of `versions`; epoch e learns on version e modulo V.
        batch_size: further inputs per step where the section names none; None: as many as real ones.
        say: is told, after the first epoch, what the filter keeps.

    Raises:
        InputError: a teacher that cannot be asked, or without what the section wants of it; nothing to explore around,
            no generator or a wrong one.
    """

    mixup = True

    def __init__(
        self,
        section: ExploreSection,
        teacher: Teacher,
        dataset: Dataset,
        *,
        generator: ImageGenerator | TextGenerator | None = None,
        unlabelled: Unlabelled | None = None,
        tau: float | None = None,
        subclasses: int | None = None,
        generated: GeneratedSet | None = None,
        batch_size: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if section.kind == "none":
            raise ValueError('kind "none" has nothing to explore')
        self.section, self.labeller, self.dataset = section, teacher, dataset
        self.generator, self.unlabelled, self.generated = generator, unlabelled, generated
        self.subclasses, self._batch_size = subclasses, batch_size
        self._say = say
        self._multilabel = dataset.task == "multilabel"
        knows_classes = labels_classes(teacher, dataset, subclasses)
        self.match: Literal["kd", "objective"] = section.match or ("kd" if knows_classes else "objective")
        self.tau = section.tau or tau or 1.0
        self._check(knows_classes)
        near = f"explore.sigma below {section.sigma:g}, " if "sigma" in _read(section) else ""
        self.remedy = f"; or, where it is a term of explore, {near}explore.weight below {section.weight:g}"
        if section.generates:
            self.remedy += ", or another generator: it may decode what is not finite"
        self._key = [
            "explore",
            FORM,
            section.model_dump(mode="json", exclude={"generator", "match", "tau", "batch_size"}),
            [self.match, self.tau if self.match == "kd" else None, section.batch_size or batch_size],
            None if generator is None else generator.key,
            None if unlabelled is None else unlabelled.key,
            None if generated is None else generated.key,
            teacher.key,
            subclasses,
        ]

    @property
    def key(self) -> object:
        return self._key

    def _check(self, knows_classes: bool) -> None:
        """Refuses what teacher and section cannot do together."""
        section, teacher = self.section, self.labeller
        if not teacher.runs_live:
            raise _not_live(teacher.kind)
        wants = {
            "explore.kind": section.kind == "gradient",
            "explore.match": self.match == "kd",
            "explore.filter": section.filter != "none",
        }
        for where, wanted in wants.items():
            if wanted and not knows_classes:
                raise InputError(
                    f"the teacher gives no logits for the {len(self.dataset.classes)} classes",
                    where=where,
                    evidence=f"logits: {teacher.num_logits or 'none'}",
                    fix='match = "objective", without filter and not by gradient; or a teacher of these classes',
                )
        if section.kind == "gradient" and not isinstance(teacher, NetworkTeacher):
            raise _no_gradient(teacher.kind, "its outputs have no gradient")
        if section.versions is not None:
            if isinstance(teacher, NetworkTeacher) and teacher.parameters_that_learn():
                raise InputError(
                    "a fixed set holds what the teacher said once, and this one learns",
                    where="explore.versions",
                    fix='leave versions out, or teacher.strategy = "frozen"',
                )
            if self.generated is None:
                raise ValueError("versions without the fixed set; build_generated makes it")

    def start(self, run: Run) -> None:
        """Moves all to the device and explores around up to 512 seeds, with the student as it is before training.

        Raises:
            InputError: the generator decodes another shape or values that are not finite; the filter keeps less than
                5 %; the teacher's outputs have no gradient; objectives that cannot be matched on further inputs.
        """
        self.run, section = run, self.section
        if self.match == "objective":
            check_match(run.objective.sections, labels_classes(self.labeller, self.dataset, self.subclasses))
        self._move(run.device)
        rows = None if run.rows is None else run.rows.numpy()
        self.pool = Pool(section.around, self.dataset, self.unlabelled, rows=rows, device=run.device, resident=run.data)
        wanted = section.batch_size or self._batch_size or run.batch_size
        self._share = wanted // run.processes.world
        if self._share < _SMALLEST_SHARE:
            raise InputError(
                "a single further input has no statistics that a student could normalise it with",
                where="explore.batch_size",
                evidence=f"{wanted} further inputs per step, {run.processes.world} "
                f"process{'es' * (run.processes.world > 1)}",
                fix=f"explore.batch_size = {_SMALLEST_SHARE * run.processes.world} or more",
            )
        self._orders = Orders(len(self.pool), run.seed)
        self._forget()
        if self.generated is not None:
            self._fixed = _Fixed(self.generated, len(self.pool), run.device)
        else:
            self.maker = Maker(section, self.dataset, self.generator, run.device, run.seed)
            with seeded(run.seed), in_eval_mode(run.student):
                self._pilot()
            self._forget()

    def _move(self, device: torch.device) -> None:
        if isinstance(self.labeller, NetworkTeacher):
            self.labeller.network.to(device)
            self.labeller.device = device
        self._device = device

    def _pilot(self) -> None:
        """Explores as the first steps will, and looks at what came out."""
        chosen = self._orders.chosen(0, min(_PILOT, len(self.pool)))
        draws = Draws(self.run.seed, 0)
        for first in range(0, len(chosen), _PILOT_BATCH):
            seeds = self.pool.take(chosen[first : first + _PILOT_BATCH])
            if self.section.kind == "gradient":
                self._check_gradient(seeds)
            made = self.maker.make(seeds, draws, step=0, judge=self._judge(self._student_logits))
            if not bool(made.finite):
                raise InputError(
                    "the generator decodes values that are not finite",
                    where="explore.generator",
                    evidence=f"among the first {first + len(seeds.inputs)} inputs that were made",
                    fix=_smaller(self.section, "check its weights and how it scales images"),
                )
            told = self._told(made)
            self._keep(seeds, told)
        self._check_kept("of the first inputs that were made")

    def _check_gradient(self, seeds: Seeds) -> None:
        """Refuses a teacher that passes no gradient to the pixels, or a decoder that passes none to the latents."""
        reason = _why_no_gradient(self._teacher_logits, seeds.inputs[:2].float())
        if reason is not None:
            raise _no_gradient(self.labeller.kind, reason)
        assert isinstance(self.generator, ImageGenerator)
        reason = _why_no_gradient(self.generator.decode, self.generator.encode(seeds.inputs[:2]))
        if reason is not None:
            raise InputError(
                "gradient exploration follows the decoder's gradient, and this one passes none",
                where="explore.generator",
                evidence=reason,
                fix='a decode without no_grad, detach and NumPy, or explore.kind = "random"',
            )

    # -- a step -------------------------------------------------------------------------------------------------------

    def before_step(self, step: Step) -> None:
        """Makes the step's further inputs and asks the teacher; leaves no trace in the student."""
        run, rank = self.run, self.run.processes.rank
        everyone = self._orders.chosen(step.number, self._share * run.processes.world)
        chosen = everyone[rank * self._share : (rank + 1) * self._share]
        looks = step.number % run.steps_per_epoch % _LOOK == 0
        with in_eval_mode(run.student):
            made = None
            if self.generated is not None:
                self._ready = self._fixed.take(step.epoch, chosen)
            else:
                seeds = self.pool.take(chosen)
                made = self.maker.make(
                    seeds,
                    Draws(run.seed, step.number, rank),
                    step=step.number,
                    judge=self._judge(self._student_logits),
                )
                told = self._told(made)
                self._ready = _Ready(made.inputs, told, self._keep(seeds, told), made.finite)
                self._broken |= ~made.finite
            if looks:
                self._look(self._ready, None if made is None else made.before)

    def _judge(self, student: Judge) -> Judge:
        """The divergence that is climbed. `student`: pixels -> class logits (n, C)."""
        return lambda pixels: divergence(self._teacher_logits(pixels), student(pixels), multilabel=self._multilabel)

    def _student_logits(self, inputs: Tensor) -> Tensor:
        """The student's class logits (n, C), in the mode that it is in."""
        with self.run.autocast():
            output: StudentOutput = self.run.student(inputs)
        return self.run.objective.class_logits(at_least_float32(output.head))

    def _teacher_logits(self, pixels: Tensor) -> Tensor:
        """The teacher's class logits (n, C), with a gradient to the pixels."""
        assert isinstance(self.labeller, NetworkTeacher)
        return self._class_logits(self.labeller.compute(_batch(pixels, None)))

    def _told(self, made: Made | Seeds) -> TeacherOutput:
        """What the teacher says of inputs, on the device of the training."""
        found = self.labeller.outputs(_batch(made.inputs, made.texts))
        return TeacherOutput(*(None if part is None else part.to(self._device) for part in found))

    def _class_logits(self, told: TeacherOutput) -> Tensor:
        assert told.logits is not None
        return told.logits if self.subclasses is None else class_logits_of(told.logits, self.subclasses)

    def _keep(self, seeds: Seeds, told: TeacherOutput) -> Tensor | None:
        """Which further inputs (n,) the filter keeps; None without a filter."""
        if self.section.filter == "none":
            return None
        agreed = self._class_logits(self._told(seeds)) if self.section.filter == "agreement" else None
        keep, classes = kept(self.section, self._class_logits(told), agreed)
        self._count(keep, classes)
        return keep

    def _count(self, keep: Tensor, classes: Tensor) -> None:
        self._counts[0].index_add_(0, classes, torch.ones_like(keep, dtype=torch.float64))
        self._counts[1].index_add_(0, classes, keep.double())

    @torch.no_grad()
    def _look(self, ready: _Ready, before: Tensor | None) -> None:
        """Notes how far the student, in eval mode, is from the teacher on what the step learns from."""
        if not labels_classes(self.labeller, self.dataset, self.subclasses):
            return
        told = self._class_logits(ready.told)
        after = divergence(told, self._student_logits(ready.inputs), multilabel=self._multilabel)
        gain = after if before is None else after - before
        self._looked += torch.stack([after.mean(), gain.mean()]).double()
        self._looks += 1

    def terms(self, step: Step, output: StudentOutput) -> dict[str, Tensor]:
        """The loss on the further inputs; nothing where its weight is 0."""
        if self.section.weight == 0:
            return {}
        run = self.run
        inputs, told, any_left = _without_dropped(self._ready)
        with leaving_statistics(run.student, run.objective):
            with run.autocast():
                found: StudentOutput = run.alone(inputs)
            own = StudentOutput(at_least_float32(found.embedding), at_least_float32(found.head))
            terms = self._kd(own, told) if self.match == "kd" else self._objective(own, told, step)
        # a NaN stops the training, which would else go on with whatever became of the pixels
        sound = torch.where(self._ready.finite, 0.0, torch.nan)
        return {
            f"explore/{name}": self.section.weight * (term if any_left is None else any_left * term) + sound
            for name, term in terms.items()
        }

    def _kd(self, own: StudentOutput, told: TeacherOutput) -> dict[str, Tensor]:
        loss = binary_kd_loss if self._multilabel else kd_loss
        return {"kd": loss(self.run.objective.class_logits(own.head), self._class_logits(told), self.tau)}

    def _objective(self, own: StudentOutput, told: TeacherOutput, step: Step) -> dict[str, Tensor]:
        """The recipe's distillation terms on the further inputs of all processes."""
        run = self.run
        whole, told = run.processes.gather(own), self._gathered(told)
        count = len(whole.head)
        classes = torch.zeros(count, dtype=torch.int64, device=run.device)
        if labels_classes(self.labeller, self.dataset, self.subclasses):
            logits = self._class_logits(told)
            labels = (logits > 0).float() if self._multilabel else logits.argmax(1)
        else:
            labels = classes  # check_match has seen that nobody reads them
        epoch = step.number / run.steps_per_epoch
        # no objective that is let in here knows samples by their row
        batch = Batch(labels, None, classes, step.number, epoch, epoch / run.section.epochs)
        found: dict[str, Tensor] = run.objective(whole, told, batch)
        return found

    def _gathered(self, told: TeacherOutput) -> TeacherOutput:
        """The teacher's outputs for the further inputs of all processes, in the order of `Processes.gather`."""
        parts = [torch.zeros(0, device=self._device) if part is None else part for part in told]
        count = max(len(part) for part in parts)
        whole = self.run.processes.gather(
            StudentOutput(*(part.reshape(count, -1) if len(part) else part.new_zeros(count, 0) for part in parts))
        )
        return TeacherOutput(*(None if part is None else found for part, found in zip(told, whole, strict=True)))

    # -- what the loop asks besides -----------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Starts the figures anew."""
        # asked, kept: per class that the filter speaks of
        self._counts = torch.zeros(2, len(self.dataset.classes), dtype=torch.float64, device=self._device)
        self._looked = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._looks = 0
        self._broken = torch.zeros((), dtype=torch.bool, device=self._device)

    def logs(self) -> dict[str, float]:
        """explore/divergence: mean KL(h || f) at temperature 1 of student and teacher in eval mode on the further
            inputs, before any are dropped, over every tenth step of the epoch.
        explore/gain: kind "gradient", how much more that is than at the seeds' own latents.
        explore/kept, explore/kept/<class>: with a filter, the share that it kept in the epoch; by the class that the
            teacher gives the seed (agreement) or the further input (confidence). In a fixed set, of all its versions.

        Raises:
            InputError: the filter kept less than 5 %.
            EdgestillError: values that are not finite were decoded.
        """
        figures: dict[str, float] = {}
        if bool(self._broken):
            raise EdgestillError(
                "the generator decodes values that are not finite",
                where="explore.generator",
                fix=_smaller(self.section, "check its weights"),
            )
        if self._looks:
            figures["explore/divergence"], gain = (self._looked / self._looks).tolist()
            if self.section.kind == "gradient":
                figures["explore/gain"] = gain
        rates = self.generated.keep_rates if self.generated is not None else self._check_kept("of this epoch's")
        if rates and self._say is not None:
            self._say(f"explore.filter {_kept_in_words(self.section, rates)}")
            self._say = None
        self._forget()
        return {**figures, **rates}

    def _check_kept(self, what: str) -> dict[str, float]:
        """Keep rates by the names that the metrics give them; none without a filter."""
        if self.section.filter == "none":
            return {}
        asked, left = self._counts.tolist()
        return check_keep_rates(self.section, self.dataset.classes, asked, left, what)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts, "looked": self._looked, "looks": self._looks, "broken": self._broken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts, self._looked, self._broken = (
            state[name].to(self._device) for name in ("counts", "looked", "broken")
        )
        self._looks = state["looks"]

    # -- looking ------------------------------------------------------------------------------------------------------

    def picture(
        self, path: Path, student: Student, objective: Composition, *, radii: Sequence[float] = _RADII, seed: int = 0
    ) -> None:
        """A PNG: real images in its first row, and below what exploration makes of them at other radii.

        Of a training split with classes every class has an image, the rarest first, up to ten; its word stands above.
        Below each image stands the teacher's word for it, where it has one. The row of the section's own radius has a
        frame.

        Args:
            path: of the PNG.
            student: whose disagreement with the teacher is climbed; back on its device afterwards, in eval mode.
            objective: gives its class logits.
            radii: factors of sigma, one row each.
            seed: of the draws, which are the same in all rows.
        """
        from distill.exploration.pictures import grid, one_per_class, spread

        device = self.labeller.device if isinstance(self.labeller, NetworkTeacher) else torch.device("cpu")
        place = next(student.parameters()).device
        self._device = device
        pool = Pool(self.section.around, self.dataset, self.unlabelled, device=device)
        maker = Maker(self.section, self.dataset, self.generator, device, seed)
        shown = spread(len(pool))
        if self.section.around != "unlabelled" and not self._multilabel:
            shown = one_per_class(self.dataset.train.labels, self.dataset.classes)
        seeds = pool.take(shown.rows)

        def logits(pixels: Tensor) -> Tensor:
            return objective.class_logits(at_least_float32(student(pixels).head))

        student.to(device).eval()
        objective.to(device).eval()
        rows: list[Made | Seeds] = [seeds]
        rows += [
            maker.make(seeds, Draws(seed, 0), step=0, judge=self._judge(logits), sigma=factor * self.section.sigma)
            for factor in radii
        ]
        words = [row for row in map(self._words, rows) if row is not None]
        student.to(place)
        objective.to(place)
        if words:
            words[0] = [f"says {word}" for word in words[0]]
        own = list(radii).index(1.0) if 1.0 in radii else None
        titles = [f"sigma {factor * self.section.sigma:g}{' (chosen)' * (factor == 1)}" for factor in radii]
        grid(
            torch.stack([row.inputs.cpu() for row in rows]),
            path,
            row_titles=["real", *titles],
            captions=words or None,
            column_titles=shown.titles,
            heading=shown.heading,
            marked=None if own is None else 1 + own,
        )

    def _words(self, shown: Made | Seeds) -> list[str] | None:
        """What the teacher calls each image: its class, or all labels that are more likely than not."""
        if not labels_classes(self.labeller, self.dataset, self.subclasses):
            return None
        logits = self._class_logits(self._told(shown)).cpu()
        names = self.dataset.classes
        if not self._multilabel:
            return [names[index] for index in logits.argmax(1).tolist()]
        return [
            ", ".join(name for name, on in zip(names, row, strict=True) if on) or "-" for row in (logits > 0).tolist()
        ]


class _Fixed:
    """A fixed set, resident."""

    def __init__(self, generated: GeneratedSet, total: int, device: torch.device) -> None:
        versions, found = generated.inputs.shape[:2]
        if found != total:
            raise InputError(
                "the fixed set belongs to other real inputs",
                where=str(generated.folder),
                evidence=f"made of {found} real inputs, there are {total}",
                fix="delete that folder; it is made anew",
            )
        self._versions, self._total, self._device = versions, total, device

        def stored(array: np.ndarray[Any, Any] | None) -> Stored | None:
            return None if array is None else Stored(array.reshape(-1, *array.shape[2:]), device)

        self._inputs, self._keep = stored(generated.inputs), stored(generated.keep)
        self._embedding, self._logits = stored(generated.embedding), stored(generated.logits)
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._filtered = generated.filtered

    def take(self, epoch: int, chosen: np.ndarray[Any, Any]) -> _Ready:
        """Version `epoch` modulo V of the seeds `chosen` (n,)."""
        rows = torch.from_numpy(epoch % self._versions * self._total + chosen)

        def taken(store: Stored | None) -> Tensor | None:
            return None if store is None else store.take(rows)

        inputs = taken(self._inputs)
        assert inputs is not None
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        keep = taken(self._keep) if self._filtered else None
        return _Ready(inputs, TeacherOutput(taken(self._embedding), taken(self._logits)), keep, self._finite)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside it is in eval mode; afterwards every layer is in the mode that it was in."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


@contextmanager
def leaving_statistics(*modules: nn.Module) -> Iterator[None]:
    """Layers that keep running statistics, such as BatchNorm, neither read nor change them inside, in train mode."""
    found: list[Any] = [
        layer
        for module in modules
        for layer in module.modules()
        if layer.training and getattr(layer, "track_running_stats", False)
    ]
    for layer in found:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in found:
            layer.track_running_stats = True


def kept(section: ExploreSection, told: Tensor, agreed: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the section's filter keeps, and the class that it speaks of.

    Args:
        section: its filter is not "none".
        told: the teacher's class logits (n, C) for the further inputs.
        agreed: the same for the seeds; filter "agreement" alone needs them.

    Returns:
        bool (n,), and int64 (n,): agreement, the class of the seed; confidence, that of the further input.
    """
    classes = told.argmax(1)
    if section.filter == "agreement":
        assert agreed is not None
        real = agreed.argmax(1)
        return classes == real, real
    return told.softmax(1).amax(1) >= section.threshold, classes


def check_keep_rates(
    section: ExploreSection, classes: Sequence[str], asked: Sequence[float], left: Sequence[float], what: str
) -> dict[str, float]:
    """Keep rates as the metrics name them: explore/kept, and explore/kept/<class> where any was asked about.

    Args:
        section: filter and radius, for the message.
        classes: their names.
        asked, left: per class, how many inputs there were and how many were kept.
        what: which inputs, for the message.

    Raises:
        InputError: less than 5 % were kept.
    """
    rates = {name: kept_here / there for name, there, kept_here in zip(classes, asked, left, strict=True) if there > 0}
    whole = sum(left) / max(1.0, sum(asked))
    if whole < SMALLEST_KEEP_RATE:
        raise InputError(
            f"the filter keeps {100 * whole:.1f} % {what} ({sum(asked):.0f}), less than "
            f"{100 * SMALLEST_KEEP_RATE:.0f} %: nothing is left to learn from",
            where="explore.filter",
            evidence="kept per class: " + ", ".join(f"{name} {100 * rate:.1f} %" for name, rate in rates.items()),
            fix=_smaller(section, 'explore.filter = "none"'),
        )
    return {KEPT: whole, **{f"{KEPT}/{name}": rate for name, rate in rates.items()}}


def _kept_in_words(section: ExploreSection, rates: Mapping[str, float]) -> str:
    """What a filter keeps, in all and of the worst classes. rates: as of `check_keep_rates`."""
    by_class = {name.removeprefix(KEPT + "/"): rate for name, rate in rates.items() if name != KEPT}
    words = f"keeps {100 * rates[KEPT]:.0f} % of the further inputs, {least_kept(by_class)}"
    starved = starved_classes(by_class)
    return f"{words}; {starved}: {_smaller(section, 'another filter')}" if starved else words


def labels_classes(teacher: Teacher, dataset: Dataset, subclasses: int | None) -> bool:
    """Whether its logits speak of the classes of the data."""
    return teacher.num_logits is not None and teacher.num_logits == len(dataset.classes) * (subclasses or 1)


def check_exploration(
    section: ExploreSection,
    *,
    kind: Literal["image", "tokens"],
    task: Task,
    objectives: Sequence[AnyObjective],
    teacher_kind: TeacherKind,
    has_unlabelled: bool,
) -> None:
    """Refuses what recipe and data tell cannot work; what only the loaded teacher tells, `Exploration` refuses.

    Args:
        section: the recipe's `[explore]`.
        kind: of the inputs.
        task: of the data.
        objectives: of the recipe.
        teacher_kind: of the recipe's teacher.
        has_unlabelled: whether there is `[data.unlabelled]`.

    Raises:
        InputError: names the key.
    """
    if section.kind == "none":
        return
    if teacher_kind in ("array", "none"):
        raise _not_live(teacher_kind)
    if section.around != "train" and not has_unlabelled:
        raise no_unlabelled(section.around)
    if kind == "tokens":
        _check_tokens(section)
    elif section.generates and section.generator.kind == "masked-lm":
        raise InputError(
            "a masked language model makes texts, and the data holds images",
            where="explore.generator.kind",
            fix='kind = "vae", which edgestill trains, or "torch", your own',
        )
    if section.kind == "gradient" and teacher_kind == "onnx":
        raise _no_gradient(teacher_kind, "an ONNX graph has no gradient")
    if section.filter != "none" and task == "multilabel":
        raise InputError(
            "with several labels there is no likeliest class to filter by",
            where="explore.filter",
            evidence='data.task = "multilabel"',
            fix='explore.filter = "none"',
        )
    if section.match == "objective":
        check_match(objectives, knows_classes=True)


def _check_tokens(section: ExploreSection) -> None:
    """Refuses what belongs to images."""
    if section.kind == "gradient":
        raise InputError(
            "texts have no gradient to follow: their tokens are discrete",
            where="explore.kind",
            evidence="the data holds texts",
            fix='explore.kind = "random", which refills masked tokens',
        )
    if section.kind in ("reconstructed", "augmented"):
        raise InputError(
            f'kind "{section.kind}" belongs to images, the data holds texts',
            where="explore.kind",
            fix='explore.kind = "random", which refills masked tokens, or "real"',
        )
    if section.kind not in GENERATED:
        return
    if section.generator.kind not in (None, "masked-lm"):
        raise InputError(
            f'a generator of kind "{section.generator.kind}" makes images, the data holds texts',
            where="explore.generator.kind",
            fix='kind = "masked-lm", with "model"',
        )
    if section.generator.model is None:
        raise InputError(
            "texts are refilled by a masked language model, and none is named",
            where="explore.generator.model",
            fix='generator = { kind = "masked-lm", model = "a folder or hub name" }',
        )
    if "sigma" in given(section):
        raise InputError(
            "texts have no latents, so there is no radius",
            where="explore.sigma",
            fix="explore.generator.mask, the share of tokens that are refilled",
        )


def check_match(objectives: Sequence[AnyObjective], knows_classes: bool) -> None:
    """Refuses match = "objective" where the objectives have no loss on inputs that are in no split.

    Args:
        objectives: of the recipe.
        knows_classes: whether the teacher gives class logits, by which further inputs are labelled.

    Raises:
        InputError: an objective that knows samples by their row or needs labels that there are not, or none that
            listens to the teacher.
    """
    fix = 'explore.match = "kd"' if knows_classes else "another objective, or a teacher with class logits"
    if all(section.kind == "supervised" for section in objectives):
        raise InputError(
            "there is no objective that could be matched: all of them are supervised", where="explore.match", fix=fix
        )
    for section in objectives:
        if section.kind == "crd" or (isinstance(section, LELPSection) and section.subclasses == "random"):
            raise InputError(
                f'objective "{section.kind}" knows samples by their place in the training split, and further inputs '
                "have none",
                where="explore.match",
                fix=fix,
            )
        if "labels" in section.needs and section.kind != "supervised" and not knows_classes:
            raise InputError(
                f'objective "{section.kind}" needs labels, and this teacher cannot give them',
                where="explore.match",
                evidence="it has no logits for the classes of the data",
                fix=fix,
            )


def _batch(inputs: Tensor, texts: tuple[str, ...] | None) -> TeacherBatch:
    """For inputs that are in no split, so their rows mean nothing."""
    return TeacherBatch(inputs, "train", np.zeros(len(inputs), np.int64), texts)


def _without_dropped(ready: _Ready) -> tuple[Tensor, TeacherOutput, Tensor | None]:
    """Inputs and outputs with kept ones, in turn, in the places of those that are dropped, and 1.0 if any is left."""
    if ready.keep is None:
        return ready.inputs, ready.told, None
    count = ready.keep.sum()
    # kept ones first, each group in its order
    order = torch.argsort(ready.keep.to(torch.int8), descending=True, stable=True)
    places = torch.arange(len(order), device=order.device) % count.clamp(min=1)
    rows = order.index_select(0, places)
    told = TeacherOutput(*(None if part is None else part.index_select(0, rows) for part in ready.told))
    inputs = ready.inputs.index_select(0, rows)
    if inputs.dim() == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return inputs, told, (count > 0).float()


def _read(section: ExploreSection) -> Mapping[str, object]:
    """Keys that its kind reads and that concern how far it goes."""
    return {"sigma": section.sigma} if section.kind in ("random", "gradient") and section.sigma > 0 else {}


def _smaller(section: ExploreSection, otherwise: str) -> str:
    """A remedy: a smaller radius where there is one, an easier threshold, or something else."""
    parts = [f"explore.sigma = {section.sigma / 2:g}"] if _read(section) else []
    if section.filter == "confidence":
        parts.append(f"explore.threshold below {section.threshold:g}")
    return ", or ".join([*parts, otherwise])


def _why_no_gradient(function: Callable[[Tensor], Tensor], place: Tensor) -> str | None:
    """Why `function` passes no gradient to its input at `place`; None where it does."""
    place = place.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            found = function(place)
        if not found.requires_grad:
            return "its outputs have no graph"
        torch.autograd.grad(found.sum(), place)
    except RuntimeError as error:  # tensors that were changed in place, or that do not depend on the input
        return str(error).splitlines()[0]
    return None


def _not_live(kind: str) -> InputError:
    return InputError(
        "this teacher cannot be asked about further inputs",
        where="teacher.kind",
        evidence=f'kind = "{kind}" has outputs for the samples of the data alone',
        fix='a teacher that runs (train, torch, transformers, onnx), or explore.kind = "none"',
    )


def _no_gradient(kind: str, evidence: str) -> InputError:
    return InputError(
        "gradient exploration follows the teacher's gradient, and this one passes none",
        where="explore.kind",
        evidence=f'teacher.kind = "{kind}": {evidence}',
        fix='explore.kind = "random", or a teacher of kind train, torch or transformers',
    )
