"""From `[explore.generator]` to a frozen generator of images, as an artefact with pictures to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.dataset import InputSpec
from distill.distribution import default_device
from distill.exploration.fit import METRICS, clear, fit, lines
from distill.exploration.generator import ImageGenerator
from distill.exploration.pictures import Columns, grid, spread
from distill.exploration.section import GeneratorSection
from distill.exploration.torch_generator import TorchGenerator
from distill.exploration.vae import VAE, VAEGenerator
from distill.networks import load_state, read_state, seeded
from distill.students import save_student
from profiles.artifact import content_key, create, current
from profiles.errors import EdgestillError, InputError
from profiles.progress import Progress, Silent

Array = np.ndarray[Any, Any]
KIND = "generator"
_WHERE = "explore.generator"
_FORM = 1
"""Raise it when the way a generator is made changes, so that older artefacts are made anew."""
_LEARNING_RATE = 0.002
_WEIGHTS = "vae.safetensors"
_STD = "latent_std.npy"
_SMALLEST_STD = 1e-6
_IN_USE = 0.1
"""Deviation of the posterior's mean from which a dimension counts as used (Burda et al. 2016: variance 0.01)."""
_SHOWN = 10
_SAMPLE_ROWS = 4
_MEASURED = 1024
"""Images whose reconstruction is measured."""
_CHUNK = 256
_NO_BETTER = 0.9
"""Reconstructions this close to the error of the mean image show nothing of their original."""


def make_image_generator(
    section: GeneratorSection,
    inputs: Array,
    spec: InputSpec,
    folder: Path,
    *,
    seed: int,
    base: Path,
    allow_code: bool = False,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    shown: Columns | None = None,
) -> ImageGenerator:
    """The generator of a recipe with images: trained (kind "vae"), or loaded and tried (kind "torch").

    The artefact (kind "generator") in `folder` holds latent_std.npy, reconstructions.png (real images, below them what
    the generator makes of them) and samples.png (drawn from a Gaussian with the latents' mean and deviations); of a VAE
    vae.safetensors and metrics.jsonl, too. One that was made from the same section, inputs and seed is loaded.

    Args:
        section: `[explore.generator]`; kind None is "vae".
        inputs: uint8 (M, C, H, W), M >= 2, clean images, training and unlabelled ones, of which exploration may start
            from only some; the latents' deviations are those over all of them. Their labels are not needed.
        spec: their shape, and mean and std.
        folder: of the artefact; while a VAE learns, `<folder>.partial` holds its checkpoint.
        seed: of initialisation, order, noise and samples.
        base: the recipe's folder.
        allow_code: the user allowed importing code that the recipe names.
        device: where it learns and then runs; None: the first GPU where there is one, else the CPU.
        progress: shows the training, and says how good the reconstructions are.
        shown: the inputs that reconstructions.png has, with their words; None: some, evenly spread.

    Raises:
        InputError: a kind or inputs that do not fit, or a user's generator that cannot be used (where =
            "explore.generator.factory").
        Interrupted: while the VAE learns; the same call goes on.
        EdgestillError: the VAE's loss became infinite or NaN, or the disk is full.
    """
    progress = progress or Silent()
    place = default_device() if device is None else torch.device(device)
    if spec.kind != "image":
        raise InputError("texts have no images to generate", where=f"{_WHERE}.kind", fix='kind = "masked-lm"')
    if section.kind == "masked-lm":
        raise InputError(
            "a masked language model makes no images", where=f"{_WHERE}.kind", fix='kind = "vae" or kind = "torch"'
        )
    if len(inputs) < 2:
        raise InputError(
            "a generator needs at least two images to learn or to measure its latents",
            where="explore.around",
            evidence=f"there {'is 1' if len(inputs) else 'are 0'}",
            fix='around = "both", with [data.unlabelled]',
        )
    if section.kind == "torch":
        return _torch_generator(section, inputs, folder, seed, base, allow_code, place, progress, shown)
    return _vae(section, inputs, spec, folder, seed, place, progress, shown)


def _vae(
    section: GeneratorSection,
    inputs: Array,
    spec: InputSpec,
    folder: Path,
    seed: int,
    device: torch.device,
    progress: Progress,
    shown: Columns | None,
) -> VAEGenerator:
    rate = _LEARNING_RATE if section.learning_rate == "auto" else section.learning_rate
    settings = section.model_dump(mode="json", include={"latent", "width", "beta"})
    epochs = section.passes(len(inputs))
    settings |= {"epochs": epochs, "batch_size": section.batch}
    key = content_key(KIND, "vae", _FORM, settings, rate, list(spec.shape), spec.mean, spec.std, seed, inputs)
    with seeded(seed):
        network = VAE(spec, section.latent, section.width)
    if current(folder, KIND, key) is not None:
        file = folder / _WEIGHTS
        load_state(network, read_state(file, where=str(file)), file=file, where=str(file))
        return VAEGenerator(network.to(device), _read_std(folder))

    def loss(rows: Tensor) -> dict[str, Tensor]:
        images = _copied(inputs[rows.numpy()]).to(device)
        return network.loss(images, section.beta)

    history = fit(
        network,
        loss,
        len(inputs),
        folder,
        key=key,
        epochs=epochs,
        batch_size=section.batch,
        learning_rate=rate,
        seed=seed,
        device=device,
        progress=progress,
        title="generator (VAE)",
    )
    network.requires_grad_(False)
    generator = VAEGenerator(network, torch.ones(section.latent))
    mean, std = _moments(generator, inputs)
    generator = VAEGenerator(network, std)
    info: dict[str, Any] = {"kind": "vae"}
    with create(folder, KIND, key, info) as temporary:
        save_student(network, temporary / _WEIGHTS)
        (temporary / METRICS).write_text(lines(history), encoding="utf-8")
        info |= _look(generator, mean, inputs, temporary, seed, progress, shown)
        info["latents_in_use"] = int((std > _IN_USE).sum())
    clear(folder)
    if info["rmse"] > _NO_BETTER * info["rmse_of_the_mean"]:
        progress.note(
            "the generator's images show little of their originals: look at "
            f"{folder / 'reconstructions.png'}; {_WHERE}.epochs above {epochs} or a smaller beta helps"
        )
    return generator


def _torch_generator(
    section: GeneratorSection,
    inputs: Array,
    folder: Path,
    seed: int,
    base: Path,
    allow_code: bool,
    device: torch.device,
    progress: Progress,
    shown: Columns | None,
) -> TorchGenerator:
    examples = _copied(inputs[_spread(len(inputs), _SHOWN)])
    generator = TorchGenerator(section, examples, base=base, seed=seed, device=device, allow_code=allow_code)
    key = content_key(KIND, "torch", _FORM, generator.identity, seed, inputs)
    if current(folder, KIND, key) is not None:
        generator.set_latent_std(_read_std(folder))
        return generator
    mean, std = _moments(generator, inputs)
    generator.set_latent_std(std)
    info: dict[str, Any] = {"kind": "torch"}
    with create(folder, KIND, key, info) as temporary:
        info |= _look(generator, mean, inputs, temporary, seed, progress, shown)
        info["latents_in_use"] = int((std > _SMALLEST_STD).sum())
    return generator


def _moments(generator: ImageGenerator, inputs: Array) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every latent dimension over `inputs`, float32 (d,) on the CPU.

    Raises:
        InputError: a user's encoder gives values that are not finite.
    """
    sums: list[Tensor] = []
    # around the first sample, so that a large mean takes no digits from the deviations
    shift = generator.encode(_copied(inputs[:1])).cpu().double()
    broken = 0
    for first in range(0, len(inputs), _CHUNK):
        latents = generator.encode(_copied(inputs[first : first + _CHUNK])).cpu().double()
        broken += int((~latents.isfinite()).any(1).sum())
        away = latents - shift
        sums.append(torch.stack([away.sum(0), away.square().sum(0)]))
    if broken:
        _refuse_not_finite(generator, "encode", broken, len(inputs))
    mean, square = torch.stack(sums).sum(0) / len(inputs)
    std = (square - mean.square()).clamp_min(0).sqrt().clamp_min(_SMALLEST_STD)
    return (mean + shift[0]).float(), std.float()


def _look(
    generator: ImageGenerator,
    mean: Tensor,
    inputs: Array,
    folder: Path,
    seed: int,
    progress: Progress,
    shown: Columns | None,
) -> dict[str, float]:
    """Writes both pictures; says and returns how far reconstructions are off, in grey levels.

    Raises:
        InputError: a user's decoder gives values that are not finite.
    """
    rows = _spread(len(inputs), _MEASURED)
    real = _copied(inputs[rows])
    made = _images(generator, generator.encode(real))
    exact = real.double()
    info = {
        "rmse": float((made.double() - exact).square().mean().sqrt()),
        "rmse_of_the_mean": float((exact - exact.mean(0)).square().mean().sqrt()),
    }
    columns = shown or spread(len(inputs))
    real = _copied(inputs[columns.rows])
    made = _images(generator, generator.encode(real))
    grid(
        torch.stack([real, made]),
        folder / "reconstructions.png",
        row_titles=["real", "made"],
        column_titles=columns.titles,
        heading=columns.heading,
    )
    noise = torch.randn(_SAMPLE_ROWS * _SHOWN, len(mean), generator=torch.Generator().manual_seed(seed))
    std = generator.latent_std
    samples = _images(generator, mean.to(std.device) + noise.to(std.device) * std)
    grid(samples.reshape(_SAMPLE_ROWS, _SHOWN, *samples.shape[1:]), folder / "samples.png")
    np.save(folder / _STD, std.cpu().numpy())
    progress.note(
        f"generator: its images are {info['rmse']:.1f} of 255 grey levels off their originals "
        f"(the mean image: {info['rmse_of_the_mean']:.1f})"
    )
    return info


@torch.no_grad()
def _images(generator: ImageGenerator, latents: Tensor) -> Tensor:
    """What latents (N, d) decode to, as uint8 on the CPU."""
    decoded = torch.cat([generator.decode(part).cpu() for part in torch.split(latents, _CHUNK)])
    broken = int((~decoded.isfinite()).flatten(1).any(1).sum())
    if broken:
        _refuse_not_finite(generator, "decode", broken, len(decoded))
    return decoded.round().to(torch.uint8)


def _refuse_not_finite(generator: ImageGenerator, name: str, broken: int, count: int) -> None:
    if isinstance(generator, TorchGenerator):
        generator.refuse_not_finite(name, broken, count)
    raise EdgestillError(
        f"the trained VAE's {name} gives values that are not finite",
        where=_WHERE,
        evidence=f"for {broken} of {count} samples",
        fix=f"a smaller {_WHERE}.learning_rate",
    )


def _copied(images: Array) -> Tensor:
    """A tensor of its own: what is mapped from disk cannot be written, of which torch warns."""
    return torch.from_numpy(np.array(images))


def _spread(count: int, most: int) -> Array:
    """int64, ascending: at most `most` of `count` rows, evenly spread, so that sorted data shows every part."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64)


def _read_std(folder: Path) -> Tensor:
    return torch.from_numpy(np.load(folder / _STD))
