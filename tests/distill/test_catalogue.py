"""The catalogue of data sets, and fetching from it."""

import hashlib

import huggingface_hub.constants
import numpy as np
import pytest

from distill.data import catalogue, load_dataset
from distill.data.arrays import read_idx
from distill.data.make_fashion_mnist_small import DEBIAN_FOLDER, PACKAGED
from distill.data.section import DataSection
from profiles.errors import EdgestillError, InputError

needs_debian = pytest.mark.skipif(
    not DEBIAN_FOLDER.is_dir(), reason="needs Fashion-MNIST: apt-get install dataset-fashion-mnist (Debian, Ubuntu)"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "cache"))


def test_every_entry_tells_licence_size_task_and_citation():
    names = [entry.name for entry in catalogue.list_catalogue()]
    assert names == ["fashion-mnist-small", "fashion-mnist", "movie-snippets"]
    for entry in catalogue.list_catalogue():
        assert entry.licence
        assert entry.citation
        assert entry.size_mib > 0
        assert entry.task == "multiclass"


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match="fashion-mnst") as caught:
        catalogue.fetch("fashion-mnst")
    assert caught.value.fix == 'did you mean "fashion-mnist"?'


def test_the_packaged_set_needs_no_fetching():
    assert catalogue.fetch("fashion-mnist-small") == PACKAGED


@needs_debian
def test_full_fashion_mnist_comes_from_the_debian_package_with_the_published_content(tmp_path):
    folder = catalogue.fetch("fashion-mnist")
    assert folder == tmp_path / "cache" / "data" / "fashion-mnist"
    for name, expected in catalogue.FASHION_FILES.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
    assert read_idx(folder / "train-images-idx3-ubyte").shape == (60_000, 28, 28)
    assert np.bincount(read_idx(folder / "t10k-labels-idx1-ubyte")).tolist() == [1000] * 10
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert catalogue.fetch("fashion-mnist") == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before


@needs_debian
def test_a_changed_file_in_the_cache_is_noticed():
    folder = catalogue.fetch("fashion-mnist")
    with (folder / "t10k-labels-idx1-ubyte").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    with pytest.raises(InputError, match="changed after it was written"):
        catalogue.fetch("fashion-mnist")


def test_without_debian_package_and_network_the_message_names_both(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EdgestillError, match="not installed and cannot be downloaded") as caught:
        catalogue.fetch("fashion-mnist")
    assert "apt-get install dataset-fashion-mnist" in str(caught.value)
    assert not (tmp_path / "cache" / "data" / "fashion-mnist").exists()


def test_movie_snippets_without_an_index_end_in_pips_own_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(EdgestillError, match="pip could not download") as caught:
        catalogue.fetch("movie-snippets")
    assert "No matching distribution" in str(caught.value.evidence)
    assert not (tmp_path / "cache" / "data" / "movie-snippets").exists()


def test_an_archive_with_other_content_is_refused(tmp_path):
    archive = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    archive.write_bytes(b"not an archive")
    with pytest.raises(EdgestillError, match="does not hold the movie snippets"):
        catalogue._snippets_of(archive)


def test_snippets_are_positive_above_zero_negative_below_and_zero_is_dropped(tmp_path):
    lines = ["1\t2.5\tA lovely film.", "2\t-0.1\tDull.", "3\t0.0\tIt has actors.", "4\t0.2\tTabs\tstay."]
    (tmp_path / catalogue.SNIPPETS_FILE).write_bytes("\r\n".join(lines).encode())
    texts, labels = catalogue.read_snippets(tmp_path)
    assert texts == ["A lovely film.", "Dull.", "Tabs\tstay."]
    assert labels == ["positive", "negative", "positive"]


def test_hub_name_while_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EdgestillError, match="hub cannot be asked") as caught:
        load_dataset(DataSection(source="someone/something"), seed=0, base=tmp_path, folder=tmp_path / "data")
    assert "local copy" in str(caught.value.fix)


def test_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(InputError, match="holds something else"):
        catalogue.fetch("fashion-mnist", tmp_path / "mine")
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear diary"
