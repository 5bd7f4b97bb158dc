"""all-MiniLM-L6-v2 as a teacher of short texts: frozen (a teacher of another task), or fine-tuned on the labels."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distill.teachers.from_transformers import pool

Array = np.ndarray[Any, Any]
DIMENSIONS = 384
_ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class FineTuning:
    """How the teacher is trained: AdamW, linear warm-up over `warmup` of the steps, then linearly to zero."""

    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    largest_gradient: float = 1.0
    length: int = 48
    seed: int = 0


class SentenceEncoder(nn.Module):
    """Texts to the mean of their tokens' last hidden states: float32 (N, 384), not normalised."""

    def __init__(self, folder: Path, length: int) -> None:
        super().__init__()
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.network: Any = transformers.AutoModel.from_pretrained(
            str(folder), local_files_only=True, dtype=torch.float32, add_pooling_layer=False
        )
        self.length = length

    def forward(self, texts: Sequence[str]) -> Tensor:
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        )
        return pool(self.network(**encoded).last_hidden_state, encoded["attention_mask"], "mean")


class Classifier(nn.Module):
    """An encoder and a linear layer on its embeddings (after dropout, while it trains)."""

    def __init__(self, encoder: SentenceEncoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(DIMENSIONS, classes)

    def forward(self, texts: Sequence[str]) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.encoder(texts)))
        return logits


def embed(encoder: SentenceEncoder, texts: Sequence[str]) -> Array:
    """float32 (N, 384) in the order of `texts`, clean (no dropout)."""
    encoder.eval()
    # texts of like length go together, so that short ones are not padded to the longest one
    order = np.argsort([len(text) for text in texts], kind="stable")
    found = np.empty((len(texts), DIMENSIONS), np.float32)
    with torch.inference_mode():
        for start in range(0, len(texts), _ROWS_AT_ONCE):
            rows = order[start : start + _ROWS_AT_ONCE]
            found[rows] = encoder([texts[row] for row in rows.tolist()]).numpy()
    return found


def fine_tune(
    folder: Path, texts: Sequence[str], labels: Array, classes: int, settings: FineTuning
) -> tuple[Classifier, list[float]]:
    """Trains encoder and head on these texts alone.

    Args:
        folder: the pretrained network.
        texts, labels: the training split: N texts, int64 (N,).
        classes: number of them.
        settings: how.

    Returns:
        The classifier, in evaluation mode, and the mean training loss of each epoch.
    """
    torch.manual_seed(settings.seed)
    network = Classifier(SentenceEncoder(folder, settings.length), classes)
    steps_per_epoch = -(-len(texts) // settings.batch_size)
    steps = settings.epochs * steps_per_epoch
    warm = max(1, round(settings.warmup * steps))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    targets = torch.from_numpy(labels)
    random = np.random.default_rng(settings.seed)
    network.train()
    losses = []
    started = time.perf_counter()
    for epoch in range(settings.epochs):
        order = random.permutation(len(texts))
        total = 0.0
        for step in range(steps_per_epoch):
            rows = order[step * settings.batch_size : (step + 1) * settings.batch_size]
            loss = cross_entropy(network([texts[row] for row in rows.tolist()]), targets[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), settings.largest_gradient)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
            if step % 25 == 24:
                done = epoch * steps_per_epoch + step + 1
                print(
                    f"fine-tuning: step {done} of {steps}, mean loss {total / ((step + 1) * settings.batch_size):.4f}, "
                    f"{time.perf_counter() - started:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
        losses.append(total / len(texts))
    network.eval()
    return network, losses


def classify(network: Classifier, embeddings: Array) -> Array:
    """float32 (N, C): the head's logits of embeddings that its own encoder gave."""
    with torch.inference_mode():
        logits: Array = network.head(torch.from_numpy(embeddings)).numpy()
    return logits
