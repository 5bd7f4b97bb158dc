from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import export
from distill.data.text import encode, train_tokenizer
from export import Plan, parity, plan, write_bundle
from profiles import engine_check
from profiles.artifact import file_hash, verify
from profiles.errors import InputError
from tests.export.conftest import IMAGES, device_and_stack, score
from tests.export.models import TinyText

LABELS = ("first", "second", "third", "fourth")
WHEELS = Path(os.environ.get("EDGESTILL_TEST_WHEELS", Path(__file__).parents[2] / ".wheels"))


def bundle_of(plan: Plan, name: str, folder: Path, **options: Any) -> Path:
    device, stack = device_and_stack(plan.device, plan.stack)
    given = {
        "name": "line3",
        "device": device,
        "stack": stack,
        "golden": IMAGES[:1],
        "labels": LABELS,
        "preprocessing": {"kind": "image", "resize": "stretch", "color": "grey"},
        "licence": "MIT",
    }
    return write_bundle(folder, plan, plan[name], **given | options)


def run_infer(
    folder: Path, *arguments: str, python: str = sys.executable, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`path`: a folder whose modules come before the installed ones."""
    return subprocess.run(
        [python, str(folder / "infer.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        check=False,
        env=os.environ | ({"PYTHONPATH": str(path)} if path is not None else {}),
    )


@pytest.fixture(scope="module")
def cpu_bundle(cpu_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "line3"
    return bundle_of(cpu_plan, "int8", folder, metric=score(cpu_plan["int8"].to_score or Path()))


def test_bundle_says_everything_a_device_owner_asks(cpu_bundle: Path) -> None:
    manifest = verify(cpu_bundle, "bundle")
    assert {"model.onnx", "golden.npz", "labels.txt", "infer.py", "README.txt"} <= set(manifest.files)
    info = manifest.info
    assert info["inputs"] == [{"name": "image", "dtype": "uint8", "shape": ["batch", 1, 16, 16]}]
    assert info["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", 4]}]
    assert info["precision"] == "int8"
    assert info["metric"]["value"] > 0.9
    assert info["parity"][0]["difference"]["n"] > 0
    assert info["preprocessing"]["resize"] == "stretch"
    assert info["stack"]["runtime"] == "onnxruntime"
    assert info["calibration_sha256"]
    assert info["licence"] == "MIT"


def test_selftest_passes_and_fails_when_the_model_changed(cpu_bundle: Path, cpu_plan: Plan, tmp_path: Path) -> None:
    passed = run_infer(cpu_bundle, "--selftest")
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert passed.stdout.startswith("PASS: largest difference")
    broken = bundle_of(cpu_plan, "fp32", tmp_path / "broken")
    with np.load(broken / "golden.npz") as golden:
        arrays = dict(golden)
    np.savez(broken / "golden.npz", **{**arrays, "output": arrays["output"] + 1})
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["files"]["golden.npz"] = file_hash(broken / "golden.npz")
    (broken / "manifest.json").write_text(json.dumps(manifest))
    failed = run_infer(broken, "--selftest")
    assert failed.returncode == 1
    assert failed.stdout.startswith("FAIL")


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz"])
def test_infer_refuses_a_file_with_a_flipped_byte(cpu_bundle: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(cpu_bundle, folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    found = run_infer(folder, "--selftest")
    assert found.returncode == 1
    assert f"{name} is not the file that manifest.json describes" in found.stderr
    assert len(found.stderr.splitlines()) == 1, found.stderr
    (folder / name).unlink()
    assert f"{name} cannot be read" in run_infer(folder, "--selftest").stderr


def test_infer_prints_classes_of_arrays_and_images(cpu_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    np.save(tmp_path / "two.npy", IMAGES[:2])
    found = run_infer(cpu_bundle, str(tmp_path / "two.npy"), "--top", "2")
    lines = found.stdout.splitlines()
    assert len(lines) == 2, found.stderr
    assert all(line.split()[0] in LABELS and line.count("%") == 2 for line in lines)
    Image.fromarray(IMAGES[0, 0]).save(tmp_path / "one.png")
    image = run_infer(cpu_bundle, str(tmp_path / "one.png"), "--top", "2")
    assert image.stdout.splitlines() == lines[:1]


def test_classes_that_do_not_exclude_each_other_have_a_share_each(cpu_plan: Plan, tmp_path: Path) -> None:
    folder = bundle_of(cpu_plan, "fp32", tmp_path / "several", exclusive=False)
    np.save(tmp_path / "one.npy", IMAGES[:1])
    words = run_infer(folder, str(tmp_path / "one.npy"), "--top", "4").stdout.split()
    shares = {name: float(share.rstrip("%")) / 100 for name, share in zip(words[::2], words[1::2], strict=True)}
    logits = parity.run_session(parity.open_session(folder / "model.onnx"), {"image": IMAGES[:1]}, 1)[0]
    np.testing.assert_allclose([shares[name] for name in LABELS], 1 / (1 + np.exp(-logits)), atol=1e-3)


def test_wrong_shape_is_said_and_not_a_traceback(cpu_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "wrong.npy", np.zeros((1, 1, 8, 8), np.uint8))
    found = run_infer(cpu_bundle, str(tmp_path / "wrong.npy"))
    assert found.returncode == 1
    assert "the model takes" in found.stderr
    assert "Traceback" not in found.stderr


def test_unknown_missing_and_damaged_files_are_said_in_a_sentence(cpu_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    np.save(tmp_path / "words.npy", np.full((1, 1, 16, 16), "a"))
    for name in ("notes.txt", "missing.png", "empty.npy", "cut.npz", "words.npy"):
        found = run_infer(cpu_bundle, str(tmp_path / name))
        assert found.returncode == 1, name
        assert name in found.stderr
        assert len(found.stderr.splitlines()) == 1, found.stderr


TEXTS = ["One small step", "b a b a b a b a b a b a b a b a", "", "unheard words"]


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[Any]]:
    """A bundle of a text model, and the tokens that the data room makes of TEXTS."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = train_tokenizer(["a b a b", "one small step", "one a step b small"] * 4, 50)
    tokens = encode(tokenizer, TEXTS, 12)
    tokenizer.enable_padding(length=12, pad_id=0, pad_token="[PAD]")
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    device, stack = device_and_stack("this-machine")
    made = plan(
        TinyText().eval(),
        held_out=tokens,
        calibration=None,
        stack=stack,
        device=device,
        folder=folder / "graphs",
        model_key="text",
        input_name="tokens",
        precisions=("fp32",),
    )
    return write_bundle(
        folder / "bundle",
        made,
        made["fp32"],
        name="texts",
        device=device,
        stack=stack,
        golden=tokens[:1],
        preprocessing={"kind": "tokens", "length": 12, "pad_id": 0, "vocabulary": 50},
        tokenizer=folder / "tokenizer.json",
    ), tokens


def test_texts_become_the_tokens_of_the_training_data(text_bundle: tuple[Path, NDArray[Any]], tmp_path: Path) -> None:
    folder, tokens = text_bundle
    assert json.loads((folder / "manifest.json").read_text())["info"]["preprocessing"]["in_graph"].startswith("nothing")
    assert "texts.txt" in (folder / "README.txt").read_text()
    (tmp_path / "some.txt").write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    np.save(tmp_path / "some.npy", tokens)
    texts, ids = (run_infer(folder, str(tmp_path / name)) for name in ("some.txt", "some.npy"))
    assert texts.returncode == 0, texts.stderr
    assert texts.stdout == ids.stdout
    assert len(set(texts.stdout.splitlines())) == len(TEXTS)


def test_what_a_text_bundle_cannot_read_is_said_in_a_sentence(
    text_bundle: tuple[Path, NDArray[Any]], tmp_path: Path
) -> None:
    folder, tokens = text_bundle
    (tmp_path / "some.txt").write_text("one step\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "photo.jpg").touch()
    np.save(tmp_path / "beyond.npy", tokens + 50)
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "tokenizers.py").write_text("raise ImportError")
    for name, path, message in (
        ("some.txt", tmp_path / "without", "pip install tokenizers"),
        ("empty.txt", None, "holds no text"),
        ("photo.jpg", None, "texts as .txt"),
        ("beyond.npy", None, "token ids outside 0 to 49"),
    ):
        found = run_infer(folder, str(tmp_path / name), path=path)
        assert found.returncode == 1
        assert message in found.stderr
        assert len(found.stderr.splitlines()) == 1, found.stderr


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8-fp16", "int8-fp32"])
def test_tensorrt_bundles_pass_their_selftest_in_onnxruntime(rtx_plan: Plan, tmp_path: Path, name: str) -> None:
    folder = bundle_of(rtx_plan, name, tmp_path / "bundle")
    info = json.loads((folder / "manifest.json").read_text())["info"]
    assert info["engine"]["compute_capability"] == "8.9"
    assert info["engine"]["builder"].startswith("TensorRT-RTX 1.")
    assert (folder / info["engine"]["file"]).is_file()
    assert (folder / info["static_engine"]["file"]).is_file()
    found = run_infer(folder, "--selftest", "--runtime", "onnxruntime")
    assert found.returncode == 0, found.stdout + found.stderr


def infer_on(gpu: dict[str, Any] | None, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The bundle's selftest, with that in place of the GPU that this machine has."""
    code = f"engine_check.this_gpu = lambda: {gpu!r}; runpy.run_path('infer.py', None, '__main__')"
    return subprocess.run(
        [sys.executable, "-c", f"import engine_check, runpy; {code}", "--selftest", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=folder,
    )


HERE = {"device": "NVIDIA GeForce RTX 4060 Laptop GPU", "compute_capability": "8.9", "memory_mib": 8188}


@pytest.mark.parametrize(
    ("gpu", "change", "message"),
    [
        (None, {}, "an engine needs an NVIDIA GPU with its driver"),
        (HERE | {"compute_capability": "8.6"}, {}, "built for compute capability 8.9, this GPU has 8.6"),
        (HERE, {"builder": "TensorRT-RTX 1.6.0.3"}, "1.6.0.3 and runs on that version only; here is TensorRT-RTX 1."),
        (HERE, {"builder": "TensorRT 10.3.0"}, "built by TensorRT 10.3.0; here is TensorRT-RTX"),
        (HERE, {"sha256": "0" * 64}, "not the file that its manifest describes"),
        (HERE, {"version_compatible": True}, "brings its own runtime, code that would run here"),
    ],
)
def test_infer_refuses_an_engine_that_does_not_belong_here(
    rtx_plan: Plan, tmp_path: Path, gpu: dict[str, Any] | None, change: dict[str, str], message: str
) -> None:
    folder = bundle_of(rtx_plan, "fp16", tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["info"]["engine"].update(change)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = infer_on(gpu, folder, "--runtime", "tensorrt")
    assert found.returncode == 1
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1, found.stderr


def test_tensorrt_bundles_build_their_engine_on_the_device(rtx_plan: Plan, tmp_path: Path) -> None:
    device, stack = device_and_stack("jetson-orin-nano")
    folder = bundle_of(rtx_plan, "fp16", tmp_path / "bundle", device=device, stack=stack)
    script = (folder / "build_engine.sh").read_text()
    assert "MADE_FOR=10.3.0" in script
    assert "--optShapes=image:4x1x16x16" in script
    assert "WORKSPACE=2048" in script
    assert "sh build_engine.sh" in (folder / "README.txt").read_text()
    engine = folder / "model.engine"
    engine.write_bytes(bytes([engine.read_bytes()[0] ^ 1]) + engine.read_bytes()[1:])
    assert "model.engine is not the file that manifest.json describes" in infer_on(HERE, folder).stderr
    # what the script leaves beside an engine is what infer.py goes by
    facts = {"builder": "TensorRT 10.3.0", "compute_capability": "8.7", "device": "Orin"}
    (folder / "other.engine").write_bytes(b"plan")
    (folder / "other.engine.json").write_text(json.dumps(facts))
    found = infer_on(HERE, folder, "--engine", "other.engine")
    assert "built by TensorRT 10.3.0; here is TensorRT-RTX" in found.stderr


def test_same_content_is_not_written_again(cpu_plan: Plan, tmp_path: Path) -> None:
    folder = bundle_of(cpu_plan, "fp32", tmp_path / "bundle")
    before = (folder / "manifest.json").stat().st_mtime_ns
    bundle_of(cpu_plan, "fp32", tmp_path / "bundle")
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_refused_candidate_cannot_be_bundled(cpu_plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp16 cannot be bundled"):
        bundle_of(cpu_plan, "fp16", tmp_path / "bundle")


@pytest.mark.parametrize(
    "template",
    [Path(export.__file__).parent / "infer_template.py", Path(engine_check.__file__)],
    ids=lambda path: path.stem,
)
def test_what_runs_on_the_device_is_python_3_6(template: Path) -> None:
    ast.parse(template.read_text(encoding="utf-8"), feature_version=(3, 6))
    pytest.importorskip("vermin", reason="vermin is not installed (extra dev)")
    command = ["-c", "import sys, vermin; sys.exit(vermin.main())", "--target=3.6-", "--no-tips", str(template)]
    found = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.slow
def test_selftest_passes_in_a_bare_environment(cpu_bundle: Path, tmp_path: Path) -> None:
    """NumPy and ONNX Runtime alone, from wheels that the install step fetched."""
    if not any(WHEELS.glob("onnxruntime-*.whl")):
        pytest.skip(f"no wheels in {WHEELS}: pip download -d {WHEELS.name} numpy onnxruntime")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-index", "--find-links", WHEELS, "numpy", "onnxruntime"],
        check=True,
        timeout=240,
        env=clean,
    )
    found = run_infer(cpu_bundle, "--selftest", python=str(python))
    assert found.returncode == 0, found.stdout + found.stderr
    assert "onnxruntime" in found.stdout
