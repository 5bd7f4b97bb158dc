"""Starting is light, and a working folder with our package names in it does no harm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli.app import COMMANDS

HEAVY = ("torch", "numpy", "pydantic", "onnx", "onnxruntime", "datasets", "transformers", "scipy", "accelerate", "PIL")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import json, sys\n"
        "from cli.app import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit:\n"
        "    print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = json.loads(done.stderr)
    assert [name for name in loaded if name.partition(".")[0] in HEAVY] == []
    assert [name for name in loaded if name.startswith("cli.commands.")] == []
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", ["init", "report", "devices", "methods", "data", "doctor", "run", "study"])
def test_the_help_of_a_command_does_not_import_torch(name: str) -> None:
    code = (
        "import sys\n"
        "from cli.app import main\n"
        "try:\n"
        "    main([sys.argv[1], '--help'])\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True, timeout=60)


def test_importing_the_pipeline_leaves_the_compiler_out() -> None:
    code = "import sys, cli.pipeline; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[2])


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """A working folder whose own modules are called as ours are, and must not be imported."""
    trap = 'raise RuntimeError("the working folder was imported")\n'
    for name in ("export.py", "cli.py", "distill.py", "typer.py", "torch.py"):
        (tmp_path / name).write_text(trap)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "__init__.py").write_text(trap)
    return tmp_path


@pytest.fixture
def edgestill() -> str:
    found = shutil.which("edgestill", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("the edgestill command is not installed in this environment (pip install -e .)")
    return found


@pytest.mark.parametrize("arguments", [[name, "--help"] for name in COMMANDS], ids=lambda words: words[0])
def test_help_works_in_a_folder_with_our_names(hostile_folder: Path, edgestill: str, arguments: list[str]) -> None:
    done = subprocess.run(
        [edgestill, *arguments], cwd=hostile_folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: edgestill" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["devices", "--json"], ["methods", "--json"], ["data", "--json"], ["doctor", "--json"], ["init", "--yes"]],
    ids=lambda words: words[0],
)
def test_commands_work_in_a_folder_with_our_names(hostile_folder: Path, edgestill: str, arguments: list[str]) -> None:
    done = subprocess.run(
        [edgestill, *arguments], cwd=hostile_folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    if "--json" in arguments:
        json.loads(done.stdout)
