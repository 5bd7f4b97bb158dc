"""A teacher from a user's own torch code."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.dataset import Dataset
from distill.networks import ImageAdapter, call_factory, find_linear, first_tensor, load_state, read_state, seeded
from distill.outputs import TeacherOutput
from distill.teachers.section import TeacherSection
from distill.teachers.single_logit import is_single_logit
from distill.teachers.teacher import NetworkTeacher, TeacherBatch, pool_features
from profiles.errors import InputError, nearest


class TorchTeacher(NetworkTeacher):
    """A network from a factory; its embedding is a named layer's output, or the input of its final Linear.

    Logits: the network's output, when it has one column per class, or for two exclusive classes a single logit z, which
    speaks for the second: [0, z] (`classification` true insists on them, false leaves them out). The head is known when
    it is a Linear that gives exactly those logits.

    Raises:
        InputError: a factory that fails, weights that do not fit, unknown layer, a network that does not run on the
            data.
    """

    kind = "torch"

    def __init__(
        self,
        section: TeacherSection,
        dataset: Dataset,
        *,
        base: Path,
        seed: int,
        device: torch.device,
        allow_code: bool,
    ) -> None:
        assert section.factory is not None
        with seeded(seed):
            network = call_factory(section.factory, section.kwargs, base=base, where="teacher", allow_code=allow_code)
        if section.weights is not None:
            file = base / section.weights
            load_state(network, read_state(file, where="teacher.weights"), file=file, where="teacher.weights")
        spec = dataset.input
        adapter: nn.Module = ImageAdapter(section, spec, where="teacher") if spec.kind == "image" else nn.Identity()
        super().__init__(
            nn.ModuleDict({"adapter": adapter, "network": network}),
            section.model_dump(
                mode="json", exclude={"batch_size", "cache_dtype", "weights", "strategy", "generic", "coached"}
            ),
            device,
        )
        self._captured: Tensor | None = None
        self._classes = len(dataset.classes)
        rows = np.arange(min(2, len(dataset.train)))
        self._example = TeacherBatch(torch.from_numpy(dataset.train.inputs[rows]), "train", rows)
        head: nn.Linear | None = None
        if section.embedding_layer is not None:
            modules = dict(network.named_modules())
            if section.embedding_layer not in modules:
                raise InputError(
                    f'the layer "{section.embedding_layer}" does not exist',
                    where="teacher.embedding_layer",
                    fix=nearest(section.embedding_layer, [name for name in modules if name]),
                )
            modules[section.embedding_layer].register_forward_hook(self._keep_output)
        else:
            _, head = find_linear(network, section.head, where="teacher")
            head.register_forward_pre_hook(self._keep_input)
        self._probe(section, dataset, head)

    def _keep_output(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._captured = first_tensor(output, where="teacher.embedding_layer")

    def _keep_input(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._captured = inputs[0]

    def _run(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        self._captured = None
        modules = self.network
        assert isinstance(modules, nn.ModuleDict)
        output = first_tensor(modules["network"](modules["adapter"](self.to_device(inputs))), where="teacher.factory")
        if self._captured is None:
            raise InputError("the named layer was not used in a forward pass", where="teacher.embedding_layer")
        embedding, self._captured = pool_features(self._captured).float(), None
        return embedding, output.float()

    @torch.no_grad()
    def _probe(self, section: TeacherSection, dataset: Dataset, head: nn.Linear | None) -> None:
        """One forward pass of two training samples decides the dimensions."""
        example = self._example.inputs
        try:
            embedding, output = self._run(example)
        except InputError:
            raise
        except Exception as error:  # a user's network may raise anything
            raise InputError(
                f'"{section.factory}" does not run on this data',
                where="teacher.factory",
                evidence=f"input {tuple(example.shape)}: {type(error).__name__}: {error}",
                fix="check teacher.input_channels and teacher.input_size, or the network itself",
            ) from error
        if embedding.ndim != 2:
            raise InputError(
                f"the embedding has the shape {tuple(embedding.shape)}",
                where="teacher.embedding_layer",
                fix="name another layer",
            )
        self.embedding_dim = embedding.shape[1]
        classes = len(dataset.classes)
        fits = is_single_logit(output.shape, dataset) or (output.ndim == 2 and output.shape[1] == classes)
        if section.classification and not fits:
            raise InputError(
                f"the teacher's output has the shape {tuple(output.shape[1:])}, the data set has {classes} classes",
                where="teacher.classification",
                fix="leave it out: the teacher then gives embeddings alone",
            )
        if fits and section.classification is not False:
            self._know_logits(output.shape, dataset)
            output = output.reshape(len(output), -1)
            # another number of columns could not be compared
            if head is not None and head.out_features == output.shape[1]:
                found = head(embedding.to(head.weight.dtype)).float()
                self._captured = None  # the head's hook saw this call, too
                if torch.allclose(found, output, atol=1e-4):
                    self.set_head(head)

    def compute(self, batch: TeacherBatch) -> TeacherOutput:
        embedding, output = self._run(batch.inputs)
        modules = self.network
        assert isinstance(modules, nn.ModuleDict)
        if "head" in modules:
            return TeacherOutput(embedding, modules["head"](embedding).float())
        return TeacherOutput(embedding, None if self.num_logits is None else self._class_logits(output))

    def live(self, layers: int | None = None) -> Self:
        copied = super().live(layers)
        if copied.num_logits is None:
            copied._add_head(self._classes)
        copied.learn_only_for_logits(copied._example)
        return copied
