"""Models that edgestill did not define: exported, quantised, checked and measured from the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from cli.pipeline.bench import BenchOptions, bench_file
from profiles import agent
from profiles.artifact import read_manifest
from profiles.device import load_device
from profiles.errors import InputError
from profiles.opening import open_bundle
from profiles.progress import Silent
from profiles.remote_device import made_for_another
from profiles.runtimes.onnxruntime import run_model
from profiles.usercode import load_factory
from tests.cli.cli_runner import Result, edgestill

MODULE = '''
from collections import namedtuple

import torch
from torch import nn


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        gate = self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True))))
        return x * nn.functional.hardsigmoid(gate)


class Block(nn.Module):
    """An inverted residual: expand, depthwise, squeeze and excite, project."""

    def __init__(self, channels, out, stride):
        super().__init__()
        hidden = 3 * channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish(),
            nn.Conv2d(hidden, hidden, 5, stride, 2, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish(),
            SqueezeExcite(hidden), nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out),
        )
        self.same = stride == 1 and channels == out

    def forward(self, x):
        return x + self.layers(x) if self.same else self.layers(x)


Found = namedtuple("Found", "features logits")


class Mobile(nn.Module):
    def __init__(self, width=8, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.Hardswish())
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, image):
        features = self.blocks(self.stem(image)).mean((2, 3))
        return Found(features, self.head(features))


def mobile(width=8):
    torch.manual_seed(0)
    model = Mobile(width)
    model.head.weight.data *= 100  # an untrained head hardly tells samples apart
    return model


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                   max_position_embeddings=32, num_labels=3)
    )


def broken(width):
    raise RuntimeError("no such width")


ready = nn.Linear(4, 2)
'''
IMAGES = ("--example", "image:1x3x24x24")
TOKENS = ("--example", "input_ids:1xlength=12:int64", "--example", "attention_mask:1xlength=12:int64")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "somebodys_models.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", image=rng.standard_normal((64, 3, 24, 24)).astype(np.float32))
    mask = (np.arange(12) < rng.integers(4, 13, (64, 1))).astype(np.int64)
    np.savez(folder / "texts.npz", input_ids=rng.integers(0, 100, (64, 12)), attention_mask=mask)
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)  # a dotted path is looked for where the command is typed
    monkeypatch.setenv("NO_COLOR", "1")


def export(factory: str, out: str, *options: str) -> Result:
    return edgestill("export", "--model", f"somebodys_models:{factory}", "--out", out, *options)


@pytest.fixture(scope="module")
def mobile(place: Path) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        samples = ("--samples", "images.npz", "--batch", "3")
        return export("mobile", "mobile", *IMAGES, *samples, "--kwargs", '{"width": 12}')


@pytest.fixture(scope="module")
def bert(place: Path) -> Result:
    pytest.importorskip("transformers", reason="transformers is not installed (extra transformers)")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return export("bert", "bert", *TOKENS, "--samples", "texts.npz", "--json")


def module(factory: str, place: Path, **kwargs: Any) -> torch.nn.Module:
    made = load_factory(f"somebodys_models:{factory}", base=place, where="", allow_code=True)(**kwargs)
    assert isinstance(made, torch.nn.Module)
    return made.eval()


def test_a_mobile_net_is_exported_quantised_and_told_about(mobile: Result, place: Path) -> None:
    assert mobile.status == 0, mobile.err
    assert 'the output "logits" is exported; --output chooses another: features' in mobile.err
    lines = mobile.out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        "fp32", "fp16", "int8", "bundle", "bundle", "next:",
    ]  # fmt: skip
    assert "refused" in next(line for line in lines if line.startswith("fp16"))  # a CPU has no FP16: preflight's words
    assert "Conv, Gemm and MatMul nodes in ONNX Runtime's optimised graph" in mobile.out
    info = open_bundle(place / "mobile" / "int8").info
    assert info["batch"] == 3
    assert info["facts"]["output"] == "logits"
    images = np.load(place / "images.npz")["image"][:5]
    with torch.no_grad():
        expected = module("mobile", place, width=12)(torch.from_numpy(images)).logits.numpy()
    found = run_model(place / "mobile" / "fp32" / "model.onnx", {"image": images})["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_transformer_is_called_by_keyword_and_keeps_its_dynamic_sizes(bert: Result, place: Path) -> None:
    assert bert.status == 0, bert.err
    assert {entry["name"]: entry["refused"] is None for entry in json.loads(bert.out)["plan"]["candidates"]} == {
        "fp32": True, "fp16": False, "int8": True,
    }  # fmt: skip
    rungs = {entry["name"]: entry["parity"] for entry in json.loads(bert.out)["plan"]["candidates"]}
    for name in ("fp32", "int8"):
        assert (rungs[name][-1]["name"], rungs[name][-1]["passed"]) == (f"{name} at other sizes", True)
    path = place / "bert" / "fp32" / "model.onnx"
    inputs = {entry.name: entry.type.tensor_type.shape.dim for entry in onnx.load(path).graph.input}
    assert {name: [dim.dim_param for dim in dims] for name, dims in inputs.items()} == {
        "input_ids": ["batch", "length"], "attention_mask": ["batch", "length"],
    }  # fmt: skip
    tokens = np.random.default_rng(1).integers(0, 100, (3, 7))
    mask = np.ones_like(tokens)
    mask[1, 4:] = 0
    with torch.no_grad():
        expected = module("bert", place)(torch.from_numpy(tokens), torch.from_numpy(mask)).logits.numpy()
    found = run_model(path, {"input_ids": tokens, "attention_mask": mask})["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_bundle_with_a_dynamic_size_reads_samples_of_another_length(bert: Result, place: Path) -> None:
    assert bert.status == 0
    np.savez(place / "short.npz", input_ids=np.ones((2, 7), np.int64), attention_mask=np.ones((2, 7), np.int64))
    assert len(infer(place / "bert" / "fp32", place / "short.npz")) == 2


def test_samples_that_a_model_of_several_inputs_cannot_take_are_said_in_a_sentence(bert: Result, place: Path) -> None:
    assert bert.status == 0
    bundle = place / "bert" / "fp32"
    assert "infer.py samples.npz" in (bundle / "README.txt").read_text()
    ids, mask = np.ones((2, 7), np.int64), np.ones((2, 7), np.int64)
    for name, arrays, said in (
        ("rows", (ids, mask[:1]), "different numbers of samples"),
        ("range", (ids * 10**6, mask), "the model cannot compute"),
    ):
        path = place / f"{name}.npz"
        np.savez(path, input_ids=arrays[0], attention_mask=arrays[1])
        done = subprocess.run(
            [sys.executable, "infer.py", str(path)], cwd=bundle, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_what_export_made_is_checked_and_measured(bert: Result, place: Path) -> None:
    assert bert.status == 0
    assert edgestill("check", "bert/int8").status == 0
    options = {
        "device": "this-machine", "batch": 2, "threads": 1, "percentile": 50, "latency_ms": None,
        "scope": "end_to_end", "seconds": 0.1, "sweep": False, "strict": False,
    }  # fmt: skip
    graph = place / "bert" / "fp32" / "model.onnx"
    with pytest.raises(InputError, match="dynamic dimension beside the batch") as caught:
        bench_file(graph, BenchOptions.checked(**options, shapes=()), Silent())  # type: ignore[arg-type]
    fix = str(caught.value.fix)
    assert fix == "--shape input_ids:2x64"
    # the sizes of one input settle those of the others
    shapes = (fix.removeprefix("--shape ").replace("64", "20"),)
    measured = bench_file(graph, BenchOptions.checked(**options, shapes=shapes), Silent()).measurement  # type: ignore[arg-type]
    assert (measured.batch, measured.input_source) == (2, "random")


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        ("mobile", (*IMAGES, "--samples", "images.npz")),
        (
            "bert",
            ("--example", "input_ids:1x12:int64", "--example", "attention_mask:1x12:int64", "--samples", "texts.npz"),
        ),
    ],
)
def test_engines_are_built_by_tensorrt_rtx(factory: str, options: tuple[str, ...], place: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra tensorrt-rtx)")
    if factory == "bert":
        pytest.importorskip("transformers", reason="transformers is not installed (extra transformers)")
    precisions = ("--precision", "fp16", "--precision", "int8")
    made = export(factory, f"{factory}-rtx", *options, *precisions, "--device", "rtx-4060-laptop")
    assert made.status == 0, made.err
    for form in ("fp16", "int8-fp16", "int8-fp32"):
        info = open_bundle(place / f"{factory}-rtx" / form).info
        assert info["engine"]["builder"].startswith("TensorRT-RTX 1."), form
        assert info["engine"]["compute_capability"] == "8.9"
        assert [entry["name"] for entry in info["inputs"]] == [text.split(":")[0] for text in options[1:-2:2]]


def test_a_limit_is_judged_on_the_device_that_the_bundle_is_for_alone(mobile: Result, place: Path) -> None:
    assert mobile.status == 0
    shutil.copytree(place / "mobile" / "fp32", place / "for-a-pi")
    manifest = place / "for-a-pi" / "manifest.json"
    assert made_for_another(json.loads(manifest.read_text())["info"]["device"], agent.read()) is None
    content = json.loads(manifest.read_text())
    pi = load_device("raspberry-pi-5")
    content["info"]["device"] |= {"name": pi.name, "title": pi.title}
    manifest.write_text(json.dumps(content))
    found = edgestill("bench", "for-a-pi", "--percentile", "50", "--max-seconds", "0.1", "--latency-ms", "1000")
    assert found.status == 4, found.out + found.err
    assert "limit 1000 ms: INCONCLUSIVE" in found.out
    assert f"the bundle is for {pi.title}" in found.out


def test_another_output_and_one_precision_are_chosen(place: Path) -> None:
    options = ("--output", "features", "--precision", "fp32", "--set", "export.opset=18")
    made = export("mobile", "features", *IMAGES, *options)
    assert made.status == 0, made.err
    assert [path.name for path in sorted((place / "features").iterdir())] == ["export.json", "fp32", "graphs"]
    info = read_manifest(place / "features" / "fp32", "bundle").info
    (output,) = info["outputs"]
    assert (output["name"], output["shape"]) == ("features", ["batch", 16])
    assert info["opset"] == 18
    # nothing says that these are scores of classes, so what runs alone prints them as they are
    assert info["decides"] is False
    assert "same decisions" not in made.out
    images = np.load(place / "images.npz")["image"][:3]
    np.save(place / "three.npy", images)
    printed = infer(place / "features" / "fp32", place / "three.npy")
    with torch.no_grad():
        expected = module("mobile", place)(torch.from_numpy(images)).features.numpy()
    np.testing.assert_allclose([json.loads(line) for line in printed], expected, atol=1e-5)


def test_what_is_called_logits_or_has_labels_is_printed_as_classes(mobile: Result, place: Path) -> None:
    assert mobile.status == 0
    np.save(place / "one.npy", np.load(place / "images.npz")["image"][:1])
    assert infer(place / "mobile" / "fp32", place / "one.npy")[0].count("%") == 3
    options = ("--example", "1x4", "--precision", "fp32", "--labels", "labels.txt")
    (place / "labels.txt").write_text("cat\ndog\n")
    assert export("ready", "labelled", *options).status == 0
    np.save(place / "zeros.npy", np.zeros((2, 4), np.float32))
    lines = infer(place / "labelled" / "fp32", place / "zeros.npy")
    assert all({"cat", "dog"} < set(line.split()) for line in lines)
    (place / "labels.txt").write_text("cat\ndog\nfish\n")
    refused = export("ready", "never", *options)
    assert refused.status == 2
    assert "it has 2 values" in refused.err


def infer(bundle: Path, samples: Path) -> list[str]:
    """What the stand-alone script prints."""
    command = [sys.executable, str(bundle / "infer.py"), str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("factory", "options", "said"),
    [
        ("mobile", (*IMAGES, "--output", "logit"), 'did you mean "logits"'),
        ("mobile", ("--example", "image:1x4x24x24"), "the model does not run on the example inputs"),
        ("ready", ("--example", "1x9"), "where: --example 1x9 "),
        ("mobile", (*IMAGES, "--precision", "int8"), "real samples"),
        ("mobile", (*IMAGES, "--precision", "fp16"), "ONNX Runtime computes FP16 graphs in FP32"),
        ("mobile", (*IMAGES, "--precision", "fp4"), "no export for FP4"),
        ("bert", (*TOKENS[:2], "--example", "atention_mask:1x12:int64"), 'did you mean "attention_mask"'),
        ("bert", (*TOKENS, "--device", "rtx-4060-laptop"), "engines, which are built for fixed sizes"),
        ("broken", (*IMAGES, "--kwargs", '{"width": 1}'), "RuntimeError: no such width"),
        ("broken", IMAGES, "does not take these arguments"),
        ("mobil", IMAGES, 'did you mean "mobile"'),
        ("mobile", (*IMAGES, "--set", "train.epochs=1"), "without a recipe only [export] has keys to change"),
        ("mobile", (*IMAGES, "--set", "export.opst=17"), 'did you mean "opset"'),
        ("mobile", (*IMAGES, "--set", "export.opset=seventeen"), "--set, export.opset"),
        ("mobile", (*IMAGES, "--set", "export.qat=auto"), "a model from elsewhere is not trained here"),
        ("mobile", (*IMAGES, "--set", "export.opset"), "is not KEY=VALUE"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(factory: str, options: tuple[str, ...], said: str) -> None:
    result = export(factory, "never", *options)
    assert result.status in (1, 2)
    assert said in " ".join(result.err.split()), result.err
    assert "Traceback" not in result.err


def test_options_of_own_models_are_refused_for_runs() -> None:
    result = edgestill("export", "runs/x", "--precision", "fp32")
    assert result.status == 2
    assert "--model package.module:factory" in result.err


def test_only_a_path_out_of_a_recipe_needs_the_users_word(place: Path) -> None:
    typed = export("ready", "ready", "--example", "1x4", "--precision", "fp32")  # a module, no factory
    assert typed.status == 0, typed.err
    np.savez(place / "data.npz", images=np.zeros((40, 8, 8), np.uint8), labels=np.arange(40) % 4)
    (place / "recipe.toml").write_text(
        'name = "r"\nobjective = "supervised"\n[data]\nsource = "npz"\npath = "data.npz"\n'
        '[student]\nkind = "torch"\nfactory = "somebodys_models:mobile"\n'
        '[[target]]\nname = "here"\ndevice = "this-machine"\n'
    )
    asked = edgestill("distill", "recipe.toml", "--out", "run")
    assert asked.status == 2
    assert "--allow-code" in asked.err
