from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from export.own import Example, export_model, parse_example
from profiles.artifact import read_manifest
from profiles.errors import InputError
from tests.export.conftest import device_and_stack


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 16)
        self.right = nn.Embedding(20, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.left(features) + self.right(tokens).mean(1)))


EXAMPLES = [parse_example("features:1x6"), parse_example("tokens:1x5:int64", position=1)]


def samples(count: int = 64) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    rng = np.random.default_rng(0)
    return {
        "features": rng.standard_normal((count, 6)).astype(np.float32),
        "tokens": rng.integers(0, 20, (count, 5)),
    }


@given(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,9}", fullmatch=True),
    st.lists(st.integers(1, 4096), min_size=1, max_size=5),
    st.sampled_from(["float32", "uint8", "int32", "int64", "bool"]),
)
@settings(max_examples=100, deadline=None)
def test_example_reads_back_what_it_prints(name: str, shape: list[int], dtype: str) -> None:
    example = Example(name, tuple(shape), dtype)
    assert parse_example(str(example)) == example


@given(st.text(max_size=20))
@settings(max_examples=150, deadline=None)
def test_any_text_is_an_example_or_an_input_error(text: str) -> None:
    try:
        parsed = parse_example(text)
    except InputError:
        return
    assert parsed.shape
    assert all(size > 0 for size in parsed.shape)


def test_name_and_type_are_optional() -> None:
    assert parse_example("1x3x224x224") == Example("input", (1, 3, 224, 224), "float32")
    assert parse_example("1x64:int64", position=1) == Example("input_1", (1, 64), "int64")
    with pytest.raises(InputError, match='unknown type "int63"') as caught:
        parse_example("1x64:int63")
    assert "int64" in str(caught.value.fix)


def test_several_inputs_are_exported_quantised_and_bundled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    device, stack = device_and_stack("this-machine")
    made, bundles = export_model(TwoInputs(), EXAMPLES, device=device, stack=stack, folder=tmp_path, samples=samples())
    assert {candidate.name for candidate in made.usable} == {"fp32", "int8"}
    assert [path.name for path in bundles] == ["fp32", "int8"]
    info = read_manifest(tmp_path / "fp32", "bundle").info
    assert [entry["name"] for entry in info["inputs"]] == ["features", "tokens"]
    assert info["facts"]["compared_on"] == "the samples given"


def test_without_samples_int8_is_refused(tmp_path: Path) -> None:
    device, stack = device_and_stack("this-machine")
    made, _ = export_model(TwoInputs(), EXAMPLES, device=device, stack=stack, folder=tmp_path)
    assert [candidate.name for candidate in made.usable] == ["fp32"]
    assert "real samples" in str(made["int8"].refused)
    assert read_manifest(tmp_path / "fp32", "bundle").info["facts"]["compared_on"] == "random inputs"


def test_weights_are_loaded_and_must_fit(tmp_path: Path) -> None:
    device, stack = device_and_stack("this-machine")
    torch.manual_seed(3)
    save_file(TwoInputs().state_dict(), str(tmp_path / "good.safetensors"))
    model = TwoInputs()
    export_model(
        model, EXAMPLES, device=device, stack=stack, folder=tmp_path / "out", weights=tmp_path / "good.safetensors",
        precisions=("fp32",),
    )  # fmt: skip
    torch.manual_seed(3)
    assert torch.equal(model.head.weight, TwoInputs().head.weight)
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="do not fit TwoInputs"):
        export_model(
            TwoInputs(), EXAMPLES, device=device, stack=stack, folder=tmp_path / "x", weights=tmp_path / "bad.pth"
        )


class Scaled(nn.Module):
    """The factor is in the code that runs and in no weight."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.head = nn.Linear(6, 3)
        nn.init.ones_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features * self.factor)


def test_changed_code_with_the_same_weights_is_exported_anew(tmp_path: Path) -> None:
    device, stack = device_and_stack("this-machine")
    for factor in (1.0, -2.0):
        made, bundles = export_model(
            Scaled(factor), EXAMPLES[:1], device=device, stack=stack, folder=tmp_path, precisions=("fp32",)
        )
        assert not made.all_reused
        with np.load(bundles[0] / "golden.npz") as golden:
            expected = factor * golden["input_features"].sum(1)
            np.testing.assert_allclose(golden["output"][:, 0], expected, rtol=1e-4)


def test_samples_that_do_not_fit_are_named(tmp_path: Path) -> None:
    device, stack = device_and_stack("this-machine")
    wrong = samples() | {"tokens": np.zeros((64, 9), np.int64)}
    with pytest.raises(InputError, match='samples of "tokens" do not fit'):
        export_model(TwoInputs(), EXAMPLES, device=device, stack=stack, folder=tmp_path, samples=wrong)
