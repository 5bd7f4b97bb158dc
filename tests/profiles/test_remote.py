"""The link and the agent against a real OpenSSH server on loopback; what goes wrong there, and that nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.pipeline.limits import judge
from cli.pipeline.prepare import prepare_host
from profiles import agent, conditions
from profiles.device import TargetSection, load_device, resolve_target
from profiles.errors import EdgestillError, InputError
from profiles.fresh_process import HangError
from profiles.measure_section import MeasureSection
from profiles.measurement import Measurement
from profiles.progress import Silent
from profiles.remote import SSH, Host, Link, boot_line, explain_ssh, sweep
from profiles.remote_device import mismatches, recognise, remember, remembered, remembered_for
from profiles.remote_runtime import Build, RemoteRuntime, Rung, Stack, choose_rung, ladder, measure_on
from profiles.runtimes.onnxruntime import run_model
from tests.profiles.test_bad_models import endless
from tests.recorded import jetson
from tests.sensors import counting, put, slowing_down
from tests.sshd import Server, assert_nothing_left, keygen, processes_of, serve, small_disk

PYTHON = sys.executable
NOBODY = 65534
QUICK = MeasureSection(max_samples=200, warmup_seconds=1.0, max_seconds=5.0)
ASCII = st.text(st.characters(codec="ascii"), max_size=80)
TARGET = TargetSection(name="t", percentile=90, latency_ms=500.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("sshd")
    disks = contextlib.ExitStack()
    with serve(root) as found, pytest.MonkeyPatch.context() as patch, disks:
        patch.setenv(SSH, found.command)
        patch.setenv("EDGESTILL_CONFIG", str(root / "config"))
        found.device("plain", f'export EDGESTILL_ROOT="{root}/blind"')
        found.device("rapl", f'export EDGESTILL_ROOT="{root}/sensors"')
        found.device("hot", f'export EDGESTILL_ROOT="{root}/melting"')
        jetson.install(root / "tools", python=PYTHON, sudo=True)
        # without the runtimes of this environment's Python, TensorRT's tools are all that the device has
        put(root / "jetson", "sys/class/devfreq/17000000.gpu/cur_freq", 624_750_000)
        found.device("orin", f'export PATH="{root}/tools:/usr/bin:/bin" EDGESTILL_ROOT="{root}/jetson"')
        jetson.install(root / "own", python=PYTHON, sudo=True)
        found.device("owned", f'export PATH="{root}/own:/usr/bin:/bin"')
        found.device("counted", f'echo >> {root}/connections; if [ -e "{root}/away" ]; then exit 1; fi')
        found.device("nopython", "export PATH=/nonexistent")
        found.device("stranger", authorised=False)
        keygen("-f", str(root / "other"))
        (root / "wrong").write_text("device " + " ".join((root / "other.pub").read_text().split()[:2]) + "\n")
        found.device("changed", options=f"  UserKnownHostsFile {root}/wrong")
        found.device("new", options="  UserKnownHostsFile none")
        for name, kib in (("full", 600), ("brimful", 16)):
            mounted = disks.enter_context(small_disk(root / name, kib))
            found.device(name, "" if mounted else f"ulimit -f {kib if kib > 100 else 8}")
        found.device("bare", f'export HOME="{root}/bare"')
        found.device("chatty", "echo Welcome; echo '{not json}'")
        yield found


@pytest.fixture(scope="module")
def gpus(server: Server) -> None:
    """Devices "cuda" and "integrated" with stand-ins for TensorRT's Python module and CUDA's library."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a CUDA GPU, or a C compiler for a library that stands in")
    folder, recorded = server.root / "gpu", Path(jetson.__file__).parent
    folder.mkdir()
    shutil.copy(recorded / "tensorrt_module.py", folder / "tensorrt.py")
    library = [compiler, "-shared", "-fPIC", "-o", str(folder / "libcudart.so"), str(recorded / "cudart.c")]
    subprocess.run(library, check=True)
    for version in ("10.2", "11.0", "12", "13"):  # the real one, where there is one, has such a name
        (folder / f"libcudart.so.{version}").symlink_to("libcudart.so")
    put(server.root / "board", "sys/class/hwmon/hwmon1/name", "ina3221")
    for name, value in (("in1_label", "VDD_IN"), ("in1_input", 5000), ("curr1_input", 1200)):
        put(server.root / "board", f"sys/class/hwmon/hwmon1/{name}", value)
    for alias, integrated, root in (("cuda", 0, "blind"), ("integrated", 1, "board")):
        server.device(
            alias,
            f'export PYTHONPATH="{folder}" LD_LIBRARY_PATH="{folder}" CUDART_INTEGRATED={integrated} '
            f'EDGESTILL_ROOT="{server.root}/{root}"',
        )


@pytest.fixture
def stranger_to_root(server: Server) -> Iterator[Path]:
    """A device "user" where this user is not root; a folder with its tools and its temporary files."""
    with tempfile.TemporaryDirectory(prefix="edgestill-test-") as name:
        place = Path(name)
        jetson.install(place / "tools", python=PYTHON)
        (place / "tmp").mkdir()
        before = f'export PATH="{place}/tools:/usr/bin:/bin" TMPDIR="{place}/tmp" HOME="{place}/tmp"'
        if os.getuid() == 0:
            # what pytest makes is for its own user alone, so that another could not even enter it
            place.chmod(0o755)
            os.chown(place / "tmp", NOBODY, NOBODY)
            before += (
                f'; cd /; exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups sh -c "$SSH_ORIGINAL_COMMAND"'
            )
        server.device("user", before)
        yield place


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """uint8 (N, 1, 8, 8) -> logits (N, 3)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["f"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "small",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weights, "w")],
    )
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def images(count: int = 20) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(1).integers(0, 256, (count, 1, 8, 8), np.uint8)}


def pids(link: Link) -> tuple[int, int]:
    return link.facts["pid"], link.facts["janitor"]


def worker_of(link: Link) -> int:
    return int(Path(str(link.folder), "children").read_text().split()[-2])


def failure(name: str, **more: str) -> EdgestillError:
    with pytest.raises(EdgestillError) as caught:
        Link(Host(name, **more)).close()  # type: ignore[arg-type]
    return caught.value


# -- measuring


def measured(link: Link, model: Path, *, stack: Stack, wrapped: bool) -> Measurement:
    rung = next(rung for rung in ladder(link, stack).rungs if rung.wrapped == wrapped)
    runtime = RemoteRuntime(link, stack, {"a": model}, images(), 1, rung=rung)
    found = measure_on(runtime, images(), TARGET, QUICK, input_source="real samples", fresh_process=False)
    return found["a"].measurement


def test_a_model_is_measured_there_as_it_is_here_and_nothing_is_left(
    server: Server, model: Path, tmp_path: Path
) -> None:
    inputs = images(50)
    with Link(Host("plain", python=PYTHON)) as link:
        runtime = RemoteRuntime(link, "onnxruntime", {"a": model, "b": model}, inputs, 1)
        found = measure_on(runtime, inputs, TARGET, QUICK, input_source="real samples")
        one, samples = found["a"]
        assert one.verdict == "pass"
        assert one.environment["host"] == "plain"
        assert one.environment["cores"] == os.cpu_count()
        assert one.end_to_end is not None
        assert len(samples.compute_ns) == len(samples.end_to_end_ns) == one.compute.samples >= 64
        assert (samples.compute_ns <= samples.end_to_end_ns).all()
        assert one.differences[0].against == "b"
        assert one.load_ms is not None
        assert one.memory.peak_mib is not None
        outputs = runtime.outputs(model, inputs, 4, tmp_path)["logits"]
        left = pids(link)
    np.testing.assert_allclose(outputs, run_model(model, inputs)["logits"], rtol=1e-5)
    assert one.energy is not None
    assert one.energy.millijoules is None
    assert "tells no energy" in one.energy.how
    assert_nothing_left(server.root / "plain", *left)


def test_energy_is_read_by_the_devices_sensors_and_decides(server: Server, model: Path) -> None:
    section = QUICK.model_copy(update={"energy_seconds": 0.3})
    with Link(Host("rapl", python=PYTHON)) as link:
        runtime = RemoteRuntime(link, "onnxruntime", {"a": model}, images(), 1)
        with counting(server.root / "sensors", worker_of(link), idle=5.0, busy=20.0):
            found = measure_on(runtime, images(), TARGET, section, input_source="real samples", fresh_process=False)
    one = found["a"].measurement
    energy = one.energy
    assert energy is not None
    assert one.end_to_end is not None
    assert energy.how == "RAPL package-0, idle subtracted"
    assert energy.queries > 50
    assert energy.idle_watts == pytest.approx(5.0, rel=0.5)
    assert energy.millijoules is not None
    # 20 W while the model computes; how long that is, the latency tells up to what Python adds
    assert 0.3 < energy.millijoules / (20.0 * one.end_to_end.minimum) < 10.0
    for limit, verdict in ((100 * energy.millijoules, "pass"), (energy.millijoules / 100, "fail")):
        target = TARGET.model_copy(update={"energy_mj": limit, "latency_ms": None})
        (judged,) = judge(target, measurement=one, size_mib=1.0, metric=None, drop=None, on_device=True)
        assert judged.verdict == verdict, judged
    assert_nothing_left(server.root / "rapl")


def test_clocks_that_fall_and_throttling_are_seen_and_leave_the_limit_undecided(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions, "_CLOCK_SECONDS", 0.1)
    section = QUICK.model_copy(
        # three seconds, as a device looks at its clocks once in a second
        update={"idle_gap_ms": 20.0, "energy_seconds": 0.0, "max_samples": 150, "warmup_seconds": 0.3}
    )
    with slowing_down(server.root / "melting"), Link(Host("hot", python=PYTHON)) as link:
        runtime = RemoteRuntime(link, "onnxruntime", {"a": model}, images(), 1)
        found = measure_on(runtime, images(), TARGET, section, input_source="real samples", fresh_process=False)
    one = found["a"].measurement
    seen = one.environment["clock_mhz"]
    assert 1.1 * seen["lowest"] < seen["highest"] < 2000
    assert any("clock changed while sampling" in warning for warning in one.warnings)
    assert one.verdict == "inconclusive"
    assert one.compute.maximum < 500.0, "the latency alone would pass"
    assert any(
        re.search(r"throttled while it was measured \(\d+ events before, \d+ after\)", why) for why in one.mismatches
    )
    (judged,) = judge(TARGET, measurement=one, size_mib=1.0, metric=None, drop=None, on_device=True)
    assert judged.verdict == "inconclusive"
    assert "throttled" in judged.reason
    assert_nothing_left(server.root / "hot")


def test_what_a_login_script_prints_does_not_disturb(server: Server) -> None:
    with Link(Host("chatty", python=PYTHON)) as link:
        assert link.ask("offers", names=["onnxruntime"])["onnxruntime"]["version"]


def test_files_come_and_go_unchanged(server: Server, tmp_path: Path) -> None:
    data = np.random.default_rng(2).bytes(3_000_000)
    with Link(Host("plain", python=PYTHON)) as link:
        link.put("data", data[:1000])
        link.put("data", data[1000:], more=True)
        link.get("data", tmp_path / "back")
        with pytest.raises(EdgestillError, match="outside"):
            link.put("../data", b"x")
        with pytest.raises(EdgestillError, match="no such file"):
            link.get("missing", tmp_path / "back2")
    assert (tmp_path / "back").read_bytes() == data


# -- a Jetson, by recorded outputs and a stand-in trtexec


def test_trtexec_tells_compute_times_only_and_its_engine_comes_back(
    server: Server, model: Path, tmp_path: Path
) -> None:
    inputs = images()
    with Link(Host("orin")) as link:
        assert link.facts["power_mode"] == "15W"
        assert link.facts["tegrastats"]["power_mw"]["VDD_IN"] == 4541
        assert [rung.name for rung in ladder(link, "tensorrt").rungs] == ["trtexec"]
        runtime = RemoteRuntime(link, "tensorrt", {"a": model}, inputs, 2, keep=tmp_path / "engines")
        assert runtime.version == "10.3.0"
        found, samples = measure_on(runtime, inputs, TARGET, QUICK, input_source="real samples")["a"]
        outputs = runtime.outputs(model, inputs, 2, tmp_path)["logits"]
        left = pids(link)
    assert found.end_to_end is None
    assert found.scope == "compute"
    assert found.verdict == "inconclusive"
    assert "trtexec tells compute times only" in found.mismatches[0]
    assert len(samples.compute_ns) == found.compute.samples
    assert len(samples.end_to_end_ns) == 0
    assert found.load_ms is None
    assert "trtexec" in found.memory.how
    assert found.energy is not None
    assert found.energy.millijoules is None
    assert "trtexec starts and loads anew" in found.energy.how
    assert found.environment["gpu_clock_mhz"] == {"lowest": 624.8, "highest": 624.8}, "the GPU's, while trtexec ran"
    assert len(outputs) == 8, "four queries of two"
    np.testing.assert_allclose(outputs, run_model(model, inputs)["logits"][:8], rtol=1e-3)
    assert runtime.built[model].file.read_bytes() == model.read_bytes()
    assert runtime.built[model].cache is not None
    assert_nothing_left(server.root / "orin", *left)


def test_an_engine_that_was_built_there_is_not_built_again(server: Server, model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with Link(Host("orin")) as link:
            runtime = RemoteRuntime(link, "tensorrt", {"a": model}, images(), 1, keep=tmp_path)
            runtime.load(model, threads=1)
        times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert len(times) == 3
    assert times == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


@pytest.mark.parametrize("alias", ["cuda", "integrated"])
def test_by_tensorrts_python_module_memory_and_energy_are_those_of_what_the_gpu_works_in(
    server: Server, gpus: None, model: Path, tmp_path: Path, alias: str
) -> None:
    inputs = images(8)
    section = QUICK.model_copy(update={"energy_seconds": 0.1, "max_samples": 64, "warmup_seconds": 0.2})
    with Link(Host(alias, python=PYTHON)) as link:
        runtime = RemoteRuntime(link, "tensorrt", {"a": model}, inputs, 2)
        assert runtime.rung == Rung("tensorrt", "10.3.0")
        found = measure_on(runtime, inputs, TARGET, section, input_source="real samples")["a"].measurement
        outputs = runtime.outputs(model, inputs, 2, tmp_path)["logits"]
    np.testing.assert_allclose(outputs, run_model(model, inputs)["logits"], rtol=1e-5)
    assert found.end_to_end is not None
    assert found.end_to_end.minimum > found.compute.minimum
    assert found.energy is not None
    assert found.load_ms is not None
    if alias == "integrated":
        assert "MemAvailable" in found.memory.how
        assert found.memory.peak_mib is not None
        assert found.energy.how.startswith("INA3221 VDD_IN")
        assert found.energy.idle_watts == pytest.approx(6.0, rel=0.2)
    else:
        assert found.memory.peak_mib is None
        assert found.memory.how.startswith("n/a: no NVIDIA driver tells the GPU memory of a process")
        assert found.energy.millijoules is None or found.energy.how.startswith("NVML")
        assert "NVML" in found.energy.how, "never the processor's"
        target = TARGET.model_copy(update={"memory_mib": 1e6, "latency_ms": None})
        (judged,) = judge(target, measurement=found, size_mib=1.0, metric=None, drop=None, on_device=True)
        assert judged.verdict == "not measured"
    assert_nothing_left(server.root / alias)


def test_an_engine_of_another_tensorrt_is_told_by_the_python_module(
    server: Server, gpus: None, model: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        with Link(Host("cuda", python=PYTHON)) as link:
            runtime = RemoteRuntime(link, "tensorrt", {"a": model}, images(), 2, keep=tmp_path)
            if not [*tmp_path.iterdir()]:
                runtime.load(model, threads=1)
                (engine,) = tmp_path.glob("*.engine")
                engine.write_bytes(engine.read_bytes().replace(b"10.3.0", b"10.0.1.6", 1))
                continue
            with pytest.raises(EdgestillError, match="made by another TensorRT") as caught:
                runtime.load(model, threads=1)
    assert "expecting library version 10.3.0.26 got 10.0.1.6" in (caught.value.evidence or "")
    assert "built anew" in (caught.value.fix or "")
    assert_nothing_left(server.root / "cuda")


@pytest.mark.parametrize(
    ("fails", "message", "evidence", "fix"),
    [
        ("memory", "ran out of memory", "OutOfMemory", "--workspace-mib"),
        ("killed", "ran out of memory|killed TensorRT", "signal 9", "--workspace-mib"),
        ("operator", "does not know an operator", "Plugin not found", "edgestill check"),
        ("version", "another TensorRT", "Version tag does not match", "built anew"),
    ],
)
def test_trtexec_fails_and_its_reason_is_told(
    server: Server, model: Path, tmp_path: Path, fails: str, message: str, evidence: str, fix: str
) -> None:
    # the wrapper is how a user puts a command around the tools; here it sets the stand-in's failure
    host = Host("orin", wrapper=f"env TRTEXEC_FAILS={fails} PATH={server.root}/tools:/usr/bin:/bin")
    with Link(host) as link, pytest.raises(EdgestillError, match=message) as caught:
        measured(link, model, stack="tensorrt", wrapped=True)
    assert evidence in (caught.value.evidence or "")
    assert fix in (caught.value.fix or "")
    assert_nothing_left(server.root / "orin")


def test_clocks_are_locked_when_asked_for_and_restored(server: Server) -> None:
    log = server.root / "tools" / "clocks.log"
    with Link(Host("orin")) as link:
        assert not log.exists(), "nothing is changed without being asked"
        link.ask("lock_clocks")
        os.kill(link.facts["pid"], signal.SIGKILL)
        assert_nothing_left(server.root / "orin", *pids(link))
    store, lock, restore = log.read_text().splitlines()
    assert store.startswith("--store")
    assert lock == ""
    assert restore == store.replace("--store", "--restore")


def test_a_user_without_the_right_to_lock_clocks_is_told_how_to(server: Server, stranger_to_root: Path) -> None:
    with Link(Host("user")) as link:
        assert Path(f"/proc/{link.facts['pid']}").stat().st_uid != 0
        with pytest.raises(EdgestillError, match="the clocks cannot be locked") as caught:
            link.ask("lock_clocks")
        assert link.ask("facts")["facts"]["cores"], "the agent goes on"
        left = pids(link)
    assert "a password is required" in (caught.value.evidence or "")
    assert (
        caught.value.fix
        == f"ssh -t {Host('user').shown} sudo jetson_clocks    then the same command without --lock-clocks"
    )
    assert not (stranger_to_root / "tools" / "clocks.log").exists()
    assert_nothing_left(stranger_to_root / "tmp", *left)


def test_what_a_device_lacks_is_told_with_the_command_that_installs_it(server: Server) -> None:
    with Link(Host("plain", python=PYTHON)) as link, pytest.raises(EdgestillError, match="nor trtexec") as caught:
        choose_rung(link, "tensorrt")
    assert "apt install libnvinfer-bin" in (caught.value.fix or "")
    with Link(Host("orin")) as link, pytest.raises(EdgestillError, match="no onnxruntime") as caught:
        choose_rung(link, "onnxruntime")
    assert caught.value.fix == "edgestill devices prepare orin"


def test_the_real_builder_builds_there_and_a_missing_gpu_is_told(server: Server, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    builds = {model: Build(compute_capability="8.9")}
    with Link(Host("plain", python=PYTHON)) as link:
        runtime = RemoteRuntime(link, "tensorrt-rtx", {"a": model}, images(), 1, builds=builds, keep=tmp_path)
        assert runtime.rung.name == "tensorrt_rtx"
        try:
            runtime.load(model, threads=None)
        except EdgestillError as error:
            assert "CUDA" in error.message or "GPU" in error.message, error  # noqa: PT017
    assert next(tmp_path.glob("*.engine")).stat().st_size > 1000
    assert next(tmp_path.glob("*.cache")).is_file()
    assert_nothing_left(server.root / "plain")


def test_a_bare_machine_gets_a_runtime_without_pip_or_internet(
    server: Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = getattr(sys, "_base_executable", sys.executable)
    wheels = Path(os.environ.get("EDGESTILL_TEST_WHEELS", Path(__file__).parents[2] / ".wheels"))
    if not [*wheels.glob("onnxruntime-*.whl")]:
        pytest.skip(f"needs wheels in {wheels} (pip download onnxruntime numpy; CI does)")
    # -S and -I would hide the packages; a Python whose own have been left out is as bare as a device's
    if subprocess.run([bare, "-c", "import onnxruntime"], capture_output=True, check=False).returncode == 0:
        pytest.skip("the Python underneath has an onnxruntime of its own")
    with Link(Host("bare", python=bare)) as link, pytest.raises(EdgestillError, match="no onnxruntime"):
        choose_rung(link, "onnxruntime")
    said = prepare_host(Host("bare", python=bare), Silent(), wheels=wheels)
    assert said.startswith("onnxruntime ")
    host = remembered("bare")
    with Link(host) as link:
        assert measured(link, model, stack="onnxruntime", wrapped=False).verdict == "pass"
    assert [path.name for path in (server.root / "bare").iterdir()] == [".edgestill"], "what was asked for stays"
    prepare_host(host, Silent(), remove=True)
    assert_nothing_left(server.root / "bare")


def wheels_of(folder: Path, version: str, code: str) -> Path:
    """Wheels as pip names them, whose onnxruntime is a few lines."""
    folder.mkdir()
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}-x-manylinux2014_{platform.machine()}"
    for name in ("onnxruntime", "numpy"):
        with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", f"__version__ = '{version}'\n{code}\n")
    return folder


def test_packages_that_do_not_work_leave_those_that_do(server: Server, tmp_path: Path) -> None:
    good, broken = wheels_of(tmp_path / "good", "9.1", ""), wheels_of(tmp_path / "broken", "9.2", "raise OSError(1)")
    host = Host("bare", python=PYTHON)
    assert "onnxruntime 9.1" in prepare_host(host, Silent(), wheels=good)
    with pytest.raises(EdgestillError, match="does not work on the device"):
        prepare_host(host, Silent(), wheels=broken)
    with Link(remembered("bare")) as link:
        assert choose_rung(link, "onnxruntime").version == "9.1"
    assert [path.name for path in (server.root / "bare" / ".edgestill").iterdir()] == ["packages"]
    assert "onnxruntime 9.3" in prepare_host(host, Silent(), wheels=wheels_of(tmp_path / "better", "9.3", ""))
    prepare_host(host, Silent(), remove=True)
    assert_nothing_left(server.root / "bare")


# -- what goes wrong


@pytest.mark.parametrize(
    ("name", "message", "fix"),
    [
        ("127.0.0.1:1", "cannot be reached", "ssh -p 1 127.0.0.1"),
        ("no-such-host.invalid", "no such host", "ssh no-such-host.invalid"),
        ("stranger", "does not let this user in", "ssh-copy-id stranger"),
        ("changed", "host key is not the one", "ssh-keygen -R"),
        ("new", "host key is not known", "ssh new"),
        ("nopython", "has no python3", "--python"),
    ],
)
def test_why_there_is_no_connection_is_told(server: Server, name: str, message: str, fix: str) -> None:
    error = failure(name)
    assert message in error.message
    assert error.where == name
    assert error.evidence
    assert fix in (error.fix or "")


def test_a_full_disk_is_told_while_files_are_sent_and_at_the_start(server: Server) -> None:
    with Link(Host("full", python=PYTHON)) as link:
        with pytest.raises(EdgestillError, match="disk is full") as caught:
            link.put("large", bytes(2_000_000))
        assert not (server.root / "full").is_mount() or "No space left on device" in (caught.value.evidence or "")
        assert "df -h" in (caught.value.fix or "")
        assert link.ask("facts")["facts"]["cores"], "the agent goes on"
    assert "disk is full" in failure("brimful", python=PYTHON).message
    assert_nothing_left(server.root / "full")
    assert_nothing_left(server.root / "brimful")


@pytest.mark.parametrize("victim", ["agent", "link", "worker"])
def test_killed_in_the_middle_it_is_told_and_nothing_is_left(server: Server, model: Path, victim: str) -> None:
    link = Link(Host("plain", python=PYTHON))
    left = pids(link)
    runtime = RemoteRuntime(link, "onnxruntime", {"a": model}, images(), 1)
    runtime.load(model, threads=1)
    worker = worker_of(link)
    number = {"agent": left[0], "link": link._process.pid, "worker": worker}[victim]
    threading.Timer(0.3, os.kill, (number, signal.SIGKILL)).start()
    with pytest.raises(EdgestillError) as caught:
        link.ask("block", id="model0.onnx", start=0, count=10**9, seconds=60.0, gap_s=0.0)
    expected = {"agent": "agent on the device was killed", "link": "link to the device was cut", "worker": "was killed"}
    assert expected[victim] in caught.value.message
    assert ("the target under way is measured anew" in (caught.value.fix or "")) == (victim == "link")
    link.close()
    assert_nothing_left(server.root / "plain", *left, worker)


def test_a_silent_link_counts_as_cut(tmp_path: Path) -> None:
    source = Path(agent.__file__).read_text().replace("SILENCE = 90.0", "SILENCE = 0.4")
    boot = "import os;exec(os.fdopen(0,'rb',0,closefd=False).readline())"
    process = subprocess.Popen([PYTHON, "-c", boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(boot_line({"SOURCE": source, "BASE": str(tmp_path)}))
    process.stdin.flush()
    hello = json.loads(process.stdout.readline())
    assert Path(hello["folder"]).parent == tmp_path
    assert process.wait(10) == 1
    process.stdin.close()
    process.stdout.close()
    assert_nothing_left(tmp_path, hello["pid"], hello["janitor"])


def test_agent_and_janitor_killed_together_are_swept_up_after(server: Server) -> None:
    link = Link(Host("plain", python=PYTHON))
    folder = str(link.folder)
    for pid in reversed(pids(link)):
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert Path(folder).is_dir()
    link.close()
    assert_nothing_left(server.root / "plain")
    assert sweep(Host("plain", python=PYTHON), folder) == []


def test_after_a_time_out_no_late_answer_is_taken_for_another(server: Server) -> None:
    with Link(Host("plain", python=PYTHON)) as link:
        # nobody waits for this one, as after Ctrl-C
        link._request("offers", {"names": ["onnxruntime"]})
        assert link.ask("facts")["facts"]["cores"]
        with pytest.raises(EdgestillError, match="did not answer in time"):
            link.ask("offers", names=["onnxruntime"], patience=0.01)
        with pytest.raises(EdgestillError, match="was closed") as caught:
            link.ask("facts")
        assert '"offers"' in (caught.value.evidence or "")
    assert_nothing_left(server.root / "plain", *pids(link))


def test_an_ordinary_end_needs_no_second_connection(server: Server) -> None:
    connections = server.root / "connections"
    connections.unlink(missing_ok=True)
    for _ in range(5):
        with Link(Host("counted", python=PYTHON)) as link:
            pass
        assert link._process.returncode == 0
    assert connections.read_text().count("\n") == 5
    assert_nothing_left(server.root / "counted")


def test_a_device_that_cannot_be_swept_is_told(server: Server) -> None:
    told: list[str] = []
    host, away = Host("counted", python=PYTHON), server.root / "away"
    link = Link(host, told.append)
    folder = str(link.folder)
    for pid in reversed(pids(link)):
        os.kill(pid, signal.SIGKILL)
    away.touch()
    link.close()
    away.unlink()
    assert len(told) == 1
    assert f"counted: the folder {folder}" in told[0]
    assert sweep(host, folder) == []
    assert_nothing_left(server.root / "counted")


def test_clocks_that_cannot_be_given_back_are_told_with_the_command(server: Server) -> None:
    told: list[str] = []
    stuck = server.root / "own" / "stuck"
    stuck.touch()
    with Link(Host("owned"), told.append) as link:
        link.ask("lock_clocks")
    assert len(told) == 1
    assert "still locked (Error: no such clock)" in told[0]
    assert f"--restore {link.folder}/clocks.conf" in told[0]
    assert Path(str(link.folder), "clocks.conf").read_text() == "stored\n"
    stuck.unlink()
    assert sweep(Host("owned"), str(link.folder)) == []
    assert_nothing_left(server.root / "owned", *pids(link))


def test_a_process_that_cannot_be_written_down_is_not_left_running(server: Server) -> None:
    with Link(Host("plain", python=PYTHON)) as link:
        children = Path(str(link.folder), "children")
        children.symlink_to("/dev/full")
        with pytest.raises(EdgestillError, match="disk is full"):
            link.ask("use_rung", rung="onnxruntime")
        assert processes_of(Path(str(link.folder))) == []
        children.unlink()
    assert_nothing_left(server.root / "plain")


# -- models that hang, crash or are slow


@pytest.fixture(scope="module")
def second(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in a file of its own."""
    path = tmp_path_factory.mktemp("second") / "second.onnx"
    path.write_bytes(model.read_bytes())
    return path


def told_apart(
    runtime: RemoteRuntime, timeout_seconds: float
) -> tuple[dict[str, EdgestillError], dict[str, Measurement]]:
    failures: dict[str, EdgestillError] = {}
    section = QUICK.model_copy(update={"timeout_seconds": timeout_seconds, "max_samples": 64, "warmup_seconds": 0.3})
    found = measure_on(
        runtime, images(), TARGET, section, input_source="real samples", fresh_process=False, failures=failures
    )
    return failures, {name: each.measurement for name, each in found.items()}


def test_a_model_that_hangs_there_is_named_and_the_rest_is_measured(
    server: Server, model: Path, tmp_path: Path
) -> None:
    loop = endless(tmp_path / "endless.onnx")
    with Link(Host("plain", python=PYTHON)) as link:
        runtime = RemoteRuntime(link, "onnxruntime", {"endless": loop, "good": model}, images(), 1)
        with pytest.raises(HangError, match="endless"):
            runtime.probe("onnxruntime", loop, {}, 1, timeout_seconds=0.1)
        failures, found = told_apart(runtime, 1.0)
        assert len([line for line in processes_of(Path(str(link.folder))) if line.rstrip().endswith("worker")]) == 1
    assert found["good"].verdict == "pass"
    assert isinstance(failures["endless"], HangError)
    assert failures["endless"].message == "ONNX Runtime hangs on the model endless.onnx, on the device"
    assert failures["endless"].where == str(loop)
    assert "1 s" in (failures["endless"].evidence or "")
    assert "timeout_seconds" in (failures["endless"].fix or "")
    assert_nothing_left(server.root / "plain", *pids(link))


@pytest.mark.parametrize(
    ("fails", "message", "evidence"),
    [("hangs", "trtexec hangs on the model model.onnx", "no answer within"), ("crashes", "trtexec crashed", "SIGSEGV")],
)
def test_trtexec_hangs_or_crashes_on_one_model_and_the_rest_is_measured(
    server: Server, model: Path, second: Path, fails: str, message: str, evidence: str
) -> None:
    host = Host("orin", wrapper=f"env TRTEXEC_FAILS={fails}:model0 PATH={server.root}/tools:/usr/bin:/bin")
    with Link(host) as link:
        rung = next(rung for rung in ladder(link, "tensorrt").rungs if rung.wrapped)
        runtime = RemoteRuntime(link, "tensorrt", {"bad": model, "good": second}, images(), 1, rung=rung)
        failures, found = told_apart(runtime, 0.3)
    assert list(found) == ["good"]
    assert isinstance(failures["bad"], HangError) == (fails == "hangs")
    assert message in failures["bad"].message
    assert evidence in (failures["bad"].evidence or "")
    assert_nothing_left(server.root / "orin", *pids(link))


def test_a_crash_names_runtime_and_signal_and_the_next_model_has_a_new_process(
    server: Server, model: Path, second: Path, tmp_path: Path
) -> None:
    with Link(Host("plain", python=PYTHON)) as link:
        runtime = RemoteRuntime(link, "onnxruntime", {"a": model, "b": second}, images(), 1)
        for each in (model, second):
            runtime.load(each, threads=1)
        worker = int(Path(str(link.folder), "children").read_text().split()[-2])
        threading.Timer(0.3, os.kill, (worker, signal.SIGSEGV)).start()
        with pytest.raises(EdgestillError) as caught:
            runtime.ask_of(model, "block", 60.0, id="model0.onnx", start=0, count=10**9, seconds=0.0, gap_s=0.0)
        assert caught.value.message == "ONNX Runtime crashed on the model model.onnx, on the device"
        assert "SIGSEGV; on plain, in its queries" in (caught.value.evidence or "")
        outputs = runtime.outputs(second, images(), 4, tmp_path)["logits"]
    np.testing.assert_allclose(outputs, run_model(second, images())["logits"], rtol=1e-5)
    assert_nothing_left(server.root / "plain", *pids(link), worker)


def test_a_slow_model_and_a_long_pause_are_no_hang(server: Server, model: Path) -> None:
    with Link(Host("plain", python=PYTHON)) as link:
        runtime = RemoteRuntime(link, "onnxruntime", {"a": model}, images(), 1, timeout_seconds=0.5)
        session = runtime.load(model, threads=1)
        runtime.clock.sleep(0.2)
        session.ahead(4)
        assert all(session.query({}, runtime.clock).compute_ns > 0 for _ in range(4))
        assert runtime.clock.ns > 0.8e9
    host = Host("orin", wrapper=f"env TRTEXEC_MS=1500 PATH={server.root}/tools:/usr/bin:/bin")
    with Link(host) as link:
        found = measured(link, model, stack="tensorrt", wrapped=True)
    assert found.compute.mean >= 1500
    assert found.seconds < 15, "its rounds are as short as its time asks"


# -- texts


@pytest.mark.parametrize(
    ("line", "power", "gpu"),
    [
        (jetson.ORIN_NANO, ("VDD_IN", 4541), 612),
        (jetson.ORIN_NX, ("VDD_IN", 4319), 305),
        (jetson.NANO, ("POM_5V_IN", 3045), 76),
    ],
)
def test_tegrastats_of_three_generations_is_read(line: str, power: tuple[str, int], gpu: int) -> None:
    found = agent.parse_tegrastats(line)
    assert found["power_mw"][power[0]] == power[1]
    assert found["gpu_mhz"] == gpu
    assert all(value > 0 for value in found["temperatures_c"].values()), "a sensor that is off is left out"


@pytest.mark.parametrize("mode", jetson.NVPMODEL)
def test_the_power_mode_is_read_by_name(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jetson.install(tmp_path / "tools", python=PYTHON, mode=mode)
    monkeypatch.setenv("PATH", f"{tmp_path}/tools:{os.environ['PATH']}")
    assert agent.power_mode() == mode


def test_releases_and_versions_are_read() -> None:
    assert agent.l4t_release(jetson.TEGRA_RELEASE) == "36.4.3"
    said = "&&&& RUNNING TensorRT.trtexec [TensorRT v%s] # trtexec --help"
    for number, version in (("8502", "8.5.2"), ("8201", "8.2.1"), ("100300", "10.3.0"), ("110401", "11.4.1")):
        assert agent.trtexec_version(said % number) == version
    assert agent.trtexec_version("nothing") == ""


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=50), st.integers(0, 40), st.booleans())
def test_trtexec_times_are_those_after_the_warm_up(times: list[float], warm: int, old: bool) -> None:
    first = "startInMs" if old else "startH2dMs"
    entries = [{first: 0, "startComputeMs": i, "computeMs": 9.0} for i in range(warm)]
    entries += [{first: 0, "startComputeMs": 200 + i, "computeMs": value} for i, value in enumerate(times)]
    assert agent.parse_trtexec_times(json.dumps(entries), 200) == times


@settings(deadline=None, max_examples=50)
@given(ASCII | st.sampled_from(["[]", "[{}]", '[{"startComputeMs": 300, "computeMs": -1}]', "null", "[1]"]))
def test_times_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(agent.Problem):
        agent.parse_trtexec_times(text, 200)


@settings(deadline=None, max_examples=50)
@given(st.none() | st.integers(-20, 260), ASCII, st.booleans())
def test_every_end_of_ssh_is_explained(status: int | None, errors: str, started: bool) -> None:
    error = explain_ssh(Host("h"), status, errors, started=started)
    assert error.message
    assert error.where == "h"
    assert error.fix


def test_an_ssh_of_the_users_that_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SSH, "ssh -F /nonexistent")
    with pytest.raises(EdgestillError, match="ssh does not accept its configuration") as caught, Link(Host("h")):
        pass
    assert "ssh -F /nonexistent" in str(caught.value.fix)
    monkeypatch.setenv(SSH, "no-such-ssh")
    with pytest.raises(EdgestillError, match="EDGESTILL_SSH names a program that is not here"), Link(Host("h")):
        pass


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("orin", ["--", "orin"]),
        ("me@orin:2222", ["-p", "2222", "--", "me@orin"]),
        ("me@[fe80::1]:2222", ["-p", "2222", "--", "me@fe80::1"]),
        ("fe80::1", ["--", "fe80::1"]),
    ],
)
def test_hosts_are_what_ssh_accepts(name: str, words: list[str]) -> None:
    assert Host(name).words == words


@pytest.mark.parametrize("name", ["", "-oProxyCommand=x", "a b"])
def test_what_is_no_host_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        Host(name)


@pytest.mark.parametrize(
    ("board", "device"),
    [
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "jetson-orin-nano"),
        ("NVIDIA Jetson Nano Developer Kit", "jetson-nano"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "jetson-thor"),
        ("Raspberry Pi 5 Model B Rev 1.0", "raspberry-pi-5"),
        ("NVIDIA Jetson Xavier NX Developer Kit", None),
    ],
)
def test_a_board_is_recognised_by_its_name(board: str, device: str | None) -> None:
    found = recognise({"board": board})
    assert (found.name if found is not None else None) == device


def test_a_machine_that_is_not_what_the_target_says_is_told() -> None:
    section = TargetSection(name="t", device="jetson-orin-nano", power_mode="15W", stack="jetpack-6.2")
    target = resolve_target(section, base=Path())
    facts = {
        "board": "NVIDIA Jetson Orin Nano Developer Kit",
        "l4t": "36.4.3",
        "machine": "aarch64",
        "power_mode": "15W",
    }
    host, rung = Host("orin"), Rung("tensorrt", "10.3.0.26")
    assert mismatches(target, facts, rung, host) == ()
    told = mismatches(target, {**facts, "power_mode": "25W"}, rung, host)
    assert "power mode 25W, the target asks for 15W" in told[0]
    assert "nvpmodel" in told[0]
    assert "8.5.2" in mismatches(target, facts, Rung("tensorrt", "8.5.2"), host)[0]
    assert "Jetson Linux 35.4.1" in mismatches(target, {**facts, "l4t": "35.4.1"}, rung, host)[0]
    assert "Raspberry Pi 5" in mismatches(target, {**facts, "board": "Raspberry Pi 5 Model B"}, rung, host)[0]


def test_hosts_are_remembered_in_the_users_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESTILL_CONFIG", str(tmp_path))
    host = Host("me@orin", python="/opt/python3", wrapper="docker run --rm -i -v {folder}:{folder} image")
    path = remember(host, load_device("jetson-orin-nano").name)
    assert remembered("me@orin") == host
    assert remembered("other") == Host("other")
    assert remembered_for("jetson-orin-nano") == "me@orin"
    path.write_text("[[[")
    with pytest.raises(InputError, match="remembered"):
        remembered("me@orin")
