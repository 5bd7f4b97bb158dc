"""What a teacher's strategy cannot have is refused before training, by a run and by its dry run alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.pipeline import Run
from cli.recipe import load_recipe
from profiles.errors import InputError
from tests.cli.cli_runner import edgestill
from tests.cli.strategy_cases import SMALL, TRAINED, WIDE, make_data, target, write

ARRAY = 'kind = "array"\nlogits = "logits.npy"\n'
ONNX = 'kind = "onnx"\nfile = "teacher.onnx"\noutput = "logits"\n'
NONE = 'kind = "none"\n'
TORCH = 'kind = "torch"\nfactory = "strategy_teacher:make"\n'
TIGHT = "file_size_mib = 0.001\nmemory_mib = 0.001\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clothes")
    make_data(folder)
    return folder


def refused(folder: Path, recipe: str, key: str, *words: str, allow_code: bool = False) -> None:
    """Exit status 2 with the recipe key, the evidence and the fix, from the run and the dry run; nothing is trained."""
    out = folder / "never"
    for more in ([], ["--dry-run"]):
        result = edgestill(*(["-q", "run", recipe, "--out", str(out), *more] + ["--allow-code"] * allow_code))
        assert result.status == 2, result.err
        message = " ".join(result.err.split())
        assert key in message
        for word in words:
            assert word in message
    if out.exists():
        made = [path.name for path in out.iterdir()]
        assert not [name for name in made if name.startswith(("teacher", "cache", "students"))]


@pytest.mark.parametrize("strategy", ["generic", "sftn"])
@pytest.mark.parametrize("kind", [ARRAY, ONNX, NONE, TORCH], ids=["array", "onnx", "none", "torch"])
def test_only_a_trained_teacher_has_stage_boundaries(folder: Path, strategy: str, kind: str) -> None:
    recipe = write(folder, f'strategy = "{strategy}"', kind=kind, views=1)
    refused(folder, recipe, "teacher.strategy", "no stage boundaries", 'teacher.kind = "train"')


@pytest.mark.parametrize("strategy", ["online", "meta", "lgtm"])
@pytest.mark.parametrize(
    ("kind", "evidence"), [(ARRAY, "stored outputs"), (ONNX, "graph in a file"), (NONE, "no teacher")]
)
def test_only_a_teacher_with_weights_learns_along(folder: Path, strategy: str, kind: str, evidence: str) -> None:
    recipe = write(folder, f'strategy = "{strategy}"', kind=kind, views=1)
    refused(folder, recipe, "teacher.strategy", evidence, '"train" or "transformers" or "torch"')


@pytest.mark.parametrize(
    ("objective", "key", "words"),
    [
        ('"lelp"', "objective[0].kind", "stands still"),
        ('"fitnet"', "objective[0].kind", "compares embeddings"),
        ('"supervised"', "objective", "no objective listens"),
        ('[{kind = "kd"}, {kind = "rkd"}]', "objective[1].kind", "compares embeddings"),
    ],
)
def test_a_coached_teacher_is_told_by_logits(folder: Path, objective: str, key: str, words: str) -> None:
    recipe = write(folder, 'strategy = "lgtm"', objective, train="hard_weight = 0.5")
    refused(folder, recipe, key, words, "frozen")


def test_a_dry_run_tells_it_before_a_given_teacher_is_loaded(folder: Path) -> None:
    kind = 'kind = "torch"\nfactory = "nowhere:make"\n'
    recipe = write(folder, 'strategy = "lgtm"', '"lelp"', kind=kind)
    result = edgestill("-q", "run", recipe, "--out", str(folder / "never"), "--dry-run")
    assert result.status == 2
    assert "stands still" in result.err


def test_the_subclass_objective_and_a_conditioned_teacher_both_want_to_train_it(folder: Path) -> None:
    for strategy in ("generic", "sftn"):
        recipe = write(folder, f'strategy = "{strategy}"', '"subclass"')
        refused(folder, recipe, "objective[0].kind", "two heads", '"lelp"')


def test_mixup_is_refused_before_the_teacher_is_trained(folder: Path) -> None:
    recipe = write(folder, 'strategy = "online"', train="mixup = 0.2")
    refused(folder, recipe, "train.mixup", "influence of a sample", "mixup = 0")


def test_a_held_out_share_that_leaves_a_class_empty_names_the_smallest_that_works(folder: Path) -> None:
    recipe = write(folder, 'strategy = "lgtm"\ncoached = {held_out = 0.006}')
    refused(folder, recipe, "teacher.coached.held_out", "of 168 training samples", "held_out = 0.0")


def test_a_text_teacher_of_one_block_has_no_boundary(tmp_path: Path) -> None:
    rows = [f"{text},{label}" for _ in range(30) for text, label in (("good film", 1), ("bad film", 0))]
    (tmp_path / "films.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    recipe = tmp_path / "films.toml"
    recipe.write_text(
        '[data]\nsource = "csv"\npath = "films.csv"\ntext_column = "text"\nlabel_column = "label"\n'
        '[teacher]\narch = "text-w64-d1-h4"\nstrategy = "generic"\n'
    )
    refused(tmp_path, str(recipe), "teacher.arch", "no stage boundary", "text-w64-d2-h4")


def test_a_student_of_the_users_own_is_in_no_pool(folder: Path) -> None:
    student = 'kind = "torch"\nfactory = "strategy_teacher:make"\nkwargs = {outputs = 3}'
    targets = target("rtx")
    for strategy in ("generic", "sftn"):
        recipe = write(folder, f'strategy = "{strategy}"', student=student, targets=targets)
        refused(folder, recipe, "teacher.strategy", "no family", "teacher.generic.archs", allow_code=True)
    named = f'strategy = "sftn"\ngeneric = {{archs = ["{SMALL}"], inherit = true}}'
    recipe = write(folder, named, student=student, targets=targets)
    refused(folder, recipe, "teacher.generic.inherit", "inherit = false", allow_code=True)


@pytest.mark.parametrize(
    ("table", "key", "words"),
    [
        ('generic = {archs = ["conv-w8-d1-k3", "conv-w6-d1-k3"]}', "teacher.generic.archs[1]", "goes from 4 to 512"),
        ('generic = {archs = ["conv-w8-d1-k3", "convi-w8-d1-k3"]}', "teacher.generic.archs[1]", "cannot share"),
        ('generic = {archs = ["text-w64-d2-h4"]}', "teacher.generic.archs[0]", "reads texts"),
        ("generic = {widths = [8, 1000]}", "teacher.generic.widths[1]", "512 is the nearest"),
        ("generic = {heads = [2]}", "teacher.generic.heads", "have no heads"),
    ],
)
def test_a_pool_that_does_not_exist_names_the_entry(folder: Path, table: str, key: str, words: str) -> None:
    refused(folder, write(folder, f'strategy = "generic"\n{table}'), key, words)


def test_a_pool_that_no_target_can_carry_says_which_limit_excludes_what(folder: Path) -> None:
    targets = target("tiny", SMALL, TIGHT) + target("small", WIDE, "memory_mib = 0.001\n")
    recipe = write(folder, 'strategy = "generic"\ngeneric = {widths = [8, 12], kernels = [3]}', targets=targets)
    refused(
        folder,
        recipe,
        "teacher.generic",
        "tiny: file_size_mib 0.001 excludes all",
        "small: memory_mib 0.001 excludes all",
        "teacher.generic.within_limits = false",
    )


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("generic = {paths = 3}", '"generic.paths" belongs to strategy "generic", this one is "frozen"; leave it out'),
        ("generic = {tau = 3.0}", '"generic.tau" belongs to strategy "generic" or "sftn", this one is "frozen"'),
        ('strategy = "sftn"\ngeneric = {paths = 3}', '"generic.paths" belongs to strategy "generic"'),
        ('strategy = "online"\ncoached = {lambda_inf = 1.0}', '"coached.lambda_inf" belongs to strategy "lgtm"'),
        ('strategy = "generic"\ncoached = {held_out = 0.1}', '"coached.held_out" belongs to strategy'),
        ('strategy = "lgtm"\ncoached = {lambda_inf = "ratio:x"}', "no lambda_inf"),
        ('strategy = "lgtm"\ncoached = {lambda_inf = -1}', "a number from 0 on"),
        ('strategy = "lgtm"\ncoached = {held_out = 0.7}', "less than or equal to 0.5"),
        ('strategy = "sftn"\ngeneric = {archs = ["conv-w8-d1-k3", "conv-w4-d1-k3"]}', "one architecture"),
        ('strategy = "lgmt"', 'did you mean "lgtm"'),
        ('strategy = "lgtm"\ncoached = {held_uot = 0.1}', 'unknown key "held_uot"'),
    ],
)
def test_keys_that_do_not_fit_the_strategy_name_themselves(folder: Path, teacher: str, words: str) -> None:
    refused(folder, write(folder, teacher), "teacher", words)


def test_layers_are_counted_in_transformers_alone(folder: Path) -> None:
    recipe = write(folder, 'strategy = "lgtm"\ncoached = {trainable_layers = 2}')
    refused(folder, recipe, "teacher.coached.trainable_layers", "all of the teacher learns")


def test_a_given_teacher_that_passes_no_gradient_is_told_before_training(folder: Path, tmp_path: Path) -> None:
    kind = 'kind = "torch"\nfactory = "strategy_teacher:still"\n'
    recipe = load_recipe(write(folder, 'strategy = "online"', kind=kind))
    with pytest.raises(InputError, match="cannot learn") as caught:
        Run(recipe, tmp_path / "run", allow_code=True).distill()
    assert caught.value.where == "teacher.factory"
    assert not (tmp_path / "run" / "students").exists()


def test_a_frozen_teacher_is_what_it_was(folder: Path, tmp_path: Path) -> None:
    """The same refusals do not reach a recipe without a strategy."""
    run = Run(load_recipe(write(folder, "", '"lelp"', kind=TRAINED)), tmp_path / "run")
    run.check()
