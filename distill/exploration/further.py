"""Real inputs that are explored around, and the further inputs that each kind of exploration makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.data.dataset import Dataset
from distill.data.section import AugmentSection
from distill.data.text import encode, load_tokenizer
from distill.data.views import augment
from distill.exploration.generator import ImageGenerator, TextGenerator
from distill.exploration.section import Around, ExploreKind, ExploreSection
from distill.exploration.space import Draws, ascend, radius, to_device, to_pixels
from distill.resident import Resident, Stored
from profiles.errors import InputError

if TYPE_CHECKING:
    from distill.data.unlabelled import Unlabelled

Array = np.ndarray[Any, Any]
Judge = Callable[[Tensor], Tensor]
"""Float pixels (N, C, H, W), 0 to 255 -> the divergence of teacher and student (N,), differentiable."""


class Seeds(NamedTuple):
    """Clean real inputs (n, *shape) on the device, their texts where they are texts, and indices (n,) on the host."""

    inputs: Tensor
    texts: tuple[str, ...] | None
    indices: Array


class Pool:
    """The inputs that are explored around: rows of the training split, then the unlabelled ones.

    Args:
        around: which of them.
        dataset: gives the training split.
        unlabelled: the others.
        rows: sorted rows of the training split that the student may learn on; None: all.
        device: where seeds are wanted.
        resident: holds the training split on that device already.

    Raises:
        InputError: unlabelled inputs are wanted and there are none.
    """

    def __init__(
        self,
        around: Around,
        dataset: Dataset,
        unlabelled: Unlabelled | None,
        *,
        rows: Array | None = None,
        device: torch.device,
        resident: Resident | None = None,
    ) -> None:
        if around != "train" and (unlabelled is None or not len(unlabelled)):
            raise no_unlabelled(around)
        self._is_image = dataset.input.kind == "image"
        self._rows = np.arange(len(dataset.train)) if rows is None else rows
        if around == "unlabelled":
            self._rows = self._rows[:0]
        self._others = None if unlabelled is None or around == "train" else unlabelled
        self._resident = resident
        self._device = device
        self._train = None if resident is not None or not len(self._rows) else Stored(dataset.train.inputs, device)
        self._more = None if self._others is None else Stored(self._others.inputs, device)
        self._texts = (dataset.train.texts, None if self._others is None else self._others.texts)

    def __len__(self) -> int:
        return len(self._rows) + (0 if self._others is None else len(self._others))

    def take(self, indices: Array) -> Seeds:
        """Clean inputs at `indices` (n,) of the pool, those of the training split first."""
        count = len(self._rows)
        indices = np.concatenate([indices[indices < count], indices[indices >= count]])
        rows, others = self._rows[indices[indices < count]], indices[indices >= count] - count
        parts = []
        if len(rows):
            parts.append(self._of_the_split(torch.from_numpy(rows)))
        if len(others):
            assert self._more is not None
            parts.append(self._more.take(torch.from_numpy(others)))
        inputs = torch.cat(parts)
        if self._is_image:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return Seeds(inputs, self._texts_of(rows, others), indices)

    def _of_the_split(self, rows: Tensor) -> Tensor:
        if self._resident is not None:
            return self._resident.clean_inputs(to_device(rows, self._device), rows)
        assert self._train is not None
        return self._train.take(rows)

    def _texts_of(self, rows: Array, others: Array) -> tuple[str, ...] | None:
        train, more = self._texts
        if (len(rows) and train is None) or (len(others) and more is None):
            return None
        return (*((train or ())[row] for row in rows.tolist()), *((more or ())[row] for row in others.tolist()))


class Made(NamedTuple):
    """Further inputs.

    inputs: uint8 (n, C, H, W) or int64 (n, T). texts: n texts, None for images. finite: bool (), whether what was
    decoded is. before: (n,), the divergence at the seeds' own latents; None for other kinds than "gradient".
    """

    inputs: Tensor
    texts: tuple[str, ...] | None
    finite: Tensor
    before: Tensor | None = None


class Maker:
    """Makes further inputs of real ones.

    Kind "augmented" is a strong augmentation: each image is shifted by up to a quarter of its shorter side in both
    directions (reflected borders), mirrored half of the time, half of the time a rectangle of 1/8 to 1/2 of each side
    becomes one grey level, contrast changes by a factor of 0.5 to 1.5 and brightness by up to a quarter of its range.
    Mirrors and shifts may make another class of an image; the teacher labels what came out.

    Args:
        section: kind, steps and radius.
        dataset: gives shape and tokenizer.
        generator: None where the kind needs none.
        device: of the inputs; the generator is moved there.
        seed: of the views of kind "augmented".

    Raises:
        InputError: no generator, or one for other inputs; no texts.
    """

    def __init__(
        self,
        section: ExploreSection,
        dataset: Dataset,
        generator: ImageGenerator | TextGenerator | None,
        device: torch.device,
        seed: int,
    ) -> None:
        self.section, self.spec, self.device, self.seed = section, dataset.input, device, seed
        self._images: ImageGenerator | None = None
        self._texts: TextGenerator | None = None
        if section.generates:
            if self.spec.kind == "image":
                if not isinstance(generator, ImageGenerator):
                    raise _wrong_generator(section.kind, generator, 'kind = "vae" or "torch"')
                self._images = generator.to(device)
            else:
                if not isinstance(generator, TextGenerator):
                    raise _wrong_generator(section.kind, generator, 'kind = "masked-lm"')
                self._texts = generator.to(device)
        if self._texts is not None:
            if dataset.tokenizer is None:
                raise InputError("the data set has tokens and no tokenizer for new texts", where="data.tokenizer")
            self._tokenizer = load_tokenizer(dataset.tokenizer)
        if self.spec.kind == "image":
            side = min(self.spec.shape[1:])
            self._strong = AugmentSection(crop=min(256, max(1, side // 4)), flip=True, erase=0.5)

    def make(
        self,
        seeds: Seeds,
        draws: Draws,
        *,
        step: int,
        judge: Judge | None = None,
        kind: ExploreKind | None = None,
        sigma: float | None = None,
    ) -> Made:
        """One further input for each seed; nothing is read back from the device.

        Args:
            seeds: n real inputs.
            draws: what is random in it.
            step: as in `draws`; names the view of kind "augmented".
            judge: what kind "gradient" climbs.
            kind, sigma: instead of the section's.

        Raises:
            InputError: the generator decodes another shape.
        """
        kind = self.section.kind if kind is None else kind
        sigma = self.section.sigma if sigma is None else sigma
        fine = torch.ones((), dtype=torch.bool, device=self.device)
        if self._texts is not None:
            return self._refilled(seeds, draws, fine)
        if kind == "real":
            return Made(seeds.inputs, seeds.texts, fine)
        if kind == "augmented":
            indices = to_device(torch.from_numpy(seeds.indices), self.device)
            # view 0 is the clean image
            viewed = augment(seeds.inputs, indices, step + 1, self.seed, self._strong)
            return Made(draws.strengthen(viewed), None, fine)
        generator = self._images
        assert generator is not None
        with torch.no_grad():
            latents = generator.encode(seeds.inputs)
        before = None
        if kind == "random":
            latents = latents + draws.offsets(len(latents), generator.latent_std, sigma)
        elif kind == "gradient":
            assert judge is not None
            asked = judge
            climbed = ascend(
                latents,
                generator.latent_std,
                radius(sigma, latents.shape[1]),
                self.section.steps,
                lambda place: asked(self._decoded(place, seeds.inputs)),
            )
            latents, before = climbed
        with torch.no_grad():
            decoded = self._decoded(latents, seeds.inputs)
        pixels = to_pixels(decoded).contiguous(memory_format=torch.channels_last)
        return Made(pixels, None, torch.isfinite(decoded).all(), before)

    def _refilled(self, seeds: Seeds, draws: Draws, fine: Tensor) -> Made:
        assert self._texts is not None
        if seeds.texts is None:
            raise InputError(
                "the tokens came without their texts, which are what is refilled",
                where="explore.kind",
                fix='a data source with texts, or explore.kind = "real"',
            )
        texts = tuple(self._texts.refill(seeds.texts, draws.text_seeds(len(seeds.texts))))
        tokens = torch.from_numpy(encode(self._tokenizer, texts, self.spec.shape[0]))
        return Made(to_device(tokens, self.device), texts, fine)

    def _decoded(self, latents: Tensor, real: Tensor) -> Tensor:
        """Float pixels of `latents`, in the shape of the real images (n, C, H, W)."""
        assert self._images is not None
        decoded = self._images.decode(latents)
        if decoded.shape != real.shape:
            raise InputError(
                f"the generator decodes {tuple(decoded.shape[1:])}, the images are {tuple(real.shape[1:])}",
                where="explore.generator",
                evidence=f"{len(real)} images gave {tuple(decoded.shape)}",
                fix="decode must give images of the shape that encode was given",
            )
        return decoded


def no_unlabelled(around: Around) -> InputError:
    """There is nothing unlabelled to explore around."""
    return InputError(
        "there are no unlabelled inputs to explore around",
        where="explore.around",
        evidence=f'around = "{around}"',
        fix='add [data.unlabelled], or explore.around = "train"',
    )


def _wrong_generator(kind: str, generator: object, right: str) -> InputError:
    found = "there is none" if generator is None else f"it is a {type(generator).__name__}"
    return InputError(
        f'kind "{kind}" needs a generator for these inputs', where="explore.generator", evidence=found, fix=right
    )
