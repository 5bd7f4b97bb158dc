"""A teacher from a Hugging Face `transformers` folder or hub name, for texts or images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.dataset import Dataset
from distill.networks import ImageAdapter
from distill.outputs import TeacherOutput
from distill.teachers.section import ImageInput, Pooling, TeacherSection
from distill.teachers.teacher import NetworkTeacher, TeacherBatch
from profiles.artifact import content_key
from profiles.errors import InputError

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""Name or owner/name; anything else can only be a path."""


class TransformersTeacher(NetworkTeacher):
    """Embedding: the pooled last hidden state (N, D). Logits: its classifier's, with `classification`.

    One label for two exclusive classes is a single logit z, which speaks for the second: [0, z].

    Texts go through the model's own tokenizer (not the student's), cut at `max_length` (None: what the model can take).
    Images are resized to its processor's size (stretched to a square: framing is the data set's business), scaled with
    its mean and standard deviation, and repeated to its channels.

    Raises:
        InputError: `transformers` is not installed, nothing loadable at that name, texts missing, wrong class count.
    """

    kind = "transformers"

    def __init__(self, section: TeacherSection, dataset: Dataset, *, base: Path, device: torch.device) -> None:
        assert section.model is not None
        self._pooling: Pooling = section.pooling
        self._dataset = dataset
        self.sees_views = dataset.input.kind == "image"
        local = (base / section.model).is_dir()
        if not local and _HUB_NAME.fullmatch(section.model) is None:
            raise InputError(f"no such folder: {base / section.model}", where="teacher.model")
        source = str(base / section.model) if local else section.model
        modules, preprocessing = self._load(source, section, dataset, local)
        super().__init__(modules, preprocessing, device)
        found = self.outputs(TeacherBatch(torch.from_numpy(dataset.train.inputs[:2].copy()), "train", _first_rows()))
        assert found.embedding is not None
        self.embedding_dim = found.embedding.shape[1]
        if found.logits is not None:
            self._know_logits(found.logits.shape, dataset)
            if self.num_logits != len(dataset.classes):
                raise InputError(
                    f"the teacher has {self.num_logits} labels, the data set has {len(dataset.classes)} classes",
                    where="teacher.classification",
                    fix="leave it out: a teacher of another task gives embeddings",
                )

    def _load(
        self, source: str, section: TeacherSection, dataset: Dataset, local: bool
    ) -> tuple[nn.ModuleDict, dict[str, Any]]:
        try:
            import transformers
        except ImportError as error:
            raise InputError(
                "teachers of this kind need transformers",
                where="teacher.kind",
                fix="pip install 'edgestill[transformers]'",
            ) from error
        image = dataset.input.kind == "image"
        self._tokenizer: Any = None
        try:
            config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
            if section.classification and image:
                factory: Any = transformers.AutoModelForImageClassification
            elif section.classification:
                factory = transformers.AutoModelForSequenceClassification
            else:
                factory = transformers.AutoModel
            model = factory.from_pretrained(source, config=config, local_files_only=local, dtype=torch.float32)
            if not image:
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
            else:
                processor, _ = transformers.BaseImageProcessor.get_image_processor_dict(source, local_files_only=local)
        except Exception as error:  # missing files, no network, unknown model types: each of another type
            raise InputError(
                f'cannot load "{section.model}" with transformers',
                where="teacher.model",
                evidence=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                fix="name a folder that save_pretrained wrote, or a hub name when there is a network",
            ) from error
        preprocessing: dict[str, Any] = {"pooling": section.pooling, "classification": bool(section.classification)}
        modules = nn.ModuleDict({"model": model})
        if image:
            scaling = _image_input(processor, getattr(config, "num_channels", dataset.input.shape[0]))
            modules["adapter"] = ImageAdapter(scaling, dataset.input, where="teacher")
            preprocessing |= scaling.model_dump(mode="json")
        else:
            if dataset.train.texts is None:
                raise InputError("the data set has no texts for the teacher's tokenizer", where="teacher.kind")
            limit = min(int(getattr(config, "max_position_embeddings", 512)), int(self._tokenizer.model_max_length))
            self._max_length = min(section.max_length or limit, limit)
            if self._tokenizer.pad_token is None:
                self._tokenizer.pad_token = self._tokenizer.eos_token
            vocabulary = content_key({str(word): int(i) for word, i in self._tokenizer.get_vocab().items()})
            preprocessing |= {"max_length": self._max_length, "vocabulary": vocabulary}
        return modules, preprocessing

    def compute(self, batch: TeacherBatch) -> TeacherOutput:
        modules = self.network
        assert isinstance(modules, nn.ModuleDict)
        if self._tokenizer is None:
            result = modules["model"](
                pixel_values=modules["adapter"](self.to_device(batch.inputs)), output_hidden_states=True
            )
            mask = None
        else:
            texts = self._dataset.split(batch.split).texts
            if texts is None:
                raise InputError(
                    f"the {batch.split} split has no texts for the teacher's tokenizer", where="teacher.kind"
                )
            encoded = self._tokenizer(
                [texts[row] for row in batch.rows],
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            ).to(self.device)
            result = modules["model"](**encoded, output_hidden_states=True)
            mask = encoded["attention_mask"]
        hidden = result.get("last_hidden_state")
        if hidden is None:  # classifiers return the list alone
            hidden = result["hidden_states"][-1]
        logits = result.get("logits")
        return TeacherOutput(
            pool(hidden, mask, self._pooling).float(), None if logits is None else self._class_logits(logits.float())
        )


def pool(hidden: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """One embedding per sample.

    Args:
        hidden: (N, T, D) tokens, or (N, D, H, W) a map, whose places are its tokens.
        mask: (N, T), 1 at real tokens, on whichever side the padding is; None: all are real.
        pooling: "mean" or "max" over the real tokens, "cls" the first one, "last" the last one.

    Returns:
        (N, D).
    """
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    real = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask.to(hidden.dtype)
    if pooling == "mean":
        return (hidden * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
    if pooling == "max":
        return hidden.masked_fill(real.unsqueeze(-1) == 0, torch.finfo(hidden.dtype).min).amax(1)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    if pooling == "cls":
        chosen = torch.where(real > 0, places, hidden.shape[1] - 1).amin(1)
    else:
        chosen = torch.where(real > 0, places, 0).amax(1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), chosen]


def _image_input(processor: dict[str, Any], channels: int) -> ImageInput:
    """Size, mean and standard deviation out of a preprocessor_config.json."""
    size = processor.get("crop_size") if processor.get("do_center_crop") else None
    size = size or processor.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor.get("do_normalize", True) and mean and std:
        scaling = {"mean": tuple(mean), "std": tuple(std)}
    else:
        scaling = {"mean": (0.0,), "std": (1.0,)}
    return ImageInput(input_size=size, input_channels=3 if channels == 3 else 1, **scaling)


def _first_rows() -> Any:
    import numpy as np

    return np.arange(2)
