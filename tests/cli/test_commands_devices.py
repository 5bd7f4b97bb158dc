"""`edgestill devices`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from profiles.device import Device, list_devices, load_device
from tests.cli.cli_runner import edgestill


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGESTILL_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path / "config"


def test_the_bare_command_lists_every_device() -> None:
    bare, listed = edgestill("devices"), edgestill("devices", "list")
    assert bare == listed
    assert all(f"\n{name} " in "\n" + bare.out for name in list_devices())
    assert [entry["name"] for entry in json.loads(edgestill("devices", "--json").out)] == list_devices()


@pytest.mark.parametrize("name", list_devices())
def test_every_device_is_shown_with_its_sources(name: str) -> None:
    device = load_device(name)
    result = edgestill("devices", "show", name)
    assert result.status == 0
    assert device.title in result.out
    assert all(stack.name in result.out for stack in device.stacks)
    assert all(mode.name in result.out for mode in device.power_modes)
    words = " ".join(result.out.split())
    assert all(" ".join(source.split())[:60] in words for source in device.sources)
    assert Device.model_validate_json(edgestill("devices", "show", name, "--json").out) == device


def test_what_is_not_known_or_not_usable_is_said() -> None:
    shown = edgestill("devices", "show", "jetson-orin-nano").out
    assert "FP8 needs 8.9 or higher" in shown
    assert "not known" in edgestill("devices", "show", "this-machine").out


def test_detect_prints_this_machine() -> None:
    assert json.loads(edgestill("devices", "detect", "--json").out)["name"] == "this-machine"
    assert edgestill("devices", "detect").out.startswith("this-machine: ")


def test_an_unknown_device_suggests_the_nearest() -> None:
    result = edgestill("devices", "show", "jetson-orin-nan")
    assert result.status == 2
    assert "jetson-orin-nano" in result.err


def own_file(folder: Path, name: str = "my-board") -> Path:
    text = edgestill("devices", "show", "raspberry-pi-5", "--toml").out
    file = folder / "board.toml"
    file.write_text(text.replace('name = "raspberry-pi-5"', f'name = "{name}"', 1))
    return file


def test_a_device_file_that_was_printed_can_be_added_and_named(tmp_path: Path, own_config: Path) -> None:
    added = edgestill("devices", "add", str(own_file(tmp_path)))
    assert added.status == 0, added.err
    assert (own_config / "devices" / "my-board.toml").is_file()
    original = load_device("raspberry-pi-5")
    assert load_device("my-board") == original.model_copy(update={"name": "my-board"})
    assert "my-board" in list_devices()


def test_adding_never_overwrites_without_force(tmp_path: Path, own_config: Path) -> None:
    file = own_file(tmp_path)
    edgestill("devices", "add", str(file))
    kept = own_config / "devices" / "my-board.toml"
    before = kept.read_text()
    file.write_text(before.replace("Raspberry Pi 5", "Another board"))
    again = edgestill("devices", "add", str(file))
    assert again.status == 2
    assert "--force" in again.err
    assert kept.read_text() == before
    assert edgestill("devices", "add", str(file), "--force").status == 0
    assert "Another board" in kept.read_text()


def test_a_shipped_name_a_bad_file_and_a_path_as_name_are_refused(tmp_path: Path, own_config: Path) -> None:
    shipped = edgestill("devices", "add", str(own_file(tmp_path, "raspberry-pi-5")))
    assert shipped.status == 2
    assert "ships with edgestill" in shipped.err
    assert edgestill("devices", "add", str(own_file(tmp_path, "../escape"))).status == 2
    broken = tmp_path / "broken.toml"
    broken.write_text('name = "x"\nkindd = "cpu"\n')
    assert edgestill("devices", "add", str(broken)).status == 2
    assert edgestill("devices", "add", str(tmp_path / "missing.toml")).status == 2
    assert not own_config.exists()
