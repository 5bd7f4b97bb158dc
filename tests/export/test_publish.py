"""An export's folder holds what the last good export made, and what others put there."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import pytest

from export import publish
from export.publish import RECORD, made_before, publishing
from profiles.artifact import create
from profiles.errors import EdgestillError, InputError


def export(folder: Path, names: Sequence[str], content: str) -> None:
    with publishing(folder) as new:
        for name in names:
            with create(new / name, "bundle", content) as temporary:
                (temporary / "model.onnx").write_text(content)


def state(folder: Path) -> dict[str, str]:
    """Every file's content, the manifests and the record aside."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", RECORD)
    }


def test_the_second_export_leaves_nothing_of_the_first_and_everything_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(folder, ("graphs", "fp32", "int8"), "first")
    (folder / "notes.txt").write_text("mine")
    (folder / "int8" / "measured.csv").write_text("mine")
    (folder / "fp32" / "labels.txt").write_text("mine")
    (folder / "int8" / "model.engine.json").write_text("of build_engine.sh")
    with create(folder / "other", "bundle", "k") as temporary:
        (temporary / "model.onnx").write_text("copied here")
    export(folder, ("graphs", "fp32"), "second")
    assert state(folder) == {
        "fp32/labels.txt": "mine",
        "fp32/model.onnx": "second",
        "graphs/model.onnx": "second",
        "int8/measured.csv": "mine",
        "notes.txt": "mine",
        "other/model.onnx": "copied here",
    }
    assert made_before(folder) == ["fp32", "graphs"]
    assert not list(folder.glob(".*"))


def test_what_a_new_bundle_brings_too_is_kept_under_another_name(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(folder, ("fp32",), "first")
    (folder / "fp32" / "labels.txt").write_text("mine")
    with publishing(folder) as new, create(new / "fp32", "bundle", "b") as temporary:
        (temporary / "labels.txt").write_text("shipped")
    assert state(folder) == {"fp32/labels.txt": "shipped", "fp32/labels.txt.kept": "mine"}


def test_a_failed_export_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), publishing(folder):
        raise ZeroDivisionError
    assert not folder.exists()
    export(folder, ("fp32", "int8"), "first")
    before = state(folder)
    with pytest.raises(TypeError):
        export(folder, ("fp32", None), "second")  # type: ignore[arg-type]
    assert state(folder) == before

    # the disk fills up when everything is in its place but the record
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for swaps in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(publish, "write_text", full)
            if not swaps:
                patch.setattr(publish, "exchange", lambda new, final: False)  # as on other systems than Linux
            with pytest.raises(EdgestillError, match="the disk is full"):
                export(folder, ("bf16", "fp32"), "second")
        assert state(folder) == before
        assert made_before(folder) == ["fp32", "int8"]
        assert not list(folder.glob(".*"))


def test_a_folder_of_others_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "fp32").mkdir()
    (tmp_path / "fp32" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="fp32 is in the way"):
        export(tmp_path, ("fp32",), "first")
    assert state(tmp_path) == {"fp32/thesis.txt": "mine"}
