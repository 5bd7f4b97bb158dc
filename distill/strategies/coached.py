"""A teacher that learns beside its student: online (ProKT), meta (MetaDistil) and LGTM as one strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.dataset import Dataset
from distill.data.labels import Labels
from distill.networks import load_state, read_state
from distill.objectives.base import at_least_float32
from distill.objectives.kd import binary_kd_loss, kd_loss
from distill.outputs import StudentOutput, TeacherOutput
from distill.strategies.held_out import held_out_rows
from distill.strategies.influence import change_along, influence, preconditioned, sample_influence, through_clipping
from distill.strategies.virtual_step import clipped, norm, untouched, virtual_step
from distill.strategy import Step, Strategy
from distill.teachers.strategy_section import CoachedSection, parse_lambda
from distill.teachers.teacher import NetworkTeacher, TeacherBatch
from distill.training import Run, metric_value
from profiles.artifact import explain_os_errors
from profiles.errors import InputError
from profiles.metrics import primary_metric

FORM = 1
"""Raise when the way a teacher learns, or which rows are held out, changes, so that older students are made anew."""
TEACHER_FILE = "teacher.safetensors"
_STREAM = 0xBA7C
"""Keeps the order of held-out batches apart from other draws of the same seed."""


class Coached(Strategy):
    """The teacher takes a step of its own before each of the student's, and the student gets its fresh outputs.

    On a training batch, with T the teacher's logits, S the student's and sg[.] a stop of gradients, it descends

        online:  a_t CE(y, T) + (1 - a_t) KL(sg[S] || T)
        lgtm:    the same - lambda_inf J
        meta:    - eta_s J, the gradient of the held-out loss alone

    J is the influence of `distill.strategies.influence`: what following T in one step of the student's own optimiser
    does for its loss on held-out samples. Under a virtual step of plain SGD, or `influence = "preconditioned"`, that
    loss has exactly the gradient -eta_s grad J by the teacher's weights, eta_s the student's learning rate in this
    step; the factor 1 - hard_weight is in J already, so `lambda_inf = "bilevel"` and meta take eta_s.

    Other `lambda_inf`: a number; "official", the teacher's learning rate in this step, as in the authors' code;
    "ratio:R", R ||grad of the other terms|| / ||grad J||, which is our reading: the published weight leaves next to
    nothing of the influence. 0 is strategy "online" exactly, apart from the samples that are held out all the same.

    Our reading of the weight of J besides: what J is taken of are the student's terms as it descends them, so KD brings
    (1 - hard_weight) tau^2 and its objective's weight into J. The authors' code takes the influence on a_t CE +
    (1 - a_t) KL(S || T), so theirs has (1 - a_t), tau 1, and the student's softmax Jacobian instead. Their "official"
    is thus ours up to these factors.

    Our reading, where the paper is silent: the teacher is always in eval mode (its BatchNorm keeps its statistics, no
    dropout) and in float32; held-out inputs are not augmented, as at test time; the student judges and is judged in
    eval mode, its S and the virtual step are those of train mode; with several labels KL is the Bernoulli one, averaged
    over the labels; an objective's own parameters, which logit objectives have none of, are left out of the direction;
    `train.class_weights` and `train.label_smoothing` hold for the teacher's CE and for the held-out loss as well as for
    the student's, and "balanced" weights are those of the whole training split, held-out samples included.

    The student's virtual step is that of its real optimiser, gradient clipping included. With several processes all of
    it is computed on the global batch, as one process would.

    Memory: copies of the student's weights and optimiser state. Time per step, in passes of the student: three forward
    and two backward for J (finite difference: four forward), in passes of the teacher: one forward, two backward, and
    one forward for the fresh outputs.

    Args:
        strategy: see above.
        section: the recipe's `[teacher.coached]`.
        teacher: live, from `live_teacher`; changed in place.
        dataset: that it will learn on.
        held_out: share of the training split that is held out; None: nothing.
        learning_rate: peak of the teacher's.
        start_key: key of the teacher before it learns.

    Raises:
        InputError: nothing held out where the strategy needs it.
    """

    def __init__(
        self,
        strategy: Literal["online", "meta", "lgtm"],
        section: CoachedSection,
        teacher: NetworkTeacher,
        dataset: Dataset,
        *,
        held_out: float | None,
        learning_rate: float,
        start_key: str,
    ) -> None:
        self.strategy, self.section, self.learner, self.dataset = strategy, section, teacher, dataset
        self.share, self.learning_rate = held_out, learning_rate
        self.remedy = f"; or teacher.coached.learning_rate below {learning_rate:g}"
        self._start_key = start_key
        self._form, self._weight = ("bilevel", 0.0) if strategy == "meta" else parse_lambda(section.lambda_inf)
        self.is_influenced = strategy == "meta" or (
            strategy == "lgtm" and (self._form, self._weight) != ("number", 0.0)
        )
        if strategy != "online" and held_out is None:
            raise InputError(
                f'strategy "{strategy}" judges the student on samples that are held out, and there are none',
                where="teacher.coached.held_out",
                fix="held_out = 0.05",
            )
        self._soft_loss: Callable[[Tensor, Tensor, float], Tensor] = (
            kd_loss if dataset.task == "multiclass" else binary_kd_loss
        )
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._steps = 0
        self._pass: tuple[int, Tensor, Tensor] | None = None

    @property
    def key(self) -> object:
        # the held-out rows follow from data, seed and share, which all are in the student's key
        section = self.section.model_dump(mode="json", exclude={"learning_rate", "held_out"})
        return ["coached", FORM, self.strategy, section, self.share, self.learning_rate, self._start_key]

    def rows(self, dataset: Dataset, seed: int) -> np.ndarray[Any, Any] | None:
        if self.share is None:
            return None
        return np.setdiff1d(np.arange(len(dataset.train)), self._held_out(dataset, seed))

    def _held_out(self, dataset: Dataset, seed: int) -> np.ndarray[Any, Any]:
        assert self.share is not None
        split = dataset.train
        return held_out_rows(Labels(split.labels, split.mask), dataset.classes, self.share, seed)

    def start(self, run: Run) -> None:
        self.run = run
        self.learner.network.to(run.device)
        self.learner.device = run.device
        self._parameters = self.learner.parameters_that_learn()
        groups = [
            {"params": [p for p in self._parameters if p.dim() > 1], "weight_decay": self.section.weight_decay},
            {"params": [p for p in self._parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)
        self._student_names = [name for name, p in run.student.named_parameters() if p.requires_grad]
        self._student_parameters = [p for p in run.student.parameters() if p.requires_grad]
        if not self.is_influenced:
            return
        self.held = torch.from_numpy(self._held_out(run.dataset, run.seed))
        wanted = self.section.held_out_batch_size or run.section.batch_size
        self.held_batch = min(wanted, len(self.held)) // run.processes.world * run.processes.world
        if not self.held_batch:
            raise InputError(
                f"{min(wanted, len(self.held))} held-out samples cannot be shared by {run.processes.world} processes",
                where="teacher.coached.held_out_batch_size" if wanted < len(self.held) else "teacher.coached.held_out",
                fix=f"at least {run.processes.world} samples",
            )

    # -- a step -------------------------------------------------------------------------------------------------------

    def before_step(self, step: Step) -> None:
        """The teacher's own step."""
        value = None
        figures: dict[str, Tensor] = {}
        if self.is_influenced:
            told, head, change, value = self.influence(step)
            if self.dataset.task == "multiclass":
                figures["coached/helpful_samples"] = (sample_influence(head, told.detach(), change) > 0).double().mean()
        else:
            told = self._logits(step)
            with torch.no_grad(), untouched(self.run.student):
                head = self._student(step).head
        student = self.run.objective.class_logits(head).detach()
        rate = self.learning_rate * step.learning_rate / self.run.section.peak_learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._note(self._descend(self._terms(step, told, student), value, step.learning_rate, rate) | figures)

    def _terms(self, step: Step, told: Tensor, student: Tensor) -> dict[str, Tensor]:
        """The teacher's loss besides the influence, term by term."""
        if self.strategy == "meta":
            return {}
        hard = self.section.hard_weight
        return {
            "coached/ground_truth": hard * self.run.truth(told, step.rows),
            "coached/student": (1 - hard) * self._soft_loss(told, student, 1.0),
        }

    def _descend(
        self, terms: Mapping[str, Tensor], value: Tensor | None, eta_s: float, eta_t: float
    ) -> dict[str, Tensor]:
        """One step of the teacher's optimiser on the terms minus lambda_inf J, whose figures it returns.

        `value`: J; None: there is none.
        """
        figures = {name: term.detach() for name, term in terms.items()}
        others = self._gradients(torch.stack(list(terms.values())).sum(), value is not None) if terms else None
        gradients = others
        if value is not None:
            found = self._gradients(value, False)
            figures["coached/influence"] = value.detach()
            size = norm(found)
            weight: Tensor | float
            if self._form == "ratio":
                assert others is not None
                weight = self._weight * norm(others) / torch.where(size > 0, size, torch.inf)
            else:
                weight = {"number": self._weight, "bilevel": eta_s, "official": eta_t}[self._form]
            gradients = list(torch._foreach_mul(found, -weight))
            if others is not None:
                total = norm(others)
                share = size / torch.where(total > 0, total, torch.inf)
                figures["coached/influence_ratio"] = weight * share
                figures["coached/unweighted_influence_ratio"] = share
                gradients = list(torch._foreach_add(gradients, others))
        assert gradients is not None
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return figures

    def _note(self, figures: Mapping[str, Tensor]) -> None:
        """Adds a step's figures to the epoch's sums, on the device."""
        values = torch.stack([figure.double() for figure in figures.values()])
        self._names = list(figures)
        self._sums = values if self._sums is None else self._sums.add_(values)
        self._steps += 1

    def _gradients(self, scalar: Tensor, keep: bool) -> list[Tensor]:
        """Of the teacher's parameters, averaged over the processes; `keep`: the graph is needed once more."""
        found = torch.autograd.grad(scalar, self._parameters, retain_graph=keep, allow_unused=True)
        return self._averaged(
            [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, found, strict=True)]
        )

    def _averaged(self, gradients: list[Tensor]) -> list[Tensor]:
        world = self.run.processes.world
        return gradients if world == 1 else [self.run.processes.sum(gradient) / world for gradient in gradients]

    def _logits(self, step: Step) -> Tensor:
        """The teacher's logits (B, C) of the global batch; with a graph unless gradients are off."""
        own = self.learner.compute(TeacherBatch(step.inputs, "train", step.host_share.numpy())).logits
        assert own is not None
        own = at_least_float32(own)
        return self.run.processes.gather(StudentOutput(own[:, :0], own)).head

    def _student(self, step: Step) -> StudentOutput:
        """The student's outputs of the global batch, as in the step that follows."""
        with self.run.autocast():
            output: StudentOutput = self.run.student(step.inputs)
        return self._whole(output)

    def _whole(self, output: StudentOutput) -> StudentOutput:
        return self.run.processes.gather(
            StudentOutput(at_least_float32(output.embedding), at_least_float32(output.head))
        )

    # -- influence ----------------------------------------------------------------------------------------------------

    def influence(self, step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """T (B, C) with its graph, the student's head output and its change u along the held-out gradient (B, C), and
        J, a scalar of which T's graph is a part. Head outputs are class logits, as logit objectives have no others."""
        run = self.run
        told = self._logits(step)
        with untouched(run.student, run.objective):
            output = self._student(step)
            gradients = self._student_gradients(output, told.detach(), step)
        used = gradients
        largest = run.section.grad_clip
        if largest is not None:
            # the student alone, as in the loop
            own = {p: gradients[p] for p in self._student_parameters if p in gradients}
            used = gradients | clipped(own, largest)
        with untouched(run.student, run.objective):
            run.student.eval()
            with virtual_step(run.optimizer, used):
                direction = self._held_out_gradient(step)
            if self.section.influence == "preconditioned":
                stepped = {p: v for p, v in direction.items() if p in used}
                direction = preconditioned(run.optimizer, used, stepped)
                if largest is not None:
                    direction = through_clipping(gradients, largest, direction)
            named = {
                name: direction[p]
                for name, p in zip(self._student_names, self._student_parameters, strict=True)
                if p in direction
            }
            own_change = change_along(run.student, step.inputs, named, self.section.derivative)
        change = run.processes.gather(StudentOutput(own_change[:, :0], own_change)).head
        embedding = output.embedding.detach()

        def loss(head: Tensor) -> Tensor:
            terms = run.loss_terms(StudentOutput(embedding, head), TeacherOutput(None, told), step.rows, step.number)
            # the labels' term knows no teacher: it would add to J and nothing to its gradient
            return torch.stack([term for name, term in terms.items() if name != "ground_truth"]).sum()

        return told, output.head.detach(), change, influence(loss, output.head, change)

    def _student_gradients(self, output: StudentOutput, told: Tensor, step: Step) -> dict[nn.Parameter, Tensor]:
        """The gradient of the step that follows, if the teacher stood still; `.grad` is not touched."""
        parameters = [*self._student_parameters, *(p for p in self.run.objective.parameters() if p.requires_grad)]
        terms = self.run.loss_terms(output, TeacherOutput(None, told), step.rows, step.number)
        return self._of(torch.stack(list(terms.values())).sum(), parameters)

    def _held_out_gradient(self, step: Step) -> dict[nn.Parameter, Tensor]:
        """v: the gradient of the ground-truth loss on the step's held-out batch by the student's present weights."""
        rows, host_rows = self.held_out_batch(step.number)
        share, host_share = self.run.processes.share(rows), self.run.processes.share(host_rows)
        with self.run.autocast():
            output: StudentOutput = self.run.student(self.run.data.clean_inputs(share, host_share))
        logits = self.run.objective.class_logits(self._whole(output).head)
        return self._of(self.run.truth(logits, rows), self._student_parameters)

    def held_out_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows of the training split that judge optimiser step `step`, on the device and on the host; int64.

        All held-out rows in random order, then again in another; a pure function of seed and step. As in training, what
        does not fill a batch is left out of a pass.
        """
        batches = len(self.held) // self.held_batch
        number, place = divmod(step, batches)
        if self._pass is None or self._pass[0] != number:
            order = np.random.default_rng((self.run.seed, number, _STREAM)).permutation(len(self.held))
            host = self.held[torch.from_numpy(order)]
            if self.run.device.type == "cuda":
                host = host.pin_memory()  # a pass may be one batch, and no step waits for the device
            self._pass = number, host.to(self.run.device, non_blocking=True), host
        _, rows, host_rows = self._pass
        chosen = slice(place * self.held_batch, (place + 1) * self.held_batch)
        return rows[chosen], host_rows[chosen]

    def _of(self, scalar: Tensor, parameters: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """Gradients of the parameters that the scalar depends on, averaged over the processes."""
        found = torch.autograd.grad(scalar, parameters, allow_unused=True)
        known = {p: g for p, g in zip(parameters, found, strict=True) if g is not None}
        return dict(zip(known, self._averaged(list(known.values())), strict=True))

    # -- what the loop asks besides -----------------------------------------------------------------------------------

    @torch.no_grad()
    def teacher(self, step: Step) -> TeacherOutput:
        return TeacherOutput(None, self._logits(step))

    def logs(self) -> dict[str, float]:
        """Means over the epoch's steps, beside the teacher's loss terms:

        influence: J.
        influence_ratio: ||lambda_inf grad J|| over the norm of the other terms' gradient; R where lambda_inf is
            "ratio:R".
        unweighted_influence_ratio: the same without lambda_inf, which tells how much there is to weigh.
        helpful_samples: share of the batch whose influence I_i = (S_i - T_i) . u_i is positive, so that following the
            teacher on them lowers the held-out loss. As published, of KL at tau 1, whatever the objective; only where
            a sample has one class.
        """
        if self._sums is None:
            return {}
        means = (self._sums / self._steps).tolist()
        self._sums, self._steps = None, 0
        return dict(zip(self._names, means, strict=True))

    @torch.no_grad()
    def validation(self) -> dict[str, float]:
        """The teacher's primary metric on the validation split."""
        run, split = self.run, self.dataset.validation
        rows = np.arange(run.processes.rank, len(split), run.processes.world)
        logits = torch.zeros(len(split), len(self.dataset.classes), device=run.device)
        size = max(256, run.batch_size)
        for first in range(0, len(rows), size):
            chosen = rows[first : first + size]
            found = self.learner.compute(TeacherBatch(torch.from_numpy(split.inputs[chosen]), "validation", chosen))
            assert found.logits is not None
            logits[torch.from_numpy(chosen).to(run.device)] = found.logits.float()
        whole = run.processes.sum(logits).cpu().numpy()
        return {f"validation/teacher_{primary_metric(self.dataset.task)}": metric_value(self.dataset, whole)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "teacher": self.learner.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "names": self._names,
            "sums": self._sums,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.network.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._names, self._steps = state["names"], state["steps"]
        self._sums = None if state["sums"] is None else state["sums"].to(self.run.device)

    def save(self, folder: Path) -> None:
        """TEACHER_FILE: the teacher after the last step, whichever epoch's student is kept."""
        from safetensors.torch import save_file

        # copies: the format has no tensors that share memory, as tied embeddings do
        weights = {name: value.detach().cpu().clone() for name, value in self.learner.network.state_dict().items()}
        with explain_os_errors(folder):
            save_file({name: value.contiguous() for name, value in weights.items()}, folder / TEACHER_FILE)

    def load(self, folder: Path) -> None:
        """Gives the teacher the weights that `save` wrote: it is then as it was after its last step.

        Raises:
            InputError: a file missing or damaged.
        """
        file = folder / TEACHER_FILE
        load_state(self.learner.network, read_state(file, where=str(file)), file=file, where=str(file))
