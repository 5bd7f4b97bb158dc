"""Live teachers: copies that start where the frozen one is, learn where they should, and leave it alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distill.data import Dataset, InputSpec, Split
from distill.outputs import TeacherOutput
from distill.students import build_student
from distill.students.section import StudentSection
from distill.teachers import ModuleTeacher, NetworkTeacher, TeacherBatch, live_teacher, load_teacher
from distill.teachers import upper_layers as upper_layers_module
from distill.teachers.from_transformers import TransformersTeacher
from distill.teachers.section import TeacherSection
from distill.teachers.upper_layers import Tokens
from profiles.errors import EdgestillError, InputError

WORDS = ("good", "bad", "film", "a", "very", "the", "plot", "acting")
KEY = "teacher.coached.trainable_layers"
ROWS = np.array([0, 7, 3])


def images(classes: int = 3) -> Dataset:
    generator = np.random.default_rng(0)

    def split(count: int) -> Split:
        return Split(
            generator.integers(0, 256, (count, 1, 16, 16), dtype=np.uint8), generator.integers(0, classes, count)
        )

    spec = InputSpec("image", (1, 16, 16), (0.4,), (0.25,))
    return Dataset(
        "images", "multiclass", tuple("abc"[:classes]), spec, split(10), split(4), split(3), key=f"images {classes}"
    )


def texts(classes: int = 2) -> Dataset:
    generator = np.random.default_rng(0)

    def split(count: int) -> Split:
        rows = tuple(" ".join(generator.choice(WORDS, generator.integers(1, 9))) for _ in range(count))
        return Split(generator.integers(1, 9, (count, 8)), generator.integers(0, classes, count), texts=rows)

    spec = InputSpec("tokens", (8,), vocabulary=9)
    return Dataset(
        "texts", "multiclass", tuple("abc"[:classes]), spec, split(10), split(4), split(3), key=f"texts {classes}"
    )


def batch(data: Dataset, rows: Any = ROWS, split: Any = "train") -> TeacherBatch:
    rows = np.asarray(rows)
    return TeacherBatch(torch.from_numpy(data.split(split).inputs[rows]), split, rows)


# --- teachers of every kind -----------------------------------------------------------------------------------------

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.fixed = nn.Parameter(torch.ones(6), requires_grad=False)
        self.counter = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
        self.unused = nn.Linear(6, 2)
        self.fc = nn.Linear(6, classes)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.conv(x)).relu().mean((2, 3)) * self.fixed))

class Closed(Net):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)

class Locked(Net):
    def __init__(self):
        super().__init__()
        import threading
        self.lock = threading.Lock()

class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"live_net_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def load(folder: Path, data: Dataset, **keys: Any) -> NetworkTeacher:
    found = load_teacher(TeacherSection(**keys), data, base=folder, allow_code=True)
    assert isinstance(found, NetworkTeacher)
    return found


def trained(data: Dataset, arch: str) -> NetworkTeacher:
    network = build_student(StudentSection(), data.input, len(data.classes), arch=arch, seed=0, base=Path())
    return ModuleTeacher(network.train())


SMALL: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def configuration(family: str, **changes: Any) -> Any:
    import transformers

    if family == "distilbert":
        return transformers.DistilBertConfig(
            vocab_size=12, dim=16, n_layers=3, n_heads=2, hidden_dim=32, sinusoidal_pos_embds=True, **changes
        )
    if family == "vit":
        return transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32,
            patch_size=8, **changes
        )  # fmt: skip
    families = {
        "bert": transformers.BertConfig,
        "roberta": transformers.RobertaConfig,
        "mpnet": transformers.MPNetConfig,
        "llama": transformers.LlamaConfig,
        "albert": transformers.AlbertConfig,
        "fnet": transformers.FNetConfig,
    }
    return families[family](**SMALL, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a tiny random model of a family, as save_pretrained does; dropout is on while it trains."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    made: dict[Any, Path] = {}

    def make(family: str, labels: int | None = None) -> Path:
        if (family, labels) in made:
            return made[family, labels]
        path = tmp_path_factory.mktemp(family) / "model"
        config = configuration(family, **({} if labels is None else {"num_labels": labels}))
        torch.manual_seed(0)
        if family == "vit":
            processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
            path.mkdir()
            (path / "preprocessor_config.json").write_text(json.dumps(processor))
        else:
            vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
            raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
            raw.pre_tokenizer = pre_tokenizers.Whitespace()
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=raw,
                pad_token="[PAD]",
                unk_token="[UNK]",
                model_max_length=16,
                padding_side="left" if family == "llama" else "right",
            ).save_pretrained(path)
        classifier = (
            transformers.AutoModelForImageClassification
            if family == "vit"
            else transformers.AutoModelForSequenceClassification
        )
        (transformers.AutoModel if labels is None else classifier).from_config(config).save_pretrained(path)
        made[family, labels] = path
        return path

    return make


def transformer(path: Path, data: Dataset, **keys: Any) -> NetworkTeacher:
    return load(path.parent, data, kind="transformers", model=path.name, **keys)


def names(teacher: NetworkTeacher) -> set[str]:
    return {name for name, parameter in teacher.network.named_parameters() if parameter.requires_grad}


def assert_live(teacher: NetworkTeacher, live: NetworkTeacher, data: Dataset, *, tolerance: float = 0.0) -> None:
    """All that holds for a live teacher of any kind."""
    before, key = teacher.fingerprint(), teacher.key
    state = {name: value.clone() for name, value in live.network.state_dict().items()}
    assert type(live) is type(teacher)
    assert live.num_logits == len(data.classes)
    assert live.embedding_dim == teacher.embedding_dim
    assert live.head_weight is None
    assert {value.device for value in live.network.state_dict().values()} == {teacher.device}
    assert not any(module.training for module in live.network.modules())
    with pytest.raises(EdgestillError, match="not frozen"):
        live.assert_frozen()
    # the same outputs, on every split, with a gradient only when asked for one
    for split, rows in (("train", ROWS), ("validation", [2, 0]), ("test", [1])):
        expected, found = teacher.outputs(batch(data, rows, split)), live.outputs(batch(data, rows, split))
        assert found.embedding is not None
        assert found.logits is not None
        assert not found.logits.requires_grad
        assert not found.embedding.requires_grad
        torch.testing.assert_close(found.embedding, expected.embedding, atol=tolerance, rtol=tolerance)
        if expected.logits is not None:
            torch.testing.assert_close(found.logits, expected.logits, atol=tolerance, rtol=tolerance)
        else:
            assert found.logits.shape == (len(rows), len(data.classes))
            assert not found.logits.any()
    # a frozen teacher's compute has no graph
    assert not any(value is not None and value.requires_grad for value in teacher.compute(batch(data)))
    # gradients reach exactly what learns (a zero head lets nothing through before it has moved)
    learning = live.parameters_that_learn()
    assert {id(p) for p in learning} == {id(p) for n, p in live.network.named_parameters() if n in names(live)}
    optimiser = torch.optim.SGD(learning, lr=0.05)
    weights = torch.linspace(1, 2, len(ROWS) * len(data.classes)).view(len(ROWS), -1)
    for _ in range(2):
        optimiser.zero_grad()
        computed = live.compute(batch(data))
        assert computed.logits is not None
        assert computed.logits.dtype == torch.float32
        loss = (computed.logits.log_softmax(1) * weights).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    for name, parameter in live.network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    moved = _logits(live.outputs(batch(data)))
    assert not torch.equal(moved, _logits(live.outputs(batch(data, ROWS + 1))))
    # only they moved: fixed parameters and statistics did not
    for name, value in live.network.state_dict().items():
        if name not in names(live):
            assert torch.equal(value, state[name]), name
    assert any(not torch.equal(value, state[name]) for name, value in live.network.state_dict().items())
    assert live.key != key
    # the original knows nothing of it
    teacher.assert_frozen()
    assert teacher.fingerprint() == before
    assert teacher.key == key
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    # back to where it was, to the bit; and forward again in another copy
    trained_state = {name: value.clone() for name, value in live.network.state_dict().items()}
    live.network.load_state_dict(state)
    first = _logits(live.outputs(batch(data)))
    live.network.load_state_dict(trained_state)
    assert torch.equal(_logits(live.outputs(batch(data))), moved)
    live.network.load_state_dict(state)
    assert torch.equal(_logits(live.outputs(batch(data))), first)


def _logits(output: TeacherOutput) -> Tensor:
    assert output.logits is not None
    return output.logits


# --- modules and users' networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "data"),
    [
        ("conv-w8-d1-k3", images()),
        ("convi-w8-d1-k3", images()),
        ("text-w16-d2-h2", texts(3)),
        ("textc-w16-d1-k3", texts(3)),
    ],
)
def test_a_trained_network_learns_on_in_all_its_parameters(arch: str, data: Dataset) -> None:
    teacher = trained(data, arch)
    live = live_teacher(teacher, None, data)
    assert names(live) == {name for name, _ in live.network.named_parameters()} == names(teacher.live())
    assert live.key == teacher.key
    assert_live(teacher, live, data)


def test_a_users_network_keeps_what_it_fixed_and_leaves_out_what_it_never_asks(tmp_path: Path, nets: str) -> None:
    data = images()
    teacher = load(tmp_path, data, kind="torch", factory=f"{nets}:Net")
    live = live_teacher(teacher, None, data)
    layers = ("conv", "norm", "fc")
    assert names(live) == {f"network.{layer}.{what}" for layer in layers for what in ("weight", "bias")}
    assert_live(teacher, live, data)


def test_hooks_of_a_live_copy_see_the_copy_and_those_of_the_original_the_original(tmp_path: Path, nets: str) -> None:
    data = images()
    teacher = load(tmp_path, data, kind="torch", factory=f"{nets}:Net", embedding_layer="conv")
    live, other = live_teacher(teacher, None, data), live_teacher(teacher, None, data)
    expected = teacher.outputs(batch(data))
    with torch.no_grad():
        for parameter in live.parameters_that_learn():
            parameter.mul_(2)
    moved, still = live.outputs(batch(data)), other.outputs(batch(data))
    assert expected.embedding is not None
    torch.testing.assert_close(moved.embedding, 2 * expected.embedding)
    assert torch.equal(teacher.outputs(batch(data)).embedding, expected.embedding)  # type: ignore[arg-type]
    assert torch.equal(still.embedding, expected.embedding)  # type: ignore[arg-type]


def test_a_users_network_of_embeddings_alone_gets_a_head_of_zeros(tmp_path: Path, nets: str) -> None:
    data = images()
    teacher = load(tmp_path, data, kind="torch", factory=f"{nets}:Net", kwargs={"classes": 7})
    assert teacher.num_logits is None
    state = torch.random.get_rng_state()
    live = live_teacher(teacher, None, data)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not names(live) & {"network.fc.weight", "network.fc.bias"}  # its own logits are of another task
    assert {"head.weight", "head.bias"} <= names(live)
    assert_live(teacher, live, data)


def test_a_single_logit_stays_zero_and_z(tmp_path: Path, nets: str) -> None:
    data = images(2)
    teacher = load(tmp_path, data, kind="torch", factory=f"{nets}:Net", kwargs={"classes": 1})
    live = live_teacher(teacher, None, data)
    assert live.single_logit
    found = live.compute(batch(data)).logits
    assert found is not None
    assert not found[:, 0].any()
    assert found.requires_grad
    assert_live(teacher, live, data)


def test_a_network_that_came_wholly_frozen_learns_wholly(tmp_path: Path, nets: str) -> None:
    data = images()
    teacher = load(tmp_path, data, kind="torch", factory=f"{nets}:Frozen")
    assert "network.fixed" in names(live_teacher(teacher, None, data))
    # as does a network that another teacher has frozen before
    network = build_student(StudentSection(), data.input, 3, arch="conv-w8-d1-k3", seed=0, base=Path())
    ModuleTeacher(network)
    assert len(ModuleTeacher(network).live().parameters_that_learn()) == len(list(network.parameters()))


def test_networks_that_pass_no_gradient_or_cannot_be_copied_are_refused(tmp_path: Path, nets: str) -> None:
    data = images()
    with pytest.raises(InputError, match="cannot learn") as error:
        live_teacher(load(tmp_path, data, kind="torch", factory=f"{nets}:Closed"), None, data)
    assert error.value.where == "teacher.factory"
    with pytest.raises(InputError, match="cannot be copied") as error:
        live_teacher(load(tmp_path, data, kind="torch", factory=f"{nets}:Locked"), None, data)
    assert error.value.where == "teacher.factory"


def test_layers_are_counted_in_transformers_alone(tmp_path: Path, nets: str) -> None:
    data = images()
    for teacher in (trained(data, "conv-w8-d1-k3"), load(tmp_path, data, kind="torch", factory=f"{nets}:Net")):
        with pytest.raises(InputError) as error:
            teacher.live(2)
        assert (error.value.where, error.value.fix) == (KEY, "leave it out: all layers learn")


def test_stored_outputs_and_graphs_cannot_learn(tmp_path: Path) -> None:
    data = images()
    np.save(tmp_path / "logits.npy", np.zeros((10, 3), np.float32))
    stored = load_teacher(TeacherSection(kind="array", logits="logits.npy"), data, base=tmp_path)
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).eval()
    torch.onnx.export(
        network, (torch.zeros(1, 1, 16, 16),), tmp_path / "net.onnx", output_names=["logits"], dynamo=False,
        dynamic_axes={"input": {0: "n"}, "logits": {0: "n"}}, input_names=["input"],
    )  # fmt: skip
    graph = load_teacher(TeacherSection(kind="onnx", file="net.onnx", output="logits"), data, base=tmp_path)
    for teacher, says in ((stored, 'kind "array" is only stored outputs'), (graph, 'kind "onnx"')):
        with pytest.raises(InputError, match=says) as error:
            live_teacher(teacher, None, data)
        assert error.value.where == "teacher.kind"
        assert error.value.fix == 'kind = "train", "torch" or "transformers", or teacher.strategy = "frozen"'


def test_a_network_trained_with_subclasses_is_refused(tmp_path: Path) -> None:
    data = images()
    network = build_student(StudentSection(), data.input, 6, arch="conv-w8-d1-k3", seed=0, base=Path())
    with pytest.raises(InputError, match="6 logits, the data set has 3 classes"):
        live_teacher(ModuleTeacher(network), None, data)


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_all_of_a_transformer_learns_but_a_pooler_that_nobody_asks(family: str, folder: Callable[..., Path]) -> None:
    data = texts(3)
    teacher = transformer(folder(family), data)
    assert teacher.num_logits is None
    live = live_teacher(teacher, None, data)
    every = {name for name, _ in live.network.named_parameters()}
    assert names(live) == {name for name in every if "pooler" not in name}
    # not to the bit: the frozen weights are mapped from a file, where they begin at other addresses
    assert_live(teacher, live, data, tolerance=1e-6)


def test_a_classifier_learns_with_its_pooler_and_keeps_its_own_head(folder: Callable[..., Path]) -> None:
    data = texts()
    teacher = transformer(folder("bert", 2), data, classification=True)
    live = live_teacher(teacher, None, data)
    assert names(live) == {name for name, _ in live.network.named_parameters()}
    assert any("pooler" in name for name in names(live))
    assert_live(teacher, live, data, tolerance=1e-6)


def test_a_classifier_of_one_label_stays_zero_and_z(folder: Callable[..., Path]) -> None:
    data = texts()
    teacher = transformer(folder("bert", 1), data, classification=True)
    live = live_teacher(teacher, 1, data)
    assert not _logits(live.compute(batch(data)))[:, 0].any()
    assert_live(teacher, live, data, tolerance=1e-5)


@pytest.mark.parametrize(
    ("family", "count"), [("bert", 1), ("bert", 2), ("bert", 3), ("roberta", 2), ("distilbert", 2), ("llama", 1)]
)
def test_only_the_last_layers_learn_and_the_outputs_stay(family: str, count: int, folder: Callable[..., Path]) -> None:
    data = texts(3)
    teacher = transformer(folder(family), data, pooling="last" if family == "llama" else "mean")
    live = live_teacher(teacher, count, data)
    stack = {"distilbert": "model.transformer.layer", "llama": "model.layers"}.get(family, "model.encoder.layer")
    chosen = tuple(f"{stack}.{index}." for index in range(3 - count, 3))
    after = ("head.", "model.norm.")
    assert names(live) == {n for n, _ in live.network.named_parameters() if n.startswith((*chosen, *after))}
    assert_live(teacher, live, data, tolerance=1e-5)


def test_a_position_bias_that_frozen_layers_share_stays_frozen(folder: Callable[..., Path]) -> None:
    data = texts()
    teacher = transformer(folder("mpnet"), data)
    assert "model.encoder.relative_attention_bias.weight" in names(live_teacher(teacher, None, data))
    live = live_teacher(teacher, 2, data)
    assert "model.encoder.relative_attention_bias.weight" not in names(live)
    assert_live(teacher, live, data, tolerance=1e-5)


def test_after_it_learned_the_whole_network_of_its_weights_says_the_same(folder: Callable[..., Path]) -> None:
    data = texts()
    teacher = transformer(folder("bert", 2), data, classification=True)
    live, whole = live_teacher(teacher, 2, data), live_teacher(teacher, None, data)
    optimiser = torch.optim.AdamW(live.parameters_that_learn(), lr=0.01)
    for _ in range(3):
        loss = _logits(live.compute(batch(data))).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    whole.network.load_state_dict(live.network.state_dict())
    for split, rows in (("train", np.arange(10)), ("validation", np.arange(4))):
        found, expected = live.outputs(batch(data, rows, split)), whole.outputs(batch(data, rows, split))
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.embedding, expected.embedding, atol=1e-5, rtol=1e-5)


def test_frozen_layers_run_once_per_split_and_texts_are_tokenised_once(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = texts()
    teacher = transformer(folder("bert"), data, batch_size=4)
    live = live_teacher(teacher, 1, data)
    assert isinstance(live, TransformersTeacher)
    attention = live.network.get_submodule("model.encoder.layer.0.attention")
    top = live.network.get_submodule("model.encoder.layer.2.attention")
    calls, read = {"lower": 0, "upper": 0}, []
    attention.register_forward_hook(lambda *_: calls.__setitem__("lower", calls["lower"] + 1))
    top.register_forward_hook(lambda *_: calls.__setitem__("upper", calls["upper"] + 1))
    encode = live._encode

    def counted(found: list[str]) -> dict[str, Tensor]:
        read.append(len(found))
        return encode(found)

    monkeypatch.setattr(live, "_encode", counted)
    for _ in range(5):
        live.compute(batch(data))
    assert calls == {"lower": 3, "upper": 3 + 5}  # ten texts, four at a time; then only the steps
    live.outputs(batch(data, [0, 1], "validation"))
    assert calls == {"lower": 3 + 1, "upper": 3 + 5 + 2}
    assert read == [10, 4]


def test_what_is_large_is_kept_in_half_precision(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data = texts()
    teacher = transformer(folder("bert"), data)
    small = live_teacher(teacher, 1, data)
    assert isinstance(small, TransformersTeacher)
    small.outputs(batch(data))
    assert small._entering["train"].dtype == torch.float32
    monkeypatch.setattr(upper_layers_module, "FLOAT32_BYTES", 100)
    large = live_teacher(teacher, 1, data)
    assert isinstance(large, TransformersTeacher)
    found, expected = large.outputs(batch(data)), teacher.outputs(batch(data))
    assert large._entering["train"].dtype == torch.float16
    assert found.embedding is not None
    assert found.embedding.dtype == torch.float32
    assert not torch.equal(found.embedding, expected.embedding)  # type: ignore[arg-type]
    torch.testing.assert_close(found.embedding, expected.embedding, atol=5e-3, rtol=5e-3)
    # values beyond float16 are told, not stored as infinity
    with torch.no_grad():
        large.network.get_submodule("model.encoder.layer.1.output.LayerNorm").weight.fill_(1e6)  # type: ignore[operator]
    with pytest.raises(InputError, match="float16") as error:
        large.outputs(batch(data, [0], "validation"))
    assert error.value.where == KEY


def test_the_frozen_part_is_computed_in_full_precision_under_autocast(folder: Callable[..., Path]) -> None:
    data = texts()
    teacher = transformer(folder("bert"), data)
    live = live_teacher(teacher, 1, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _logits(live.compute(batch(data))).dtype == torch.float32
    torch.testing.assert_close(
        live.outputs(batch(data)), teacher.outputs(batch(data))._replace(logits=torch.zeros(3, 2))
    )


def test_an_image_transformers_frozen_layers_follow_the_views(folder: Callable[..., Path]) -> None:
    data = images()
    teacher = transformer(folder("vit"), data, pooling="cls")
    assert_live(teacher, live_teacher(teacher, None, data), data, tolerance=1e-6)
    live = live_teacher(teacher, 2, data)
    assert {found[1] for name in names(live) if (found := re.search(r"layers?\.(\d)\.", name))} == {"1", "2"}
    assert not any("embeddings" in name for name in names(live))
    flipped = batch(data)._replace(inputs=batch(data).inputs.flip(3))
    torch.testing.assert_close(live.outputs(flipped).embedding, teacher.outputs(flipped).embedding)
    assert_live(teacher, live, data, tolerance=1e-6)


def test_layers_that_do_not_fit_are_refused_with_their_number(folder: Callable[..., Path]) -> None:
    data = texts()
    with pytest.raises(InputError, match="has 3 layers") as error:
        transformer(folder("bert"), data).live(4)
    assert error.value.where == KEY
    assert error.value.fix == "at most 3; or leave it out: all layers learn"
    # one layer used three times, and one that mixes padding into the texts
    for family, says in (("albert", "cannot tell"), ("fnet", "cannot run without the others")):
        with pytest.raises(InputError, match=says) as error:
            transformer(folder(family), data).live(2)
        assert (error.value.where, error.value.fix) == (KEY, "leave it out: all layers learn")
        assert error.value.evidence


def test_a_teachers_key_does_not_depend_on_its_strategy(tmp_path: Path, nets: str, folder: Callable[..., Path]) -> None:
    text, image = texts(), images()
    for path, data, keys in (
        (folder("bert").parent, text, {"kind": "transformers", "model": "model"}),
        (tmp_path, image, {"kind": "torch", "factory": f"{nets}:Net"}),
    ):
        frozen = load(path, data, **keys)
        coached = load(path, data, **keys, strategy="lgtm", coached={"hard_weight": 0.4, "learning_rate": 1e-4})
        with torch.no_grad():  # a factory without weights draws them; the same seed draws the same
            assert frozen.fingerprint() == coached.fingerprint()
        assert frozen.key == coached.key


def test_split_without_texts_is_told(folder: Callable[..., Path]) -> None:
    data = texts()
    data = replace(data, test=replace(data.test, texts=None))
    live = live_teacher(transformer(folder("bert"), data), 1, data)
    with pytest.raises(InputError, match="the test split has no texts"):
        live.outputs(batch(data, [0], "test"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU (torch.cuda.is_available() is false)")
@pytest.mark.parametrize(("layers", "kept"), [(None, 2**30), (2, 2**30), (2, 100)])
def test_a_live_teacher_on_the_gpu_says_what_the_one_on_the_cpu_says(
    layers: int | None, kept: int, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upper_layers_module, "FLOAT32_BYTES", kept)
    data, path = texts(), folder("bert", 2)
    section = TeacherSection(kind="transformers", model=path.name, classification=True)
    found = []
    for device in ("cpu", "cuda"):
        teacher = load_teacher(section, data, base=path.parent, device=device)
        computed = live_teacher(teacher, layers, data).compute(batch(data))
        assert _logits(computed).device.type == device
        found.append(computed.logits.detach().cpu())  # type: ignore[union-attr]
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)


# --- inputs that are in no split ------------------------------------------------------------------------------------


def new_texts(data: Dataset, *words: str) -> TeacherBatch:
    """Texts of no split, beside rows and tokens that say something else."""
    return batch(data, np.arange(len(words)))._replace(texts=words)


def test_a_transformer_reads_the_texts_that_it_is_given(folder: Callable[..., Path]) -> None:
    data = texts()
    teacher = transformer(folder("bert", 2), data, classification=True)
    rows = data.train.texts
    assert rows is not None
    given_back = teacher.outputs(new_texts(data, rows[7], rows[0], rows[3]))
    torch.testing.assert_close(given_back, teacher.outputs(batch(data, [7, 0, 3])))
    told = teacher.outputs(new_texts(data, "good film", "bad"))
    assert not torch.allclose(_logits(told), _logits(teacher.outputs(batch(data, [0, 1]))))
    torch.testing.assert_close(_logits(told)[1:], _logits(teacher.outputs(new_texts(data, "bad"))))


@pytest.mark.parametrize("layers", [None, 1, 2])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_live_transformer_reads_new_texts_afresh(
    family: str, layers: int | None, folder: Callable[..., Path]
) -> None:
    data = texts()
    teacher = transformer(folder(family, 2), data, classification=True, pooling="last" if family == "llama" else "mean")
    live = live_teacher(teacher, layers, data)
    kept = live.outputs(batch(data))  # what is kept of a split is of its own texts
    asked = new_texts(data, "good plot", "very bad acting", "a")
    torch.testing.assert_close(live.outputs(asked), teacher.outputs(asked), atol=1e-5, rtol=1e-5)
    computed = live.compute(asked)
    learning = live.parameters_that_learn()
    gradients = torch.autograd.grad(_logits(computed).square().sum(), learning, allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
    # the same texts under other rows say the same, and the split still says what it said
    torch.testing.assert_close(live.outputs(asked._replace(rows=np.array([9, 9, 9]), split="test")), computed)
    assert torch.equal(_logits(live.outputs(batch(data))), _logits(kept))
    # after it learned, as well
    with torch.no_grad():
        for parameter in learning:
            parameter.mul_(1.1)
    whole = live_teacher(teacher, None, data)
    whole.network.load_state_dict(live.network.state_dict())
    torch.testing.assert_close(live.outputs(asked), whole.outputs(asked), atol=1e-5, rtol=1e-5)


def test_stored_outputs_refuse_what_they_never_saw(tmp_path: Path) -> None:
    np.save(tmp_path / "logits.npy", np.zeros((10, 2), np.float32))
    data = texts()
    stored = load_teacher(TeacherSection(kind="array", logits="logits.npy"), data, base=tmp_path)
    assert not stored.runs_live
    assert stored.outputs(batch(data)).logits is not None
    pixels = batch(images(2))
    for asked in (new_texts(data, "a film"), pixels._replace(inputs=pixels.inputs.float())):
        with pytest.raises(InputError, match="cannot say anything about new inputs") as error:
            stored.outputs(asked)
        assert error.value.where == "teacher.kind"
        assert "transformers" in (error.value.fix or "")


class Pixels(nn.Module):
    """Takes pixels of 0 to 255, whole or floating."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        output: Tensor = self.head(pixels.float().flatten(1) / 255)
        return output


@pytest.mark.parametrize("whole_pixels", [True, False])
def test_a_graph_runs_on_what_it_is_given(whole_pixels: bool, tmp_path: Path) -> None:
    data = images()
    example = torch.zeros(1, 1, 16, 16, dtype=torch.uint8 if whole_pixels else torch.float32)
    torch.manual_seed(0)
    torch.onnx.export(
        Pixels().eval(), (example,), tmp_path / "net.onnx", output_names=["logits"], dynamo=False,
        dynamic_axes={"input": {0: "n"}, "logits": {0: "n"}}, input_names=["input"],
    )  # fmt: skip
    graph = load_teacher(TeacherSection(kind="onnx", file="net.onnx", output="logits"), data, base=tmp_path)
    assert graph.runs_live
    real = batch(data)
    expected = _logits(graph.outputs(real))
    # whatever the rows say; floating pixels a hair below the whole ones are these
    pixels = (real.inputs.float() - 1e-4).requires_grad_()
    found = graph.outputs(TeacherBatch(pixels, "test", np.zeros(3, np.int64)))
    torch.testing.assert_close(_logits(found), expected, atol=1e-4, rtol=1e-4)
    other = graph.outputs(real._replace(inputs=255 - real.inputs))
    assert not torch.allclose(_logits(other), expected, atol=1e-2)


@pytest.mark.parametrize("kind", ["train", "torch", "transformers"])
def test_gradients_reach_the_pixels(kind: str, tmp_path: Path, nets: str, folder: Callable[..., Path]) -> None:
    data = images()
    if kind == "train":
        teacher = trained(data, "conv-w8-d1-k3")
    elif kind == "torch":
        teacher = load(tmp_path, data, kind="torch", factory=f"{nets}:Net")
    else:
        teacher = transformer(folder("vit", 3), data, classification=True)
    real = batch(data)
    whole = teacher.outputs(real)
    torch.testing.assert_close(teacher.outputs(real._replace(inputs=real.inputs.float())), whole)
    # autograd against a central difference along random directions; kinks of ReLU are avoided by a small step
    teacher.network.double()
    weights = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)

    def value(pixels: Tensor) -> Tensor:
        return (_logits(teacher.compute(real._replace(inputs=pixels))).double().softmax(1) * weights).sum()

    pixels = real.inputs.double().requires_grad_()
    (gradient,) = torch.autograd.grad(value(pixels), pixels)
    assert gradient.shape == real.inputs.shape
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        # along the gradient itself, tilted at random: far above the float32 rounding of the outputs
        direction = gradient / gradient.norm() + 0.05 * torch.randn(gradient.shape, generator=generator).double()
        step = 0.5
        with torch.no_grad():
            difference = (value(pixels + step * direction) - value(pixels - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=2e-2)
    teacher.assert_frozen()
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


# --- kept texts -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    side=st.sampled_from(["left", "right"]),
    data=st.data(),
)
def test_kept_tokens_come_back_as_the_tokenizer_pads_them(lengths: list[int], side: str, data: Any) -> None:
    words = [list(range(10 * i + 1, 10 * i + 1 + length)) for i, length in enumerate(lengths)]

    def padded(chosen: list[list[int]]) -> dict[str, Tensor]:
        longest = max(1, *(len(row) for row in chosen)) if len(chosen) > 1 else max(1, len(chosen[0]))
        ids, mask = [], []
        for row in chosen:
            gap = [0] * (longest - len(row))
            ids.append(gap + row if side == "left" else row + gap)
            mask.append([int(word > 0) for word in ids[-1]])
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    tokens = Tokens(padded(words), side)
    expected, found = padded([words[row] for row in rows]), tokens.batch(np.array(rows), torch.device("cpu"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    places, real = tokens.places(np.array(rows))
    assert real.tolist() == expected["attention_mask"].bool().tolist()
    for row, at, is_real, ids in zip(rows, places, real, expected["input_ids"].tolist(), strict=True):
        assert [words[row][p] for p in at[is_real]] == [i for i in ids if i > 0]
