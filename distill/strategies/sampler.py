"""Which architectures of a pool a step is conditioned on: a categorical distribution that may learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distill.students.arch import Arch
from profiles.errors import InputError

Distribution = Literal["uniform", "easy", "hard"]
_STREAM = 0x67656E
"""Keeps these draws apart from everything else that is drawn from (seed, step)."""
_DIMENSIONS = ("width", "depth", "kernel", "heads")


def draws(seed: int, step: int) -> torch.Generator:
    """The generator of one step's draws, on the CPU: a pure function of seed and step."""
    state = np.random.SeedSequence((seed, step, _STREAM)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


class PathSampler:
    """p_phi over an enumerated pool: logits(a) = phi[width of a] + phi[depth of a] + phi[kernel or heads of a].

    The paper says that the distribution is trainable; its form, its estimator and its optimiser are our reading: exact
    log-probabilities over the enumeration, leave-one-out REINFORCE (Kool, van Hoof & Welling 2019) on the conditioning
    losses of one batch, minus `entropy_weight` times the exact entropy, and Adam. "easy" lowers E_p[L], "hard" raises
    it; "uniform" learns nothing and stays exactly uniform, as does a pool of one.

    The losses are not normalised (our reading): the baseline removes their level, so what acts is how much the
    architectures differ on the same batch, in nats, and the entropy weight is in nats of loss per nat of entropy. The
    optimum over all distributions is p ~ exp(-L / beta) ("hard": exp(L / beta)): a beta far below the differences in L
    ends with one architecture. 0.01 did on Fashion-MNIST, hence the default of 0.5 (our reading).

    phi is float64 and lives on the CPU, where the draws are needed. A dimension in which the pool has one value only
    has no phi: it would change nothing.

    Args:
        archs: the pool, P >= 1 architectures without duplicates.
        distribution: see above.
        entropy_weight: beta >= 0.
        learning_rate: Adam's, > 0.

    Raises:
        InputError: an empty pool.
    """

    def __init__(
        self,
        archs: Sequence[Arch],
        distribution: Distribution,
        *,
        entropy_weight: float = 0.5,
        learning_rate: float = 0.05,
    ) -> None:
        if not archs:
            raise InputError("the pool has no architecture", where="teacher.generic", fix="name at least one")
        self.archs = tuple(archs)
        self.distribution = distribution
        self.entropy_weight = entropy_weight
        values = {
            name: sorted({getattr(arch, name, 0) for arch in self.archs})
            for name in _DIMENSIONS
            if len({getattr(arch, name, 0) for arch in self.archs}) > 1
        }
        self.choices = tuple((name, value) for name, found in values.items() for value in found)
        """What the pool's architectures differ in: ("width", 16), ...; one phi each."""
        members = [[getattr(arch, name) == value for name, value in self.choices] for arch in self.archs]
        self._members = torch.tensor(members, dtype=torch.float64).reshape(len(self.archs), len(self.choices))
        self.phi = torch.zeros(len(self.choices), dtype=torch.float64, requires_grad=True)
        self._optimizer = torch.optim.Adam([self.phi], lr=learning_rate)

    @property
    def learns(self) -> bool:
        """Whether `update` changes anything; the losses need not be read otherwise."""
        return self.distribution != "uniform" and len(self.archs) > 1

    def log_probabilities(self) -> Tensor:
        """log p_phi(a) (P,), float64, with a gradient to phi."""
        return (self._members @ self.phi).log_softmax(0)

    def probabilities(self) -> Tensor:
        """p_phi(a) (P,), float64, without gradient."""
        return self.log_probabilities().exp().detach()

    def entropy(self) -> Tensor:
        """-sum_a p log p in nats, 0 to log P, scalar with a gradient to phi."""
        log_p = self.log_probabilities()
        return -(log_p.exp() * log_p).sum()

    def choice_probabilities(self) -> dict[str, float]:
        """The mass of every choice, such as {"width16": 0.25, ...}; one dimension's masses sum to 1."""
        masses = (self._members.T @ self.probabilities()).tolist()
        return {f"{name}{value}": mass for (name, value), mass in zip(self.choices, masses, strict=True)}

    def sample(self, k: int, generator: torch.Generator) -> Tensor:
        """Indices int64 (k,) of independent draws, with replacement."""
        return torch.multinomial(self.probabilities(), k, replacement=True, generator=generator)

    def objective(self, indices: Tensor, losses: Tensor) -> Tensor:
        """A scalar whose gradient estimates that of +-E_p[L] - beta H without bias (+ easy, - hard); minimised.

        (1/K) sum_k (L_k - mean_{j != k} L_j) log p(a_k): the baseline of a draw is the mean of the others, which does
        not depend on it.

        Args:
            indices: int64 (K,), K >= 2, of independent draws.
            losses: (K,), what the draws cost on the same batch; constants here.
        """
        k = len(indices)
        losses = losses.detach().to(torch.float64)
        advantage = (losses - losses.mean()) * k / (k - 1)  # = L_k minus the mean of the others
        expected = (advantage * self.log_probabilities()[indices]).mean()
        return (-expected if self.distribution == "hard" else expected) - self.entropy_weight * self.entropy()

    def update(self, indices: Tensor, losses: Tensor) -> None:
        """One Adam step on phi; nothing where the distribution does not learn.

        Losses that are infinite or NaN leave phi as it is: the training loop reports them, and draws with a phi of NaN
        would fail before it does.

        Args:
            indices: int64 (K,), K >= 2, what `sample` gave.
            losses: (K,) on the CPU.
        """
        if not self.learns or not bool(losses.isfinite().all()):
            return
        (self.phi.grad,) = torch.autograd.grad(self.objective(indices, losses), self.phi)
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """phi and its Adam."""
        return {"phi": self.phi.detach().clone(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, for the same pool."""
        with torch.no_grad():
            self.phi.copy_(state["phi"])
        self._optimizer.load_state_dict(state["optimizer"])
