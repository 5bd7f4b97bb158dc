"""A user's own code is loaded by dotted path, only when allowed, and never hides ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from profiles.errors import EdgestillError, InputError, Interrupted, nearest
from profiles.usercode import load_factory


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with modules of every kind; what they import is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_edgestill_model.py").write_text(
        "def create(width=8):\n    return width * 2\n\nlimit = 3\n_secret = 4\n"
    )
    (tmp_path / "my_edgestill_broken.py").write_text("raise RuntimeError('no weights here')\n")
    (tmp_path / "my_edgestill_syntax.py").write_text("def (:\n")
    (tmp_path / "my_edgestill_needs.py").write_text("import surely_not_installed_anywhere\n")
    (tmp_path / "export.py").write_text("hidden = True\n")
    (tmp_path / "profiles.py").write_text("hidden = True\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_edgestill_")]:
        del sys.modules[name]


def load(path: str, base: Path, *, allow_code: bool = True) -> object:
    return load_factory(path, base=base, where="student.factory", allow_code=allow_code)


def test_factory_beside_the_recipe_is_found(project: Path) -> None:
    factory = load("my_edgestill_model:create", project)
    assert callable(factory)
    assert factory(width=4) == 8


def test_code_of_a_recipe_needs_permission(project: Path) -> None:
    with pytest.raises(InputError, match="wants to run code") as caught:
        load("my_edgestill_model:create", project, allow_code=False)
    assert "--allow-code" in str(caught.value.fix)
    assert caught.value.where == "student.factory"
    assert "my_edgestill_model" not in sys.modules


@pytest.mark.parametrize("path", ["my_edgestill_model", "my_edgestill_model:", ":create", ""])
def test_malformed_path_is_refused(project: Path, path: str) -> None:
    with pytest.raises(InputError, match="is not a dotted path"):
        load(path, project)


def test_missing_module_names_the_folder(project: Path) -> None:
    with pytest.raises(InputError, match='cannot import "my_edgestill_missing"') as caught:
        load("my_edgestill_missing:create", project)
    assert str(project) in str(caught.value.fix)


def test_missing_requirement_of_the_module_is_the_evidence(project: Path) -> None:
    with pytest.raises(InputError) as caught:
        load("my_edgestill_needs:create", project)
    assert "surely_not_installed_anywhere" in str(caught.value.evidence)


@pytest.mark.parametrize(
    ("module", "evidence"), [("my_edgestill_broken", "no weights here"), ("my_edgestill_syntax", "SyntaxError")]
)
def test_module_that_fails_while_imported_is_explained(project: Path, module: str, evidence: str) -> None:
    with pytest.raises(InputError, match="fails while it is imported") as caught:
        load(f"{module}:create", project)
    assert evidence in str(caught.value.evidence)


def test_misspelt_name_suggests_the_nearest_public_one(project: Path) -> None:
    with pytest.raises(InputError, match='has no "creat"') as caught:
        load("my_edgestill_model:creat", project)
    assert caught.value.fix == 'did you mean "create"?'


def test_value_that_cannot_be_called_is_refused(project: Path) -> None:
    with pytest.raises(InputError, match="not callable"):
        load("my_edgestill_model:limit", project)


def test_users_modules_never_hide_ours(project: Path) -> None:
    load("my_edgestill_model:create", project)
    assert sys.path[-1] == str(project)
    with pytest.raises(InputError, match='"export" has no "hidden"'):
        load("export:hidden", project)


def test_folder_is_added_to_the_path_once(project: Path) -> None:
    for _ in range(3):
        load("my_edgestill_model:create", project)
    assert sys.path.count(str(project)) == 1


def test_nearest_suggests_one_word_or_lists_all() -> None:
    assert nearest("epoch", ["epochs", "batch_size"]) == 'did you mean "epochs"?'
    assert nearest("zzz", ["epochs", "batch_size"]) == "valid: batch_size, epochs"


def test_errors_print_where_evidence_and_fix_and_carry_their_exit_status() -> None:
    error = InputError("wrong", where="recipe.toml: seed", evidence="seed = x", fix="seed = 0")
    assert str(error) == "wrong\n  where: recipe.toml: seed\n  evidence: seed = x\n  fix: seed = 0"
    assert str(EdgestillError("broken")) == "broken"
    assert [kind("x").exit_status for kind in (EdgestillError, InputError, Interrupted)] == [1, 2, 130]
