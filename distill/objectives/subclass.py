"""Subclass distillation (Mueller, Kornblith & Hinton 2020, arXiv 2002.03936).

A teacher with a head of C S outputs o (S per class) invents subclasses, and the student matches all of them:

    class logits     z_c = tau logsumexp_s(o_cs / tau), so that softmax(z / tau)_c = sum_s softmax(o / tau)_cs
    teacher learns   cross_entropy(z, y) at tau = 1 + aux_weight L_aux      (the loop adds the first part)
    student term     tau^2 KL(softmax(o_T / tau) || softmax(o_S / tau)) over all C S subclasses

L_aux makes the teacher use its subclasses: it falls as the samples of a batch move apart. A teacher of kind "train" is
trained again, from its first weights on. A frozen one cannot be: then only a new linear head on its cached embeddings
learns, with the same two losses. The student's weights are our reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.objectives.base import FitData, Objective, Shapes, at_least_float32, required
from distill.objectives.ground_truth import cross_entropy
from distill.objectives.kd import kd_loss
from distill.objectives.section import AnyObjective, SubclassSection
from distill.objectives.split_head import class_logits_of
from distill.outputs import Batch, StudentOutput, TeacherOutput
from profiles.errors import InputError

_FIT_EPOCHS = 20
_FIT_STEPS = 500
"""At least; 20 epochs of a few hundred samples would leave the head near its first weights."""
_FIT_BATCH = 128
_FIT_LEARNING_RATE = 3e-3
_LEAST_SHARE = 0.01
"""Of the mean deviation of the embedding's dimensions, that each is taken to have at least."""


def auxiliary_loss(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """mean_i log sum_j exp(h_i . h_j) - 1/T - log N, with h_i the standardised logits of sample i over sqrt(T K).

    Standardised: minus their mean, over their standard deviation (both over the sample's own K logits), so that
    h_i . h_i = 1/T and h_i . h_j is the correlation of two samples' logits over T. A sample whose logits are all equal
    has no direction; its h is 0 and gets no gradient.

    Args:
        logits: (N, K), K = C S subclass logits.
        temperature: T > 0.

    Returns:
        Scalar, at least float32. Its maximum 0 is reached when all h_i are equal (and by a batch of one). Minimum:
        since sum_ij h_i . h_j >= 0, the mean over j != i of h_i . h_j averages at least -1/(T (N - 1)), and by
        convexity

            L_aux >= log(exp(1/T) + (N - 1) exp(-1/(T (N - 1)))) - 1/T - log N

        with equality for a regular simplex, which exists when N <= K; for large N the bound rises to -1/T. Invariant
        to the order of the samples, to a common order of the logits, and to shift and positive scale of each sample's
        logits.
    """
    z = at_least_float32(logits)
    centred = z - z.mean(dim=1, keepdim=True)
    squared = centred.square().sum(dim=1, keepdim=True)
    # rounding alone leaves about eps |z| per logit
    noise = z.shape[1] * (4 * torch.finfo(z.dtype).eps * z.detach().abs().amax(dim=1, keepdim=True)).square()
    flat = squared <= noise
    # where() before the root, so that a flat sample has a finite (zero) gradient
    unit = torch.where(flat, 0.0, centred) * torch.where(flat, 1.0, squared).rsqrt()
    similarity = unit @ unit.T / temperature
    return similarity.logsumexp(dim=1).mean() - 1 / temperature - math.log(len(z))


def retrained_for(sections: Sequence[AnyObjective]) -> SubclassSection | None:
    """The objective of a mix that wants a teacher of its own making; None when there is none.

    Raises:
        InputError: two of them; one teacher cannot have two heads.
    """
    found = [position for position, section in enumerate(sections) if isinstance(section, SubclassSection)]
    if len(found) > 1:
        raise InputError(
            "two objectives want to retrain the teacher, and there is one",
            where=f"objective[{found[1]}].kind",
            evidence='objective "subclass" is there twice',
            fix="keep one of them",
        )
    return next((section for section in sections if isinstance(section, SubclassSection)), None)


def teacher_section(section: SubclassSection) -> SubclassSection:
    """The part of the settings that the teacher depends on; those of the student alone are at their defaults."""
    return SubclassSection(
        subclasses_per_class=section.subclasses_per_class,
        aux_weight=section.aux_weight,
        aux_temperature=section.aux_temperature,
    )


class SubclassTeacher(Objective):
    """What the teacher learns beside the ground truth: aux_weight times `auxiliary_loss`. No objective of a recipe.

    Requirements: a head of C S outputs. The loop adds the cross-entropy of its class logits.
    """

    def __init__(self, section: SubclassSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        self.section = section

    @staticmethod
    def head_size(section: SubclassSection, classes: int) -> int:  # type: ignore[override]
        return classes * section.subclasses_per_class

    def class_logits(self, head: Tensor) -> Tensor:
        return class_logits_of(head, self.section.subclasses_per_class)

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        loss = auxiliary_loss(student.head, self.section.aux_temperature)
        return {"subclass/auxiliary": self.section.aux_weight * loss}


class Subclass(Objective):
    """weight times the student term above.

    Requirements: labels, and either the logits of a teacher that was trained with subclasses (`Shapes.subclasses`) or
    the embeddings of a frozen one, for which `prepare` fits a head of its own on the training split. That head is a
    buffer: it is kept with the training, learns nothing during it, and is no part of the exported student.
    """

    head_weight: Tensor
    head_bias: Tensor

    def __init__(self, section: SubclassSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        self.section = section
        self.retrained = shapes.subclasses is not None
        if self.retrained:
            if shapes.subclasses != section.subclasses_per_class:
                raise RuntimeError("the teacher was trained with another number of subclasses")
            return
        if shapes.teacher_dim is None:
            raise RuntimeError("subclass distillation was built without subclass logits and without embeddings")
        first = nn.Linear(shapes.teacher_dim, self.head_size(section, shapes.classes))
        self.register_buffer("head_weight", first.weight.detach().clone())
        self.register_buffer("head_bias", first.bias.detach().clone())

    @staticmethod
    def head_size(section: SubclassSection, classes: int) -> int:  # type: ignore[override]
        return classes * section.subclasses_per_class

    def class_logits(self, head: Tensor) -> Tensor:
        return class_logits_of(head, self.section.subclasses_per_class, self.section.tau)

    def prepare(self, data: FitData, *, fitted: bool = False) -> None:
        """Fits the head on a frozen teacher's embeddings; nothing to do for a teacher that was trained again."""
        if not self.retrained and not fitted:
            self._fit(data)

    def _fit(self, data: FitData) -> None:
        """AdamW on both losses of the teacher; epoch e reads view e modulo the cached views.

        The embeddings are standardised per dimension meanwhile, and the head that is kept undoes it.
        """
        embedding = required(data.embedding)
        views, rows, _ = embedding.shape
        clean = embedding[0].double()
        mean = clean.mean(0).to(data.device, torch.float32)
        deviation = clean.std(0, correction=0)
        # a dimension that hardly varies over the clean samples may do so in another view
        deviation = deviation.clamp(min=_LEAST_SHARE * float(deviation.mean()))
        scale = torch.where(deviation > 0, deviation, 1).reciprocal().to(data.device, torch.float32)
        weight = nn.Parameter(self.head_weight.clone())
        bias = nn.Parameter(self.head_bias.clone())
        optimizer = torch.optim.AdamW([weight, bias], lr=_FIT_LEARNING_RATE, weight_decay=0.0)
        generator = torch.Generator().manual_seed(data.seed)
        for epoch in range(max(_FIT_EPOCHS, math.ceil(_FIT_STEPS / math.ceil(rows / _FIT_BATCH)))):
            view = embedding[epoch % views]
            order = torch.randperm(rows, generator=generator).to(embedding.device)
            for chosen in torch.split(order, _FIT_BATCH):
                inputs = (at_least_float32(view[chosen].to(data.device)) - mean) * scale
                head = inputs @ weight.T + bias
                loss = cross_entropy(
                    class_logits_of(head, self.section.subclasses_per_class), data.labels[chosen].to(data.device)
                )
                loss = loss + self.section.aux_weight * auxiliary_loss(head, self.section.aux_temperature)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            self.head_weight.copy_(weight * scale)
            self.head_bias.copy_(bias - self.head_weight @ mean)

    def teacher_logits(self, teacher: TeacherOutput) -> Tensor:
        """(N, C S): the teacher's subclass logits, without gradient."""
        if self.retrained:
            return required(teacher.logits).detach()
        return at_least_float32(required(teacher.embedding)).detach() @ self.head_weight.T + self.head_bias

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        return {"subclass": self.weight * kd_loss(student.head, self.teacher_logits(teacher), self.section.tau)}
