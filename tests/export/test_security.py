"""Files that anybody may have made run no code, reach nowhere, fill no memory; a failed export changes nothing."""

from __future__ import annotations

import ast
import contextlib
import gzip
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.arrays import read_idx, read_npz
from distill.data.images import EncodedImages
from distill.networks import read_state
from export import Plan, write_bundle
from profiles import artifact
from profiles.errors import EdgestillError, InputError
from profiles.opening import foreign_domains, open_arrays, open_bundle, open_graph
from tests.cli.cli_runner import edgestill
from tests.export.conftest import IMAGES, device_and_stack, plan_for
from tests.export.preflight_cases import external, foreign, relu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    place = tmp_path_factory.mktemp("small")
    return plan_for("this-machine", place, score=None, difference=None, precisions=("fp32",))


# --------------------------------------------------------------------------------------------- no code is executed

FORBIDDEN_IMPORTS = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}


EVALUATORS = {"eval", "exec", "torch.jit.load", "torch.package.PackageImporter", "torch.hub.load"}
UNPICKLERS = {"pickle.load", "pickle.loads", "pickle.Unpickler"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression that is a chain of names, else nothing."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def offences(source: str) -> list[str]:
    """What in a module could execute what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [entry.name for entry in node.names]
            found += [f"import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_IMPORTS]
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                found.append("import from pickle")
        if isinstance(node, ast.Attribute) and dotted(node) in UNPICKLERS:
            found.append(dotted(node))
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        given = {entry.arg: getattr(entry.value, "value", "?") for entry in node.keywords}
        unsafe = called == "torch.load" and given.get("weights_only") is not True
        unsafe |= any(given.get(key, False) is not False for key in ("allow_pickle", "trust_remote_code", "shell"))
        if unsafe or called in EVALUATORS:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("package", ["distill", "export", "profiles", "cli"])
def test_no_module_unpickles_or_evaluates_what_a_file_holds(package: str) -> None:
    found = {str(path): offences(path.read_text(encoding="utf-8")) for path in (ROOT / package).rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    ["torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "import yaml",
     "from pickle import load", "import pickle; pickle.load(f)", "exec(text)"],
)  # fmt: skip
def test_the_search_for_such_calls_finds_them(line: str) -> None:
    assert offences(line)


# ------------------------------------------------------------------------------------------------- external data


def stored(path: Path, model: onnx.ModelProto) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def in_a_branch(location: str) -> onnx.ModelProto:
    """The tensor is a constant inside of an If's branch."""
    inner = external(location)
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["y"], value=inner.graph.initializer[0])],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    )
    model = relu()
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
    return model


def linked(folder: Path) -> onnx.ModelProto:
    (folder.parent / "secret").write_bytes(bytes(16))
    (folder / "w.data").symlink_to("../secret")
    return external("w.data")


def linked_folder(folder: Path) -> onnx.ModelProto:
    (folder.parent / "w.data").write_bytes(bytes(16))
    (folder / "sub").symlink_to("..")
    return external("sub/w.data")


OUTSIDE: dict[str, Callable[[Path], onnx.ModelProto]] = {
    "parent": lambda folder: external("../secret"),
    "hidden parent": lambda folder: external("a/../../secret"),
    "absolute": lambda folder: external("/etc/passwd"),
    "windows": lambda folder: external("C:\\secret"),
    "backslash": lambda folder: external("..\\secret"),
    "nothing": lambda folder: external(""),
    "null": lambda folder: external("w\0.data"),
    "link": linked,
    "linked folder": linked_folder,
    "branch": lambda folder: in_a_branch("../secret"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_external_data_outside_of_the_folder_is_refused(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = stored(folder / "m.onnx", OUTSIDE[case](folder))
    with pytest.raises(InputError, match="external data points out of the model's folder") as caught:
        open_graph(path)
    assert caught.value.where == str(path)
    assert "save_as_external_data=True" in str(caught.value.fix)


def test_external_data_in_the_folder_is_opened_and_too_little_of_it_is_named(tmp_path: Path) -> None:
    path = stored(tmp_path / "m.onnx", external("deep/w.data"))
    with pytest.raises(InputError, match=r'"deep/w\.data" is missing'):
        open_graph(path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "w.data").write_bytes(bytes(15))
    with pytest.raises(InputError, match=r'"deep/w\.data" is too short'):
        open_graph(path)
    (tmp_path / "deep" / "real").write_bytes(bytes(16))
    (tmp_path / "deep" / "w.data").unlink()
    (tmp_path / "deep" / "w.data").symlink_to("real")  # a link inside of the folder is none that leaves it
    assert open_graph(path).graph.initializer[0].name == "w"


def test_custom_operators_are_refused_and_those_of_onnx_runtime_are_not(tmp_path: Path) -> None:
    path = stored(tmp_path / "m.onnx", foreign("Mine", "my.domain"))
    with pytest.raises(InputError, match="custom operators") as caught:
        open_graph(path)
    assert caught.value.evidence == 'domain "my.domain": Mine'
    assert foreign_domains(foreign("QLinearAdd", "com.microsoft")) == {}
    own = foreign("Mine", "my.domain")
    own.functions.append(onnx.helper.make_function("my.domain", "Mine", ["a"], ["b"], [], []))
    assert foreign_domains(own) == {}


@pytest.mark.parametrize(
    ("model", "said"),
    [(external("../secret"), "external data points out"), (foreign("Mine", "my.domain"), "custom")],
)
def test_every_command_refuses_such_a_file(model: onnx.ModelProto, said: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "m.onnx", model)
    bench = edgestill("bench", str(path))
    assert (bench.status, said in bench.err, "Traceback" in bench.err) == (2, True, False)
    check = edgestill("check", str(path))
    assert (check.status, said in " ".join(check.out.split())) == (3, True)
    np.savez(tmp_path / "d.npz", images=IMAGES[:40, 0], labels=np.arange(40) % 4)
    init = edgestill(
        "init",
        "--out",
        str(tmp_path / "r.toml"),
        "--yes",
        "--data",
        str(tmp_path / "d.npz"),
        "--teacher",
        f"onnx:{path}",
    )
    assert (init.status, said in init.err) == (2, True)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "r"\n[data]\nsource = "npz"\npath = "d.npz"\n[teacher]\nkind = "onnx"\nfile = "m.onnx"\n'
        'output = "y"\n[[target]]\nname = "here"\ndevice = "this-machine"\n'
    )
    run = edgestill("distill", str(recipe), "--out", str(tmp_path / "run"))
    assert (run.status, said in run.err) == (2, True), run.err


# ------------------------------------------------------------------------------------------------------- bundles


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small bundle, whole."""
    info = {"model": "model.onnx", "engine": None, "inputs": [{"name": "x", "dtype": "float32", "shape": [1, 4]}]}
    with artifact.create(tmp_path / "bundle", "bundle", "key", info) as folder:
        stored(folder / "model.onnx", relu())
        np.savez(folder / "golden.npz", input_x=np.zeros((1, 4), np.float32), output=np.zeros((1, 4), np.float32))
    return tmp_path / "bundle"


def change(bundle: Path, **changes: object) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    for key, value in changes.items():
        part = manifest if key in manifest else manifest["info"]
        part[key] = part[key] | value if isinstance(value, dict) and isinstance(part[key], dict) else value
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def relist(bundle: Path, *names: str) -> None:
    """Gives the manifest the present hashes of these files."""
    change(bundle, files={name: artifact.file_hash(bundle / name) for name in names})


def other_model(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(relu(opset=16).SerializeToString())


def model_elsewhere(bundle: Path) -> None:
    stored(bundle.parent / "other.onnx", relu())
    change(bundle, model="../other.onnx")


def file_elsewhere(bundle: Path) -> None:
    (bundle.parent / "secret").write_bytes(b"secret")
    change(bundle, files={"../secret": artifact.file_hash(bundle.parent / "secret")})


def linked_model(bundle: Path) -> None:
    shutil.move(bundle / "model.onnx", bundle.parent / "moved.onnx")
    (bundle / "model.onnx").symlink_to("../moved.onnx")


def data_elsewhere(bundle: Path) -> None:
    stored(bundle / "model.onnx", external("../secret"))
    relist(bundle, "model.onnx")


def data_unlisted(bundle: Path) -> None:
    stored(bundle / "model.onnx", external("w.data"))
    (bundle / "w.data").write_bytes(bytes(16))
    relist(bundle, "model.onnx")


def custom_operators(bundle: Path) -> None:
    stored(bundle / "model.onnx", foreign("Mine", "my.domain"))
    relist(bundle, "model.onnx")


def engine_elsewhere(bundle: Path) -> None:
    change(bundle, engine={"file": "/tmp/model.engine"})


TAMPERED = {
    other_model: "model.onnx changed after it was written",
    model_elsewhere: 'its list of files has no "../other.onnx"',
    file_elsewhere: "the manifest names a file outside of its bundle",
    linked_model: "the manifest names a file outside of its bundle",
    data_elsewhere: "external data points out of the model's folder",
    data_unlisted: 'the external data "w.data" is not in the manifest',
    custom_operators: "custom operators",
    engine_elsewhere: 'its list of files has no "/tmp/model.engine"',
}


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda tamper: tamper.__name__)
def test_a_tampered_bundle_is_refused_by_every_command(tamper: Callable[[Path], None], bundle: Path) -> None:
    open_bundle(bundle)
    tamper(bundle)
    for command in ("bench", "check"):
        result = edgestill(command, str(bundle))
        assert result.status == 2, result.err
        assert TAMPERED[tamper] in " ".join(result.err.split())
        assert "Traceback" not in result.err
        assert "fix" in result.err


def test_a_whole_bundle_is_checked_like_its_model(bundle: Path) -> None:
    assert edgestill("check", str(bundle)).status == 0


def test_changed_artefacts_of_a_run_are_refused_when_it_goes_on(small_plan: Plan, tmp_path: Path) -> None:
    shutil.copytree(small_plan.folder, tmp_path / "graphs")
    options = {"score": None, "difference": None, "precisions": ("fp32",)}
    again = plan_for("this-machine", tmp_path / "graphs", **options)
    assert again.all_reused
    graph = again["fp32"].file
    assert graph is not None
    written = graph.stat().st_mtime_ns
    model = onnx.load(str(graph))
    model.doc_string = "mine"
    graph.write_bytes(model.SerializeToString())
    os.utime(graph, ns=(written, written))
    with pytest.raises(InputError, match=r"model\.onnx changed after it was written") as caught:
        plan_for("this-machine", tmp_path / "graphs", **options)
    assert caught.value.fix == f"delete {graph.parent} and run the same command again"


def test_large_artefacts_are_hashed_again_only_when_they_were_written_to(tmp_path: Path) -> None:
    with artifact.create(tmp_path / "data", "data", "key") as folder:
        (folder / "inputs.npy").write_bytes(bytes(100))
    assert artifact.current(tmp_path / "data", "data", "key") is not None
    time.sleep(0.01)
    (tmp_path / "data" / "inputs.npy").write_bytes(bytes(99) + b"x")
    with pytest.raises(InputError, match=r"inputs\.npy changed"):
        artifact.current(tmp_path / "data", "data", "key")


# ---------------------------------------------------------------------------------------------------- archives


def zip_of_zeros(path: Path, name: str, mebibytes: int) -> Path:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as member,
    ):
        for _ in range(mebibytes // 16):
            member.write(bytes(2**24))
    return path


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zip_of_zeros(tmp_path_factory.mktemp("bomb") / "bomb.npz", "images.npy", 288)


@pytest.mark.parametrize("reader", [open_arrays, read_npz, lambda path: read_state(path, where="student.weights")])
def test_zip_bombs_are_refused_before_they_unpack(reader: Callable[[Path], object], bomb: Path) -> None:
    assert bomb.stat().st_size < 2**21
    with pytest.raises(InputError, match=r"unpacks to 288 MiB") as caught:
        reader(bomb)
    assert "fold may be a bomb" in str(caught.value.evidence)


def test_commands_refuse_a_bomb(bomb: Path, tmp_path: Path) -> None:
    model = ("--model", "torch.nn:Linear", "--kwargs", '{"in_features": 8, "out_features": 3}', "--example", "1x8")
    out = ("--out", str(tmp_path / "x"))
    for option in (("--samples", str(bomb)), ("--weights", str(bomb))):
        result = edgestill("export", *model, *option, *out)
        assert (result.status, "unpacks to 288 MiB" in result.err) == (2, True), result.err
    assert not (tmp_path / "x").exists()


def test_an_array_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117) + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    (tmp_path / "a.npy").write_bytes(content)
    for name in ("a.npz", "a.npy"):
        with pytest.raises(InputError, match="cannot be read"):
            open_arrays(tmp_path / name)


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", x=np.array([print], object))
    np.save(tmp_path / "o.npy", np.array([print], object))
    for name in ("o.npz", "o.npy"):
        with pytest.raises(InputError, match="cannot be read"):
            open_arrays(tmp_path / name)


def test_gzip_and_image_bombs_are_refused(tmp_path: Path) -> None:
    start = bytes([0, 0, 8, 3]) + struct.pack(">III", 60_000, 280, 280)
    with gzip.open(tmp_path / "idx.gz", "wb", compresslevel=1) as file:
        file.write(start + bytes(2**20))
    with pytest.raises(InputError, match=r"unpacks to|truncated"):
        read_idx(tmp_path / "idx.gz")
    (tmp_path / "small.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + struct.pack(">I", 5) + bytes(50)))
    with pytest.raises(InputError, match="longer than its header says"):
        read_idx(tmp_path / "small.gz")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(2**16))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    with pytest.raises(InputError, match=r"p\.png is not a readable image") as caught:
        EncodedImages([("p.png", png)]).decode(0, (8, 8), "stretch", 1)
    assert "decompression bomb" in str(caught.value.evidence)


@given(noise=st.binary(max_size=300), position=st.integers(0, 2000), value=st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_damaged_files_are_input_errors_and_nothing_else(
    noise: bytes, position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    np.savez_compressed(folder / "whole.npz", a=np.arange(40), b=np.ones((2, 3)))
    archive = bytearray((folder / "whole.npz").read_bytes())
    graph = bytearray(foreign("QLinearAdd", "com.microsoft").SerializeToString())
    archive[position % len(archive)] = value
    graph[position % len(graph)] = value
    for content, reader in ((noise, open_arrays), (archive, open_arrays), (noise, open_graph), (graph, open_graph)):
        (folder / "damaged").write_bytes(content)
        with contextlib.suppress(InputError):
            reader(folder / "damaged")


# ------------------------------------------------------------------------------------------------ atomic exports


def rewritten(plan: Plan, folder: Path, name: str) -> Path:
    device, stack = device_and_stack("this-machine")
    return write_bundle(folder, plan, plan["fp32"], name=name, device=device, stack=stack, golden=IMAGES[:1])


def test_an_export_that_the_disk_does_not_take_leaves_the_last_bundle(small_plan: Plan, tmp_path: Path) -> None:
    folder = rewritten(small_plan, tmp_path / "bundle", "first")
    before = open_bundle(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses what goes beyond
    try:
        with pytest.raises(EdgestillError, match="cannot write to") as caught:
            rewritten(small_plan, folder, "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(caught.value.evidence)
    assert open_bundle(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert open_bundle(rewritten(small_plan, folder, "second")).info["name"] == "second"


REWRITES = """
import sys
from pathlib import Path
from profiles.artifact import create
folder, number = Path(sys.argv[1]), 0
while True:
    number += 1
    with create(folder, "bundle", str(number), {"number": number}) as temporary:
        for name in ("model.onnx", "golden.npz", "infer.py"):
            (temporary / name).write_bytes(str(number).encode() * 2000)
    if number == 1:
        print("ready", flush=True)
"""


def test_a_process_that_is_killed_leaves_a_whole_bundle(tmp_path: Path) -> None:
    folder, rng = tmp_path / "bundle", np.random.default_rng(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", REWRITES, str(folder)], stdout=subprocess.PIPE, cwd=ROOT, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        manifest = artifact.verify(folder, "bundle")
        assert (folder / "infer.py").read_bytes() == str(manifest.info["number"]).encode() * 2000


def test_torch_weights_that_hold_code_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "hook": print}, tmp_path / "w.pth")
    model = ("--model", "torch.nn:Linear", "--kwargs", '{"in_features": 8, "out_features": 3}', "--example", "1x8")
    result = edgestill("export", *model, "--weights", str(tmp_path / "w.pth"), "--out", str(tmp_path / "x"))
    assert result.status == 2
    assert "Traceback" not in result.err
