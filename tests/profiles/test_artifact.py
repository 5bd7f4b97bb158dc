"""Artefacts are whole or absent, keyed, verified; disks that are full or closed are explained."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles import artifact
from profiles.errors import EdgestillError, InputError
from profiles.section import Section

KIND = "teacher cache"


def make(folder: Path, text: str = "hello", key: str = "k1") -> None:
    with artifact.create(folder, KIND, key, info={"rows": 3}) as place:
        (place / "sub").mkdir()
        (place / "sub" / "data.txt").write_text(text)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_finished_artifact_has_a_manifest_with_hashes_versions_and_info(tmp_path: Path) -> None:
    make(tmp_path / "cache")
    manifest = artifact.verify(tmp_path / "cache", KIND)
    assert manifest.key == "k1"
    assert manifest.info == {"rows": 3}
    assert set(manifest.files) == {"sub/data.txt"}
    assert "numpy" in manifest.versions
    assert leftovers(tmp_path) == []


def test_info_may_be_filled_until_the_block_ends(tmp_path: Path) -> None:
    info: dict[str, int] = {}
    with artifact.create(tmp_path / "cache", KIND, "k", info=info):
        info["epochs"] = 4
    assert artifact.read_manifest(tmp_path / "cache", KIND).info == {"epochs": 4}


def test_parents_are_made(tmp_path: Path) -> None:
    make(tmp_path / "runs" / "a" / "cache")
    assert artifact.current(tmp_path / "runs" / "a" / "cache", KIND, "k1") is not None


def test_artifact_of_another_key_kind_or_with_a_missing_file_is_not_current(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert artifact.current(folder, KIND, "k1") is None
    make(folder)
    assert artifact.current(folder, KIND, "k1") is not None
    assert artifact.current(folder, KIND, "k2") is None
    assert artifact.current(folder, "data", "k1") is None
    (folder / "sub" / "data.txt").unlink()
    assert artifact.current(folder, KIND, "k1") is None


def test_new_artifact_replaces_the_old_one_whole(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    make(folder, "old", "k1")
    (folder / "stray.txt").write_text("of the old one")
    make(folder, "new", "k2")
    assert (folder / "sub" / "data.txt").read_text() == "new"
    assert not (folder / "stray.txt").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("training crashed"), KeyboardInterrupt()])
def test_old_content_is_kept_when_the_work_fails(tmp_path: Path, error: BaseException) -> None:
    folder = tmp_path / "cache"
    make(folder, "old", "k1")

    def fail() -> None:
        with artifact.create(folder, KIND, "k2") as place:
            (place / "half.txt").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert artifact.verify(folder, KIND).key == "k1"
    assert leftovers(tmp_path) == []


def test_nothing_is_left_when_the_first_write_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with artifact.create(tmp_path / "cache", KIND, "k") as place:
            (place / "half.txt").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_disk_that_fills_up_while_writing_is_explained_and_the_old_artifact_stays(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    make(folder, "old", "k1")
    with (
        pytest.raises(EdgestillError, match="the disk is full") as caught,
        artifact.create(folder, KIND, "k2"),
        Path("/dev/full").open("w") as file,
    ):
        file.write("x" * 100_000)
    assert caught.value.exit_status == 1
    assert str(folder) in str(caught.value.where)
    assert "same command" in str(caught.value.fix)
    assert artifact.verify(folder, KIND).key == "k1"
    assert leftovers(tmp_path) == []


def test_disk_that_is_full_when_the_artifact_is_synced_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make(tmp_path / "cache", "old", "k1")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(EdgestillError, match="the disk is full"):
            make(tmp_path / "cache", "new", "k2")
    assert artifact.verify(tmp_path / "cache", KIND).key == "k1"
    assert leftovers(tmp_path) == []


def test_old_artifact_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    make(folder, "old", "k1")
    rename = Path.rename
    calls = []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(artifact, "exchange", lambda new, final: False)  # as on other systems than Linux
        patched.setattr(Path, "rename", second_fails)
        with pytest.raises(EdgestillError, match="cannot write"):
            make(folder, "new", "k2")
    assert artifact.verify(folder, KIND).key == "k1"
    assert leftovers(tmp_path) == []


def test_folder_below_a_file_cannot_be_written_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(EdgestillError, match="cannot write to") as caught:
        make(tmp_path / "runs" / "cache")
    assert "--out" in str(caught.value.fix)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs Linux' /sys, which nobody can write to")
def test_unwritable_folder_is_explained_even_for_root() -> None:
    with pytest.raises(EdgestillError, match="cannot write to") as caught:
        make(Path("/sys/kernel/edgestill-test/cache"))
    assert caught.value.exit_status == 1


def test_other_os_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), artifact.create(tmp_path / "cache", KIND, "k"):
        (tmp_path / "missing").read_text()


def test_missing_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no teacher cache in"):
        artifact.read_manifest(tmp_path / "cache", KIND)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"kind": "teacher cache"}', "\x00\x01"])
def test_damaged_manifest_is_refused_and_the_artifact_is_made_anew(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "cache"
    make(folder)
    (folder / artifact.MANIFEST).write_text(damage)
    with pytest.raises(InputError, match="damaged manifest") as caught:
        artifact.read_manifest(folder, KIND)
    assert "made anew" in str(caught.value.fix)
    assert artifact.current(folder, KIND, "k1") is None
    make(folder)
    assert artifact.verify(folder, KIND).key == "k1"


def test_manifest_that_is_not_text_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "cache")
    (tmp_path / "cache" / artifact.MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="damaged manifest"):
        artifact.read_manifest(tmp_path / "cache", KIND)


def test_manifest_of_a_newer_edgestill_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache" / artifact.MANIFEST
    make(tmp_path / "cache")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(InputError, match="newer edgestill"):
        artifact.read_manifest(tmp_path / "cache", KIND)


def test_artifact_of_another_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "cache")
    with pytest.raises(InputError, match="holds a teacher cache, not a student"):
        artifact.read_manifest(tmp_path / "cache", "student")


def test_changed_and_missing_files_are_found(tmp_path: Path) -> None:
    make(tmp_path / "cache")
    data = tmp_path / "cache" / "sub" / "data.txt"
    data.write_text("hellO")
    with pytest.raises(InputError, match=r"data\.txt changed after it was written"):
        artifact.verify(tmp_path / "cache", KIND)
    data.unlink()
    with pytest.raises(InputError, match=r"data\.txt is missing"):
        artifact.verify(tmp_path / "cache", KIND)


def test_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    artifact.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        artifact.write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.toml"]
    assert path.stat().st_mode & 0o777 == 0o644


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_key_is_stable_and_ignores_the_order_of_keys(value: object) -> None:
    assert artifact.content_key(value) == artifact.content_key(value)
    assert artifact.content_key({"a": value, "b": 1}) == artifact.content_key({"b": 1, "a": value})
    assert artifact.content_key(value) != artifact.content_key(value, None)
    assert artifact.content_key([value]) != artifact.content_key(value)


def test_key_tells_arrays_sections_and_paths_apart() -> None:
    class Part(Section):
        epochs: int

    zeros = np.zeros((2, 3), dtype=np.float32)
    keys = [
        artifact.content_key(part)
        for part in (
            zeros,
            zeros.reshape(3, 2),
            zeros.astype(np.float64),
            zeros + 1,
            Part(epochs=1),
            Part(epochs=2),
            Path("a"),
            1,
            "1",
        )
    ]
    assert len(set(keys)) == len(keys)
    assert artifact.content_key(zeros.T) == artifact.content_key(np.ascontiguousarray(zeros.T))
    with pytest.raises(TypeError):
        artifact.content_key(object())
