"""A teacher from any ONNX file with named outputs, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.dataset import Dataset
from distill.networks import ImageAdapter
from distill.outputs import TeacherOutput
from distill.teachers.section import ImageInput, TeacherSection
from distill.teachers.single_logit import is_single_logit
from distill.teachers.teacher import Teacher, TeacherBatch, pool_features
from profiles.artifact import file_hash
from profiles.errors import InputError, nearest
from profiles.opening import open_graph, stored_apart

_TYPES = {
    "tensor(uint8)": np.uint8,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
_MASK, _TOKEN_TYPES = "attention_mask", "token_type_ids"


class OnnxTeacher(Teacher):
    """Images enter as uint8 where the graph takes uint8, else scaled as ImageInput says (size and channels of a fixed
    input shape are taken from the graph). Texts enter as the student's tokens, with `attention_mask` and
    `token_type_ids` where the graph has them. Inputs that are in no split enter in the same way. A single logit z of
    two exclusive classes speaks for the second: [0, z].

    Raises:
        InputError: unreadable file, unknown output, input that the data cannot feed, logits of another class count.
    """

    kind = "onnx"

    def __init__(self, section: TeacherSection, dataset: Dataset, *, base: Path, device: torch.device) -> None:
        import onnxruntime as ort

        super().__init__(section.model_dump(mode="json", exclude={"batch_size", "cache_dtype", "file"}))
        assert section.file is not None
        self.file = base / section.file
        if not self.file.is_file():
            raise InputError(f"no such file: {self.file}", where="teacher.file")
        open_graph(self.file)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        try:
            self._session = ort.InferenceSession(str(self.file), options, providers=providers)
        except Exception as error:  # the runtime's exceptions share no base class
            raise InputError(
                f"ONNX Runtime cannot load {self.file}", where="teacher.file", evidence=str(error).splitlines()[0]
            ) from error
        self._outputs: list[tuple[str, str]] = []
        known = [output.name for output in self._session.get_outputs()]
        for key, name in (("embedding_output", section.embedding_output), ("output", section.output)):
            if name is not None:
                if name not in known:
                    raise InputError(
                        f'{self.file} has no output "{name}"', where=f"teacher.{key}", fix=nearest(name, known)
                    )
                self._outputs.append((key, name))
        self._pad_id = dataset.input.pad_id
        self._bind_inputs(section, dataset)
        self._probe(dataset)

    def fingerprint(self) -> str:
        """Hash of the graph's file and of the weights beside it."""
        beside = {entry.place for entry in stored_apart(open_graph(self.file))}
        return "\n".join(file_hash(path) for path in (self.file, *(self.file.parent / name for name in sorted(beside))))

    def _bind_inputs(self, section: TeacherSection, dataset: Dataset) -> None:
        inputs = {entry.name: entry for entry in self._session.get_inputs()}
        main = [entry for name, entry in inputs.items() if name not in (_MASK, _TOKEN_TYPES)]
        if len(main) != 1 or any(entry.type not in _TYPES for entry in inputs.values()):
            raise InputError(
                f"{self.file} does not take one tensor",
                where="teacher.file",
                evidence=", ".join(f"{name}: {entry.type}" for name, entry in inputs.items()),
                fix=f"a graph with one input (and, for texts, {_MASK} and {_TOKEN_TYPES})",
            )
        self._input = main[0].name
        self._dtypes = {name: _TYPES[entry.type] for name, entry in inputs.items()}
        shape = list(main[0].shape)
        self._batch = shape[0] if shape and isinstance(shape[0], int) else None
        self._adapter: ImageAdapter | None = None
        floating = np.issubdtype(self._dtypes[self._input], np.floating)
        spec = dataset.input
        if (spec.kind == "image" and len(shape) != 4) or (spec.kind == "tokens" and (len(shape) != 2 or floating)):
            raise InputError(
                f'the input "{self._input}" of {self.file} does not fit the data',
                where="teacher.file",
                evidence=f"it is {main[0].type} of shape {shape}, a sample is {spec.dtype} {spec.shape}",
            )
        if spec.kind == "image" and floating:
            channels, height, width = shape[1:]
            if isinstance(channels, int) and channels not in (1, 3):
                raise InputError(
                    f"{self.file} wants {channels} channels in the second place",
                    where="teacher.file",
                    evidence=f"shape {shape}",
                    fix="export it with inputs in the order N, C, H, W",
                )
            size = section.input_size
            if size is None and isinstance(height, int) and height == width and (height, width) != spec.shape[1:]:
                size = height
            repeat = section.input_channels or (channels if isinstance(channels, int) else None)
            scaling = ImageInput(
                normalization=section.normalization,
                mean=section.mean,
                std=section.std,
                input_size=size,
                input_channels=repeat,
            )
            self._adapter = ImageAdapter(scaling, spec, where="teacher").eval().requires_grad_(False)

    @torch.no_grad()
    def _run(self, inputs: Tensor) -> list[np.ndarray[Any, Any]]:
        x = inputs.detach().cpu()
        if self._adapter is not None:
            x = self._adapter(x)
        elif x.is_floating_point():
            x = x.round()  # pixels between two values, for a graph that takes whole ones
        feeds = {self._input: x.numpy()}
        if _MASK in self._dtypes:
            feeds[_MASK] = (x != self._pad_id).numpy()
        if _TOKEN_TYPES in self._dtypes:
            feeds[_TOKEN_TYPES] = np.zeros(x.shape)
        feeds = {name: np.ascontiguousarray(value.astype(self._dtypes[name])) for name, value in feeds.items()}
        names = [name for _, name in self._outputs]
        rows, size = x.shape[0], self._batch or x.shape[0]
        chunks = []
        for start in range(0, rows, size):
            part = {name: value[start : start + size] for name, value in feeds.items()}
            if (short := size - min(size, rows - start)) > 0:  # a fixed batch size: fill up with the last row
                part = {name: np.concatenate([value, value[-1:].repeat(short, 0)]) for name, value in part.items()}
            chunks.append([value[: rows - start] for value in self._session.run(names, part)])
        return [np.concatenate(values) for values in zip(*chunks, strict=True)]

    def _probe(self, dataset: Dataset) -> None:
        """One run of two training samples decides the dimensions."""
        example = torch.from_numpy(dataset.train.inputs[:2].copy())
        try:
            embedding, logits = self._collect(self._run(example))
        except Exception as error:  # the runtime's exceptions share no base class
            raise InputError(
                f"{self.file} does not run on this data",
                where="teacher.file",
                evidence=f"input {tuple(example.shape)}: {error}",
                fix="check teacher.input_channels and teacher.input_size",
            ) from error
        single = logits is not None and is_single_logit(logits.shape, dataset)
        for key, value in (("embedding_output", embedding), ("output", None if single else logits)):
            if value is not None and value.ndim != 2:
                raise InputError(f"the {key} of {self.file} has the shape {tuple(value.shape)}", where=f"teacher.{key}")
        if embedding is not None:
            self.embedding_dim = embedding.shape[1]
        if logits is not None:
            self._know_logits(logits.shape, dataset)
            if self.num_logits != len(dataset.classes):
                raise InputError(
                    f"the teacher has {self.num_logits} logits, the data set has {len(dataset.classes)} classes",
                    where="teacher.output",
                    fix="name only embedding_output: a teacher of another task gives embeddings",
                )

    def _collect(self, values: list[np.ndarray[Any, Any]]) -> TeacherOutput:
        found = {key: torch.from_numpy(v).float() for (key, _), v in zip(self._outputs, values, strict=True)}
        embedding, output = found.get("embedding_output"), found.get("output")
        return TeacherOutput(
            None if embedding is None else pool_features(embedding),
            None if output is None else self._class_logits(output),
        )

    def outputs(self, batch: TeacherBatch) -> TeacherOutput:
        return self._collect(self._run(batch.inputs))
