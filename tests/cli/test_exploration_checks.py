"""What an exploration cannot have is refused before training, by a run and by its dry run alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.pipeline import Run
from cli.recipe import load_recipe
from profiles.errors import InputError
from tests.cli.cli_runner import edgestill
from tests.cli.exploration_cases import VAE, explored, films, make_all
from tests.cli.strategy_cases import TRAINED

ARRAY = 'kind = "array"\nlogits = "logits.npy"\n'
ONNX = 'kind = "onnx"\nfile = "teacher.onnx"\noutput = "logits"\n'
NONE = 'kind = "none"\n'
EMBEDDINGS = 'kind = "torch"\nfactory = "strategy_teacher:make"\n'
OWN = 'kind = "random"\ngenerator = {kind = "torch", factory = "exploration_generator:make", kwargs = {%s}}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clothes")
    make_all(folder)
    return folder


def refused(folder: Path, recipe: str, key: str, *words: str, allow_code: bool = False) -> None:
    """Exit status 2 with the recipe key, the evidence and the fix, from the run and the dry run; nothing is trained."""
    out = folder / "never"
    for more in ([], ["--dry-run"]):
        result = edgestill(*(["-q", "run", recipe, "--out", str(out), *more] + ["--allow-code"] * allow_code))
        assert result.status == 2, (more, result.err)
        message = " ".join(result.err.split())
        assert key in message, (more, message)
        for word in words:
            assert word in message, (more, message)
    if out.exists():
        made = [path.name for path in out.iterdir()]
        assert not [name for name in made if name.startswith(("teacher", "cache", "students", "generator"))]


@pytest.mark.parametrize("kind", ["random", "gradient", "real"])
@pytest.mark.parametrize("teacher", [ARRAY, NONE], ids=["array", "none"])
def test_stored_outputs_and_no_teacher_cannot_be_asked(folder: Path, kind: str, teacher: str) -> None:
    recipe = explored(folder, f'kind = "{kind}"', kind=teacher)
    refused(folder, recipe, "teacher.kind", "cannot be asked", 'explore.kind = "none"')


def test_a_graph_in_a_file_has_no_gradient_to_follow(folder: Path) -> None:
    refused(folder, explored(folder, 'kind = "gradient"', kind=ONNX), "explore.kind", "ONNX", '"random"')


def test_there_must_be_unlabelled_inputs_to_explore_around(folder: Path) -> None:
    for around in ("unlabelled", "both"):
        recipe = explored(folder, f'kind = "real"\naround = "{around}"')
        refused(folder, recipe, "explore.around", "[data.unlabelled]")


def test_a_rest_needs_samples_that_are_left_over(folder: Path) -> None:
    recipe = explored(folder, 'kind = "real"\naround = "both"', data="[data.unlabelled]\nrest = true\n")
    refused(folder, recipe, "data.unlabelled.rest", "left over", "train_size")


def test_a_generator_of_texts_makes_no_images(folder: Path) -> None:
    recipe = explored(folder, 'kind = "random"\ngenerator = {kind = "masked-lm", model = "bert"}')
    refused(folder, recipe, "explore.generator.kind", '"vae"')


@pytest.mark.parametrize(
    ("explore", "key", "words"),
    [
        ('kind = "gradient"', "explore.kind", "tokens are discrete"),
        ('kind = "reconstructed"', "explore.kind", "belongs to images"),
        ('kind = "augmented"', "explore.kind", "belongs to images"),
        ('kind = "random"\ngenerator = {kind = "vae"}', "explore.generator.kind", '"masked-lm"'),
        ('kind = "random"', "explore.generator.model", "none is named"),
        ('kind = "random"\nsigma = 2.0\ngenerator = {model = "bert"}', "explore.sigma", "no radius"),
    ],
)
def test_texts_are_refilled_and_nothing_else(folder: Path, explore: str, key: str, words: str) -> None:
    refused(folder, films(folder, explore), key, words)


@pytest.mark.parametrize(
    ("objective", "words"),
    [('"crd"', 'objective "crd" knows samples by their place'), ('"supervised"', "all of them are supervised")],
)
def test_objectives_that_know_no_further_inputs_are_not_matched_on_them(
    folder: Path, objective: str, words: str
) -> None:
    recipe = explored(folder, 'kind = "real"\nmatch = "objective"', objective)
    refused(folder, recipe, "explore.match", words, '"kd"')


def test_several_labels_have_no_likeliest_class_to_filter_by(folder: Path) -> None:
    recipe = Path(explored(folder, 'kind = "real"\nfilter = "confidence"', data='task = "multilabel"', name="many"))
    recipe.write_text(recipe.read_text().replace("three.npz", "many.npz"))
    refused(folder, str(recipe), "explore.filter", 'explore.filter = "none"')


def test_a_teacher_that_learns_is_not_asked_once_and_for_all(folder: Path) -> None:
    recipe = explored(folder, 'kind = "real"\nversions = 2', teacher='strategy = "online"')
    refused(folder, recipe, "explore.versions", "learns along", "leave versions out")


@pytest.mark.parametrize(
    ("explore", "key", "words"),
    [
        ('kind = "rndom"', "explore.kind", 'did you mean "random"'),
        ('kind = "real"\nsigma = 2.0', "explore", '"sigma" belongs to kind "gradient" or "random"'),
        ('kind = "real"\nsigma = 2.0', "explore", "fix: leave explore.sigma out; or compare kinds"),
        ('kind = "real"\nbatch_size = 1', "explore.batch_size", "greater than or equal to 2"),
        ('kind = "random"\nsteps = 2', "explore", '"steps" belongs to kind "gradient"'),
        ('kind = "gradient"\nversions = 2', "explore", '"versions" belongs to kind'),
        ('kind = "gradient"\nsigma = 0.0', "explore", '"reconstructed" is that control'),
        ('kind = "random"\nsigma = -1.0', "explore.sigma", "greater than or equal to 0"),
        ('kind = "random"\nthreshold = 0.9', "explore", 'belongs to filter = "confidence"'),
        ('kind = "random"\nthreshold = 0.9', "explore", 'fix: explore.filter = "confidence", or leave'),
        ('kind = "random"\ngenerator = {kind = "torch"}', "explore.generator", 'needs "factory"'),
        ('kind = "random"\ngenerator = {kind = "vae", model = "x"}', "explore.generator", '"model" does not belong'),
        ('kind = "random"\ngenerator = {kind = "vae", model = "x"}', "explore.generator", 'kind = "masked-lm"'),
        ('kind = "random"\nsigmma = 1.0', "explore.sigmma", 'did you mean "sigma"'),
    ],
)
def test_keys_that_do_not_fit_the_kind_name_themselves(folder: Path, explore: str, key: str, words: str) -> None:
    refused(folder, explored(folder, explore), key, words)


def test_a_stored_recipe_may_spell_out_what_was_the_default_before(folder: Path) -> None:
    for kind in ("none", "real"):
        load_recipe(explored(folder, f'kind = "{kind}"\nsigma = 1.0', name="stored"))


def test_a_filter_that_keeps_nearly_nothing_stops_with_the_keep_rates(folder: Path, tmp_path: Path) -> None:
    recipe = explored(folder, 'kind = "real"\nfilter = "confidence"\nthreshold = 0.999')
    result = edgestill("-q", "run", recipe, "--out", str(tmp_path / "run"))
    assert result.status == 2
    message = " ".join(result.err.split())
    assert "explore.filter" in message
    assert "less than 5 %" in message
    assert "kept per class: " in message
    assert "explore.threshold below 0.999" in message
    assert not (tmp_path / "run" / "students").exists()


@pytest.mark.parametrize(
    ("explore", "objective", "key"),
    [
        ('kind = "real"\nmatch = "kd"', '"fitnet"', "explore.match"),
        ('kind = "real"\nfilter = "agreement"', '"fitnet"', "explore.filter"),
        ('kind = "real"', '"supervised"', "explore.match"),
        ('kind = "gradient"\n' + VAE, '"fitnet"', "explore.kind"),
    ],
)
def test_a_given_teacher_without_classes_is_told_before_training(
    folder: Path, tmp_path: Path, explore: str, objective: str, key: str
) -> None:
    recipe = load_recipe(explored(folder, explore, objective, kind=EMBEDDINGS))
    with pytest.raises(InputError) as caught:
        Run(recipe, tmp_path / "run", allow_code=True).distill()
    assert caught.value.where == key
    assert not {path.name for path in (tmp_path / "run").iterdir()} & {"students", "generator", "cache"}


@pytest.mark.parametrize(
    ("kwargs", "words"), [("side = 27", "another shape"), ("broken = true", "finite")], ids=["shape", "nan"]
)
def test_a_generator_of_the_users_is_looked_at_first(folder: Path, kwargs: str, words: str) -> None:
    recipe = explored(folder, OWN % kwargs)
    refused(folder, recipe, "explore.generator", words, allow_code=True)


@pytest.mark.parametrize(
    ("kwargs", "place"), [("scale = nan", "scale = nan"), ("sizes = [1.5, {low = -inf}]", "sizes[1].low = -inf")]
)
def test_arguments_that_cannot_be_stored_are_refused(folder: Path, kwargs: str, place: str) -> None:
    refused(folder, explored(folder, OWN % kwargs), "explore.generator.kwargs", place, "a word", allow_code=True)


@pytest.mark.parametrize("table", ["teacher", "student"])
def test_arguments_of_other_factories_are_refused_alike(folder: Path, table: str) -> None:
    kind = 'kind = "torch"\nfactory = "strategy_teacher:make"\nkwargs = {outputs = inf}\n'
    recipe = Path(explored(folder, "", kind=TRAINED if table == "student" else kind, name="arguments"))
    if table == "student":
        recipe.write_text(recipe.read_text().replace("[student]", f"[student]\n{kind}"))
    refused(folder, str(recipe), f"{table}.kwargs", "outputs = inf", "a word", allow_code=True)


def test_code_is_imported_when_it_is_allowed(folder: Path) -> None:
    refused(folder, explored(folder, OWN % ""), "--allow-code")


# -- studies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "explore", "asked", "words"),
    [
        (ARRAY, "", ["explore.kind=none,real"], "kd (real): this teacher cannot be asked"),
        (TRAINED, 'around = "unlabelled"\nkind = "real"', ["objective=supervised,kd"], "kd: there are no unlabelled"),
        (TRAINED, "", ["explore.sigma=1,2"], 'no method of this study reads "explore.sigma"'),
        (TRAINED, "", ["explore.kind=none,random", "explore.sigma=1,-1"], "greater than or equal to 0"),
        (TRAINED, "", ["explore.kind=none,rndom"], 'did you mean "random"'),
        (TRAINED, "", ['explore={kind="random"}'], "a method of a study, not a factor"),
    ],
)
def test_a_studys_dry_run_refuses_an_exploration_without_data(
    folder: Path, tmp_path: Path, teacher: str, explore: str, asked: list[str], words: str
) -> None:
    recipe = Path(explored(folder, explore, kind=teacher, name="dry"))
    recipe.write_text(recipe.read_text().replace("three.npz", "nowhere.npz"))
    varied = [part for each in asked for part in ("--vary", each)]
    result = edgestill("-q", "study", str(recipe), *varied, "--out", str(tmp_path / "study"), "--dry-run")
    assert result.status == 2, result.err
    assert words in " ".join(result.err.split())


def test_a_studys_methods_are_named_after_what_they_explore(folder: Path, tmp_path: Path) -> None:
    """The labels alone never explore; a factor of one kind of exploration leaves the others as they are."""
    recipe = explored(folder, 'kind = "gradient"\nsteps = 2', name="named")
    varied = ["objective=supervised,kd", "explore.kind=none,random,gradient", "explore.sigma=1,2"]
    asked = [part for each in varied for part in ("--vary", each)]
    result = edgestill("-q", "study", recipe, *asked, "--out", str(tmp_path / "study"), "--dry-run", "--json")
    assert result.status == 0, result.err
    names = [row["label"] for row in json.loads(result.out)["combinations"]]
    methods = ["supervised", "kd", "kd (random)", "kd (gradient)"]
    assert names == [f"{method}, sigma={sigma}" for sigma in (1, 2) for method in methods]
