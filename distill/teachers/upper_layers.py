"""A transformer whose last layers learn: what enters them is computed once, and what is below them is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.networks import first_tensor
from profiles.errors import InputError

Rows = np.ndarray[tuple[int], np.dtype[np.int64]]
KEY = "teacher.coached.trainable_layers"
FIX = "leave it out: all layers learn"
FLOAT32_BYTES = 2**30
"""Hidden states of one split that take more than this in float32 are kept as float16, in the host's memory."""


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, through pinned memory where that spares the host from waiting."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Tokens:
    """The texts of one split, tokenised once: int32 (N, T) for each of the tokenizer's outputs, on the host.

    Args:
        encoded: padded to the longest text; with "attention_mask".
        side: of the padding, "left" or "right".
    """

    def __init__(self, encoded: Mapping[str, Tensor], side: str) -> None:
        self._columns = {name: value.to(torch.int32) for name, value in encoded.items()}
        self._left = side == "left"
        mask: np.ndarray[Any, Any] = encoded["attention_mask"].numpy()
        self.lengths: Rows = mask.sum(1).astype(np.int64)

    def batch(self, rows: Rows, device: torch.device) -> dict[str, Tensor]:
        """int64 (n, t) on `device`, t the longest of these texts: as if the tokenizer had read these alone."""
        chosen, longest = torch.from_numpy(rows), self.longest(rows)
        parts = {name: column.index_select(0, chosen) for name, column in self._columns.items()}
        first = next(iter(parts.values())).shape[1] - longest if self._left else 0
        return {name: send(part[:, first : first + longest].long(), device) for name, part in parts.items()}

    def longest(self, rows: Rows) -> int:
        """t of `batch`; at least 1."""
        return max(1, int(self.lengths[rows].max()))

    def places(self, rows: Rows) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Where each token of `batch(rows)` is in its text: int64 (n, t), and bool (n, t), False at padding."""
        longest, lengths = self.longest(rows), self.lengths[rows, None]
        places = np.arange(longest)[None] - (longest - lengths if self._left else 0)
        real = (places >= 0) & (places < lengths)
        return np.where(real, places, 0), real


class HiddenStates:
    """What enters the first learning layer, for every token of one split and without the padding: (tokens, D).

    float32 on `device`; above FLOAT32_BYTES float16 on the host.

    Args:
        tokens: of the split.
        entering: rows -> the hidden states (n, t, D), float32, of the padded batch `tokens.batch(rows)`.
        batch_size: rows per call of it.
        device: where they are used.

    Raises:
        InputError: a value beyond float16 where that is the type.
    """

    def __init__(
        self, tokens: Tokens, entering: Callable[[Rows], Tensor], batch_size: int, device: torch.device
    ) -> None:
        self._tokens = tokens
        self._starts = np.concatenate([[0], np.cumsum(tokens.lengths)])
        total = int(self._starts[-1])
        self._flat = torch.empty(0)
        # texts of like length go together, so that short ones are not padded to the longest one
        order = np.argsort(tokens.lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            hidden = entering(rows)
            if start == 0:
                small = total * hidden.shape[2] * 4 <= FLOAT32_BYTES
                self._flat = torch.empty(
                    (total, hidden.shape[2]),
                    dtype=torch.float32 if small else torch.float16,
                    device=device if small else torch.device("cpu"),
                )
            places, real = tokens.places(rows)
            found = hidden[torch.from_numpy(real).to(hidden.device)].to(self._flat.dtype).to(self._flat.device)
            if not bool(found.isfinite().all()):  # once per split, not per step
                raise InputError("what enters the learning layers does not fit float16", where=KEY, fix=FIX)
            self._flat[torch.from_numpy((self._starts[rows, None] + places)[real]).to(self._flat.device)] = found

    @property
    def dtype(self) -> torch.dtype:
        """The stored type."""
        return self._flat.dtype

    def batch(self, rows: Rows, device: torch.device) -> Tensor:
        """float32 (n, t, D) on `device` for `tokens.batch(rows)`, zero at padding."""
        places, real = self._tokens.places(rows)
        index = torch.from_numpy((np.where(real, self._starts[rows, None] + places, 0)).reshape(-1))
        hidden = send(self._flat.index_select(0, send(index, self._flat.device)), device).float()
        return hidden.view(*places.shape, -1) * send(torch.from_numpy(real), device).unsqueeze(-1)


class Cut:
    """A place in a transformer's stack of layers, before its last `count`: it tells what enters them, and replays it.

    While it replays, the layers below pass their input on and the first upper layer gets the given hidden states; the
    model's own forward does all the rest (masks, position biases, norms, pooler, classifier).

    Raises:
        InputError: no stack of as many layers as the configuration says, or a smaller one than `count`.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        stack = _stack(model)
        if count > len(stack):
            raise InputError(
                f"the teacher has {len(stack)} layers, {count} of them cannot learn",
                where=KEY,
                fix=f"at most {len(stack)}; or {FIX}",
            )
        self._entered: Tensor | None = None
        self._recording = False
        self._replayed: Tensor | None = None
        upper = len(stack) - count
        stack[upper].register_forward_pre_hook(self._enter, with_kwargs=True)
        for layer in list(stack)[:upper]:
            layer.forward = partial(_lower, self, layer.forward, [])

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Inside, a forward pass leaves what enters the upper layers, (n, t, D), as the last of the list."""
        found: list[Tensor] = []
        self._recording = True
        try:
            yield found
            if self._entered is not None:
                found.append(self._entered)
        finally:
            self._recording, self._entered = False, None

    @contextmanager
    def replaying(self, hidden: Tensor) -> Iterator[None]:
        """Inside, a forward pass goes on with `hidden` (n, t, D) before the upper layers."""
        self._replayed = hidden
        try:
            yield
        finally:
            self._replayed = None

    @property
    def skips(self) -> bool:
        """Whether the layers below are skipped now."""
        return self._replayed is not None

    def _enter(
        self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._recording:
            self._entered = _hidden(args, kwargs)
        if self._replayed is None:
            return None
        if args:
            return (self._replayed, *args[1:]), kwargs
        return args, {
            **kwargs,
            next(name for name, value in kwargs.items() if isinstance(value, Tensor)): self._replayed,
        }


def _lower(cut: Cut, original: Callable[..., Any], form: list[int], *args: Any, **kwargs: Any) -> Any:
    """A lower layer's forward: the original, or its input in the form that the original last returned.

    form: entries of the tuple that it returned, 0 for a tensor; empty before its first call.
    """
    if cut.skips:
        hidden = _hidden(args, kwargs)
        # what a layer tells besides is not there; where an upper one needs it, the check of the two parts says so
        return (hidden, *[None] * (form[0] - 1)) if form and form[0] else hidden
    output = original(*args, **kwargs)
    form[:] = [len(output) if isinstance(output, tuple) else 0]
    return output


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return first_tensor(args or tuple(value for value in kwargs.values() if isinstance(value, Tensor)), where=KEY)


def _stack(model: nn.Module) -> nn.ModuleList:
    """The layers that the configuration counts; of several lists of that length the largest by parameters."""
    config = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    found = [child for child in model.modules() if isinstance(child, nn.ModuleList) and len(child) == count]
    if not found:
        raise InputError(
            "cannot tell the teacher's layers apart",
            where=KEY,
            evidence=f'"{getattr(config, "model_type", type(model).__name__)}" has no list of {count} layers',
            fix=FIX,
        )
    return max(found, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))
