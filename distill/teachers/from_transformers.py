"""A teacher from a Hugging Face `transformers` folder or hub name, for texts or images."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.dataset import Dataset, SplitName
from distill.networks import ImageAdapter
from distill.outputs import TeacherOutput
from distill.teachers.section import ImageInput, Pooling, TeacherSection
from distill.teachers.teacher import NetworkTeacher, TeacherBatch
from distill.teachers.upper_layers import FIX, KEY, Cut, HiddenStates, Rows, Tokens, send
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

    A live copy tokenises every split once. When only its last layers learn, it computes once per split of texts what
    enters them, and keeps it in memory; images go through the frozen layers every time, because their views change, and
    so do texts that are in no split (`TeacherBatch.texts`), which are tokenised anew.

    Raises:
        InputError: `transformers` is not installed, nothing loadable at that name, texts missing, wrong class count.
    """

    kind = "transformers"

    def __init__(self, section: TeacherSection, dataset: Dataset, *, base: Path, device: torch.device) -> None:
        assert section.model is not None
        self._pooling: Pooling = section.pooling
        self._dataset = dataset
        self._batch_size = section.batch_size
        self._tokens: dict[SplitName, Tokens] | None = None
        self._cut: Cut | None = None
        self._entering: dict[SplitName, HiddenStates] = {}
        self.sees_views = dataset.input.kind == "image"
        source, local = locate(section.model, base, where="teacher.model")
        modules, preprocessing = self._load(source, section, dataset, local)
        super().__init__(modules, preprocessing, device)
        found = self.outputs(self._example(np.arange(min(2, len(dataset.train)))))
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
        inputs = self._inputs(batch)
        if self._cut is None or batch.texts is not None:  # what was kept is of the splits' own texts
            return self._forward(inputs)
        with self._cut.replaying(self._entering_of(batch.split).batch(batch.rows, self.device)):
            return self._forward(inputs)

    def live(self, layers: int | None = None) -> Self:
        copied = super().live()
        if copied.num_logits is None:
            copied._add_head(len(self._dataset.classes))
        cut = copied._freeze_below(layers) if layers is not None else None
        copied.learn_only_for_logits(copied._example(np.arange(min(2, len(self._dataset.train)))))
        if self._tokenizer is not None:
            # only now: the steps before look at a few texts, for which a whole split need not be read
            copied._cut, copied._tokens = cut, {}
        return copied

    def _shared(self) -> list[object]:
        return [self._dataset, self._tokenizer]

    def _example(self, rows: Rows) -> TeacherBatch:
        """These training samples, clean."""
        return TeacherBatch(torch.from_numpy(self._dataset.train.inputs[rows]), "train", rows)

    def _inputs(self, batch: TeacherBatch) -> dict[str, Tensor]:
        """What the model's forward takes, on the device."""
        if self._tokenizer is None:
            modules = self.network
            assert isinstance(modules, nn.ModuleDict)
            return {"pixel_values": modules["adapter"](self.to_device(batch.inputs))}
        if batch.texts is None and self._tokens is not None:
            return self._tokens_of(batch.split).batch(batch.rows, self.device)
        if batch.texts is not None:
            chosen = list(batch.texts)
        else:
            texts = self._texts(batch.split)
            chosen = [texts[row] for row in batch.rows]
        return {name: send(value, self.device) for name, value in self._encode(chosen).items()}

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        """int64 (N, T) each, on the host, padded to the longest."""
        return dict(
            self._tokenizer(texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt")
        )

    def _texts(self, split: SplitName) -> tuple[str, ...]:
        texts = self._dataset.split(split).texts
        if texts is None:
            raise InputError(f"the {split} split has no texts for the teacher's tokenizer", where="teacher.kind")
        return texts

    def _forward(self, inputs: dict[str, Tensor]) -> TeacherOutput:
        modules = self.network
        assert isinstance(modules, nn.ModuleDict)
        result = modules["model"](**inputs, output_hidden_states=True)
        hidden = result.get("last_hidden_state")
        if hidden is None:  # classifiers return the list alone
            hidden = result["hidden_states"][-1]
        embedding = pool(hidden, inputs.get("attention_mask"), self._pooling).float()
        if "head" in modules:
            return TeacherOutput(embedding, modules["head"](embedding).float())
        logits = result.get("logits")
        return TeacherOutput(embedding, None if logits is None else self._class_logits(logits.float()))

    def _tokens_of(self, split: SplitName) -> Tokens:
        assert self._tokens is not None
        if split not in self._tokens:
            self._tokens[split] = Tokens(self._encode(list(self._texts(split))), self._tokenizer.padding_side)
        return self._tokens[split]

    def _entering_of(self, split: SplitName) -> HiddenStates:
        if split not in self._entering:
            cut, tokens = self._cut, self._tokens_of(split)
            assert cut is not None

            def entering(rows: Rows) -> Tensor:
                with cut.recording() as found:
                    self._forward(tokens.batch(rows, self.device))
                return found[-1]

            # the frozen part in full precision, whatever the step that asks first runs in
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._entering[split] = HiddenStates(tokens, entering, self._batch_size, self.device)
        return self._entering[split]

    def _freeze_below(self, layers: int) -> Cut:
        """Freezes all that decides what enters the last `layers` layers, and shows that they can run on their own."""
        modules = self.network
        assert isinstance(modules, nn.ModuleDict)
        cut = Cut(modules["model"], layers)
        texts = self._dataset.train.texts
        rows = np.arange(min(256, len(self._dataset.train)))
        if self._tokenizer is not None and texts is not None:
            # a short and a long one, so that padding is looked at as well
            order = sorted(rows.tolist(), key=lambda row: len(texts[row]))
            rows = np.array([order[0], order[-1]])
        inputs = self._inputs(self._example(rows[:2]))
        with torch.enable_grad(), cut.recording() as found:
            whole = self._forward(inputs)
        if not found:
            raise InputError("the teacher's layers were not used in a forward pass", where=KEY, fix=FIX)
        below = self._reached(found[-1])
        for parameter in self.parameters_that_learn():
            if id(parameter) in below:
                parameter.requires_grad_(False)
        if self._tokenizer is not None:
            _check_parts(whole, inputs, found[-1].detach(), cut, self._forward)
        return cut


def locate(model: str, base: Path, *, where: str) -> tuple[str, bool]:
    """What `from_pretrained` is called with for a folder below `base` or a hub name, and whether it is a folder.

    Raises:
        InputError: neither a folder nor a possible hub name.
    """
    if (base / model).is_dir():
        return str(base / model), True
    if _HUB_NAME.fullmatch(model) is None:
        raise InputError(f"no such folder: {base / model}", where=where)
    return model, False


def _check_parts(
    whole: TeacherOutput,
    inputs: dict[str, Tensor],
    hidden: Tensor,
    cut: Cut,
    forward: Callable[[dict[str, Tensor]], TeacherOutput],
) -> None:
    """The upper layers alone must give what the whole network gives.

    Raises:
        InputError: they do not.
    """
    mask = inputs["attention_mask"]
    try:
        if hidden.shape[:2] != mask.shape:
            raise ValueError(f"{tuple(mask.shape)} tokens enter as {tuple(hidden.shape)}")
        with torch.no_grad(), cut.replaying(hidden * mask.unsqueeze(-1)):
            parts = forward(inputs)
        pairs = [(a, b) for a, b in zip(whole, parts, strict=True) if a is not None and b is not None]
        difference = max(float((a.detach() - b).abs().max()) for a, b in pairs)
        if not difference <= _ATOL:
            raise ValueError(f"outputs of two training samples differ by {difference:.2g}")
    except Exception as error:  # a model may need anything of its lower layers
        raise InputError(
            "the teacher's last layers cannot run without the others",
            where=KEY,
            evidence=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix=FIX,
        ) from error


_ATOL = 1e-4
"""Largest difference between a network run whole and in two parts."""


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
