from __future__ import annotations

import ast
import glob
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from profiles import agent
from tests.sensors import put

SOURCE = Path(agent.__file__)
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc and /sys")


def test_runs_on_python_3_6() -> None:
    vermin = shutil.which("vermin", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if vermin is None:
        pytest.skip("vermin is not installed")
    done = subprocess.run([vermin, "-t=3.6-", "--no-tips", str(SOURCE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_imports_the_standard_library_only() -> None:
    imported = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported <= sys.stdlib_module_names


@linux_only
def test_as_a_script_it_prints_one_json_document(tmp_path: Path) -> None:
    alone = tmp_path / "agent.py"
    shutil.copy(SOURCE, alone)
    done = subprocess.run([sys.executable, "-I", "-S", str(alone)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["cores"] == os.cpu_count()
    assert found["cpu_model"]
    assert 0 < found["memory_available_mib"] <= found["memory_mib"]
    assert not [key for key, value in found.items() if value in (None, [], {}, "")], "absent facts stay absent"


def _spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@linux_only
def test_another_process_that_loads_the_cpu_is_seen_and_named() -> None:
    other = multiprocessing.get_context("fork").Process(target=_spin, args=(30.0,))
    other.start()
    assert other.pid is not None
    name = Path(f"/proc/{other.pid}/comm").read_text().strip()
    uses = []
    for _ in range(20):
        before = agent.CpuUse()
        time.sleep(0.6)
        uses.append(agent.CpuUse().since(before))
        # three are named: on a machine that is busy otherwise, it may not be among them every time
        if name in [entry["name"] for entry in uses[-1]["busiest"]]:
            break
    other.kill()
    other.join()
    assert uses[-1]["other_cores"] > 0.05
    assert name in [entry["name"] for entry in uses[-1]["busiest"]]


def _removed(folder: str, user: int | None, told: Connection) -> None:
    if user is not None:
        os.setuid(user)
    told.send(agent.remove(folder))


@linux_only
def test_a_folder_that_cannot_be_removed_is_told() -> None:
    # root may remove everything, so it is done as somebody else; pytest's own folders are closed to them
    user = 65534 if os.getuid() == 0 else None
    base = Path(tempfile.mkdtemp(prefix="edgestill-test-"))
    held, file = base / "agent" / "held", base / "agent" / "file"
    held.mkdir(parents=True)
    for path in (file, held / "inner"):
        path.touch()
    for path in (base, held.parent, held, file):
        path.chmod(0o755)
        if user is not None:
            os.chown(path, user, -1)
    held.chmod(0o500)
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=_removed, args=(str(held.parent), user, there))
    other.start()
    other.join(30)
    assert here.recv() == [f"{held.parent} is still there, with held"]
    assert not file.exists()
    held.chmod(0o700)
    assert agent.remove(str(held.parent)) == []
    base.rmdir()


@pytest.mark.parametrize(("asleep", "answers"), [(0.0, False), (3600.0, False), (3600.0, True)])
def test_what_the_agent_slept_through_is_not_waited_time(asleep: float, answers: bool) -> None:
    turns: list[float] = []
    now = [0.0]

    def ready(seconds: float) -> bool:
        turns.append(seconds)
        now[0] += seconds + (asleep if len(turns) == 2 else 0.0)
        return answers and len(turns) == 6

    assert agent.awaited(ready, 10.0, lambda: now[0]) == answers
    assert len(turns) == (6 if answers else 9 if asleep else 10), "a turn slept through counts twice, not an hour"


@linux_only
def test_own_work_is_not_taken_for_another_process() -> None:
    before = agent.CpuUse()
    _spin(0.5)
    after = agent.CpuUse()
    use = after.since(before)
    others = use["other_cores"] * use["seconds"]
    machine = after.busy - before.busy  # type: ignore[operator]
    assert machine - others == pytest.approx(after.own - before.own, abs=0.05)


@pytest.mark.parametrize(
    ("path", "text", "told"),
    [
        ("sys/devices/system/cpu/cpu3/thermal_throttle/package_throttle_count", "7", 7),
        ("sys/class/hwmon/hwmon4/oc1_event_cnt", "2", 2),
        ("sys/devices/platform/soc/soc:firmware/get_throttled", "50005", 0x50005),
    ],
)
def test_throttling_is_read_where_each_kind_of_machine_counts_it(
    path: str, text: str, told: int, tmp_path: Path
) -> None:
    put(tmp_path, path, text)
    environment = {**os.environ, "EDGESTILL_ROOT": str(tmp_path)}
    done = subprocess.run([sys.executable, "-I", "-S", str(SOURCE)], capture_output=True, env=environment, check=True)
    assert json.loads(done.stdout)["throttle_events"] == told


def test_temperatures_outside_of_what_silicon_bears_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = {"zone0": "45500\n", "zone1": "-256000\n", "zone2": ""}
    for name, text in readings.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "temp").write_text(text)
        (tmp_path / name / "type").write_text(f"{name}-thermal\n")
    monkeypatch.setattr(glob, "glob", lambda pattern: sorted(map(str, tmp_path.iterdir())))
    assert agent.temperatures() == {"zone0-thermal": 45.5}
