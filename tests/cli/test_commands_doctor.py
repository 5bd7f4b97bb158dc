"""`edgestill doctor`."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec

import pytest

from cli.commands import doctor
from profiles.runtimes import available
from tests.cli.cli_runner import edgestill


def test_it_tells_the_machine_and_exits_0() -> None:
    result = edgestill("doctor", "--json")
    assert result.status == 0
    checks = {check["name"]: check for check in json.loads(result.out)["checks"]}
    assert {
        "Python",
        "processor",
        "memory",
        "disk",
        "torch",
        "onnxruntime",
        "TensorRT-RTX",
        "temperature sensors",
    } <= set(checks)
    assert checks["torch"]["state"] == "yes"
    assert checks["data fashion-mnist-small"]["state"] == "yes"
    assert all(check["fix"] for check in checks.values() if check["state"] == "bad")
    runtimes = {name.removeprefix("runtime "): check for name, check in checks.items() if name.startswith("runtime ")}
    assert set(runtimes) == set(available())
    assert runtimes["onnxruntime"]["state"] == runtimes["torch"]["state"] == "yes"
    assert all(check["found"] for check in runtimes.values()), "the version, or the reason"
    assert checks["energy sensor"]["found"]
    assert edgestill("doctor").status == 0


def test_a_missing_package_comes_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in ("transformers", "onnxscript") else real(name, package)

    monkeypatch.setattr(doctor, "find_spec", without)
    checks = {check["name"]: check for check in json.loads(edgestill("doctor", "--json").out)["checks"]}
    assert (checks["transformers"]["state"], checks["transformers"]["fix"]) == (
        "no",
        'pip install "edgestill[transformers]"',
    )
    assert (checks["onnxscript"]["state"], checks["onnxscript"]["fix"]) == ("bad", "pip install onnxscript")
    assert 'transformers: pip install "edgestill[transformers]"' in edgestill("doctor").out


def test_a_broken_installation_does_not_end_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    result = edgestill("doctor", "--json")
    assert result.status == 0
    checks = {check["name"]: check for check in json.loads(result.out)["checks"]}
    assert (checks["machine"]["state"], checks["machine"]["fix"]) == ("bad", "pip install psutil")
    assert checks["torch"]["state"] == "yes"
