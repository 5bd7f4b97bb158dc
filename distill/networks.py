"""What students and teachers share: input scaling, weights from files, a user's module, seeded building."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.data.dataset import InputSpec
from distill.teachers.section import ImageInput
from profiles.errors import InputError, nearest
from profiles.opening import refuse_zip_bomb

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """uint8 (N, C, H, W), 0 to 255 -> float32 (x / 255 - mean) / std, per channel; keeps the memory format.

    Kept as one multiplication and one addition (buffers `scale` and `shift`), so that the graph holds two nodes.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        s = torch.where(s < 1e-6, 1.0, s)  # a constant channel carries nothing, but must not become infinite
        self.register_buffer("scale", (1 / (255 * s)).float().view(1, -1, 1, 1))
        self.register_buffer("shift", (-m / s).float().view(1, -1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return image.to(self.scale.dtype) * self.scale + self.shift


class ImageAdapter(nn.Module):
    """Pixels as a foreign network wants them: repeated channels, resized, normalised (see ImageInput).

    uint8 (N, C, H, W) -> float32 (N, C', S, S).

    Raises:
        InputError: mean and std of the wrong length, or colour images for a one-channel network.
    """

    def __init__(self, section: ImageInput, spec: InputSpec, *, where: str) -> None:
        super().__init__()
        channels = section.input_channels or spec.shape[0]
        if channels != spec.shape[0] and spec.shape[0] != 1:
            raise InputError(
                f"{spec.shape[0]}-channel images cannot become {channels}-channel ones",
                where=f"{where}.input_channels",
                fix='data.channels = 1 makes the images grey; or leave "input_channels" out',
            )
        mean, std = _mean_std(section, spec, channels, where)
        self.repeat = channels if channels != spec.shape[0] else 1
        self.size = section.input_size
        # blurring before shrinking avoids aliasing; when growing it changes nothing, and few runtimes have it
        self.antialias = self.size is not None and self.size < min(spec.shape[1:])
        self.normalize = Normalize(mean, std)

    def forward(self, image: Tensor) -> Tensor:
        if self.repeat > 1:  # TensorRT repeats no uint8
            image = image.to(self.normalize.scale.dtype).expand(-1, self.repeat, -1, -1)
        x: Tensor = self.normalize(image)
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(
                x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=self.antialias
            )
        return x


def _mean_std(
    section: ImageInput, spec: InputSpec, channels: int, where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if section.mean is not None and section.std is not None:
        mean, std = section.mean, section.std
    elif section.normalization == "none":
        mean, std = (0.0,), (1.0,)
    elif section.normalization == "imagenet" and channels == 3:
        mean, std = _IMAGENET_MEAN, _IMAGENET_STD
    elif section.normalization == "imagenet":
        mean, std = (sum(_IMAGENET_MEAN) / 3,), (sum(_IMAGENET_STD) / 3,)
    else:
        mean, std = spec.mean, spec.std
    if len(mean) == 1:
        mean, std = mean * channels, std * channels
    if len(mean) != channels:
        raise InputError(
            f"mean and std have {len(mean)} values, the network's input has {channels} channels",
            where=f"{where}.mean",
            fix="give one value per channel, or one for all",
        )
    return mean, std


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random initialisation inside the block depends on `seed` alone, and the global generators stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would also reseed the GPUs' generators
        yield


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_all_tensors(module).items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def _all_tensors(module: nn.Module) -> dict[str, Tensor]:
    # not the state_dict: it leaves non-persistent buffers out
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def read_state(path: Path, *, where: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a .pth / .pt / .bin state dict (weights only: no code is executed).

    Raises:
        InputError: no such file, another format, or truncated or corrupt content; the message names the file.
    """
    if not path.is_file():
        raise InputError(f"no such weights file: {path}", where=where)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        refuse_zip_bomb(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # both readers raise many types for damaged bytes
        raise InputError(
            f"cannot read the weights in {path}",
            where=where,
            evidence=f"{(str(error) or type(error).__name__).splitlines()[0]} ({path.stat().st_size} bytes)",
            fix="the file is truncated, corrupt, or holds more than tensors; write it again with "
            "safetensors.torch.save_file(model.state_dict(), ...)",
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(
            f"{path} holds no state dict", where=where, fix="save model.state_dict(), not the model or an optimiser"
        )
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def load_state(
    module: nn.Module, state: Mapping[str, Tensor], *, file: Path, where: str, skip: tuple[str, ...] = ()
) -> None:
    """Copies `state` into `module`; every name must match, and every shape.

    `skip`: prefixes of names that may be missing or of another shape (a head that is replaced anyway).

    Raises:
        InputError: names missing, left over, or tensors of another shape; the message names file and first offenders.
    """
    own = module.state_dict()

    def skipped(name: str) -> bool:
        return any(name == prefix or name.startswith(prefix + ".") for prefix in skip)

    missing = sorted(name for name in own if name not in state and not skipped(name))
    extra = sorted(name for name in state if name not in own and not skipped(name))
    wrong = sorted(n for n in own if n in state and own[n].shape != state[n].shape and not skipped(n))
    if missing or extra or wrong:
        parts = []
        if missing:
            parts.append(f"{len(missing)} missing, such as {missing[0]}")
        if extra:
            parts.append(f"{len(extra)} unknown, such as {extra[0]}")
        if wrong:
            name = wrong[0]
            parts.append(
                f"{len(wrong)} of another shape, such as {name}: file {tuple(state[name].shape)}, "
                f"model {tuple(own[name].shape)}"
            )
        raise InputError(
            f"the weights in {file} do not fit the model",
            where=where,
            evidence="; ".join(parts),
            fix="check the architecture or kwargs that the weights were made with",
        )
    module.load_state_dict(
        {n: value for n, value in state.items() if n in own and own[n].shape == value.shape}, strict=False
    )


def call_factory(path: str, kwargs: Mapping[str, Any], *, base: Path, where: str, allow_code: bool) -> nn.Module:
    """The module that a user's factory returns.

    Raises:
        InputError: see `load_factory`; or the factory failed or returned something that is not a torch module.
    """
    from profiles.usercode import load_factory

    factory = load_factory(path, base=base, where=f"{where}.factory", allow_code=allow_code)
    try:
        module = factory(**kwargs)
    except Exception as error:  # a user's code may raise anything
        raise InputError(
            f'"{path}" failed',
            where=f"{where}.kwargs",
            evidence=f"{type(error).__name__}: {error}",
            fix=f"check {where}.kwargs = {dict(kwargs)}",
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(
            f'"{path}" returned a {type(module).__name__}, not a torch.nn.Module', where=f"{where}.factory"
        )
    return module


def find_linear(module: nn.Module, name: str | None, *, where: str) -> tuple[str, nn.Linear]:
    """Dotted name and module of the head: the Linear called `name`, or the last Linear that was registered.

    Raises:
        InputError: no such module, not a Linear, or no Linear at all.
    """
    linears = {path: child for path, child in module.named_modules() if isinstance(child, nn.Linear) and path}
    if name is None:
        if not linears:
            raise InputError("the network has no Linear layer", where=f"{where}.head", fix="end it with a nn.Linear")
        name = list(linears)[-1]
    if name not in linears:
        every = dict(module.named_modules())
        what = f"is a {type(every[name]).__name__}, not a Linear" if name in every else "does not exist"
        raise InputError(f'the layer "{name}" {what}', where=f"{where}.head", fix=nearest(name, list(linears)))
    return name, linears[name]


def first_tensor(output: Any, *, where: str) -> Tensor:
    """The tensor of a network's output: itself, its `logits`, or the first tensor of a tuple.

    Raises:
        InputError: none of these.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]  # type: ignore[no-any-return]
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits  # type: ignore[no-any-return]
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise InputError(
        f"the network returns a {type(output).__name__}", where=where, fix="return a tensor, or something with .logits"
    )
