from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from export.device_build import DIALECTS, SCRIPT, build_script, weak_precision
from export.inspection import parse_inspection, parse_times
from export.tensorrt import profiles_of
from profiles.engine_check import changed, mismatch
from tests.export import trtexec

SHELL = shutil.which("dash") or shutil.which("sh")
pytestmark = pytest.mark.skipif(SHELL is None, reason="needs a POSIX shell")
IMAGE = {"name": "image", "dtype": "uint8", "shape": ["batch", 3, 32, 32]}


def bundle(folder: Path, **options: Any) -> Path:
    """A folder with the script and a graph that nothing reads."""
    given: dict[str, Any] = {
        "model": "model.onnx",
        "inputs": [IMAGE],
        "form": "fp32",
        "rtx": False,
        "stack_version": "10.3.0",
        "profiles": profiles_of(4),
        "engines": ("model.engine", "model-batch1.engine"),
        "workspace_mib": 2048,
    }
    folder.mkdir(exist_ok=True)
    (folder / SCRIPT).write_text(build_script(**given | options), encoding="utf-8")
    (folder / "model.onnx").write_bytes(b"")
    return folder


def run(folder: Path, version: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with a stand-in trtexec of that version in PATH; None: without any."""
    programs = folder / "bin with space"
    programs.mkdir(exist_ok=True)
    if version is not None:
        program = programs / ("tensorrt_rtx" if version == "rtx" else "trtexec")
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{trtexec.__file__}" {version} "$@"\n')
        program.chmod(0o755)
    return subprocess.run(
        [str(SHELL), str(folder / SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
    )


def commands(found: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in found.stdout.splitlines() if "--onnx" in line or "--loadEngine" in line]


@pytest.mark.parametrize(
    ("version", "form"),
    [("8502", "fp32"), ("110401", "fp32"), *((name, "int8-fp16") for name in trtexec.FLAGS if name != "rtx")],
)
def test_every_version_gets_flags_that_it_has(tmp_path: Path, version: str, form: str) -> None:
    folder = bundle(tmp_path / "bundle", form=form)
    found = run(folder, version, "--layer-times")
    assert found.returncode == 0, found.stdout + found.stderr
    dynamic, static, timed = commands(found)
    old, weak = version in ("8201",), version.startswith("8")
    assert ("--workspace=2048" in dynamic) == old
    assert ("--memPoolSize=workspace:2048" in dynamic) == (not old)
    assert ("--stronglyTyped" in dynamic) == version.startswith("10")
    assert ("--int8 --fp16" in dynamic) == (weak and form == "int8-fp16")
    assert "--minShapes=image:1x3x32x32 --optShapes=image:4x3x32x32 --maxShapes=image:4x3x32x32" in dynamic
    assert ("--profile=1 --minShapes=image:1x3x32x32" in dynamic) == (not weak)
    assert "--maxShapes=image:1x3x32x32" in static
    assert "--shapes=image:4x3x32x32" in timed
    assert (folder / "timing.cache").is_file()
    parse_inspection((folder / "model.engine.layers.json").read_text(), "trtexec")
    parse_times((folder / "model.engine.times.json").read_text(), "trtexec")


def test_what_was_built_is_told_beside_it(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "bundle")
    assert run(folder, "100300").returncode == 0
    for name in ("model.engine", "model-batch1.engine"):
        built = json.loads((folder / f"{name}.json").read_text())
        assert built["builder"] == "TensorRT 10.3.0"
        assert built["compute_capability"] == "8.7"
        assert built["device"] == "Orin"
        assert changed(str(folder / name), built["sha256"]) is None
        orin = {"runtime": "TensorRT", "version": "10.3.0", "compute_capability": "8.7", "device": "Orin"}
        assert mismatch(built, orin) is None
        assert "8.6.1" in str(mismatch(built, orin | {"version": "8.6.1"}))
    assert built["batch"] == [1, 1, 1]
    assert not list(folder.glob("*.new"))


def test_one_batch_is_one_engine(tmp_path: Path) -> None:
    found = run(bundle(tmp_path / "bundle", profiles=profiles_of(1)), "110401", "--dry-run")
    assert len(commands(found)) == 1
    assert "--profile" not in found.stdout.replace("--profilingVerbosity", "")
    assert not (tmp_path / "bundle" / "model.engine").exists()


def test_graph_without_a_dynamic_batch_gets_no_shapes(tmp_path: Path) -> None:
    fixed = {"name": "x", "dtype": "float32", "shape": [1, 8]}
    found = run(bundle(tmp_path / "bundle", inputs=[fixed], profiles=profiles_of(4)), "100300", "--dry-run")
    assert found.returncode == 0
    assert "Shapes" not in found.stdout


def test_names_that_a_shell_would_read_stay_names(tmp_path: Path) -> None:
    odd = {"name": "a b'$(touch gone)\"", "dtype": "float32", "shape": ["batch", 8]}
    folder = bundle(tmp_path / "bundle", inputs=[odd])
    found = run(folder, "100300")
    assert found.returncode == 0, found.stderr
    assert "--minShapes=a b'$(touch gone)\":1x8" in found.stdout
    assert not (folder / "gone").exists()


def test_rtx_program_gets_none_of_the_flags(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "bundle", rtx=True, stack_version="1.7.1", form="fp16")
    found = run(folder, "rtx")
    assert found.returncode == 0, found.stdout + found.stderr
    assert json.loads((folder / "model.engine.json").read_text())["hardware_compatibility"] == "ampere+"


def test_compatible_plans_are_built_where_there_are_any(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"version_compatible": True, "hardware_compatibility": "ampere+"}
    folder = bundle(tmp_path / "bundle", **asked)
    for version in ("8601", "100300", "110401"):
        found = run(folder, version, "--dry-run")
        assert "--versionCompatible --hardwareCompatibilityLevel=ampere+" in found.stdout, found.stderr
    found = run(folder, "8502", "--dry-run")
    assert found.returncode == 1
    assert "TensorRT 8.5.2 builds none" in found.stderr


@pytest.mark.parametrize(
    ("version", "arguments", "message"),
    [
        (None, (), "trtexec was found neither in PATH nor in /usr/src/tensorrt/bin"),
        ("100300", ("--precision", "int8"), "--precision is for TensorRT 8"),
        ("8201", ("--precision", "int4"), "no precision int4"),
        ("100300", ("--precision", "fp16"), "here the graph decides"),
        ("100300", ("--fast",), "no option --fast"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    tmp_path: Path, version: str | None, arguments: tuple[str, ...], message: str
) -> None:
    if version is None and (shutil.which("trtexec") or Path("/usr/src/tensorrt/bin/trtexec").exists()):
        pytest.skip("trtexec is installed here")
    found = run(bundle(tmp_path / "bundle"), version, *arguments)
    assert found.returncode == 1
    assert message in found.stderr
    assert len(found.stderr.splitlines()) == 1, found.stderr


def test_tensorrt_8_takes_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "bundle", stack_version="8.5.2")
    found = run(folder, "8502", "--precision", "fp16")
    assert "--fp16" in commands(found)[0], found.stderr
    assert json.loads((folder / "model.engine.json").read_text())["precision"] == "fp16"
    found = run(folder, "8502", "--precision", "int8")
    assert found.returncode == 1
    assert "holds no INT8 ranges" in found.stderr


def test_graph_made_for_another_major_version_is_told(tmp_path: Path) -> None:
    found = run(bundle(tmp_path / "bundle"), "8502", "--dry-run")
    assert found.returncode == 0
    assert "made for TensorRT 10.3.0; here is 8.5.2" in found.stderr


def test_failed_build_leaves_the_last_engine_and_says_why(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "bundle")
    (folder / "model.engine").write_text("the last good one")
    programs = folder / "bin with space"
    programs.mkdir()
    refusing = '#!/bin/sh\necho "[TensorRT v8601]"\n[ "$1" = --help ] || { echo "x [E] no such layer"; exit 1; }\n'
    (programs / "trtexec").write_text(refusing)
    (programs / "trtexec").chmod(0o755)
    found = subprocess.run(
        [str(SHELL), str(folder / SCRIPT)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
    )
    assert found.returncode == 1
    assert "no such layer" in found.stderr
    assert "could not build model.engine" in found.stderr
    assert (folder / "model.engine").read_text() == "the last good one"


def test_script_parses_and_helps(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "bundle")
    assert subprocess.run([str(SHELL), "-n", str(folder / SCRIPT)], check=False).returncode == 0
    found = run(folder, None, "--help")
    assert found.returncode == 0
    assert "--layer-times" in found.stdout


def test_table_is_in_order() -> None:
    versions = [tuple(int(part) for part in entry.since.split(".")) for entry in DIALECTS]
    assert versions == sorted(versions)


def test_precision_of_a_graph_in_the_words_of_tensorrt_8() -> None:
    forms = ("fp32", "fp16", "int8-fp16", "int8-fp32", "int8-mixed", "bf16")
    assert [weak_precision(form) for form in forms] == ["fp32", "fp16", "int8+fp16", "int8", "int8+fp16", "fp32"]
