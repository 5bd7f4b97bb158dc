"""Texts become int64 tokens, with a tokenizer that is trained here or that the user brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill.data.arrays import Array
from profiles.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, UNKNOWN, MASK = "[PAD]", "[UNK]", "[MASK]"
_CHUNK = 4096


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A lower-casing BPE tokenizer of at most `vocabulary` entries; [PAD] is 0, [UNK] 1, [MASK] 2.

    The same texts give the same tokenizer. The library's WordPiece trainer does not: it numbers the "##" pieces in the
    order of a hash map. So it is BPE here, and a word's beginning is marked in the text ("▁").
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, UNKNOWN, MASK], show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """A user's `tokenizer.json`.

    Raises:
        InputError: not there, or not a tokenizer.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        raise InputError(f"no file {path.name}", where=f"data.tokenizer = {path}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception for everything that it cannot parse
        raise InputError(
            f"{path.name} is not a tokenizer",
            where=str(path),
            evidence=str(error).splitlines()[0],
            fix="give a tokenizer.json that the tokenizers library saved",
        ) from error


def pad_id(tokenizer: Tokenizer) -> int:
    """The id of the padding token, under its usual names; 0 where there is none."""
    for name in (PAD, "<pad>", "<|padding|>"):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    return 0


def encode(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Array:
    """int64 (N, length): the first `length` tokens of each text, padded. A text without any token gets one unknown."""
    padding = pad_id(tokenizer)
    unknown = next(
        (found for name in (UNKNOWN, "<unk>") if (found := tokenizer.token_to_id(name)) is not None), padding
    )
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    tokens = np.full((len(texts), length), padding, np.int64)
    for start in range(0, len(texts), _CHUNK):
        for row, encoding in enumerate(tokenizer.encode_batch(list(texts[start : start + _CHUNK])), start):
            ids = encoding.ids or [unknown]
            tokens[row, : len(ids)] = ids
    return tokens
