"""EC: embedding compression (Ding & Lerch 2024, arXiv 2402.06761).

A teacher of *another* task gives embeddings e (N, D_t). A trainable transform keeps only what this task needs:

    c = T(e)      linear D_t -> D_c, or Linear-BN-ReLU-Linear
    u = g(c)      linear head, training only
    terms:  lam distance(s, sg[c])        gradients reach the student (and, for "cosine", its learned map)
            mu task_loss(u, y)            gradients reach T and g only
    and the loop adds (1 - lam) task_loss(z_S, y)

The trainable transform, the frozen teacher and the separate gradients are the paper's; D_c, lam, mu, the warm-up and
the absence of any normalisation of e are our reading. T and g are never part of the exported student.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.objectives.base import FitData, Objective, Shapes, at_least_float32, required
from distill.objectives.cosine_difference import cosine_difference_loss
from distill.objectives.distance_correlation import distance_correlation_loss
from distill.objectives.ground_truth import task_loss
from distill.objectives.section import EmbeddingCompressionSection
from distill.outputs import Batch, StudentOutput, TeacherOutput

_FIT_BATCH = 128
_FIT_LEARNING_RATE = 3e-3
_PROBE_ROWS = 1024


def cosine_loss(x: Tensor, y: Tensor) -> Tensor:
    """mean_i (1 - cos(x_i, y_i)).

    Args:
        x: (N, D).
        y: (N, D).

    Returns:
        Scalar in 0..2, at least float32. Invariant to a common rotation and to the scale of each row.
    """
    return (1 - F.cosine_similarity(at_least_float32(x), at_least_float32(y), dim=1)).mean()


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the column-centred rows (Roy & Vetterli 2007).

    Args:
        x: (N, D), N >= 2.

    Returns:
        Scalar float64 in 1..min(N - 1, D): how many directions the rows really use; 0 when all rows are equal.
    """
    x = x.double()
    values = torch.linalg.svdvals(x - x.mean(0, keepdim=True))
    total = values.sum()
    if total <= 1e-12 * max(1.0, float(x.abs().max())):
        return torch.zeros((), dtype=torch.float64)
    entropy: Tensor = torch.special.entr(values / total).sum()
    return entropy.exp()


class _BatchNorm(nn.BatchNorm1d):
    """BatchNorm that uses its running statistics for a batch of one, which has no variance of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


class EmbeddingCompression(Objective):
    """The terms above, each times `weight`.

    Requirements: teacher embeddings and labels. Relations: T = identity, mu = 0, "joint" is `distance_correlation`
    (EAsT); lam = 0 is the plain student.
    """

    def __init__(self, section: EmbeddingCompressionSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        if shapes.teacher_dim is None:
            raise RuntimeError("embedding compression was built without teacher embeddings")
        self.section = section
        teacher_dim = shapes.teacher_dim
        dimension = section.dimension or shapes.student_dim
        self.transform: nn.Module
        if section.transform == "linear":
            self.transform = nn.Linear(teacher_dim, dimension)
        else:
            hidden = section.hidden or teacher_dim
            self.transform = nn.Sequential(
                nn.Linear(teacher_dim, hidden, bias=False), _BatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, dimension)
            )
        self.head = nn.Linear(dimension, shapes.classes)
        aligned = section.distance != "cosine" or dimension == shapes.student_dim
        self.align: nn.Module = nn.Identity() if aligned else nn.Linear(shapes.student_dim, dimension, bias=False)
        self._frozen = section.schedule == "frozen"
        self._probe: Tensor | None = None

    def train(self, mode: bool = True) -> EmbeddingCompression:
        """Like `nn.Module.train`; a frozen transform stays in eval mode."""
        super().train(mode)
        if self._frozen:
            self.transform.eval()
        return self

    def distance(self, student: Tensor, compressed: Tensor) -> Tensor:
        """The chosen distance between student embeddings (N, D_s) and compressed embeddings (N, D_c)."""
        if self.section.distance == "distance_correlation":
            return distance_correlation_loss(student, compressed, biased=self.section.biased)
        if self.section.distance == "cosine_difference":
            return cosine_difference_loss(student, compressed)
        return cosine_loss(self.align(at_least_float32(student)), compressed)

    def prepare(self, data: FitData, *, fitted: bool = False) -> None:
        """Fits T and g on the training split alone: fully for "frozen", a little for "warmup", not for "joint"."""
        embedding = required(data.embedding)
        self._probe = embedding[0, :: max(1, embedding.shape[1] // _PROBE_ROWS)]
        epochs = {"joint": 0, "warmup": self.section.warmup_epochs, "frozen": self.section.fit_epochs}
        if not fitted and epochs[self.section.schedule]:
            self._fit(data, epochs[self.section.schedule])
        if self._frozen:
            for module in (self.transform, self.head):
                module.requires_grad_(False)

    def _fit(self, data: FitData, epochs: int) -> None:
        """AdamW on the task loss alone, over the cached embeddings; epoch e reads view e modulo the cached views."""
        embedding = required(data.embedding)
        self.transform.train()
        parameters = [*self.transform.parameters(), *self.head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=_FIT_LEARNING_RATE, weight_decay=0.0)
        generator = torch.Generator().manual_seed(data.seed)
        rows = embedding.shape[1]
        for epoch in range(epochs):
            view = embedding[epoch % len(embedding)]
            order = torch.randperm(rows, generator=generator).to(embedding.device)
            for chosen in torch.split(order, _FIT_BATCH):
                labels = data.labels[chosen].to(data.device)
                mask = None if data.mask is None else data.mask[chosen].to(data.device)
                compressed = self.transform(at_least_float32(view[chosen].to(data.device)))
                loss = task_loss(self.head(compressed), labels, mask)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        optimizer.zero_grad()
        self.train(self.training)

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        compressed = self.transform(at_least_float32(required(teacher.embedding)).detach())
        terms: dict[str, Tensor] = {}
        if self.section.lam:
            target = compressed.detach() if self.section.detach else compressed
            distance = self.distance(student.embedding, target)
            terms["embedding_compression/distance"] = self.weight * self.section.lam * distance
        if self.section.mu and not self._frozen:
            loss = task_loss(self.head(compressed), batch.labels, batch.mask)
            terms["embedding_compression/task"] = self.weight * self.section.mu * loss
        return terms

    @torch.no_grad()
    def logs(self) -> dict[str, float]:
        """`effective_rank` of c over about 1,024 training samples: a linear T and g lose rank when classes are few."""
        if self._probe is None or len(self._probe) < 2:
            return {}
        mode = self.transform.training
        self.transform.eval()
        rows = at_least_float32(self._probe.to(self.head.weight.device))
        rank = effective_rank(self.transform(rows))
        self.transform.train(mode)
        return {"embedding_compression/effective_rank": float(rank)}
