"""LELP: learning embedding linear projections (Loo et al. 2024, arXiv 2409.20449).

With few classes the teacher's logits say little; its embedding e (N, D) says more. Every class is split into S
subclasses along informative directions of the embedding, and the student predicts the subclasses:

    offline, training split only, W (C, D) the teacher's head:
      A = W - mean over the classes of W,  P = I - A^+ A         what the head reads is removed
      mu_c, V_c = mean and top-S principal directions of {P e_i : y_i = c},  V_c <- V_c Q_c with Q_c random orthogonal
      sigma_c = RMS of the class's own coordinates
    targets:  a_c = V_c^T (P e - mu_c) / sigma_c,  p_c = softmax(z_T / tau)_c,  q_{s|c} = softmax(beta a_c)_s
              p_{c,s} = p_c q_{s|c}
    loss:     tau^2 KL(p || softmax(o / tau)),  o the student's head (N, C S)
    class logits:  tau logsumexp_s(o_{c,s} / tau),  in the ground-truth term and in the exported graph

The per-class projections, the null space, the rotation, the two temperatures and the single KL without ground truth are
the paper's as described by others; the normalisation by sigma, what small and empty classes get, the recovered head,
the probe and the defaults are our reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives.base import FitData, Objective, Shapes, at_least_float32, required
from distill.objectives.embedding_compression import EmbeddingCompression
from distill.objectives.section import LELPSection, ObjectiveBase
from distill.objectives.split_head import class_logits_of, log_sum_exp
from distill.outputs import Batch, StudentOutput, TeacherOutput
from profiles.errors import InputError

_CHUNK = 4096
"""Rows that the offline fit holds in float64 at a time."""
_RESOLUTION = 1e-14
"""Share of the embeddings' squared size below which variation is rounding: float32's resolution, squared."""
_SMALLEST_SCALE = 1e-3
_RECOVERY_RIDGE = 1e-6
"""Of the embedding's mean variance; what varies less is float16's rounding, and reading it would blur W."""
_RECOVERY_ERROR = 1e-2
"""Share of the logits' variance up to which the head counts as linear. A linear one has below 1e-3, in float16 and with
fewer samples than dimensions, too; a softmax behind it gives several 1e-2."""
_PROBE_DECAY = 1e-3
_PROBE_ITERATIONS = 200
_FIGURE_ROWS = 1024


class Subclasses(NamedTuple):
    """The split of every class; float64.

    mean: mu (C, D), in the null space. directions: (C, S, D), orthonormal rows V_c^T after the rotation. scale: sigma
    (C,).
    """

    mean: Tensor
    directions: Tensor
    scale: Tensor


# -- the loss ---------------------------------------------------------------------------------------------------------


def subclass_coordinates(embedding: Tensor, subclasses: Subclasses) -> Tensor:
    """a_c = V_c^T (e - mu_c) / sigma_c; V_c lies in the null space, so that P e has the same coordinates as e.

    Args:
        embedding: e (N, D).
        subclasses: of the same type as `embedding`.

    Returns:
        (N, C, S).
    """
    mean, directions, scale = subclasses
    # all classes in one product; a common centre first, or a large constant part of e would cost digits
    centre = mean.mean(0)
    along = ((embedding - centre) @ directions.flatten(0, 1).T).view(-1, *directions.shape[:2])
    offset = (directions @ (mean - centre).unsqueeze(-1)).squeeze(-1)
    coordinates: Tensor = (along - offset) / scale.unsqueeze(-1)
    return coordinates


def lelp_terms(head: Tensor, teacher: Tensor, coordinates: Tensor, *, tau: float, beta: float) -> tuple[Tensor, Tensor]:
    """tau^2 KL(p || softmax(o / tau)) over all C S subclasses, in its two parts.

    KL(p_{c,s} || q_{c,s}) = KL(p_c || q_c) + sum_c p_c KL(p_{.|c} || q_{.|c}), exactly. The target is
    log p_c + log_softmax(beta a_c): softmax(z_c + beta a_c) would change the teacher's class probabilities, and so
    would tempering the joint distribution.

    Args:
        head: o (N, C S).
        teacher: class logits z_T (N, C); no gradient reaches them.
        coordinates: a (N, C, S); no gradient reaches them.
        tau: temperature > 0 of teacher and student.
        beta: sharpness >= 0 of the teacher's subclasses.

    Returns:
        Two scalars >= 0, at least float32, averaged over the batch: the class part and the subclass part. Their sum is
        the loss; the class part is KD at temperature tau on the class logits.
    """
    scaled = at_least_float32(head).reshape(coordinates.shape) / tau
    log_p = F.log_softmax(at_least_float32(teacher).detach() / tau, dim=1)
    log_q = F.log_softmax(log_sum_exp(scaled), dim=1)
    log_p_within = F.log_softmax(beta * at_least_float32(coordinates).detach(), dim=2)
    log_q_within = F.log_softmax(scaled, dim=2)
    within = F.kl_div(log_q_within, log_p_within, reduction="none", log_target=True).sum(2)
    class_part = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    subclass_part = (log_p.exp() * within).sum(1).mean()
    return tau**2 * class_part, tau**2 * subclass_part


# -- the offline fit --------------------------------------------------------------------------------------------------


def removed_directions(weight: Tensor) -> Tensor:
    """An orthonormal basis B of the row space of A = W - mean over the classes of W; P = I - B^T B = I - A^+ A.

    softmax(W P e + b) does not depend on e: the rows of W P are identical.

    Args:
        weight: W (C, D), float64.

    Returns:
        (min(C, D), D), float64; rows that are not needed are 0.
    """
    _, values, basis = torch.linalg.svd(weight - weight.mean(0, keepdim=True), full_matrices=False)
    kept: Tensor = basis * (values > 1e-10 * values[0]).unsqueeze(1)
    return kept


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal (size, size) matrix, uniform over all of them (QR with the sign fix of Mezzadri 2007); float64."""
    return _orthonormal(torch.randn(size, size, generator=generator, dtype=torch.float64))


def fit_subclasses(
    embedding: Tensor,
    labels: Tensor,
    removed: Tensor,
    *,
    classes: int,
    subclasses: int,
    seed: int,
    projection: Literal["pca", "random"] = "pca",
    rotation: bool = True,
    where: str = "subclasses_per_class",
) -> Subclasses:
    """Means, directions and scales of every class's subclasses, in the null space of what was removed.

    Directions that a class is too small for are the leading pooled within-class ones orthogonal to its own. An empty
    class gets the pooled mean, directions and scale. No scale is below 1e-3 of the pooled one. Random directions
    are uniform over the null space, and are not rotated further, which would change nothing.

    Args:
        embedding: e (N, D), any floating type.
        labels: int64 (N,), on the same device.
        removed: orthonormal rows (R, D), float64, as of `removed_directions`; on the device that computes.
        classes: C.
        subclasses: S >= 1.
        seed: of the rotations and of random directions; the result is a pure function of it and the data.
        projection: principal or random directions.
        rotation: whether the directions' variances are evened out.
        where: recipe key of S, for the message.

    Raises:
        InputError: S is larger than the number of directions that there are.
    """
    device, size = removed.device, embedding.shape[1]
    generator = torch.Generator().manual_seed(seed)
    if projection == "random":
        rank = int((removed.abs().amax(1) > 0).sum())
        _refuse_more_than(size - rank, subclasses, where, f"{rank} of {size} directions are the teacher's head's own")
    means = torch.zeros(classes, size, dtype=torch.float64, device=device)
    pooled = torch.zeros(size, size, dtype=torch.float64, device=device)
    found: list[tuple[Tensor, Tensor]] = []
    counts, energy = [], 0.0
    for each in range(classes):
        rows = (labels == each).nonzero().squeeze(1)
        counts.append(len(rows))
        means[each], scatter, centred, squares = _moments(embedding, rows, removed)
        pooled += scatter
        energy += squares
        if projection == "pca":
            found.append(_principal(scatter, subclasses) if centred is None else _principal_rows(centred, subclasses))
        else:
            drawn = torch.randn(subclasses, size, generator=generator, dtype=torch.float64).to(device)
            directions = _orthonormal(_without(drawn, removed).T).T
            found.append((((directions @ scatter) * directions).sum(1), directions))
    tolerance = _RESOLUTION * energy
    overall = (means * torch.tensor(counts, dtype=torch.float64, device=device).unsqueeze(1)).sum(0) / sum(counts)

    kept = [int((values > tolerance).sum()) if projection == "pca" else subclasses for values, _ in found]
    if min(kept) < subclasses or float(pooled.trace()) <= tolerance:
        pooled_values, pooled_directions = _principal(pooled, size)
        limit = int((pooled_values > tolerance).sum())
        evidence = f"within their classes, {sum(counts):,} training samples vary in {limit} of {size} directions"
        _refuse_more_than(limit, subclasses, where, evidence + (", the head's own left out" if removed.any() else ""))
    directions = torch.empty(classes, subclasses, size, dtype=torch.float64, device=device)
    totals = torch.stack([values[:k].sum() for (values, _), k in zip(found, kept, strict=True)])
    variances = totals / torch.tensor(counts, device=device).clamp_min(1)
    for each, (_, own) in enumerate(found):
        chosen = own[: kept[each]]
        if counts[each] == 0:
            means[each] = overall
            if projection == "pca":
                chosen = pooled_directions[:subclasses]
            variances[each] = ((chosen @ pooled) * chosen).sum() / sum(counts)
        elif kept[each] < subclasses:
            _, more = _principal(_without(_without(pooled, chosen).T, chosen), subclasses - kept[each])
            chosen = _orthonormal(torch.cat([chosen, more]).T).T
        if rotation and projection == "pca":
            chosen = random_rotation(subclasses, generator).to(device).T @ chosen
        directions[each] = chosen
    smallest = _SMALLEST_SCALE * (totals.sum() / (sum(counts) * subclasses)).sqrt()
    return Subclasses(means, directions, (variances / subclasses).sqrt().clamp_min(smallest))


def recover_head(embedding: Tensor, logits: Tensor, *, device: torch.device) -> Tensor | None:
    """The linear head that made these logits, up to what softmax does not see; None when no linear head did.

    Ridge regression of z - mean over the classes of z on e, both centred, in closed form: log-probabilities count as
    the logits behind them. A head is linear if the leave-one-out error, |r_i / (1 - h_i)|^2 summed with h_i the
    leverages, is at most 1 % of the logits' variance, so that it means something when N < D, too. Deterministic.

    Args:
        embedding: e (N, D), any floating type.
        logits: z (N, C), on the same device.
        device: where to compute.

    Returns:
        W (C, D), float64, its mean over the classes 0.
    """
    rows, size = embedding.shape
    everything = torch.arange(rows, device=embedding.device)

    def centred_logits(chosen: Tensor) -> Tensor:
        z = logits[chosen].to(device, torch.float64)
        return z - z.mean(1, keepdim=True)

    mean = torch.zeros(size, dtype=torch.float64, device=device)
    logit_mean = torch.zeros(logits.shape[1], dtype=torch.float64, device=device)
    for e, chosen in _chunks(embedding, everything, device):
        mean += e.sum(0) / rows
        logit_mean += centred_logits(chosen).sum(0) / rows
    scatter = torch.zeros(size, size, dtype=torch.float64, device=device)
    products = torch.zeros(size, logits.shape[1], dtype=torch.float64, device=device)
    for e, chosen in _chunks(embedding, everything, device):
        scatter += (e - mean).T @ (e - mean)
        products += (e - mean).T @ (centred_logits(chosen) - logit_mean)
    ridge = _RECOVERY_RIDGE * scatter.trace() / size
    if not ridge > 0:
        return None
    values, vectors = torch.linalg.eigh(scatter)
    whitening = vectors / (values.clamp_min(0) + ridge).sqrt()
    weight = (whitening @ (whitening.T @ products)).T
    error, variation, original = torch.zeros(3, dtype=torch.float64, device=device).unbind()
    for e, chosen in _chunks(embedding, everything, device):
        x, z = e - mean, centred_logits(chosen)
        leverage = 1 / rows + (x @ whitening).square().sum(1, keepdim=True)
        residual = z - logit_mean - x @ weight.T
        error += (residual / (1 - leverage).clamp_min(_RESOLUTION)).square().sum()
        variation += (z - logit_mean).square().sum()
        original += logits[chosen].to(device, torch.float64).square().sum()
    linear = variation > _RESOLUTION * original and error <= _RECOVERY_ERROR * variation
    return weight - weight.mean(0) if linear else None


def fit_probe(embedding: Tensor, labels: Tensor, *, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A linear head for embeddings whose own is not known: multinomial logistic regression.

    Minimises mean cross-entropy + 5e-4 |W'|^2 by L-BFGS from 0, W' the weights on columns of zero mean and unit
    variance; deterministic.

    Args:
        embedding: e (N, D), any floating type.
        labels: int64 (N,), on the same device.
        classes: C; a class without samples gets a low bias.
        device: where to compute.

    Returns:
        W (C, D) and b (C,), float64: logits W e + b.
    """
    rows, size = embedding.shape
    everything = torch.arange(rows, device=embedding.device)
    mean = torch.zeros(size, dtype=torch.float64, device=device)
    variance = torch.zeros_like(mean)
    for part, _ in _chunks(embedding, everything, device):
        mean += part.sum(0) / rows
    for part, _ in _chunks(embedding, everything, device):
        variance += (part - mean).square().sum(0) / rows
    deviation = torch.where(variance > _RESOLUTION * (mean.square() + variance), variance.sqrt(), math.inf)
    weight = torch.zeros(classes, size, dtype=torch.float64, device=device)
    bias = torch.zeros(classes, dtype=torch.float64, device=device)

    def objective() -> Tensor:
        loss = _PROBE_DECAY / 2 * weight.square().sum()
        weight.grad, bias.grad = _PROBE_DECAY * weight, torch.zeros_like(bias)
        for part, chosen in _chunks(embedding, everything, device):
            x = (part - mean) / deviation
            target = F.one_hot(labels[chosen].to(device), classes)
            log_q = F.log_softmax(x @ weight.T + bias, dim=1)
            error = (log_q.exp() - target) / rows
            loss -= (log_q * target).sum() / rows
            weight.grad += error.T @ x
            bias.grad += error.sum(0)
        return loss

    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_PROBE_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    with torch.no_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    weight = weight / deviation
    return weight, bias - weight @ mean


def _chunks(embedding: Tensor, rows: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The chosen rows in float64 on `device`, and which they are, a few thousand at a time."""
    for chosen in torch.split(rows, _CHUNK):
        if len(chosen):
            yield embedding[chosen].to(device, torch.float64), chosen


def _without(x: Tensor, basis: Tensor) -> Tensor:
    """x (N, D) without its part in the span of the orthonormal rows of `basis` (R, D)."""
    return x - (x @ basis.T) @ basis


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns that span the same; of the sign that makes the result continuous, and unique."""
    q, r = torch.linalg.qr(columns)
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return signed


def _moments(embedding: Tensor, rows: Tensor, removed: Tensor) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Of the chosen rows, in the null space: mean (D,), scatter (D, D), the centred rows if they are fewer than D, and
    the sum of the squares of the original rows."""
    size = embedding.shape[1]
    mean = torch.zeros(size, dtype=torch.float64, device=removed.device)
    scatter = torch.zeros(size, size, dtype=torch.float64, device=removed.device)
    squares = torch.zeros((), dtype=torch.float64, device=removed.device)
    parts = []
    for part, _ in _chunks(embedding, rows, removed.device):
        mean += part.sum(0) / len(rows)
        squares += part.square().sum()
    for part, _ in _chunks(embedding, rows, removed.device):
        centred = _without(part - mean, removed)
        scatter += centred.T @ centred
        if len(rows) < size:
            parts.append(centred)
    mean = _without(mean.unsqueeze(0), removed).squeeze(0)
    return mean, scatter, torch.cat(parts) if parts else None, float(squares)


def _principal(scatter: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest `count` eigenvalues and eigenvectors (count, D) of a scatter matrix, largest first."""
    values, vectors = torch.linalg.eigh((scatter + scatter.T) / 2)
    return values.flip(0)[:count], _signed(vectors.flip(1).T[:count])


def _principal_rows(centred: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `_principal` of centred^T centred, through the smaller matrix; at most as many as there are rows."""
    values, weights = torch.linalg.eigh(centred @ centred.T)
    values, weights = values.flip(0)[:count], weights.flip(1).T[:count]
    return values, _signed(F.normalize(weights @ centred, dim=1, eps=1e-300))


def _signed(vectors: Tensor) -> Tensor:
    """Rows with a positive largest entry: an eigenvector's sign is the library's accident."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def _refuse_more_than(limit: int, subclasses: int, where: str, evidence: str) -> None:
    if subclasses > limit or limit == 0:
        raise InputError(
            f"{subclasses} subclasses per class are more than the embedding has directions for",
            where=where,
            evidence=evidence,
            fix=f"subclasses_per_class = {limit} or fewer" if limit else 'null_space = false, or objective = "kd"',
        )


# -- the objective ----------------------------------------------------------------------------------------------------


class LELP(Objective):
    """weight times the two parts of `lelp_terms`.

    Requirements: teacher embeddings and labels. Relations: subclasses_per_class = 1 is KD at the same tau and
    hard_weight 0.

    The fit reads view 0 of the cached embeddings, the clean inputs: subclasses are to follow the data, not the
    augmentation. The targets of a batch come from the embedding of the view that the student sees.

    z_T are the teacher's logits where it has one per class (a single logit z of two classes arrives as [0, z]), else
    the probe's logits. W is the head that gives these logits: the teacher's own where it is known, else the one that
    `recover_head` reads off logits and embeddings (stored outputs, ONNX) where they are an affine function of each
    other, else the probe's: `fit_probe`, on the labels. `on = "compressed"`: e is the frozen transform's output, W and
    z_T are its head's.

    `subclasses = "random"` (control): a_i ~ N(0, I) of size (C, S), drawn once per training sample from the seed. It
    has the RMS that sigma gives to real coordinates, so the same beta makes targets of the same sharpness.

    Attributes:
        head_source: where W and z_T come from, known after `prepare`. "teacher": both are the teacher's, or z_T is and
            no W is needed. "recovered": z_T is the teacher's, W was read off it. "probe": at least one of them is the
            probe's. "compressed": both are the transform's.
    """

    removed: Tensor
    mean: Tensor
    directions: Tensor
    scale: Tensor
    probe_weight: Tensor
    probe_bias: Tensor
    random_coordinates: Tensor | None

    def __init__(self, section: LELPSection, shapes: Shapes) -> None:
        super().__init__(section, shapes)
        if shapes.teacher_dim is None:
            raise RuntimeError("LELP was built without teacher embeddings")
        self.section = section
        self.builds_on_others = section.on == "compressed"
        self.head_source: Literal["teacher", "recovered", "probe", "compressed"] = (
            "compressed" if self.builds_on_others else "teacher"
        )
        # in a tuple: as a submodule it would be in the checkpoint and in the optimiser twice
        self._compression: tuple[EmbeddingCompression, ...] = ()
        self._reads_logits = shapes.teacher_logits == shapes.classes
        self._entropy: float | None = None
        self.register_buffer("random_coordinates", None, persistent=False)
        if not self.builds_on_others:
            self._allocate(shapes.teacher_dim)

    def _allocate(self, size: int) -> None:
        """Buffers of the shapes that the fit fills, so that a checkpoint can be loaded before it."""
        classes, subclasses = self.shapes.classes, self.section.subclasses_per_class
        self.register_buffer("removed", torch.zeros(min(classes, size), size))
        self.register_buffer("mean", torch.zeros(classes, size))
        self.register_buffer("directions", torch.zeros(classes, subclasses, size))
        self.register_buffer("scale", torch.ones(classes))
        if not self.builds_on_others:
            self.register_buffer("probe_weight", torch.zeros(classes, size))
            self.register_buffer("probe_bias", torch.zeros(classes))

    @staticmethod
    def head_size(section: ObjectiveBase, classes: int) -> int:
        """C S."""
        return classes * cast(LELPSection, section).subclasses_per_class

    def class_logits(self, head: Tensor) -> Tensor:
        """(N, C S) -> (N, C), see `class_logits_of`; part of the exported graph."""
        return class_logits_of(head, self.section.subclasses_per_class, self.section.tau)

    def attach(self, others: Sequence[Objective]) -> None:
        """Finds the frozen transform whose embedding is split, for `on = "compressed"`."""
        if not self.builds_on_others:
            return
        (transform,) = [each for each in others if isinstance(each, EmbeddingCompression)]
        self._compression = (transform,)
        self._allocate(transform.head.in_features)

    @property
    def null_space(self) -> Tensor:
        """P (D, D)."""
        return torch.eye(self.removed.shape[1]).to(self.removed) - self.removed.T @ self.removed

    @torch.no_grad()
    def prepare(self, data: FitData, *, fitted: bool = False) -> None:
        """Fits P, mu, V and sigma on the training split, in float64; `fitted`: they came from a checkpoint.

        Raises:
            InputError: more subclasses than directions.
        """
        embedding = required(data.embedding)[0]
        if self.builds_on_others:
            embedding = torch.cat([self._space(part.to(data.device)) for part in torch.split(embedding, _CHUNK)])
        labels = data.labels.to(embedding.device)
        needs_weight = self.section.null_space and self.section.subclasses == "projection"
        weight = self._head(data)
        if not self.builds_on_others and (not self._reads_logits or (needs_weight and weight is None)):
            weight = self._recovered_or_probe(embedding, labels, data, fitted)
        if self.section.subclasses == "random":
            self._draw(data, len(embedding))
        elif not fitted:
            self._fit(embedding, labels, weight if needs_weight else None, data)
        self._entropy = self._subclass_entropy(data)

    def _head(self, data: FitData) -> Tensor | None:
        """W (C, D) in float64 of the logits that are matched, None where it is not known."""
        if self.builds_on_others:
            return self._compression[0].head.weight.double()
        if data.head_weight is None or not self._reads_logits:
            return None
        return data.head_weight.to(data.device, torch.float64)

    def _recovered_or_probe(self, embedding: Tensor, labels: Tensor, data: FitData, fitted: bool) -> Tensor | None:
        """W where the teacher's is not known; None when a checkpoint already has what was made of it."""
        if fitted:
            self.head_source = "probe" if self.probe_weight.any() else "recovered"
            return None
        if self._reads_logits:
            weight = recover_head(embedding, required(data.logits)[0], device=data.device)
            if weight is not None:
                self.head_source = "recovered"
                return weight
        self.head_source = "probe"
        weight, bias = fit_probe(embedding, labels, classes=self.shapes.classes, device=data.device)
        self.probe_weight.copy_(weight)
        self.probe_bias.copy_(bias)
        return weight

    def _fit(self, embedding: Tensor, labels: Tensor, weight: Tensor | None, data: FitData) -> None:
        removed = torch.zeros(self.removed.shape, dtype=torch.float64, device=data.device)
        if weight is not None:
            removed = removed_directions(weight)
        found = fit_subclasses(
            embedding,
            labels,
            removed,
            classes=self.shapes.classes,
            subclasses=self.section.subclasses_per_class,
            seed=data.seed,
            projection=self.section.projection,
            rotation=self.section.rotation,
            where=f"objective[{self.shapes.position}].subclasses_per_class",
        )
        self.removed.copy_(removed)
        self.mean.copy_(found.mean)
        self.directions.copy_(found.directions)
        self.scale.copy_(found.scale)

    def _draw(self, data: FitData, rows: int) -> None:
        """The control's coordinates; a function of the seed, so they are drawn anew and not checkpointed."""
        generator = torch.Generator().manual_seed(data.seed)
        size = (rows, self.shapes.classes, self.section.subclasses_per_class)
        self.random_coordinates = torch.randn(*size, generator=generator).to(data.device)

    def _subclass_entropy(self, data: FitData) -> float | None:
        """Mean over about 1,024 training samples of sum_c p_c H(q_{.|c}) / log S; None for one subclass."""
        if self.section.subclasses_per_class == 1:
            return None
        embedding = required(data.embedding)[0]
        rows = torch.arange(0, len(embedding), max(1, len(embedding) // _FIGURE_ROWS), device=embedding.device)
        logits = None if data.logits is None else data.logits[0, rows].to(data.device)
        teacher, coordinates = self.targets(
            TeacherOutput(embedding[rows].to(data.device), logits), rows.to(data.device)
        )
        q = F.softmax(self.section.beta * coordinates, dim=2)
        entropy = (F.softmax(teacher / self.section.tau, dim=1) * torch.special.entr(q).sum(2)).sum(1).mean()
        return float(entropy) / math.log(self.section.subclasses_per_class)

    def _space(self, embedding: Tensor) -> Tensor:
        """The embedding whose classes are split: the teacher's (N, D_t), or the compressed one (N, D_c)."""
        embedding = at_least_float32(embedding)
        if not self.builds_on_others:
            return embedding
        compressed: Tensor = self._compression[0].transform(embedding)
        return compressed

    @torch.no_grad()
    def targets(self, teacher: TeacherOutput, indices: Tensor) -> tuple[Tensor, Tensor]:
        """z_T (N, C) and a (N, C, S) of a batch; `indices` int64 (N,): rows of the training split."""
        embedding = self._space(required(teacher.embedding))
        if self.builds_on_others:
            logits: Tensor = self._compression[0].head(embedding)
        elif self._reads_logits:
            logits = at_least_float32(required(teacher.logits))
        else:
            logits = F.linear(embedding, self.probe_weight.to(embedding), self.probe_bias.to(embedding))
        if self.section.subclasses == "random":
            return logits, required(self.random_coordinates).index_select(0, indices)
        split = Subclasses(self.mean.to(embedding), self.directions.to(embedding), self.scale.to(embedding))
        return logits, subclass_coordinates(embedding, split)

    def forward(self, student: StudentOutput, teacher: TeacherOutput, batch: Batch) -> dict[str, Tensor]:
        logits, coordinates = self.targets(teacher, batch.indices)
        parts = lelp_terms(student.head, logits, coordinates, tau=self.section.tau, beta=self.section.beta)
        return {"lelp/class": self.weight * parts[0], "lelp/subclass": self.weight * parts[1]}

    def logs(self) -> dict[str, float]:
        """`lelp/probe`: 1 if W or the class probabilities come from the probe. `lelp/recovered`: 1 if W was read off
        logits and embeddings. `lelp/teacher_subclass_entropy`: 0..1, 1 when all subclasses of a class are equally
        likely, as with beta = 0."""
        figures = {f"lelp/{source}": float(self.head_source == source) for source in ("probe", "recovered")}
        if self._entropy is not None:
            figures["lelp/teacher_subclass_entropy"] = self._entropy
        return figures
