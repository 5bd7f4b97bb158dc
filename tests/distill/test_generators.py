"""The loop that trains generators, the VAE, a user's own generator, and the artefact with its pictures."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from distill.data.dataset import InputSpec
from distill.exploration.fit import clear, fit, partial
from distill.exploration.make import make_image_generator
from distill.exploration.pictures import grid, one_per_class, spread
from distill.exploration.section import GeneratorSection
from distill.exploration.torch_generator import TorchGenerator
from distill.exploration.vae import VAE, VAEGenerator
from distill.networks import fingerprint, seeded
from profiles.artifact import read_manifest, verify
from profiles.errors import EdgestillError, InputError, Interrupted

Array = np.ndarray[Any, Any]


def _spec(channels: int = 1, height: int = 12, width: int = 12) -> InputSpec:
    return InputSpec("image", (channels, height, width), (0.3,) * channels, (0.3,) * channels)


def _blobs(count: int, channels: int = 1, height: int = 12, width: int = 12, seed: int = 0) -> Array:
    """Images of one bright soft spot each: two coordinates and a brightness, which a small VAE can learn."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    centre = rng.uniform(0.2, 0.8, (count, 2)) * (height, width)
    distance = (y - centre[:, 0, None, None]) ** 2 + (x - centre[:, 1, None, None]) ** 2
    spots = np.exp(-distance / (0.03 * height * width))[:, None]
    colour = rng.uniform(0.4, 1, (count, channels, 1, 1))
    found: Array = (255 * spots * colour).astype(np.uint8)
    return found


_SMALL = {"kind": "vae", "latent": 4, "width": 8, "epochs": 3, "batch_size": 32}
_EPOCHS = 20


def _make(folder: Path, inputs: Array, spec: InputSpec | None = None, *, seed: int = 0, **keys: Any) -> Any:
    section = GeneratorSection.model_validate({**_SMALL, **keys})
    spec = spec or _spec(*inputs.shape[1:])
    return make_image_generator(section, inputs, spec, folder, seed=seed, base=folder.parent, device="cpu")


# ------------------------------------------------------------------------------------------------------------- the loop


class _Line(nn.Module):
    """y = 2 x, to be found from 40 points; the noise comes from torch's generators."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.x = torch.linspace(-1, 1, 40)[:, None]
        self.seen: list[list[int]] = []

    def loss(self, rows: Tensor) -> dict[str, Tensor]:
        self.seen.append(rows.tolist())
        x = self.x[rows]
        error = (self.layer(x) - 2 * x + 0.01 * torch.randn(len(x), 1)).square().mean()
        return {"error": error, "size": 1e-4 * self.layer.weight.square().sum()}


def _line() -> _Line:
    with seeded(0):
        return _Line()


def _fit(line: _Line, folder: Path, loss: Callable[[Tensor], dict[str, Tensor]] | None = None, **keys: Any) -> Any:
    given: dict[str, Any] = {
        "key": "k",
        "epochs": 30,
        "batch_size": 8,
        "learning_rate": 0.1,
        "seed": 3,
        "device": "cpu",
        "title": "t",
    }
    return fit(line, loss or line.loss, 40, folder, **(given | keys))


def test_fit_learns_and_reports_every_epoch(tmp_path: Path) -> None:
    line = _line()
    history = _fit(line, tmp_path / "g")
    assert line.layer.weight.item() == pytest.approx(2, abs=0.05)
    assert [record["epoch"] for record in history] == list(range(1, 31))
    assert all(r["loss"] == pytest.approx(r["loss/error"] + r["loss/size"]) for r in history)
    assert not line.training
    written = (partial(tmp_path / "g") / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text) for text in written] == history


def test_fit_takes_every_sample_once_an_epoch_in_a_new_order(tmp_path: Path) -> None:
    line = _line()
    _fit(line, tmp_path / "g", epochs=3)
    epochs = [[row for rows in line.seen[5 * i : 5 * i + 5] for row in rows] for i in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_fit_leaves_the_global_generator_as_it_was(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    _fit(_line(), tmp_path / "g", epochs=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("stop_at", "number"), [(1, signal.SIGINT), (7, signal.SIGTERM), (10, signal.SIGINT), (25, signal.SIGINT)]
)
def test_fit_resumes_to_the_bit_after_a_signal(tmp_path: Path, stop_at: int, number: signal.Signals) -> None:
    whole = _line()
    expected = _fit(whole, tmp_path / "whole", epochs=6)
    first = _line()

    def interrupted(rows: Tensor) -> dict[str, Tensor]:
        terms = first.loss(rows)
        if len(first.seen) == stop_at:
            os.kill(os.getpid(), number)
        return terms

    with pytest.raises(Interrupted, match=f"stopped after {stop_at / 5:.1f} of 6 epochs"):
        _fit(first, tmp_path / "g", interrupted, epochs=6)
    second = _line()
    history = _fit(second, tmp_path / "g", epochs=6)
    assert first.seen + second.seen == whole.seen
    assert history == expected
    assert fingerprint(second.layer) == fingerprint(whole.layer)


def test_a_finished_fit_is_not_repeated_until_it_is_cleared(tmp_path: Path) -> None:
    line, again = _line(), _line()
    history = _fit(line, tmp_path / "g", epochs=2)
    assert _fit(again, tmp_path / "g", epochs=2) == history
    assert not again.seen
    assert fingerprint(again.layer) == fingerprint(line.layer)
    clear(tmp_path / "g")
    assert not partial(tmp_path / "g").exists()


def test_a_checkpoint_of_other_settings_is_not_taken_up(tmp_path: Path) -> None:
    _fit(_line(), tmp_path / "g", epochs=2)
    again = _line()
    _fit(again, tmp_path / "g", epochs=2, key="other")
    assert len(again.seen) == 10


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    _fit(_line(), tmp_path / "g", epochs=1)
    file = partial(tmp_path / "g") / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged checkpoint"):
        _fit(_line(), tmp_path / "g", epochs=1)


def test_a_term_that_is_not_finite_stops_and_is_named(tmp_path: Path) -> None:
    line = _line()

    def broken(rows: Tensor) -> dict[str, Tensor]:
        terms = line.loss(rows)
        return {**terms, "broken": terms["size"] * (float("nan") if len(line.seen) > 7 else 1.0)}

    with pytest.raises(EdgestillError, match="not a number any more: broken\n") as caught:
        _fit(line, tmp_path / "g", broken)
    assert caught.value.where == "explore.generator"
    assert "steps 6 to 10" in str(caught.value.evidence)
    assert "learning_rate below 0.1" in str(caught.value.fix)


def test_a_batch_is_never_larger_than_the_data(tmp_path: Path) -> None:
    line = _line()
    _fit(line, tmp_path / "g", epochs=2, batch_size=1000)
    assert [len(rows) for rows in line.seen] == [40, 40]


# -------------------------------------------------------------------------------------------------------------- the VAE


@settings(max_examples=12, deadline=None)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(8, 50),
    width=st.integers(8, 50),
    latent=st.integers(1, 40),
)
def test_a_vae_meets_every_size_exactly(channels: int, height: int, width: int, latent: int) -> None:
    spec = _spec(channels, height, width)
    network = VAE(spec, latent, 4)
    images = torch.randint(0, 256, (3, *spec.shape), dtype=torch.uint8)
    terms = network.loss(images, 1.0)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())
    generator = VAEGenerator(network, torch.ones(latent))
    latents = generator.encode(images)
    assert latents.shape == (3, latent)
    pixels = generator.decode(latents)
    assert pixels.shape == images.shape
    assert 0 <= pixels.min() <= pixels.max() <= 255


@pytest.mark.parametrize("size", [(95, 95), (96, 96), (224, 224), (150, 8), (1, 1)])
def test_a_vae_meets_large_and_narrow_sizes(size: tuple[int, int]) -> None:
    network = VAE(_spec(3, *size), 8, 4)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    torch.stack(list(network.loss(images, 1.0).values())).sum().backward()  # type: ignore[no-untyped-call]
    generator = VAEGenerator(network, torch.ones(8))
    assert generator.decode(generator.encode(images)).shape == images.shape


def test_the_loss_is_the_lower_bound_of_a_calibrated_gaussian() -> None:
    """Against float64: with the variance of largest likelihood, -log p is D/2 (log v + 1 + log 2 pi) per image."""
    network = VAE(_spec(), 3, 4).eval()
    images = torch.from_numpy(_blobs(6))
    with seeded(5):
        terms = network.loss(images, 0.7)
    with seeded(5), torch.no_grad():
        mean, log_variance = network.encode(images)
        decoded = network.decode(mean + (log_variance / 2).exp() * torch.randn_like(mean)).double()
    posterior = torch.distributions.Normal(mean.double(), (log_variance.double() / 2).exp())
    prior = torch.distributions.Normal(torch.zeros(6, 3).double(), torch.ones(6, 3).double())
    divergence = torch.distributions.kl_divergence(posterior, prior).sum(1).mean()
    assert terms["kl"].item() == pytest.approx(0.7 * divergence.item() / 144, rel=1e-4)
    x = images.double() / 255
    best = (x - decoded).square().mean().sqrt()
    likelihood = torch.distributions.Normal(decoded, best).log_prob(x).mean()  # type: ignore[no-untyped-call]
    constants = (1 + np.log(2 * np.pi)) / 2
    assert terms["reconstruction"].item() == pytest.approx(-likelihood.item() - constants, abs=1e-3)


def test_a_perfect_reconstruction_has_a_finite_loss() -> None:
    network = VAE(_spec(), 3, 4)
    with torch.no_grad():
        last = network.paint[0]
        assert isinstance(last, nn.Conv2d)
        last.weight.zero_()
        assert last.bias is not None
        last.bias.fill_(-200)
    terms = network.loss(torch.zeros(4, 1, 12, 12, dtype=torch.uint8), 1.0)
    assert terms["reconstruction"].isfinite()


def test_decoding_is_differentiable_and_agrees_with_finite_differences() -> None:
    with seeded(0):
        network = VAE(_spec(), 4, 4)
    generator = VAEGenerator(network, torch.ones(4))
    network.double()
    z = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda latents: generator.decode(latents).mean((2, 3)), z)


def test_encoding_has_no_gradient_and_does_not_depend_on_the_batch() -> None:
    with seeded(0):
        generator = VAEGenerator(VAE(_spec(), 4, 4), torch.ones(4))
    images = torch.from_numpy(_blobs(300))
    whole = generator.encode(images)
    assert not whole.requires_grad
    torch.testing.assert_close(generator.encode(images[290:]), whole[290:], rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- the artefact


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array, VAEGenerator]:
    folder = tmp_path_factory.mktemp("run") / "generator"
    inputs = _blobs(300)
    return folder, inputs, _make(folder, inputs, epochs=_EPOCHS, learning_rate=0.01)


def test_a_trained_vae_gives_back_what_it_was_shown(learned: tuple[Path, Array, VAEGenerator]) -> None:
    _, _, generator = learned
    fresh = torch.from_numpy(_blobs(200, seed=1))
    made = generator.decode(generator.encode(fresh))
    error = (made - fresh).square().mean().sqrt()
    spread = (fresh.float() - fresh.float().mean(0)).square().mean().sqrt()
    assert error < 0.4 * spread


def test_latent_std_is_that_of_the_posterior_means(learned: tuple[Path, Array, VAEGenerator]) -> None:
    _, inputs, generator = learned
    latents = generator.encode(torch.from_numpy(inputs)).double()
    torch.testing.assert_close(generator.latent_std.double(), latents.std(0, correction=0), rtol=1e-4, atol=1e-6)


def test_a_generator_is_frozen_and_uses_no_random_numbers(learned: tuple[Path, Array, VAEGenerator]) -> None:
    _, inputs, generator = learned
    network = generator.network
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    before, state = fingerprint(network), torch.get_rng_state()
    z = generator.encode(torch.from_numpy(inputs[:32])).requires_grad_()
    torch.autograd.grad(generator.decode(z).sum(), z)
    assert fingerprint(network) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_artefact_holds_weights_metrics_and_pictures(learned: tuple[Path, Array, VAEGenerator]) -> None:
    folder, _, generator = learned
    manifest = verify(folder, "generator")
    assert set(manifest.files) == {
        "vae.safetensors",
        "metrics.jsonl",
        "latent_std.npy",
        "reconstructions.png",
        "samples.png",
    }
    assert manifest.info["kind"] == "vae"
    assert 0 < manifest.info["rmse"] < manifest.info["rmse_of_the_mean"]
    assert 2 <= manifest.info["latents_in_use"] <= 4
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == _EPOCHS
    assert not partial(folder).exists()
    assert generator.key


def test_a_finished_generator_is_loaded_not_trained(learned: tuple[Path, Array, VAEGenerator]) -> None:
    folder, inputs, generator = learned
    created = (folder / "manifest.json").stat().st_mtime_ns
    again = _make(folder, inputs, epochs=_EPOCHS, learning_rate=0.01)
    assert (folder / "manifest.json").stat().st_mtime_ns == created
    assert again.key == generator.key
    images = torch.from_numpy(inputs[:5])
    assert torch.equal(again.decode(again.encode(images)), generator.decode(generator.encode(images)))


def test_the_same_seed_gives_the_same_generator_and_another_seed_another(tmp_path: Path) -> None:
    inputs = _blobs(64)
    keys = [_make(tmp_path / name, inputs, seed=seed).key for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("change", ["beta", "latent", "width", "epochs", "inputs", "seed"])
def test_a_stale_generator_is_made_anew(tmp_path: Path, change: str) -> None:
    inputs = _blobs(64)
    _make(tmp_path / "g", inputs)
    before = read_manifest(tmp_path / "g", "generator").key
    keys: dict[str, Any] = {"beta": 2.0, "latent": 5, "width": 9, "epochs": 2}
    other = _blobs(64, seed=9) if change == "inputs" else inputs
    generator = _make(
        tmp_path / "g", other, seed=int(change == "seed"), **({change: keys[change]} if change in keys else {})
    )
    assert read_manifest(tmp_path / "g", "generator").key != before
    assert len(generator.latent_std) == (5 if change == "latent" else 4)


def test_an_interrupted_generator_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _blobs(96)
    expected = _make(tmp_path / "whole", inputs)
    loss, calls = VAE.loss, []

    def stopping(self: VAE, images: Tensor, beta: float) -> dict[str, Tensor]:
        calls.append(len(images))
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, images, beta)

    monkeypatch.setattr(VAE, "loss", stopping)
    with pytest.raises(Interrupted):
        _make(tmp_path / "g", inputs)
    assert not (tmp_path / "g").exists()
    assert _make(tmp_path / "g", inputs).key == expected.key
    assert len(calls) == 9


def test_rgb_images_of_an_odd_size_round_trip(tmp_path: Path) -> None:
    inputs = _blobs(128, 3, 15, 11)
    generator = _make(tmp_path / "g", inputs)
    images = torch.from_numpy(inputs[:4])
    assert generator.decode(generator.encode(images)).shape == images.shape
    assert np.asarray(Image.open(tmp_path / "g" / "samples.png")).ndim == 3


def test_a_generator_that_learned_nothing_is_pointed_out(tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes:
        def __getattr__(self, name: str) -> Any:
            from profiles.progress import Silent

            return notes.append if name == "note" else getattr(Silent(), name)

    section = GeneratorSection.model_validate({**_SMALL, "epochs": 1, "learning_rate": 1e-6})
    make_image_generator(
        section, _blobs(40), _spec(), tmp_path / "g", seed=0, base=tmp_path, device="cpu", progress=Notes()
    )
    assert any("explore.generator.epochs above 1" in note for note in notes)


def test_constant_images_give_a_positive_latent_std(tmp_path: Path) -> None:
    generator = _make(tmp_path / "g", np.full((8, 1, 12, 12), 7, np.uint8))
    assert (generator.latent_std > 0).all()


def test_images_mapped_from_disk_are_read_without_a_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "inputs.npy", _blobs(20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _make(tmp_path / "g", np.load(tmp_path / "inputs.npy", mmap_mode="r"), epochs=1)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    tokens = InputSpec("tokens", (16,), vocabulary=10)
    with pytest.raises(InputError, match="texts have no images"):
        _make(tmp_path / "g", np.zeros((4, 16), np.int64), tokens)
    with pytest.raises(InputError, match="masked language model makes no images"):
        make_image_generator(
            GeneratorSection(kind="masked-lm", model="x"), _blobs(4), _spec(), tmp_path / "g", seed=0, base=tmp_path
        )
    for count in (0, 1):
        with pytest.raises(InputError, match="at least two images") as caught:
            _make(tmp_path / "g", _blobs(2)[:count])
        assert caught.value.where == "explore.around"


def test_few_images_get_more_passes_unless_their_number_is_named() -> None:
    passes = GeneratorSection().passes
    assert [passes(count) for count in (2, 100, 128, 200, 256, 1280, 3200)] == [500, 500, 500, 500, 250, 50, 20]
    assert GeneratorSection(epochs=3).passes(100) == 3
    assert GeneratorSection(epochs=3, min_steps=10).passes(100) == 10
    assert GeneratorSection(min_steps=10).passes(100) == 20
    assert GeneratorSection(model="x").passes(100) == 3
    assert GeneratorSection(model="x", min_steps=30).passes(100) == 10


def test_the_least_number_of_steps_is_in_the_key_only_where_it_binds(tmp_path: Path) -> None:
    inputs = _blobs(64)
    keys = []
    for number, own in enumerate(({}, {"min_steps": 6}, {"min_steps": 7})):
        _make(tmp_path / str(number), inputs, **own)
        keys.append(read_manifest(tmp_path / str(number), "generator").key)
    assert keys[0] == keys[1] != keys[2]
    history = (tmp_path / "2" / "metrics.jsonl").read_text().splitlines()
    assert len(history) == 4
    section = GeneratorSection.model_validate(_SMALL)
    assert "min_steps" not in section.hashed
    assert section.model_copy(update={"min_steps": 7}).hashed["min_steps"] == 7


def test_short_epochs_are_not_each_written_to_disk(tmp_path: Path) -> None:
    written = []
    line = _line()

    def watched(rows: Tensor) -> dict[str, Tensor]:
        file = tmp_path / "g.partial" / "checkpoint.pt"
        written.append(file.stat().st_mtime_ns if file.is_file() else 0)
        return line.loss(rows)

    assert len(_fit(line, tmp_path / "g", watched, epochs=25)) == 25
    assert len(set(written)) == 3  # none, after 50 steps, after 100


# ----------------------------------------------------------------------------------------------- a user's own generator

_CODE = '''
import torch
from torch import nn


class Halves(nn.Module):
    """Latents (N, 2, H, W) of two equal copies; decoding averages them: an exact round trip."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def encode(self, images):
        return images.repeat(1, 2, 1, 1) * self.scale

    def decode(self, latents):
        return latents.mean(1, keepdim=True) / self.scale


class Tuple(Halves):
    def encode(self, images):
        return super().encode(images), torch.randn(len(images))


class WrongShape(Halves):
    def decode(self, latents):
        return super().decode(latents)[:, :, :-1]


class NotANumber(Halves):
    def decode(self, latents):
        return super().decode(latents) / 0 * 0


class SometimesNotANumber(Halves):
    def decode(self, latents):
        decoded = super().decode(latents)
        return torch.where(decoded.amin((1, 2, 3), keepdim=True) < -0.01, float("nan"), decoded)


class NotANumberEncoded(Halves):
    def encode(self, images):
        return super().encode(images) * float("inf")


class NoBatch(Halves):
    def encode(self, images):
        return super().encode(images).flatten()


class Pooled(Halves):
    def encode(self, images):
        return super().encode(images).mean(0, keepdim=True)


class Random(Halves):
    def encode(self, images):
        return super().encode(images) + torch.randn_like(images)


class RandomDecoder(Halves):
    def decode(self, latents):
        return super().decode(latents) + 0.01 * torch.rand(1)


class Signed(Halves):
    def decode(self, latents):
        return super().decode(latents) * 2 - 1


class Indices(Halves):
    def encode(self, images):
        return super().encode(images).long()


class Dictionary(Halves):
    def encode(self, images):
        return {"mean": super().encode(images)}


class TupleDecoded(Halves):
    def decode(self, latents):
        return super().decode(latents), latents


class NoneDecoded(Halves):
    def decode(self, latents):
        return None


class Fails(Halves):
    def encode(self, images):
        raise RuntimeError("mat1 and mat2")


class OnlyEncode(nn.Module):
    def encode(self, images):
        return images


def function():
    return 3
'''


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"generators_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(_CODE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def _own(tmp_path: Path, code: str, cls: str, inputs: Array | None = None, **keys: Any) -> TorchGenerator:
    section = GeneratorSection.model_validate({"kind": "torch", "factory": f"{code}:{cls}", **keys})
    made = make_image_generator(
        section,
        _blobs(40) if inputs is None else inputs,
        _spec(),
        tmp_path / "g",
        seed=0,
        base=tmp_path,
        allow_code=True,
        device="cpu",
    )
    assert isinstance(made, TorchGenerator)
    return made


@pytest.mark.parametrize("cls", ["Halves", "Tuple"])
def test_a_users_generator_round_trips(tmp_path: Path, code: str, cls: str) -> None:
    generator = _own(tmp_path, code, cls)
    images = torch.from_numpy(_blobs(300, seed=2))
    latents = generator.encode(images)
    assert latents.shape == (300, 2 * 144)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(generator.decode(latents), images.float(), rtol=1e-5, atol=1e-3)


def test_a_users_generator_is_frozen_differentiable_and_cut_to_pixels(tmp_path: Path, code: str) -> None:
    generator = _own(tmp_path, code, "Halves")
    assert not generator.network.training
    assert not any(parameter.requires_grad for parameter in generator.network.parameters())
    z = torch.tensor([0.5, 2.0, -1.0]).repeat_interleave(288).reshape(3, 288).requires_grad_()
    pixels = generator.decode(z)
    assert [round(float(row.detach().mean()), 3) for row in pixels] == [127.5, 255, 0]
    (gradient,) = torch.autograd.grad(pixels.sum(), z)
    assert gradient[0].abs().min() > 0


def test_a_users_generator_has_the_std_and_the_pictures_of_its_latents(tmp_path: Path, code: str) -> None:
    inputs = _blobs(40)
    generator = _own(tmp_path, code, "Halves", inputs, kwargs={"scale": 3.0})
    expected = np.tile(inputs.reshape(40, -1).astype(np.float64), 2).std(0) / 255 * 3
    np.testing.assert_allclose(generator.latent_std.numpy(), np.maximum(expected, 1e-6), rtol=1e-4, atol=1e-6)
    manifest = verify(tmp_path / "g", "generator")
    assert set(manifest.files) == {"latent_std.npy", "reconstructions.png", "samples.png"}
    assert manifest.info["rmse"] == 0


def test_a_users_generator_is_measured_once_and_anew_when_it_changes(tmp_path: Path, code: str) -> None:
    first = _own(tmp_path, code, "Halves")
    created = (tmp_path / "g" / "manifest.json").stat().st_mtime_ns
    again = _own(tmp_path, code, "Halves")
    assert (tmp_path / "g" / "manifest.json").stat().st_mtime_ns == created
    assert again.key == first.key
    assert torch.equal(again.latent_std, first.latent_std)
    assert _own(tmp_path, code, "Halves", kwargs={"scale": 2.0}).key != first.key
    assert (tmp_path / "g" / "manifest.json").stat().st_mtime_ns != created
    assert _own(tmp_path, code, "Halves", _blobs(40, seed=3)).key != first.key


def test_weights_of_a_users_generator_are_loaded(tmp_path: Path, code: str) -> None:
    torch.save({"scale": torch.tensor(5.0)}, tmp_path / "w.pth")
    generator = _own(tmp_path, code, "Halves", weights="w.pth")
    assert generator.network.state_dict()["scale"].item() == 5
    torch.save({"other": torch.tensor(5.0)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="do not fit the model") as caught:
        _own(tmp_path, code, "Halves", weights="w.pth")
    assert caught.value.where == "explore.generator.weights"


def test_trying_a_users_generator_moves_no_random_numbers(tmp_path: Path, code: str) -> None:
    before = torch.get_rng_state()
    _own(tmp_path, code, "Tuple")
    with pytest.raises(InputError):
        _own(tmp_path, code, "Random")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("cls", "message", "evidence", "fix"),
    [
        (
            "WrongShape",
            "decode returns another shape",
            "(10, 1, 11, 12) for 10 images, which are (10, 1, 12, 12)",
            "1, 12, 12",
        ),
        ("NotANumber", "decode gives values that are not finite", "10 of 10", "weights"),
        ("SometimesNotANumber", "decode gives values that are not finite", "of 40 samples", "weights"),
        ("NotANumberEncoded", "encode gives values that are not finite", "10 of 10", "weights"),
        ("NoBatch", "encode returns no batch dimension", "(2880,) for 10 images", "(10, ...)"),
        ("Pooled", "encode returns no batch dimension", "(1, 2, 12, 12) for 10 images", "(10, ...)"),
        ("Random", "encode gives other latents at every call", "differ", "mean of the posterior"),
        ("RandomDecoder", "decode gives another image at every call", "differ", "eval mode"),
        ("Signed", "decode returns pixels outside 0..1", "from -1 to", "(x + 1) / 2"),
        ("Indices", "encode returns no floating-point latents", "int64", "before they are quantised"),
        ("Dictionary", "encode returns no tensor", "dict", "tuple"),
        ("TupleDecoded", "decode returns several things", "a tuple of 2", "return the images"),
        ("NoneDecoded", "decode returns no tensor", "NoneType", "0..1"),
        ("Fails", "encode fails", "(10, 1, 12, 12), RuntimeError: mat1 and mat2", "tensor of that shape"),
        ("OnlyEncode", "no method decode", "OnlyEncode", "decode(latents)"),
        ("function", "returned a int", None, None),
        ("Missing", 'no "Missing"', None, "valid"),
    ],
)
def test_a_bad_generator_is_refused_with_the_fix(
    tmp_path: Path, code: str, cls: str, message: str, evidence: str | None, fix: str | None
) -> None:
    with pytest.raises(InputError) as caught:
        _own(tmp_path, code, cls)
    assert message in caught.value.message
    assert caught.value.where == "explore.generator.factory"
    assert evidence is None or evidence in str(caught.value.evidence)
    assert fix is None or fix in str(caught.value.fix)
    assert not (tmp_path / "g").exists()


def test_code_runs_only_when_the_user_says_so(tmp_path: Path, code: str) -> None:
    section = GeneratorSection(kind="torch", factory=f"{code}:Halves")
    with pytest.raises(InputError, match="wants to run code") as caught:
        make_image_generator(section, _blobs(4), _spec(), tmp_path / "g", seed=0, base=tmp_path, device="cpu")
    assert caught.value.where == "explore.generator.factory"
    assert code not in sys.modules


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_where_it_belongs(tmp_path: Path, channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, channels, 8, 16), dtype=np.uint8)
    grid(torch.from_numpy(images), tmp_path / "g.png")
    sheet = np.asarray(Image.open(tmp_path / "g.png")).astype(int)
    factor, gap = 4, 4
    assert sheet.shape == (2 * (8 * factor + gap) + gap, 3 * (16 * factor + gap) + gap, 3)
    for row in range(2):
        for column in range(3):
            top, left = gap + row * (8 * factor + gap), gap + column * (16 * factor + gap)
            cell = sheet[top : top + 8 * factor : factor, left : left + 16 * factor : factor]
            expected = np.broadcast_to(images[row, column].transpose(1, 2, 0), (8, 16, 3))
            np.testing.assert_array_equal(cell, expected)


def test_titles_and_captions_leave_the_images_whole(tmp_path: Path) -> None:
    colour = (90, 200, 10)
    images = np.broadcast_to(np.array(colour, np.uint8)[:, None, None], (2, 2, 3, 70, 70))
    grid(images, tmp_path / "plain.png")
    long = "a class whose name is far too long for its image"
    grid(images, tmp_path / "g.png", row_titles=["real", "sigma 1"], captions=[["coat", long], ["", "bag"]])
    plain, sheet = (np.asarray(Image.open(tmp_path / name)) for name in ("plain.png", "g.png"))
    assert sheet.shape[0] > plain.shape[0]
    assert sheet.shape[1] > plain.shape[1]
    assert (sheet == colour).all(2).sum() == 4 * 70 * 70
    assert (sheet[:, -2:] == 255).all()


def test_every_class_has_a_column_the_rarest_first() -> None:
    labels = np.array([0, 0, 0, 0, 1, 2, 2, 3, 3, 0])
    shown = one_per_class(labels, ["a", "b", "c", "d", "nowhere"])
    assert shown.titles == ("b", "c", "d", "a", "c", "d", "a", "a")
    assert labels[shown.rows].tolist() == [1, 2, 3, 0, 2, 3, 0, 0]
    assert len(set(shown.rows.tolist())) == 8
    many = np.repeat(np.arange(30), np.arange(30, 0, -1))
    assert one_per_class(many, [str(each) for each in range(30)]).titles == tuple(str(29 - each) for each in range(10))


def test_inputs_without_classes_are_spread_over_the_picture() -> None:
    shown = spread(80)
    assert shown.rows.tolist() == list(range(0, 80, 10))
    assert shown.titles is None
    assert spread(3).rows.tolist() == [0, 1, 2]


def test_a_marked_row_has_a_frame_and_small_images_make_a_small_file(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 10, 1, 28, 28), dtype=np.uint8)
    words = [["ankle boot"] * 10] * 4
    titles = ["real", "sigma 0.25", "sigma 0.5 (chosen)", "sigma 1"]
    grid(
        images, tmp_path / "g.png", row_titles=titles, captions=words, column_titles=words[0], heading="class", marked=2
    )
    assert (tmp_path / "g.png").stat().st_size < 300_000
    sheet = np.asarray(Image.open(tmp_path / "g.png"))
    coloured = (sheet.max(2) != sheet.min(2)).any(1)
    step = 84 + 14 + 4
    assert coloured.nonzero()[0].min() > 2 * step
    assert coloured.nonzero()[0].max() <= 3 * step + 14 + 4
    small = np.repeat(np.repeat(images[2, 9], 3, 1), 3, 2)[0]
    top, left = 14 + 4 + 2 * step, sheet.shape[1] - 4 - 84
    assert (sheet[top : top + 84, left : left + 84, 0] == small).all()
