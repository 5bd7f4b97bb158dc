"""Texts refilled by real, tiny masked language models: what is masked, what is drawn, what learns, what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from distill.exploration import masked_lm as module
from distill.exploration.masked_lm import MaskedLM, Words, corrupt, draw, make_text_generator, quantiles
from distill.exploration.section import GeneratorSection
from profiles.artifact import read_manifest, verify
from profiles.errors import InputError

transformers = pytest.importorskip("transformers")

SUBJECTS = ("the film", "this movie", "a plot", "the acting", "its ending")
VERBS = ("is", "was", "seems", "feels")
OPINIONS = ("very good", "rather bad", "quite funny", "too long", "simply brilliant", "unwatchable")
TEXTS = tuple(f"{a} {b} {c}." for a, b, c in itertools.product(SUBJECTS, VERBS, OPINIONS))
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece() -> Any:
    from tokenizers import BertWordPieceTokenizer

    raw = BertWordPieceTokenizer(lowercase=True)
    raw.train_from_iterator(TEXTS, vocab_size=90, min_frequency=1, show_progress=False, special_tokens=SPECIAL)
    return transformers.BertTokenizerFast(tokenizer_object=raw._tokenizer)


def byte_level() -> Any:
    from tokenizers import ByteLevelBPETokenizer

    raw = ByteLevelBPETokenizer(add_prefix_space=True)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    raw.train_from_iterator(TEXTS, vocab_size=420, min_frequency=1, show_progress=False, special_tokens=special)
    return transformers.RobertaTokenizerFast(tokenizer_object=raw._tokenizer, add_prefix_space=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a tiny random model with its tokenizer, as save_pretrained does."""
    made: dict[Any, Path] = {}

    def make(family: str = "bert", *, head: bool = True) -> Path:
        if (family, head) in made:
            return made[family, head]
        path = tmp_path_factory.mktemp(family) / "model"
        tokenizer = byte_level() if family == "roberta" else wordpiece()
        tokenizer.save_pretrained(path)
        sizes = {**SIZES, "vocab_size": len(tokenizer) + 3}  # as padded vocabularies have it
        config = {
            "bert": lambda: transformers.BertConfig(**sizes),
            "mpnet": lambda: transformers.MPNetConfig(**sizes),
            "electra": lambda: transformers.ElectraConfig(**sizes, embedding_size=16),
            "albert": lambda: transformers.AlbertConfig(**sizes, embedding_size=16),
            "roberta": lambda: transformers.RobertaConfig(**{**sizes, "pad_token_id": tokenizer.pad_token_id}),
            "distilbert": lambda: transformers.DistilBertConfig(
                vocab_size=sizes["vocab_size"], dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=24
            ),
        }[family]()
        torch.manual_seed(0)
        auto = transformers.AutoModelForMaskedLM if head else transformers.AutoModel
        auto.from_config(config).save_pretrained(path)
        made[family, head] = path
        return path

    return make


def section(path: Path, **keys: Any) -> GeneratorSection:
    return GeneratorSection(kind="masked-lm", model=path.name, **keys)


def lm(path: Path, **keys: Any) -> MaskedLM:
    return MaskedLM(section(path, **keys), base=path.parent, seed=0)


@pytest.fixture(scope="module")
def words() -> Words:
    return Words(wordpiece(), 24)


# --- what is masked -------------------------------------------------------------------------------------------------


@given(
    count=st.integers(0, 200),
    shares=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)).map(sorted),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_share_between_the_two_is_masked_and_at_least_one(count: int, shares: list[float], seed: int) -> None:
    low, high = shares
    places, points = draw(count, (low, high), np.random.default_rng(seed))
    again = draw(count, (low, high), np.random.default_rng(seed))
    assert places.tolist() == again[0].tolist() == sorted(set(places.tolist()))
    assert points.tolist() == again[1].tolist()
    assert len(points) == len(places)
    assert ((points >= 0) & (points < 1)).all()
    if count == 0:
        assert len(places) == 0
        return
    assert set(places.tolist()) <= set(range(count))
    assert max(1, round(low * count)) <= len(places) <= max(1, round(high * count))


def test_shares_and_places_are_drawn_evenly() -> None:
    counts, hits = [], np.zeros(40)
    for seed in range(4000):
        places, _ = draw(40, (0.15, 0.3), np.random.default_rng(seed))
        counts.append(len(places) / 40)
        hits[places] += 1
    # even in [0.15, 0.3], so 0.225 on average; 4000 draws err by less than 0.003 (4 standard errors)
    assert abs(float(np.mean(counts)) - 0.225) < 0.003
    assert hits.min() / 4000 > 0.225 - 0.03
    assert hits.max() / 4000 < 0.225 + 0.03


def test_of_the_chosen_tokens_eight_tenths_are_masked_one_tenth_exchanged_and_one_tenth_left() -> None:
    rng = np.random.default_rng(0)
    ids = [7] * 20_000
    places = np.arange(0, 20_000, 2)
    changed, truth = corrupt(ids, places, 4, np.array([8, 9]), rng)
    assert truth == [7] * 10_000
    assert changed[1::2] == [7] * 10_000
    assert ids == [7] * 20_000
    shares = {i: changed[::2].count(i) / 10_000 for i in (4, 7, 8, 9)}
    for i, share in ((4, 0.8), (7, 0.1), (8, 0.05), (9, 0.05)):
        assert abs(shares[i] - share) < 0.016, i


@settings(deadline=None)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from([*SPECIAL, "film", "it's", "🙂", "xq"])).map(" ".join))
def test_special_tokens_and_what_is_no_text_are_never_masked(text: str, words: Words) -> None:
    (found,) = words.encode([text])
    ids = found.columns["input_ids"]
    assert len(ids) <= 24
    assert found.spans is not None
    for place in found.maskable.tolist():
        assert ids[place] not in range(len(SPECIAL))
        start, end = found.spans[place]
        assert text[start:end].strip() == text[start:end] != ""
    # exchanging every such token for itself changes nothing but the letter case of the model
    same = words.replace(text, found, {place: ids[place] for place in found.maskable.tolist() if ids[place] != 1})
    assert same.casefold() == text.casefold() or not text.isascii()


def test_padding_is_never_chosen_and_neither_seen(folder: Callable[..., Path]) -> None:
    generator = lm(folder())
    encoded = generator.words.encode(["the film", TEXTS[0] + " " + TEXTS[1]])
    batch = generator.words.batch([found.columns for found in encoded], torch.device("cpu"))
    mask = batch["attention_mask"]
    assert mask.sum(1).tolist() == [len(found.columns["input_ids"]) for found in encoded]
    assert bool((batch["input_ids"][mask == 0] == 0).all())
    for row, found in enumerate(encoded):
        assert bool(mask[row, found.maskable].all())


# --- what is drawn --------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 4), columns=st.integers(1, 30), seed=st.integers(0, 10_000))
def test_quantiles_are_those_of_the_distribution(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, points = rng.normal(0, 3, (rows, columns)), rng.random(rows)
    found = quantiles(torch.from_numpy(logits), torch.from_numpy(points)).tolist()
    for row in range(rows):
        weights = np.exp(logits[row] - logits[row].max())
        sums = np.cumsum(weights / weights.sum())
        assert 0 <= found[row] < columns
        assert sums[found[row]] > points[row] - 1e-9
        assert found[row] == 0 or sums[found[row] - 1] <= points[row] + 1e-9


def test_the_last_point_and_a_column_of_no_weight_are_safe() -> None:
    logits = torch.tensor([[0.0, -200.0, 0.0, -200.0], [-200.0, 0.0, -200.0, -200.0]])
    assert quantiles(logits, torch.tensor([1 - 2**-53, 0.0], dtype=torch.float64)).tolist() == [2, 1]


def test_draws_follow_the_models_distribution_at_the_temperature(folder: Callable[..., Path]) -> None:
    path = folder()
    count = 3000
    for temperature in (1.0, 0.3):
        generator = lm(path, temperature=temperature)
        with torch.no_grad():  # a random tiny model is nearly even: sharpen it, so that there is something to tell
            generator.network.model.cls.predictions.bias.copy_(
                torch.linspace(-2, 2, generator.network.model.config.vocab_size)
            )
        logits = generator._logits(generator.words.encode(["film"]), [np.array([1])])[0]
        allowed = generator.words.allowed
        expected = (logits[torch.from_numpy(allowed)].double() / temperature).softmax(0).numpy()
        drawn = generator._sample(
            logits.expand(count, -1), torch.rand(count, generator=torch.Generator().manual_seed(0))
        )
        shares = np.bincount(np.searchsorted(allowed, drawn.numpy()), minlength=len(allowed)) / count
        assert set(drawn.tolist()) <= set(allowed.tolist())
        assert np.abs(shares - expected).max() < 4 * np.sqrt(expected.max() / count)


def test_special_tokens_are_never_drawn_however_likely_they_are(folder: Callable[..., Path]) -> None:
    generator = lm(folder())
    size = generator.network.model.config.vocab_size
    with torch.no_grad():
        bias = torch.full((size,), 0.0)
        bias[: len(SPECIAL)] = bias[size - 3 :] = 1e4  # and outputs that no token has
        generator.network.model.cls.predictions.bias.copy_(bias)
    assert not set(range(len(SPECIAL))) & set(generator.words.allowed.tolist())
    assert int(generator.words.allowed.max()) < size - 3
    for text in generator.refill(TEXTS[:20], list(range(20))):
        assert "[" not in text


def test_what_becomes_of_a_text_depends_on_it_and_its_seed_alone(folder: Callable[..., Path]) -> None:
    generator = lm(folder())
    texts, seeds = list(TEXTS[:30]), [2**63 - 1 - i for i in range(30)]
    state = torch.random.get_rng_state()
    weights = {name: value.clone() for name, value in generator.network.state_dict().items()}
    together = generator.refill(texts, seeds)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in generator.network.state_dict().items())
    assert not any(child.training for child in generator.network.modules())
    assert not any(parameter.requires_grad for parameter in generator.network.parameters())
    order = np.random.default_rng(0).permutation(30).tolist()
    mixed = generator.refill([texts[i] for i in order], [seeds[i] for i in order])
    assert [mixed[order.index(i)] for i in range(30)] == together
    assert [generator.refill([text], [seed])[0] for text, seed in zip(texts, seeds, strict=True)] == together
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generator.refill(texts, seeds) == together
    assert generator.refill(texts, [0] * 30) != together
    assert sum(a != b for a, b in zip(texts, together, strict=True)) > 25
    with pytest.raises(ValueError, match="zip"):
        generator.refill(texts, seeds[:3])


def test_only_masked_words_change_and_all_else_stays_to_the_letter(folder: Callable[..., Path]) -> None:
    generator = lm(folder())
    text = "  THE Film, 🙂 was [SEP] too\tlong…  " + "Simply brilliant. " * 20
    assert generator.refill(["", " \n", "🙂"], [0, 1, 2]) == ["", " \n", "🙂"]
    for seed in range(30):
        pieces = generator.masked(text, seed).split("____")
        rest = generator.refill([text], [seed])[0]
        assert len(pieces) > 1
        for piece in pieces:  # in their order, with new words between them
            assert piece.strip() in rest
            rest = rest[rest.index(piece.strip()) + len(piece.strip()) :]
        assert pieces[-1].endswith("Simply brilliant. " * 10)  # beyond the model's length
        assert "🙂" in "".join(pieces)
        assert "[SEP]" in "".join(pieces)


def test_new_words_take_the_spaces_that_they_need(words: Words) -> None:
    ids = {word: words.encode([word])[0].columns["input_ids"][1] for word in ("film", "movie", ".", "the")}
    (found,) = words.encode(["Film. the"])
    first, dot, last = found.maskable.tolist()
    assert words.replace("Film. the", found, {first: ids["movie"]}) == "movie. the"
    assert words.replace("Film. the", found, {dot: ids["movie"]}) == "Film movie the"
    assert words.replace("Film. the", found, {last: ids["."]}) == "Film.."
    (spaced,) = words.encode(["film ."])  # a text that writes a space there keeps it
    assert words.replace("film .", spaced, {1: ids["movie"]}) == "movie ."
    assert words.replace("film .", spaced, {2: ids["."]}) == "film ."
    (pieces,) = words.encode(["badly"])  # "bad", "##l", ...: what is left of a word stays with what is before it
    assert len(pieces.maskable) > 1
    assert words.replace("badly", pieces, {1: ids["movie"]}) == "movie" + "badly"[pieces.spans[1][1] :]  # type: ignore[index]
    assert words.replace("badly", pieces, {2: ids["movie"]}).startswith("badly"[: pieces.spans[1][1]] + " movie")  # type: ignore[index]
    (close,) = words.encode(["好film"])  # a script without spaces gets none
    assert words.replace("好film", close, {2: ids["movie"]}) == "好movie"
    going_on = next(i for i in words.allowed.tolist() if words._goes_on(i))
    assert (
        words.replace("Film the", words.encode(["Film the"])[0], {2: going_on}) == "Film" + words._surfaces[going_on][1]
    )


def test_byte_level_words_are_exchanged_with_their_spaces(folder: Callable[..., Path]) -> None:
    generator = lm(folder("roberta"))
    text = "the film was good 🙂."
    (found,) = generator.words.encode([text])
    assert found.spans is not None
    shown = [text[start:end] for start, end in (found.spans[at] for at in found.maskable.tolist())]
    assert shown == ["the", "film", "was", "good", "."]  # the bytes of a sign are no words
    movie = generator.words.encode([" movie"])[0].columns["input_ids"][1]
    assert generator.words.replace(text, found, {2: movie}) == "the movie was good 🙂."
    assert generator.words.replace("film was", generator.words.encode(["film was"])[0], {1: movie}) == "movie was"
    assert not any("\ufffd" in surface for _, surface in generator.words._surfaces.values())


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet", "electra", "albert"])
def test_every_family_refills_and_is_asked_at_the_masked_places_alone(family: str, folder: Callable[..., Path]) -> None:
    generator = lm(folder(family))
    assert generator.has_head
    assert generator.network.gathers
    long = " ".join(TEXTS[:12])
    refilled = generator.refill([*TEXTS[:5], long], range(6))
    assert len(generator.words.encode([long])[0].columns["input_ids"]) <= 24
    assert refilled[-1].endswith(TEXTS[11])
    generator.network.gathers = False
    assert generator.refill([*TEXTS[:5], long], range(6)) == refilled


# --- what learns ----------------------------------------------------------------------------------------------------


def test_an_encoder_without_a_head_gets_one_and_learns_the_texts(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder(head=False)
    keys: dict[str, Any] = {"epochs": 30, "learning_rate": 5e-3, "batch_size": 16}
    made = make_text_generator(section(path, **keys), TEXTS, tmp_path / "lm", seed=0, base=path.parent)
    manifest = verify(tmp_path / "lm", "generator")
    assert not made.has_head
    assert set(manifest.files) == {"masked_lm.safetensors", "metrics.jsonl", "examples.txt"}
    assert manifest.info["learn"] == "all"
    assert manifest.info["judged_by"] == 12
    # the verbs are guessed by one in four, the rest better: far beyond chance, one in about 80
    assert manifest.info["accuracy_before"] < 0.15
    assert manifest.info["accuracy"] > 0.35
    history = [json.loads(line) for line in (tmp_path / "lm" / "metrics.jsonl").read_text().splitlines()]
    assert history[-1]["loss/masked"] < 0.7 * history[0]["loss/masked"]
    # the embeddings are tied
    assert made.network.model.get_output_embeddings().weight is made.network.model.get_input_embeddings().weight
    assert not any(child.training for child in made.network.modules())
    assert not any(parameter.requires_grad for parameter in made.network.parameters())
    assert not (tmp_path / "lm.partial").exists()
    examples = (tmp_path / "lm" / "examples.txt").read_text()
    assert examples.count("text    ") == 12
    assert examples.count("____") >= examples.count("refill  ") == 24


def test_a_finished_artefact_is_taken_up_and_another_run_makes_the_same(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = folder(head=False)

    def make(name: str, texts: tuple[str, ...] = TEXTS) -> MaskedLM:
        return make_text_generator(
            section(path, epochs=1, batch_size=32, learning_rate=3e-3), texts, tmp_path / name, seed=0, base=path.parent
        )

    made = make("lm")
    stamp = (tmp_path / "lm" / "manifest.json").stat().st_mtime_ns
    again = make("lm")
    assert (tmp_path / "lm" / "manifest.json").stat().st_mtime_ns == stamp
    assert again.key == made.key == make("other").key != lm(path).key
    assert again.refill(TEXTS, range(len(TEXTS))) == made.refill(TEXTS, range(len(TEXTS)))
    assert make("lm", TEXTS[1:]).key != made.key
    save_file({"model.cls.predictions.bias": torch.zeros(3)}, tmp_path / "other" / "masked_lm.safetensors")
    with pytest.raises(InputError, match="changed after it was written") as error:
        make("other")
    assert str(tmp_path / "other") in (error.value.fix or "")


def test_a_new_heads_bias_begins_at_the_words_frequencies(folder: Callable[..., Path]) -> None:
    generator = lm(folder(head=False))
    encoded = generator.words.encode(TEXTS)
    generator.start_from(encoded)
    bias = generator.network.model.cls.predictions.bias
    shares = bias.double().exp()
    assert float(shares.sum()) == pytest.approx(1, abs=1e-5)
    tokens = [found.columns["input_ids"][at] for found in encoded for at in found.maskable.tolist()]
    for token in (0, *set(tokens)):
        expected = (tokens.count(token) + 1) / (len(tokens) + len(bias))
        assert float(shares[token]) == pytest.approx(expected, rel=1e-4)


def test_the_head_alone_learns_where_that_is_asked(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder(head=False)
    fresh = lm(path)
    before = {name: value.clone() for name, value in fresh.network.state_dict().items()}
    made = make_text_generator(
        section(path, learn="head", epochs=2, learning_rate=1e-3), TEXTS, tmp_path / "lm", seed=0, base=path.parent
    )
    moved = {name for name, value in made.network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("model.cls.predictions.") for name in moved)
    assert "model.cls.predictions.decoder.weight" not in moved
    stored = load_file(tmp_path / "lm" / "masked_lm.safetensors")
    assert {name for name in moved if "decoder" not in name} == set(stored)
    # frozen layers are in eval mode while the head learns
    fresh.network.learn(head_only=True)
    fresh.network.train()
    assert not fresh.network.model.base_model.training
    assert fresh.network.model.cls.training


def test_a_whole_model_is_taken_as_it_is(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder()
    made = make_text_generator(section(path), TEXTS, tmp_path / "lm", seed=0, base=path.parent)
    manifest = read_manifest(tmp_path / "lm", "generator")
    assert made.has_head
    assert set(manifest.files) == {"examples.txt"}
    assert manifest.info["learn"] == "nothing"
    assert "accuracy_before" not in manifest.info
    assert made.key == lm(path).key != lm(path, temperature=0.5).key
    state = {name: value.clone() for name, value in lm(path).network.state_dict().items()}
    taught = make_text_generator(
        section(path, learn="all", epochs=1, learning_rate=1e-3), TEXTS, tmp_path / "taught", seed=0, base=path.parent
    )
    assert any(not torch.equal(value, state[name]) for name, value in taught.network.state_dict().items())


def test_the_loss_is_the_cross_entropy_of_the_chosen_tokens(folder: Callable[..., Path]) -> None:
    generator = lm(folder())
    encoded = generator.words.encode(TEXTS[:6])
    found = generator.loss(encoded, np.random.default_rng(3))
    rng, expected = np.random.default_rng(3), []
    for text in encoded:  # one text at a time, without padding, by float64 sums
        places = text.maskable[draw(len(text.maskable), (0.15, 0.3), rng)[0]]
        ids, truth = corrupt(text.columns["input_ids"], places, 4, generator.words.allowed, rng)
        columns = {name: torch.tensor([value]) for name, value in {**text.columns, "input_ids": ids}.items()}
        with torch.no_grad():
            logits = generator.network.model(**columns).logits[0].double().numpy()
        for place, true in zip(places.tolist(), truth, strict=True):
            expected.append(np.log(np.exp(logits[place]).sum()) - logits[place, true])
    assert float(found) == pytest.approx(float(np.mean(expected)), rel=1e-5)


def test_a_new_head_depends_on_the_seed_alone(folder: Callable[..., Path]) -> None:
    path = folder(head=False)
    torch.manual_seed(1)
    first = MaskedLM(section(path), base=path.parent, seed=0)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert MaskedLM(section(path), base=path.parent, seed=0).key == first.key
    assert torch.equal(torch.random.get_rng_state(), state)
    assert MaskedLM(section(path), base=path.parent, seed=1).key != first.key


def test_few_texts_are_enough(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder(head=False)
    for count in (1, 2):
        keys: dict[str, Any] = {"epochs": 1}
        texts = [*TEXTS[:count], "", "🙂"]
        make_text_generator(section(path, **keys), texts, tmp_path / str(count), seed=0, base=path.parent)
        assert read_manifest(tmp_path / str(count), "generator").info["judged_by"] == 1


# --- what is refused ------------------------------------------------------------------------------------------------


def test_an_untrained_head_is_not_trusted(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder(head=False)
    with pytest.raises(InputError, match="has no head for masked tokens") as error:
        make_text_generator(section(path, learn="nothing"), TEXTS, tmp_path / "lm", seed=0, base=path.parent)
    assert error.value.where == "explore.generator.learn"
    assert error.value.fix is not None


def test_models_that_cannot_refill_are_refused_with_what_can(folder: Callable[..., Path], tmp_path: Path) -> None:
    whole = folder()
    # no mask token
    bare = tmp_path / "bare"
    transformers.AutoModelForMaskedLM.from_pretrained(whole).save_pretrained(bare)
    tokenizer = wordpiece()
    tokenizer.mask_token = None
    tokenizer.save_pretrained(bare)
    # a family without masked language models
    wrong = tmp_path / "wrong"
    wordpiece().save_pretrained(wrong)
    transformers.LlamaConfig(**SIZES, vocab_size=95).save_pretrained(wrong)
    # weights that are not all there
    torn = tmp_path / "torn"
    wordpiece().save_pretrained(torn)
    model = transformers.AutoModelForMaskedLM.from_pretrained(whole)
    state = {name: value for name, value in model.state_dict().items() if "layer.1" not in name}
    model.save_pretrained(torn, state_dict=state)
    # not a number
    broken = tmp_path / "broken"
    wordpiece().save_pretrained(broken)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, says in (
        (bare, "has no mask token"),
        (wrong, "cannot load"),
        (torn, "lacks weights"),
        (broken, "does not refill"),
        (empty, "cannot load"),
    ):
        with pytest.raises(InputError, match=says) as error:
            lm(path)
        assert error.value.where == "explore.generator.model"
        assert error.value.fix is not None
        assert "bert-base-uncased" in error.value.fix
    with pytest.raises(InputError, match="no such folder"):
        lm(tmp_path / "not here")


def test_texts_without_words_are_refused(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder()
    for texts in ([], ["", "  ", "🙂"]):
        with pytest.raises(InputError, match="none of the unlabelled texts") as error:
            make_text_generator(section(path), texts, tmp_path / "lm", seed=0, base=path.parent)
        assert error.value.where == "data.unlabelled"
    assert not (tmp_path / "lm").exists()


def test_large_inputs_go_in_parts(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = lm(folder())
    whole = generator.refill(TEXTS, range(len(TEXTS)))
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 50)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 3)
    assert generator.refill(TEXTS, range(len(TEXTS))) == whole


def test_passes_and_batches_have_a_default_of_the_kind() -> None:
    assert (GeneratorSection().passes(10_000), GeneratorSection().batch) == (20, 128)
    texts = GeneratorSection(kind="masked-lm", model="x")
    assert (texts.passes(40), texts.batch) == (3, 32)
    chosen = GeneratorSection(model="x", epochs=20, batch_size=128)
    assert (chosen.passes(10), chosen.batch) == (20, 128)
