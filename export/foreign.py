"""A model of somebody else's as the exporter wants it: tensors in, in order; one tensor out, the batch first."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from profiles.errors import InputError, nearest

PREFERRED = "logits"
"""The output that is taken when none is named and the model has it; else the first tensor."""


class OneOutput(nn.Module):
    """Calls a model by position or by keyword and gives one of its outputs.

    Args:
        model: any module, in eval mode.
        inputs: an example of every input by name, in order. Where the names are parameters of the model's forward(), it
            is called by keyword, else by position.
        output: name of the output: a key, a field, or a position in a tuple. None: see `PREFERRED`.
        typed: the inputs as the user wrote them, for messages; else their names and shapes.

    Raises:
        InputError: some names are parameters of forward() and others are not; the model does not run on the inputs; an
            output that does not exist or does not have the batch as its first dimension.
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Tensor], output: str | None, typed: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.model = model
        self.typed = tuple(typed)
        self.names = tuple(inputs)
        self.by_keyword = _by_keyword(model, self.names)
        found = self._try(inputs)
        self.outputs = tuple(found)
        self.output = _choose(found, output)
        batch = next(iter(inputs.values())).shape[0]
        shape = tuple(found[self.output].shape)
        self.width = shape[1] if len(shape) == 2 else None
        if not shape or shape[0] != batch:
            raise InputError(
                f'the output "{self.output}" has no batch',
                where="--output" if output is not None else type(model).__name__,
                evidence=f"its shape is {shape} for inputs of batch {batch}",
                fix="--output NAME with one of: " + ", ".join(self.outputs),
            )

    @property
    def decides(self) -> bool:
        """Whether the output is one score per class, as far as the model says: two or more "logits" per sample.

        A model of transformers says it of regressions, too (`config.problem_type`).
        """
        several = self.width is not None and self.width > 1
        return self.output == PREFERRED and several and self._problem() != "regression"

    @property
    def exclusive(self) -> bool:
        """False where the model says that its classes do not exclude each other."""
        return self._problem() != "multi_label_classification"

    def _problem(self) -> object:
        return getattr(getattr(self.model, "config", None), "problem_type", None)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The chosen output (N, ...)."""
        return dict(_tensors(self._call(inputs)))[self.output]

    def _call(self, inputs: Sequence[Tensor]) -> Any:
        if self.by_keyword:
            return self.model(**dict(zip(self.names, inputs, strict=True)))
        return self.model(*inputs)

    def _try(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs the model once, because the exporter answers inputs that do not fit with pages of its own state."""
        try:
            with torch.no_grad():
                found = dict(_tensors(self._call(tuple(inputs.values()))))
        except Exception as error:  # a user's model may raise anything
            given = self.typed or [f"{name}:{'x'.join(map(str, array.shape))}" for name, array in inputs.items()]
            raise InputError(
                "the model does not run on the example inputs",
                where=" ".join(f"--example {text}" for text in given),
                evidence=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
                fix="--example must name every input that forward() needs, with shape and type: "
                + ", ".join(_parameters(self.model)),
            ) from error
        if not found:
            raise InputError("the model returns no tensor", where=type(self.model).__name__)
        return found


def _parameters(model: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [entry.name for entry in inspect.signature(model.forward).parameters.values() if entry.kind in kinds]


def _by_keyword(model: nn.Module, names: Sequence[str]) -> bool:
    parameters = _parameters(model)
    known = [name for name in names if name in parameters]
    for name in names:
        if known and name not in parameters:
            raise InputError(
                f'forward() has no "{name}"',
                where="--example",
                evidence=f"it takes {', '.join(parameters)}",
                fix=nearest(name, parameters),
            )
    return bool(known)


def _choose(found: Mapping[str, Tensor], output: str | None) -> str:
    if output is None:
        return PREFERRED if PREFERRED in found else next(iter(found))
    if output not in found:
        raise InputError(f'the model has no output "{output}"', where="--output", fix=nearest(output, list(found)))
    return output


def _tensors(output: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model's output by name: keys of mappings, fields of named tuples, positions of others."""
    if isinstance(output, Tensor):
        yield prefix or "output", output
    elif isinstance(output, Mapping):  # a ModelOutput of transformers is one
        for key, value in output.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(output, tuple | list):
        fields = getattr(output, "_fields", None) or [str(position) for position in range(len(output))]
        for name, value in zip(fields, output, strict=True):
            yield from _tensors(value, f"{prefix}.{name}" if prefix else name)
