"""Whole commands with --on, against a real OpenSSH server on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cli.pipeline.calibrate import Effort, calibrate
from cli.report.schema import load_report
from distill.data.make_fashion_mnist_small import PACKAGED
from profiles.errors import InputError
from profiles.progress import Silent
from profiles.remote import SSH, Host, Link
from profiles.remote_device import remember, remembered, remembered_for
from tests.cli.cli_runner import edgestill
from tests.recorded import jetson
from tests.sshd import Server, assert_nothing_left, serve_apart

RECIPE = """
name = "small"
objective = "supervised"
plain_students = false

[data]
source = "npz"
path = "clothes.npz"

[teacher]
kind = "none"

[train]
epochs = 1
batch_size = 64

[export]
calibration_samples = 16
parity_samples = 16

[measure]
max_samples = 200
warmup_seconds = 1.0
max_seconds = 3.0

[[target]]
name = "near"
arch = "conv-w8-d1-k3"
precision = "fp32"
percentile = 90
latency_ms = 500.0
metric_floor = 0.01

[[target]]
name = "orin"
device = "jetson-orin-nano"
stack = "jetpack-6.2"
power_mode = "25W"
arch = "conv-w8-d1-k3"
precision = "fp32"
percentile = 90
latency_ms = 500.0
latency_scope = "compute"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("sshd")
    with serve_apart(root, "near", "jet") as servers, pytest.MonkeyPatch.context() as patch:
        found = servers["near"]
        patch.setenv(SSH, found.command)
        patch.setenv("EDGESTILL_CONFIG", str(root / "config"))
        found.device("near")
        jetson.install(root / "tools", python=sys.executable)
        servers["jet"].device("jet", f'export PATH="{root}/tools:/usr/bin:/bin"')
        found.device("stranger", authorised=False)
        remember(Host("near", python=sys.executable), None)
        yield found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 real images of the packaged set."""
    folder = tmp_path_factory.mktemp("clothes")
    with np.load(PACKAGED) as stored:
        images, labels = stored["train_images"][:200], stored["train_labels"][:200]
    np.savez_compressed(folder / "clothes.npz", images=images, labels=labels % 3)
    (folder / "small.toml").write_text(RECIPE)
    return folder / "small.toml"


def test_a_run_measures_its_targets_on_their_hosts_and_goes_on_where_it_stopped(
    server: Server, recipe: Path, tmp_path: Path
) -> None:
    command = ("-q", "run", str(recipe), "--out", str(tmp_path / "run"), "--on", "near=near", "--on", "orin=jet")
    with _agents(server.root / "near", server.root / "jet") as at_once:
        first = edgestill(*command)
    assert at_once == [2], "both hosts were measured at once"
    assert first.status == 4, first.err
    rows = {row.name: row for row in load_report(tmp_path / "run" / "report.json").targets}
    near, orin = rows["near"], rows["orin"]
    assert near.verdict == "pass"
    assert near.host == "near"
    assert near.metric is not None
    assert near.metric.on == "artifact in its runtime"
    assert any("100.0% of decisions alike" in line for line in near.why)
    assert orin.verdict == "inconclusive"
    assert any("power mode 15W, the target asks for 25W" in line for line in orin.why)
    assert orin.latency is not None
    assert orin.latency.scope == "compute"
    assert orin.metric is not None
    assert orin.metric.on == "ONNX Runtime here, not the device", "trtexec gives outputs of a few samples"
    assert orin.engine is not None
    assert orin.engine.built_by == "TensorRT 10.3.0"
    bundle = json.loads((tmp_path / "run" / "bundles" / "orin" / "manifest.json").read_text())
    assert bundle["info"]["engine"]["builder"] == "TensorRT 10.3.0"
    samples = tmp_path / "run" / "measurements" / "near" / "fp32.npz"
    times = samples.stat().st_mtime_ns
    again = edgestill(*command)
    assert again.status == 4
    assert samples.stat().st_mtime_ns == times, "the same files on the same device are not measured again"
    for name in ("near", "jet"):
        assert_nothing_left(server.root / name)

    broken = edgestill("-q", "run", str(recipe), "--out", str(tmp_path / "run"), "--on", "near=stranger")
    rows = {row.name: row for row in load_report(tmp_path / "run" / "report.json").targets}
    assert broken.status == 1
    assert "ssh-copy-id stranger" in (rows["near"].error or "")
    assert rows["orin"].verdict == "not measured", "the others' results stay"

    # with pauses between the queries, a measurement takes seconds
    recipe.with_name("slow.toml").write_text(RECIPE.replace("[measure]", "[measure]\nidle_gap_ms = 100.0"))
    slow = [sys.executable, "-m", "cli.app", *command]
    slow[slow.index(str(recipe))] = str(recipe.with_name("slow.toml"))
    process = subprocess.Popen(
        slow,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        # a shell's background jobs ignore Ctrl-C, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    while not list((server.root / "near").glob("edgestill-*/inputs.bin")):
        assert process.poll() is None, "it ended before"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert samples.stat().st_mtime_ns == times, "it was not measured to the end"
    for name in ("near", "jet"):
        assert list((server.root / name).iterdir()) == [], "nothing is left when the command has ended"
        assert_nothing_left(server.root / name)


@contextmanager
def _agents(*folders: Path) -> Iterator[list[int]]:
    """On how many of the devices an agent worked at the same moment, at most."""
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], sum(any(folder.iterdir()) for folder in folders))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def test_each_host_has_a_network_of_its_own_where_this_machine_can_make_them(server: Server) -> None:
    if server.address == "127.0.0.1":
        assert os.getuid() != 0 or shutil.which("ip") is None or not _may_make_networks()
        return
    with Link(Host("near", python=sys.executable)) as near, Link(Host("jet")) as jet:
        networks = {
            Path(f"/proc/{pid}/ns/net").readlink() for pid in (near.facts["pid"], jet.facts["pid"], os.getpid())
        }
    assert len(networks) == 3


def _may_make_networks() -> bool:
    name = f"edgestill-{os.getpid()}-may"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made


def test_a_file_is_measured_on_a_host(server: Server, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])],
    )
    file = tmp_path / "relu.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    found = edgestill(
        "bench", str(file), "--on", "near", "--percentile", "50", "--max-seconds", "1", "--no-cuda-graph", "--json"
    )
    assert found.status == 0, found.err
    assert json.loads(found.out)["measurement"]["environment"]["host"] == "near"
    for options, says in (
        (("--on", "a=near"), "one host"),
        (("--on", "near", "--cuda-graph"), "records no CUDA graph"),
        (("--on", "near", "--affinity", "0"), "this machine only"),
    ):
        refused = edgestill("bench", str(file), *options)
        assert refused.status == 2
        assert says in refused.err
    assert_nothing_left(server.root / "near")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--on", "oirn=jet"), 'no target "oirn"'),
        (("--on", "orin=a", "--on", "orin=b"), "two hosts"),
        (("--on", "near"), "no host is known"),
        (("--lock-clocks",), "remote device only"),
    ],
)
def test_a_host_that_fits_no_target_is_refused(
    options: tuple[str, ...], says: str, server: Server, recipe: Path, tmp_path: Path
) -> None:
    found = edgestill("run", str(recipe), "--out", str(tmp_path), *options)
    assert found.status == 2
    assert says in found.err


def test_a_host_is_detected_and_remembered(server: Server) -> None:
    found = edgestill("devices", "detect", "jet", "--json")
    assert found.status == 0, found.err
    told = json.loads(found.out)
    assert told["facts"]["power_mode"] == "15W"
    assert told["offers"]["trtexec"]["version"] == "10.3.0"
    assert "jet" in (server.root / "config" / "hosts.toml").read_text()
    near = edgestill("devices", "detect", "near", "--python", sys.executable, "--workspace-mib", "256")
    assert near.status == 0, near.err
    assert "onnxruntime" in near.out
    assert remembered("near") == Host("near", python=sys.executable, workspace_mib=256)
    assert remembered_for("jetson-orin-nano") is None, "this machine has no board that is one"
    assert_nothing_left(server.root / "near")


def test_a_device_is_calibrated_over_ssh(server: Server) -> None:
    near = Host("near", python=sys.executable)
    few = Effort(families=("conv",), per_family=2, layers=0, runs=4, queries=64, seconds=0.2, probes=5)
    found = calibrate("raspberry-pi-5", Silent(), effort=few, refuse_busy=False, host=near)
    assert found.calibration.device == "raspberry-pi-5"
    assert found.calibration.runtime == "onnxruntime"
    assert set(found.calibration.times) == {"fp32", "int8"}
    assert all(one.p50_ms > 0 and one.samples >= 64 for one in found.observations)
    assert any(one.peak_mib for one in found.observations)
    assert all(node.microseconds for one in found.observations for node in one.nodes)
    with pytest.raises(InputError, match="no device that is known"):
        calibrate("this-machine", Silent(), effort=few, host=near)
    assert_nothing_left(server.root / "near")
