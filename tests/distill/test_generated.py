import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.exploration.further import Maker, Pool
from distill.exploration.generated import GeneratedSet, build_generated, open_generated
from distill.exploration.section import ExploreSection
from distill.exploration.space import Draws
from distill.teachers.teacher import ModuleTeacher, TeacherBatch
from profiles.artifact import read_manifest, verify
from profiles.errors import InputError
from tests.distill.exploration_cases import PCA, Exploring, Swapping, decisive, texts_dataset
from tests.distill.test_exploration import Embeds, Stored, some_unlabelled
from tests.distill.training_cases import Case, dataset, same_weights, student


def exploring(**keys: Any) -> Exploring:
    """A random exploration of two versions unless `keys` say otherwise, two epochs."""
    return Exploring(ExploreSection.model_validate({"kind": "random", "versions": 2, **keys}), Case("kd"))


def built(case: Exploring, folder: Path, **options: Any) -> GeneratedSet:
    """The fixed set of a case."""
    keys: dict[str, Any] = {"generator": case.generator(), "unlabelled": case.unlabelled, "seed": 0, "device": "cpu"}
    keys |= options
    return build_generated(case.section, keys.pop("teacher", None) or case.teacher(), case.data, folder, **keys)


@pytest.mark.parametrize("kind", ["random", "reconstructed", "augmented", "real"])
def test_a_fixed_set_holds_every_version_of_every_real_input_with_the_teachers_outputs(
    kind: str, tmp_path: Path
) -> None:
    case = replace(exploring(kind=kind, around="both"), unlabelled=some_unlabelled(dataset()))
    found = built(case, tmp_path / "set")
    verify(tmp_path / "set", "generated")
    assert found.inputs.shape == (2, 136, 3, 8, 8)
    assert found.inputs.dtype == np.uint8
    assert found.keep.all()
    assert found.keep_rates == {}
    assert found.texts() is None
    pool = Pool("both", case.data, case.unlabelled, device=torch.device("cpu"))
    maker = Maker(case.section, case.data, case.generator(), torch.device("cpu"), 0)
    teacher = case.teacher()
    for version in range(2):
        made = maker.make(pool.take(np.arange(136)), Draws(0, version), step=version)
        assert np.array_equal(found.inputs[version], made.inputs.numpy())
        told = teacher.outputs(TeacherBatch(made.inputs, "train", np.zeros(136, np.int64)))
        for stored, value in ((found.logits, told.logits), (found.embedding, told.embedding)):
            assert stored is not None
            assert value is not None
            assert np.allclose(stored[version], value.numpy(), rtol=1e-5, atol=1e-5)
    changes = not np.array_equal(found.inputs[0], found.inputs[1])
    assert changes == (kind in ("random", "augmented"))


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 120))
def test_the_size_of_the_passes_changes_no_input(size: int) -> None:
    case = exploring(kind="augmented", filter="agreement")
    with tempfile.TemporaryDirectory() as folder:
        found = built(case, Path(folder) / "a", batch_size=size)
        whole = built(case, Path(folder) / "b")
        assert np.array_equal(found.inputs, whole.inputs)
        assert found.keep_rates == whole.keep_rates


def test_random_offsets_do_not_depend_on_the_size_of_the_passes(tmp_path: Path) -> None:
    """Up to the rounding of the decoder's sums, which may move a pixel by one."""
    case = exploring()
    apart = built(case, tmp_path / "a", batch_size=7).inputs.astype(int) - built(case, tmp_path / "b").inputs
    assert abs(apart).max() <= 1
    assert (apart != 0).mean() < 0.001


def test_a_finished_set_is_opened_and_one_of_other_things_is_made_anew(tmp_path: Path) -> None:
    class Counting(PCA):
        decoded = 0

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            Counting.decoded += 1
            return super().decode(latents)

    data = dataset()
    first = built(exploring(), tmp_path / "set", generator=Counting(data.train.inputs))
    assert Counting.decoded == 2
    again = built(exploring(), tmp_path / "set", generator=Counting(data.train.inputs))
    assert Counting.decoded == 2
    assert again.key == first.key
    for learned in ({"weight": 0.2}, {"tau": 3.0}, {"batch_size": 8}, {"match": "objective"}):
        assert built(exploring(**learned), tmp_path / "set").key == first.key
    unlabelled = some_unlabelled(data)
    others: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"versions": 1}, {}),
        ({"sigma": 2.0}, {}),
        ({"filter": "agreement"}, {}),
        ({}, {"seed": 1}),
        ({}, {"teacher": ModuleTeacher(student(8))}),
        ({}, {"generator": PCA(data.train.inputs, 3)}),
        ({"around": "both"}, {"unlabelled": unlabelled}),
        ({}, {"unlabelled": unlabelled}),
    ]
    keys = [built(exploring(**keys), tmp_path / "set", **options).key for keys, options in others]
    assert len({first.key, *keys}) == len(keys) + 1


def test_training_on_a_fixed_set_reads_one_version_per_epoch_and_asks_nobody(tmp_path: Path) -> None:
    class Silent(ModuleTeacher):
        """May be hashed, not asked."""

        def outputs(self, batch: TeacherBatch) -> Any:
            raise AssertionError("asked")

    case = exploring()
    case = replace(case, case=case.case.with_(epochs=3), generated=built(case, tmp_path / "set"))
    exploration = case.build(teacher=Silent(decisive()), generator=None)
    result, net, _ = case.run(tmp_path / "s", exploration=exploration)
    assert case.generated is not None
    assert len(exploration.seen) == 18
    for step, ready in enumerate(exploration.seen):
        version = step // 6 % 2
        known = {image.tobytes(): row for row, image in enumerate(case.generated.inputs[version])}
        rows = [known[image.numpy().tobytes()] for image in ready.inputs]
        assert case.generated.logits is not None
        assert np.array_equal(ready.told.logits.numpy(), case.generated.logits[version][rows])
    assert "explore/divergence" in result.history[0]
    again = case.build(generator=None)
    assert same_weights(net, case.run(tmp_path / "again", exploration=again)[1])


def test_with_weight_zero_a_fixed_set_changes_nothing(tmp_path: Path) -> None:
    case = exploring(weight=0.0)
    case = replace(case, generated=built(case, tmp_path / "set"))
    assert same_weights(case.run(tmp_path / "s")[1], case.plain(tmp_path / "plain"))


@pytest.mark.parametrize("keys", [{"filter": "confidence", "threshold": 0.3}, {"filter": "agreement"}])
def test_the_filter_of_a_fixed_set_and_its_rates(keys: dict[str, Any], tmp_path: Path) -> None:
    case = exploring(kind="augmented", **keys)
    found = built(case, tmp_path / "set")
    assert found.logits is not None
    probability = torch.from_numpy(np.array(found.logits)).softmax(2).numpy()
    if keys["filter"] == "confidence":
        expected, classes = probability.max(2) >= 0.3, probability.argmax(2)
    else:
        real = case.teacher().outputs(
            TeacherBatch(torch.from_numpy(case.data.train.inputs), "train", np.zeros(96, np.int64))
        )
        assert real.logits is not None
        classes = np.broadcast_to(real.logits.argmax(1).numpy(), (2, 96))
        expected = probability.argmax(2) == classes
    assert np.array_equal(found.keep, expected)
    assert 0.05 < expected.mean() < 1
    assert found.keep_rates["explore/kept"] == pytest.approx(expected.mean())
    for index, name in enumerate("abcd"):
        here = expected[classes == index]
        assert found.keep_rates.get(f"explore/kept/{name}") == (pytest.approx(here.mean()) if here.size else None)
    case = replace(case, generated=found)
    result, _, exploration = case.run(tmp_path / "s")
    assert result.history[0]["explore/kept"] == pytest.approx(expected.mean())
    assert not all(ready.keep.all() for ready in exploration.seen)


def test_texts_are_stored_beside_their_tokens(tmp_path: Path) -> None:
    data = texts_dataset(tmp_path)
    section = ExploreSection.model_validate(
        {"kind": "random", "versions": 2, "generator": {"kind": "masked-lm", "model": "here"}}
    )
    case = Exploring(section, Case("kd", data=data, views=1).with_(epochs=1), texts=Swapping(["a", "b", "c", "d"]))
    found = built(case, tmp_path / "set")
    texts = found.texts()
    assert texts is not None
    assert [len(version) for version in texts] == [40, 40]
    assert texts[0] != texts[1]
    assert found.inputs.shape == (2, 40, 6)
    assert found.inputs.dtype == np.int64
    replace(case, generated=found).run(tmp_path / "s")


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ({"filter": "confidence", "threshold": 0.999}, {"teacher": ModuleTeacher(student(7))}, r"keeps 0\.0 %"),
        ({}, {"teacher": Stored(None)}, "cannot be asked"),
        ({"filter": "agreement"}, {"teacher": Embeds()}, "no logits for the 4 classes"),
        ({"around": "unlabelled"}, {}, "no unlabelled inputs"),
        ({}, {"generator": None}, "needs a generator"),
    ],
)
def test_what_cannot_work_leaves_no_set(
    keys: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        built(exploring(**keys), tmp_path / "set", **options)
    assert not list(tmp_path.iterdir())


def test_values_that_are_not_finite_leave_no_set(tmp_path: Path) -> None:
    generator = PCA(dataset().train.inputs)
    generator.calls_until_nan = 3
    with pytest.raises(InputError, match="decodes values that are not finite") as caught:
        built(exploring(), tmp_path / "set", generator=generator, batch_size=40)
    assert caught.value.evidence == "version 2, real inputs 0 to 39"
    infinite = decisive()
    with torch.no_grad():
        infinite.head.bias[1] = torch.inf
    with pytest.raises(InputError, match="logits of generated inputs are not finite"):
        built(exploring(), tmp_path / "set", teacher=ModuleTeacher(infinite))
    assert not list(tmp_path.iterdir())


def test_a_set_of_other_real_inputs_is_refused(tmp_path: Path) -> None:
    found = built(exploring(), tmp_path / "set")
    case = replace(exploring(around="both"), unlabelled=some_unlabelled(dataset()), generated=found)
    with pytest.raises(InputError, match="the fixed set belongs to other real inputs"):
        case.run(tmp_path / "s")


def test_a_damaged_set_is_named(tmp_path: Path) -> None:
    built(exploring(), tmp_path / "set")
    (tmp_path / "set" / "inputs.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(InputError, match=r"damaged set of generated inputs: inputs\.npy"):
        open_generated(tmp_path / "set")


def test_the_manifest_tells_sizes(tmp_path: Path) -> None:
    built(exploring(), tmp_path / "set")
    info = read_manifest(tmp_path / "set", "generated").info
    assert (info["versions"], info["real"], info["filtered"]) == (2, 96, False)
