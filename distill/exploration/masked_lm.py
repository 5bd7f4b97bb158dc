"""Texts rewritten by a masked language model of `transformers`: some of their tokens masked, and drawn anew from it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.exploration.fit import METRICS, clear, fit, lines
from distill.exploration.generator import TextGenerator
from distill.exploration.section import GeneratorSection
from distill.networks import fingerprint, read_state, seeded
from distill.teachers.from_transformers import locate
from distill.teachers.upper_layers import send
from profiles import artifact
from profiles.artifact import content_key
from profiles.errors import InputError
from profiles.progress import Progress, Silent

Ids = np.ndarray[tuple[int], np.dtype[np.int64]]
Points = np.ndarray[tuple[int], np.dtype[np.float64]]
KIND = "generator"
_FORM = 1
"""Raised when the same settings make another generator."""
WEIGHTS = "masked_lm.safetensors"
EXAMPLES = "examples.txt"
_WHERE = "explore.generator.model"
_FIX = (
    "name a masked language model (bert-base-uncased, distilroberta-base, ...) or a sentence encoder built on one "
    "(all-MiniLM-L6-v2), as a hub name or as a folder that save_pretrained wrote"
)
_SHOWN = 16
"""Texts in examples.txt."""
_HELD_OUT = 512
"""Texts at most that the model is judged by and does not learn from."""
_TOKENS_AT_ONCE = 4096
"""Tokens of one forward pass of a refill, padding included."""
_ROWS_AT_ONCE = 256
"""Masked tokens whose distributions over the vocabulary are held at once."""
_UNUSED = re.compile(r"\[unused\d+\]")
"""Places that BERT's vocabularies keep free; they never were in a text."""


def make_text_generator(
    section: GeneratorSection,
    texts: Sequence[str],
    folder: Path,
    *,
    seed: int,
    base: Path,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> MaskedLM:
    """The masked language model of `section`, trained on `texts` where `learn` says so; an artefact in `folder`.

    The artefact holds `examples.txt`, and, where something learned, its weights (masked_lm.safetensors) and
    metrics.jsonl. Its info says what share of masked tokens the model guesses right in texts that it did not learn from
    (a tenth, 512 at most), before and after. An artefact made of the same parts is taken up as it is.

    A checkpoint without a head for masked tokens gets its family's own, for BERT a Linear, GELU and LayerNorm, then the
    tied embeddings and a bias, drawn from `seed`; the bias begins at the words' frequencies (our reading). It learns as
    BERT did (Devlin et al. 2019): of the chosen tokens 80 % are masked, 10 % replaced by another and 10 % left, and all
    are to be told. The share that is chosen is drawn as for refilling (our reading).

    Args:
        section: of kind "masked-lm".
        texts: unlabelled; what is learnt from and judged by.
        folder: of the artefact.
        seed: of new weights, masks and order.
        base: folder that a relative `section.model` starts from.
        device: where it learns and refills; None: the CPU.
        progress: shows the training.

    Raises:
        InputError: `transformers` is not installed, nothing loadable at that name, no mask token, a head that is
            missing and must not be learnt, or no text to learn from.
        Interrupted: SIGINT or SIGTERM; the same call goes on.
    """
    assert section.model is not None
    progress, device = progress or Silent(), torch.device(device or "cpu")
    generator = MaskedLM(section, base=base, seed=seed).to(device)
    learn = section.learn
    if learn == "auto":
        learn = "nothing" if generator.has_head else "all"
    if learn == "nothing" and not generator.has_head:
        raise InputError(
            f'"{section.model}" has no head for masked tokens, and one that was never trained refills them at random',
            where="explore.generator.learn",
            fix='learn = "auto" trains one on the unlabelled texts',
        )
    rate = _LEARNING_RATE if section.learning_rate == "auto" else section.learning_rate
    training: list[Any] = []
    if learn != "nothing":
        training = [section.passes(len(texts)), section.batch, rate]
        if section.min_steps is not None:
            training.append(section.min_steps)  # fewer texts are learnt from than there are
    key = content_key("masked-lm", _FORM, generator.key, learn, training, list(texts), seed)
    manifest = artifact.current(folder, KIND, key)
    if manifest is not None:
        if learn != "nothing":
            generator.network.learn(head_only=learn == "head")
            generator.load(folder / WEIGHTS)
        return generator
    started = time.perf_counter()
    encoded = generator.words.encode(texts)
    usable = [row for row, found in enumerate(encoded) if len(found.maskable)]
    if not usable:
        raise InputError(
            "none of the unlabelled texts has a token that could be masked",
            where="data.unlabelled",
            evidence=f"{len(texts)} texts",
        )
    mixed = np.random.default_rng(seed).permutation(usable).tolist()
    judged = mixed[: min(_HELD_OUT, max(1, len(mixed) // 10))]
    learnt = mixed[len(judged) :] or judged  # a single text is both
    info: dict[str, Any] = {"model": section.model, "learn": learn, "texts": len(texts), "judged_by": len(judged)}
    judge = [encoded[row] for row in judged]
    if not generator.has_head:
        generator.start_from([encoded[row] for row in learnt])
    accuracy = generator.accuracy(judge)
    history: list[dict[str, float]] = []
    if learn != "nothing":
        info["accuracy_before"] = accuracy
        network = generator.network
        network.learn(head_only=learn == "head")
        rows = [encoded[row] for row in learnt]

        def loss(batch: Tensor) -> dict[str, Tensor]:
            # seeded by (seed, step) through torch's generator, as all noise of `fit` is
            rng = np.random.default_rng(int(torch.randint(2**62, (1,))))
            return {"masked": generator.loss([rows[row] for row in batch.tolist()], rng)}

        history = fit(
            network,
            loss,
            len(rows),
            folder,
            key=key,
            epochs=section.passes(len(rows)),
            batch_size=section.batch,
            learning_rate=rate,
            seed=seed,
            device=device,
            progress=progress,
            title="masked language model",
        )
        trained = {name: p.detach().cpu().contiguous() for name, p in network.named_parameters() if p.requires_grad}
        network.freeze()
        generator.rekey()
        accuracy = generator.accuracy(judge)
    info |= {"accuracy": accuracy, "seconds": round(time.perf_counter() - started, 1)}
    with artifact.create(folder, KIND, key, info) as temporary:
        if learn != "nothing":
            save_file(trained, temporary / WEIGHTS)
            (temporary / METRICS).write_text(lines(history))
        (temporary / EXAMPLES).write_text(_examples(generator, [texts[row] for row in judged[:_SHOWN]], info))
    clear(folder)
    return generator


_LEARNING_RATE = 5e-4
"""Of learning_rate = "auto"."""


@dataclass(frozen=True)
class Encoded:
    """One text as its tokens.

    columns: what the model takes, each of the same length; "input_ids" is one of them. maskable: int64, places of the
    tokens that may be masked: all but special ones, and those that have no characters of the text to themselves. spans:
    (start, end) of each token's characters, without the spaces around them; (0, 0) for added tokens; None where the
    tokenizer does not tell.
    """

    columns: dict[str, list[int]]
    maskable: Ids
    spans: list[tuple[int, int]] | None


class Words:
    """A tokenizer: texts to tokens and back, and which tokens may be masked and drawn.

    Attributes:
        mask: id of the mask token.
        allowed: int64, ids that may be drawn: the vocabulary without special tokens, what is no text of its own (parts
            of a character, a lone space), and [unused1] and the like.
    """

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length
        self._rules = _rules(tokenizer)  # before the first text: a tokenizer notes how it was last called
        self.mask = int(tokenizer.mask_token_id)
        special = {int(i) for i in tokenizer.all_special_ids}
        self._special = special | {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._pad = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self._surfaces = self._read_surfaces()
        self.allowed: Ids = np.array(sorted(self._surfaces), dtype=np.int64)

    def _read_surfaces(self) -> dict[int, tuple[bool, str]]:
        """Of each id that may be drawn: whether it goes on with the word before it, and its text."""
        ids = sorted(
            int(i)
            for word, i in self._tokenizer.get_vocab().items()
            if i not in self._special and not _UNUSED.fullmatch(word)
        )
        # what a token looks like inside a text shows only behind another one ("##ing", a space that belongs to it)
        alone = self._tokenizer.batch_decode([[i] for i in ids[:1000]], clean_up_tokenization_spaces=False)
        anchors = [(i, text) for i, text in zip(ids, alone, strict=False) if text.strip().isalnum()]
        if not anchors:
            return {}
        anchor, before = anchors[0][0], anchors[0][1].rstrip()
        pairs = self._tokenizer.batch_decode([[anchor, i] for i in ids], clean_up_tokenization_spaces=False)
        found = {}
        for i, pair in zip(ids, pairs, strict=True):
            text = pair[len(before) :] if pair.startswith(before) else ""
            if text.strip() and "\ufffd" not in text:
                found[i] = (not text[0].isspace(), text.strip())
        return found

    @property
    def key(self) -> str:
        """Hash of vocabulary, rules and length."""
        return content_key(self._rules, self._length)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Each text's first tokens, as many as the model takes."""
        if not texts:
            return []
        fast = bool(getattr(self._tokenizer, "is_fast", False))
        found = self._tokenizer(
            list(texts),
            truncation=True,
            max_length=self._length,
            return_attention_mask=True,
            return_special_tokens_mask=True,
            return_offsets_mapping=fast,
        )
        added = found.pop("special_tokens_mask")
        offsets = found.pop("offset_mapping") if fast else None
        result = []
        for row, text in enumerate(texts):
            columns = {name: list(column[row]) for name, column in found.items()}
            ids = columns["input_ids"]
            spans = None if offsets is None else _trimmed(text, offsets[row])
            places = [
                at
                for at, i in enumerate(ids)
                if not added[row][at] and i not in self._special and (spans is None or _alone(spans, at))
            ]
            result.append(Encoded(columns, np.array(places, dtype=np.int64), spans))
        return result

    def batch(self, rows: Sequence[Mapping[str, list[int]]], device: torch.device) -> dict[str, Tensor]:
        """int64 (N, T) each on `device`, padded on the right."""
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self._pad}
        return {
            name: send(
                torch.tensor([row[name] + [fill.get(name, 0)] * (longest - len(row[name])) for row in rows]), device
            )
            for name in rows[0]
        }

    def replace(self, text: str, encoded: Encoded, changes: Mapping[int, int]) -> str:
        """`text` with the tokens at some places (keys) exchanged for others (ids).

        All else stays as it is, letter case, spaces and what is beyond the model's length included. Where the tokenizer
        does not tell where its tokens are, the whole text comes back as it spells it.
        """
        if encoded.spans is None:
            ids = [changes.get(at, i) for at, i in enumerate(encoded.columns["input_ids"])]
            decoded = str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
            return decoded or text
        return self._spliced(text, encoded, {at: self._surfaces[i] for at, i in changes.items()})

    def blank(self, text: str, encoded: Encoded, places: Sequence[int]) -> str:
        """`text` with "____" for the tokens at `places`."""
        ids = encoded.columns["input_ids"]
        if encoded.spans is None:
            shown = [self.mask if at in places else i for at, i in enumerate(ids)]
            return str(self._tokenizer.decode(shown))
        return self._spliced(text, encoded, {at: (self._goes_on(ids[at]), "____") for at in places})

    def _goes_on(self, token: int) -> bool:
        return self._surfaces.get(token, (False, ""))[0]

    def _spliced(self, text: str, encoded: Encoded, changes: Mapping[int, tuple[bool, str]]) -> str:
        """`changes`: (goes on with the word before it, text) for the tokens at some places."""
        assert encoded.spans is not None
        ids, result, end, last, changed = encoded.columns["input_ids"], "", 0, "", False
        for at, (start, stop) in enumerate(encoded.spans):
            if stop <= max(start, end):  # added, or a part of a character that an earlier token told
                continue
            start = max(start, end)  # noqa: PLW2901
            gap, old = text[end:start], text[start:stop]
            glued, new = changes.get(at, (self._goes_on(ids[at]), old))
            if result and (changed or at in changes):
                went_on = self._goes_on(ids[at])
                # two words that stood together without a space, as in Chinese, still do
                joined = not gap and not went_on and _words_touch(last, old)
                if glued:
                    gap = gap if went_on else ""
                elif not gap and not joined and _words_touch(result, new):
                    gap = " "
            result += gap + new
            end, last, changed = stop, old, at in changes
        return result + text[end:]


def _trimmed(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans without the spaces that some tokenizers count to a word."""
    found = []
    for start, end in offsets:
        part = text[start:end]
        found.append((start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())))
    return [(start, end) if start < end else (0, 0) for start, end in found]


def _alone(spans: Sequence[tuple[int, int]], at: int) -> bool:
    """Whether a token has characters, and shares them with no neighbour (parts of one character do)."""
    start, end = spans[at]
    neighbours = [spans[other] for other in (at - 1, at + 1) if 0 <= other < len(spans)]
    return start < end and not any(max(start, a) < min(end, b) for a, b in neighbours)


def _words_touch(left: str, right: str) -> bool:
    return left[-1:].isalnum() and right[:1].isalnum()


class MaskedNetwork(nn.Module):
    """A masked language model that is asked about some places only.

    Attributes:
        model: of AutoModelForMaskedLM.
        allowed: int64 (A,), the ids that it may answer with.
    """

    allowed: Tensor

    def __init__(self, model: Any, allowed: Ids) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("allowed", torch.from_numpy(allowed), persistent=False)
        self._places: Tensor | None = None
        self._base_learns = True
        self.gathers = False
        decoder = model.get_output_embeddings()
        if isinstance(decoder, nn.Module):
            decoder.register_forward_pre_hook(self._gather)
        self.freeze()

    def _gather(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._places is None:
            return None
        return (inputs[0].flatten(0, 1)[self._places], *inputs[1:])

    def whole(self, columns: dict[str, Tensor]) -> Tensor:
        """Logits (N, T, V)."""
        logits: Tensor = self.model(**columns).logits
        return logits

    def gathered(self, columns: dict[str, Tensor], places: Tensor) -> Tensor:
        """As `forward`, but only the places reach the decoder: the whole (N, T, V) would be most of the work."""
        self._places = places
        try:
            logits: Tensor = self.model(**columns).logits
        finally:
            self._places = None
        return logits

    def forward(self, columns: dict[str, Tensor], places: Tensor) -> Tensor:
        """Logits (M, V) at `places`, int64 (M,) of the flattened (N * T) tokens."""
        if self.gathers:
            return self.gathered(columns, places)
        return self.whole(columns).flatten(0, 1)[places]

    def learn(self, *, head_only: bool) -> None:
        """Lets everything learn, or what only the head has (not the embeddings that it shares).

        Raises:
            InputError: no head of its own.
        """
        base = {id(parameter) for parameter in self.model.base_model.parameters()} if head_only else set()
        self._base_learns = not head_only
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) not in base)
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise InputError(
                "this model has no head apart from its layers", where="explore.generator.learn", fix='learn = "all"'
            )

    def freeze(self) -> None:
        """Eval mode, no gradients."""
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not self._base_learns:
            self.model.base_model.eval()  # frozen layers without dropout
        return self


class MaskedLM(TextGenerator):
    """Refills masked tokens; see `make_text_generator`.

    Of a text's tokens, special ones aside, a share drawn evenly from `mask` is masked, at least one; each masked one is
    drawn from what the model gives for it at `temperature`, all of a text's at once and independently. The rest of the
    text stays as it is; new words are in the model's own spelling (an uncased model gives small letters).

    Attributes:
        has_head: the checkpoint came with a trained head.
    """

    network: MaskedNetwork

    def __init__(self, section: GeneratorSection, *, base: Path, seed: int) -> None:
        assert section.model is not None
        tokenizer, model, self.has_head = _load(section.model, base, seed)
        self.words = Words(tokenizer, _length(tokenizer, model))
        self.network = MaskedNetwork(model, self.words.allowed)
        self._mask, self._temperature = section.mask, section.temperature
        self.device = torch.device("cpu")
        self._probe(section.model)
        self.rekey()

    def rekey(self) -> None:
        """Brings `key` up to date with the weights."""
        self.key = content_key(
            "masked-lm", fingerprint(self.network), self.words.key, list(self._mask), self._temperature
        )

    @torch.no_grad()
    def start_from(self, encoded: Sequence[Encoded]) -> None:
        """Sets a new head's bias to the log frequency of each token, one more of each than there are (our reading).

        So it starts from how often a word is, and all of its steps can go to what the context tells.
        """
        bias = getattr(self.network.model.get_output_embeddings(), "bias", None)
        if not isinstance(bias, nn.Parameter):
            return
        tokens = [found.columns["input_ids"][place] for found in encoded for place in found.maskable.tolist()]
        counts = np.bincount(tokens, minlength=len(bias)) + 1.0
        bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))

    def load(self, file: Path) -> None:
        """Takes the weights of what learned (see `MaskedNetwork.learn`) from the artefact's `file`.

        Raises:
            InputError: an unreadable file, or other weights than those.
        """
        state = read_state(file, where=str(file.parent))
        own = {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in own.items()}:
            raise InputError(
                f"{file.name} does not hold the weights that learned",
                where=str(file),
                evidence=f"{len(state)} tensors, {len(own)} learned",
                fix=f"delete {file.parent} and run the same command again",
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
        self.network.freeze()
        self.rekey()

    def to(self, device: object) -> MaskedLM:
        self.device = torch.device(device)  # type: ignore[call-overload]
        self.network.to(self.device)
        return self

    @torch.no_grad()
    def refill(self, texts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        encoded = self.words.encode(texts)
        draws = [
            draw(len(found.maskable), self._mask, np.random.default_rng(seed))
            for found, seed in zip(encoded, seeds, strict=True)
        ]
        result = list(texts)
        for rows in self._chunks(encoded):
            chosen = [encoded[row].maskable[draws[row][0]] for row in rows]
            logits = self._logits([encoded[row] for row in rows], chosen)
            points = torch.from_numpy(np.concatenate([draws[row][1] for row in rows]))
            drawn = iter(self._sample(logits, send(points, self.device)).tolist())  # a text is made on the host
            for row, places in zip(rows, chosen, strict=True):
                changes = {place: next(drawn) for place in places.tolist()}
                result[row] = self.words.replace(texts[row], encoded[row], changes)
        return result

    def masked(self, text: str, seed: int) -> str:
        """`text` with "____" at what `refill` draws anew with that seed."""
        (found,) = self.words.encode([text])
        places, _ = draw(len(found.maskable), self._mask, np.random.default_rng(seed))
        return self.words.blank(text, found, found.maskable[places].tolist())

    @torch.no_grad()
    def accuracy(self, encoded: Sequence[Encoded]) -> float:
        """Share of masked tokens whose likeliest refill is what stood there; the masks are always the same."""
        right = total = 0
        draws = [draw(len(e.maskable), self._mask, np.random.default_rng(row)) for row, e in enumerate(encoded)]
        for rows in self._chunks(encoded):
            chosen = [encoded[row].maskable[draws[row][0]] for row in rows]
            logits = self._logits([encoded[row] for row in rows], chosen)
            ids = [
                encoded[row].columns["input_ids"][at]
                for row, at_all in zip(rows, chosen, strict=True)
                for at in at_all.tolist()
            ]
            best = self.network.allowed[logits[:, self.network.allowed].argmax(1)].cpu()
            right += int((best == torch.tensor(ids)).sum())
            total += len(ids)
        return right / total

    def loss(self, encoded: Sequence[Encoded], rng: np.random.Generator) -> Tensor:
        """Cross-entropy of the chosen tokens: 80 % masked, 10 % another one, 10 % as they were (Devlin et al. 2019)."""
        rows: list[dict[str, list[int]]] = []
        chosen: list[Ids] = []
        truth: list[int] = []
        for found in encoded:
            places = found.maskable[draw(len(found.maskable), self._mask, rng)[0]]
            ids, true = corrupt(found.columns["input_ids"], places, self.words.mask, self.words.allowed, rng)
            rows.append({**found.columns, "input_ids": ids})
            chosen.append(places)
            truth += true
        columns = self.words.batch(rows, self.device)
        index = _flat(chosen, columns["input_ids"].shape[1])
        logits = self.network(columns, send(index, self.device))
        return F.cross_entropy(logits.float(), send(torch.tensor(truth), self.device))

    def _chunks(self, encoded: Sequence[Encoded]) -> Iterator[list[int]]:
        """Rows with something to mask, texts of like length together, so that short ones are padded little."""
        order = sorted(
            (row for row, found in enumerate(encoded) if len(found.maskable)),
            key=lambda row: len(encoded[row].columns["input_ids"]),
        )
        # where the whole (N, T, V) is made, it must fit the memory
        budget = _TOKENS_AT_ONCE if self.network.gathers else _TOKENS_AT_ONCE // 8
        rows: list[int] = []
        for row in order:
            if rows and (len(rows) + 1) * len(encoded[row].columns["input_ids"]) > budget:
                yield rows
                rows = []
            rows.append(row)
        if rows:
            yield rows

    def _logits(self, encoded: Sequence[Encoded], chosen: Sequence[Ids]) -> Tensor:
        """Logits (M, V) of the chosen places, all of them masked."""
        rows = []
        for found, places in zip(encoded, chosen, strict=True):
            ids = list(found.columns["input_ids"])
            for place in places.tolist():
                ids[place] = self.words.mask
            rows.append({**found.columns, "input_ids": ids})
        columns = self.words.batch(rows, self.device)
        index = send(_flat(chosen, columns["input_ids"].shape[1]), self.device)
        with torch.autocast(self.device.type, enabled=False):  # the same texts, whatever the step runs in
            logits: Tensor = self.network(columns, index)
        return logits.float()

    def _sample(self, logits: Tensor, points: Tensor) -> Tensor:
        """int64 (M,): the id at quantile `points` (M,), in [0, 1), of each row's distribution over what is allowed."""
        allowed = self.network.allowed
        found = [
            allowed[quantiles(part[:, allowed] / self._temperature, at)]
            for part, at in zip(torch.split(logits, _ROWS_AT_ONCE), torch.split(points, _ROWS_AT_ONCE), strict=True)
        ]
        return torch.cat(found)

    @torch.no_grad()
    def _probe(self, name: str) -> None:
        """Two texts through the model: whether it runs, and whether it can be asked about some places only.

        Raises:
            InputError: it does not run, or gives what is not finite, or knows fewer tokens than its tokenizer.
        """
        mask = self.words.mask
        rows = [{**found.columns} for found in self.words.encode(["a", "a text to try it with"])]
        for row in rows:
            row["input_ids"] = [*row["input_ids"][:-1], mask]
        places = _flat([np.array([0]), np.array([0, len(rows[1]["input_ids"]) - 1])], len(rows[1]["input_ids"]))
        try:
            columns = self.words.batch(rows, self.device)
            whole = self.network.whole(columns).flatten(0, 1)[places]
            if not bool(whole.isfinite().all()):
                raise ValueError("its outputs are infinite or NaN")
            if whole.shape[1] <= int(self.words.allowed.max()):
                raise ValueError(f"{whole.shape[1]} outputs, the tokenizer's ids go to {int(self.words.allowed.max())}")
        except Exception as error:  # a model may need anything that a tokenizer does not give
            raise InputError(
                f'"{name}" does not refill texts',
                where=_WHERE,
                evidence=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                fix=_FIX,
            ) from error
        try:
            part = self.network.gathered(columns, places)
        except (RuntimeError, ValueError, IndexError):  # a model that shapes its logits itself
            return
        self.network.gathers = part.shape == whole.shape and torch.allclose(part, whole, atol=1e-4, rtol=1e-4)


def draw(count: int, shares: tuple[float, float], rng: np.random.Generator) -> tuple[Ids, Points]:
    """Which of `count` tokens are masked, and where in its distribution each is drawn.

    Returns:
        Sorted places of 0..count-1, round(share * count) of them and at least one, share even in [shares[0],
        shares[1]]; and as many points in [0, 1). Both empty when count = 0.
    """
    if count == 0:
        return np.empty(0, np.int64), np.empty(0)
    share = rng.uniform(*shares)
    places = np.sort(rng.permutation(count)[: max(1, round(share * count))]).astype(np.int64)
    return places, rng.random(len(places))


def corrupt(
    ids: Sequence[int], places: Ids, mask: int, allowed: Ids, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """BERT's masking (Devlin et al. 2019) at `places`: 80 % the mask token, 10 % one of `allowed`, 10 % unchanged.

    Returns:
        The changed ids, and the true ids at `places`.
    """
    changed = list(ids)
    kinds, others = rng.random(len(places)), rng.choice(allowed, len(places))
    for place, kind, other in zip(places.tolist(), kinds.tolist(), others.tolist(), strict=True):
        if kind < 0.8:
            changed[place] = mask
        elif kind < 0.9:
            changed[place] = other
    return changed, [ids[place] for place in places.tolist()]


def quantiles(logits: Tensor, points: Tensor) -> Tensor:
    """int64 (M,): the first column at which the sum of softmax(logits (M, A)) goes beyond `points` (M,), in [0, 1).

    A point drawn evenly gives a draw from the distribution.
    """
    sums = logits.softmax(1).cumsum(1, dtype=torch.float64)
    total = sums[:, -1]
    targets = torch.minimum(points.double() * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, targets.unsqueeze(1), right=True).squeeze(1)


def _flat(chosen: Sequence[Ids], longest: int) -> Tensor:
    """Places of a padded batch in its flattened (N * T) tokens."""
    return torch.from_numpy(np.concatenate([row * longest + places for row, places in enumerate(chosen)]))


def _load(name: str, base: Path, seed: int) -> tuple[Any, Any, bool]:
    """Tokenizer, model in float32, and whether its head came with the checkpoint; without one it is drawn from `seed`.

    Raises:
        InputError: see `make_text_generator`.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "masked language models need transformers",
            where="explore.generator.kind",
            fix="pip install 'edgestill[transformers]'",
        ) from error
    source, local = locate(name, base, where=_WHERE)
    with _quiet(transformers), seeded(seed):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local)
            if tokenizer.mask_token_id is None:
                raise InputError(f'"{name}" has no mask token, so it cannot refill texts', where=_WHERE, fix=_FIX)
            model, report = transformers.AutoModelForMaskedLM.from_pretrained(
                source, local_files_only=local, dtype=torch.float32, output_loading_info=True
            )
        except InputError:
            raise
        except Exception as error:  # missing files, no network, unknown model types: each of another type
            raise InputError(
                f'cannot load "{name}" as a masked language model',
                where=_WHERE,
                evidence=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                fix=_FIX,
            ) from error
    missing = _missing(model, set(report["missing_keys"]))
    inner = {id(parameter) for parameter in model.base_model.parameters()}
    lost = sorted(label for label, parameter in missing.items() if id(parameter) in inner)
    if lost:
        raise InputError(
            f'the checkpoint of "{name}" lacks weights of the network itself',
            where=_WHERE,
            evidence=f"{len(lost)} missing, such as {lost[0]}",
            fix=_FIX,
        )
    return tokenizer, model, not missing


def _missing(model: nn.Module, names: set[str]) -> dict[str, nn.Parameter]:
    """The parameters of those names that do not share their memory with one that was loaded (tied embeddings do)."""
    every = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in every.items() if name not in names}
    return {name: p for name, p in every.items() if name in names and id(p) not in loaded}


def _length(tokenizer: Any, model: Any) -> int:
    """Tokens that the model takes, special ones included."""
    positions = int(getattr(model.config, "max_position_embeddings", 0) or 512)
    for name, module in model.named_modules():
        # RoBERTa and its kin count places from behind the padding's own
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = min(positions, int(module.num_embeddings) - int(module.padding_idx) - 1)
    return min(positions if positions > 0 else 512, int(tokenizer.model_max_length))


def _rules(tokenizer: Any) -> dict[str, Any]:
    """Plain values that decide what a tokenizer does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found: dict[str, Any] = {
        "vocabulary": {str(word): int(i) for word, i in tokenizer.get_vocab().items()},
        "special": sorted(int(i) for i in tokenizer.all_special_ids),
    }
    if backend is not None:
        rules = json.loads(backend.to_str())
        found["rules"] = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    return found


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own bars and reports; what is missing is said by us."""
    log = transformers.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


def _examples(generator: MaskedLM, texts: Sequence[str], info: Mapping[str, Any]) -> str:
    """What a person looks at: texts, what was masked, and two refills of each."""
    before = f"{info['accuracy_before']:.1%} before, " if "accuracy_before" in info else ""
    blocks = [
        f"{info['model']}, learn = {info['learn']}. Masked tokens whose likeliest refill is what stood there: {before}"
        f"{info['accuracy']:.1%} now ({info['judged_by']} texts that it did not learn from)."
    ]
    seeds = (0, 1)
    refills = [generator.refill(texts, [seed] * len(texts)) for seed in seeds]
    for row, text in enumerate(texts):
        parts = [f"text    {text}"]
        for seed, refilled in zip(seeds, refills, strict=True):
            parts += [f"masked  {generator.masked(text, seed)}", f"refill  {refilled[row]}"]
        blocks.append("\n".join(" ".join(part.split("\n")) for part in parts))
    return "\n\n".join(blocks) + "\n"
