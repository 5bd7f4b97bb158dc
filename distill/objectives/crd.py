"""Contrastive representation distillation (Tian, Krishnan & Isola 2020, arXiv 1910.10699).

Student and teacher embeddings are projected and normalised; memory banks M_S and M_T keep a running projection of every
training sample. For sample i with projections v_S, v_T, each of the two is an anchor: v_S against M_T, v_T against M_S.
The row of i in that bank is the positive, K rows of other samples are the negatives, and a classifier of fixed form
tells them apart (noise-contrastive estimation):

    x_j = exp(<v, M_j> / tau) / Z,  c = K / n                        n training samples
    loss = -mean_i [ log x_i / (x_i + c)  +  sum_{K negatives j} log c / (x_j + c) ]

Z = n times the mean of exp(<v, M_j> / tau) over the first batch, one per anchor, then fixed. After the loss the batch's
rows become normalise(momentum M_i + (1 - momentum) v_i). Gradients reach both projections and the student.

Our reading: one draw of negatives is shared by the batch, where the authors draw for every sample, with repetitions.
Each sample still has K distinct negatives, uniform among the others and never itself, so that the expected loss and
gradient do not depend on the sharing; only the noise of the batch's samples is common. It makes a matrix product of
what is otherwise a gather of (N, K, D): 1 GB for N = 128, K = 16384, D = 128. With K = n - 1, the default up to 16,385
samples, nothing is drawn at all. The banks start as random unit rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.objectives.base import Objective, Shapes, at_least_float32, required
from distill.objectives.section import CRDSection
from distill.outputs import Batch, StudentOutput, TeacherOutput
from profiles.errors import InputError

_NEGATIVES = 16384


def draw_candidates(samples: int, negatives: int, indices: Tensor, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Rows of the bank that a batch is contrasted with, and which of them each sample leaves out.

    K + 1 distinct rows are drawn. A sample that is among them leaves itself out, any other the last one: K rows
    remain, a uniform choice of K others.

    Args:
        samples: rows of the bank, n.
        negatives: K, 1..n - 1.
        indices: int64 (N,), the batch's rows.
        seed: of the objective.
        step: of the training; the draw is a function of (seed, step) and the device's kind alone.

    Returns:
        int64 (K + 1,) rows, and int64 (N,) positions in them.
    """
    device = indices.device
    if negatives + 1 == samples:
        return torch.arange(samples, device=device), indices
    generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
    rows = torch.randperm(samples, generator=generator, device=device)[: negatives + 1]
    position = torch.full((samples,), negatives, device=device)
    position.index_copy_(0, rows, torch.arange(negatives + 1, device=device))
    return rows, position.index_select(0, indices)


def similarities(
    anchors: Tensor, positives: Tensor, candidates: Tensor, left_out: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """<v, M_j> / tau of each anchor with its positive and its negatives.

    Args:
        anchors: (N, D).
        positives: (N, D), each anchor's own row of the bank.
        candidates: (K + 1, D), rows of the bank.
        left_out: int64 (N,), the candidate that is none of the anchor's negatives; gets -inf.
        tau: temperature > 0.

    Returns:
        (N,) and (N, K + 1).
    """
    anchors = anchors / tau
    return (anchors * positives).sum(1), (anchors @ candidates.T).scatter(1, left_out[:, None], -math.inf)


def log_normaliser(positive: Tensor, negative: Tensor, samples: int) -> Tensor:
    """log Z: log of n times the mean of exp(similarity).

    Args:
        positive: (N,) as `similarities` gives it.
        negative: (N, K + 1) as `similarities` gives it.
        samples: n.
    """
    total = torch.logaddexp(positive.logsumexp(0), negative.logsumexp((0, 1)))
    return total + math.log(samples / negative.numel())  # one of each row is -inf, and the positive takes its place


def nce_loss(positive: Tensor, negative: Tensor, log_z: Tensor, samples: int) -> Tensor:
    """-mean_i [ log x_i / (x_i + c) + sum_j log c / (x_j + c) ], x = exp(similarity) / Z, c = K / n.

    Computed from log x - log c, which needs no epsilon against a logarithm of zero.

    Args:
        positive: (N,) as `similarities` gives it.
        negative: (N, K + 1) as `similarities` gives it.
        log_z: scalar.
        samples: n, the training samples; the noise has probability 1 / n everywhere.

    Returns:
        Scalar > 0.
    """
    shift = log_z + math.log((negative.shape[1] - 1) / samples)
    return -(F.logsigmoid(positive - shift).sum() + F.logsigmoid(shift - negative).sum()) / len(positive)


class CRD(Objective):
    """weight times `nce_loss` of the student's anchors ("crd/student") and of the teacher's ("crd/teacher").

    The second trains the teacher's projection. Requirements: teacher embeddings; no labels. Banks and normalisers are
    buffers: they are checkpointed, and move in training mode only.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_z: Tensor

    def __init__(self, section: CRDSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        samples = shapes.train_samples
        if samples < 2:
            raise InputError(
                'objective "crd" contrasts a sample with others, and there are none',
                where=f"objective[{shapes.position}].kind",
                evidence=f"training samples: {samples}",
                fix="more training samples",
            )
        if shapes.teacher_dim is None:
            raise RuntimeError("contrastive distillation was built without teacher embeddings")
        self.tau, self.momentum = section.tau, section.momentum
        self.negatives = min(_NEGATIVES, samples - 1) if section.negatives is None else section.negatives
        self.seed = int(torch.randint(2**31, ()))
        self.student_projection = nn.Linear(shapes.student_dim, section.dimension)
        self.teacher_projection = nn.Linear(shapes.teacher_dim, section.dimension)
        self.register_buffer("student_bank", F.normalize(torch.randn(samples, section.dimension)))
        self.register_buffer("teacher_bank", F.normalize(torch.randn(samples, section.dimension)))
        # of the student's and the teacher's anchors; infinite until the first batch
        self.register_buffer("log_z", torch.full((2,), math.inf))
        self._normalised = False
        self.register_load_state_dict_post_hook(_look_again)  # type: ignore[no-untyped-call]

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        v_student = F.normalize(self.student_projection(at_least_float32(student.embedding)))
        v_teacher = F.normalize(self.teacher_projection(at_least_float32(required(teacher.embedding)).detach()))
        samples = len(self.student_bank)
        rows, left_out = draw_candidates(samples, self.negatives, batch.indices, seed=self.seed, step=batch.step)
        compared: list[tuple[Tensor, Tensor]] = []
        for anchors, bank in ((v_student, self.teacher_bank), (v_teacher, self.student_bank)):
            # copies: the banks change before the backward pass
            positives, candidates = bank.index_select(0, batch.indices), bank.index_select(0, rows)
            compared.append(similarities(anchors, positives, candidates, left_out, self.tau))
        log_z = self._log_z(compared)
        if self.training:
            self._remember(self.student_bank, batch.indices, v_student)
            self._remember(self.teacher_bank, batch.indices, v_teacher)
        return {
            f"crd/{name}": self.weight * nce_loss(*both, log_z[position], samples)
            for position, (name, both) in enumerate(zip(("student", "teacher"), compared, strict=True))
        }

    @torch.no_grad()
    def _log_z(self, compared: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(2,): log Z of both anchors; of this batch if there is none yet, which a training batch then settles."""
        if self._normalised:
            return self.log_z
        found = torch.stack([log_normaliser(*both, len(self.student_bank)) for both in compared])
        # after a resume there is one; the device decides, and the host does not wait for it
        log_z = torch.where(self.log_z.isinf(), found, self.log_z)
        if self.training:
            self.log_z.copy_(log_z)
            self._normalised = True
        return log_z

    @torch.no_grad()
    def _remember(self, bank: Tensor, indices: Tensor, projected: Tensor) -> None:
        mixed = self.momentum * bank.index_select(0, indices) + (1 - self.momentum) * projected
        bank.index_copy_(0, indices, F.normalize(mixed))


def _look_again(module: nn.Module, _keys: object) -> None:
    """After loading a state, its normaliser counts: it may be set where ours was not, or the reverse."""
    module._normalised = False  # type: ignore[assignment]
