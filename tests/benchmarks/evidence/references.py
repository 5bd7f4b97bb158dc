"""What simple methods reach: linear probes of stored embeddings, and TF-IDF with logistic regression for texts."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from profiles.errors import EdgestillError

Array = np.ndarray[Any, Any]


def sklearn(module: str = "") -> Any:
    """scikit-learn, or a module of it (".linear_model"); only these references need it.

    Raises:
        EdgestillError: it is not installed.
    """
    try:
        return importlib.import_module("sklearn" + module)
    except ImportError as error:
        raise EdgestillError(
            "the linear probes and the reference line of texts need scikit-learn", fix="pip install scikit-learn"
        ) from error


def logistic_regression(
    inputs: tuple[Any, Any, Any], labels: tuple[Array, Array, Array], strengths: Sequence[float]
) -> dict[str, float]:
    """Accuracies of the strength that is best on validation; the test split is read once, for that one.

    Args:
        inputs: train, validation and test, each (N, D), dense or sparse.
        labels: the same, int (N,).
        strengths: of the regularisation (scikit-learn's C), to choose from. The solver stops after 300 steps at most.
    """
    linear_model = sklearn(".linear_model")
    best: tuple[float, float, Any] | None = None
    for strength in strengths:
        model = linear_model.LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(inputs[0], labels[0])
        accuracy = float((model.predict(inputs[1]) == labels[1]).mean())
        if best is None or accuracy > best[0]:
            best = accuracy, strength, model
    assert best is not None
    test = float((best[2].predict(inputs[2]) == labels[2]).mean())
    return {"validation": round(best[0], 4), "test": round(test, 4), "C": best[1], "train_size": len(labels[0])}


def linear_probe(inputs: tuple[Array, Array, Array], labels: tuple[Array, Array, Array]) -> dict[str, float]:
    """Logistic regression on embeddings whose columns were standardised by the training split."""
    mean, spread = inputs[0].mean(0), inputs[0].std(0)
    train, validation, test = ((part - mean) / np.where(spread > 0, spread, 1) for part in inputs)
    return logistic_regression((train, validation, test), labels, (0.001, 0.01, 0.1))


def tf_idf(
    texts: tuple[Sequence[str], Sequence[str], Sequence[str]], labels: tuple[Array, Array, Array]
) -> dict[str, float]:
    """Words and pairs of words (sublinear counts), weights from the training split, then logistic regression."""
    vectoriser = sklearn(".feature_extraction.text").TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    train = vectoriser.fit_transform(texts[0])
    validation, test = (vectoriser.transform(part) for part in texts[1:])
    found = logistic_regression((train, validation, test), labels, (0.3, 1.0, 3.0, 10.0, 30.0))
    return {**found, "terms": len(vectoriser.vocabulary_)}
