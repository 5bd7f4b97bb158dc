"""Writes a recipe in which every key says in plain words what it does."""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cli.own_data import OwnData
from profiles.errors import InputError
from profiles.opening import open_graph

if TYPE_CHECKING:
    from profiles.device import Device

_WIDTH = 100
_SHOWN_SIZE = 64
Task = Literal["multiclass", "multilabel"]


@dataclass(frozen=True)
class Teacher:
    """A `[teacher]` table: its keys in order, and the objective that fits what the teacher tells."""

    keys: tuple[tuple[str, Any, str], ...]
    """Key, value, comment."""
    objective: str
    why: str


@dataclass(frozen=True)
class Limits:
    """Limits of every target; None: no limit. Units as in the recipe."""

    latency_ms: float | None = None
    memory_mib: float | None = None
    file_size_mib: float | None = None
    metric_floor: float | None = None


_LIMITS = (
    ("latency_ms", 10.0, "milliseconds that one answer may take, at the percentile below"),
    ("memory_mib", 500.0, "memory that the process may use, in MiB"),
    ("file_size_mib", 10.0, "size that the model file may have, in MiB"),
    (
        "metric_floor",
        0.9,
        "accuracy that the exported model must reach, 0 to 1 (several labels: mean average precision)",
    ),
)


def slug(text: str) -> str:
    """A name that recipes and folders accept."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:60] or "my-data"


def choose_teacher(given: str, *, base: Path) -> Teacher:
    """The teacher that `KIND` or `KIND:VALUE` names, e.g. `train`, `array:embeddings.npy`, `transformers:owner/model`.

    Args:
        given: what the user said.
        base: the recipe's folder; paths are written relative to it.

    Raises:
        InputError: unknown kind, or a kind that needs a value without one, or a missing file.
    """
    from typing import get_args

    from distill.teachers.section import TeacherKind
    from profiles.errors import nearest

    kind, _, value = given.partition(":")
    kinds = list(get_args(TeacherKind))
    if kind not in kinds:
        raise InputError(f'no teacher of kind "{kind}"', where="--teacher", fix=nearest(kind, kinds))
    examples = {
        "array": "array:embeddings.npy",
        "transformers": "transformers:owner/model",
        "onnx": "onnx:teacher.onnx",
        "torch": "torch:package.module:factory",
    }
    if kind in examples and not value:
        raise InputError(f'a teacher of kind "{kind}" needs more', where="--teacher", fix=f"--teacher {examples[kind]}")
    if kind == "train":
        says = "train a wide network of the student's family on your labels first, then let it teach"
        return Teacher((("kind", kind, says),), "kd", "matches the teacher's softened class probabilities")
    if kind == "none":
        return Teacher((("kind", kind, "no teacher"),), "supervised", "learns from the labels alone")
    if kind == "array":
        says = "outputs of a teacher that you computed yourself"
        rows = "one row per sample of the data, in its order"
        keys: tuple[tuple[str, Any, str], ...]
        keys = (("kind", kind, says), ("embeddings", _existing(value, base, "--teacher"), rows))
    elif kind == "transformers":
        says = "a pretrained model of the transformers library"
        model = value if not Path(value).is_dir() else _relative(Path(value), base)
        keys = (("kind", kind, says), ("model", model, "a local folder, or a name of the Hugging Face hub"))
    elif kind == "torch":
        says = "a PyTorch module that your own code makes; run needs --allow-code"
        keys = (("kind", kind, says), ("factory", value, "package.module:name of the class or function"))
    else:
        output = _onnx_output(Path(value))
        keys = (
            ("kind", kind, "a network in an ONNX file"),
            ("file", _existing(value, base, "--teacher"), "the file"),
            ("embedding_output", output, "the output that is the embedding; use `output` instead for class logits"),
        )
    return Teacher(keys, "ec", "compresses the teacher's embedding to what your task needs, and matches that")


def _existing(value: str, base: Path, where: str) -> str:
    path = Path(value).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {value}", where=where, fix="check the path")
    return _relative(path, base)


def _onnx_output(path: Path) -> str:
    _existing(str(path), path.parent, "--teacher")
    return str(open_graph(path).graph.output[0].name)


def _relative(path: Path, base: Path) -> str:
    """Relative to the recipe where the file lies below it, so that the folder can move; else absolute."""
    path, base = path.expanduser().resolve(), base.resolve()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def write(
    *,
    name: str,
    data: OwnData,
    task: Task,
    teacher: Teacher,
    devices: Sequence[tuple[str, Device]],
    limits: Limits,
    base: Path,
) -> str:
    """The recipe's text, checked.

    Args:
        name: of the run.
        data: what `look_at` found.
        task: multiclass or multilabel.
        teacher: from `choose_teacher`.
        devices: what the user named, with the device that it is; one target is written for each.
        limits: for every target.
        base: the recipe's folder.

    Raises:
        InputError: the keys do not fit each other.
    """
    lines = [
        "# A recipe for edgestill. Every key that is left out has a default.",
        "# Look first:  edgestill run FILE --dry-run      Then:  edgestill run FILE",
        "",
        *_key("name", name, "names the run and its folder, runs/NAME"),
        *_key("seed", 0, "everything random follows from it; another number gives another, equally good run"),
        *_key(
            "objective",
            teacher.objective,
            f"how the student learns from the teacher: {teacher.why}; the other ways: edgestill methods",
        ),
        *_data(data, task, base),
        "",
        "[teacher]",
        *(line for key in teacher.keys for line in _key(*key)),
        *_strategy(teacher),
        *_student(data),
        *_explore(data, teacher),
        "",
        "[train]",
        *_key("epochs", 30, "passes over the training data; more take longer, and help until they stop helping"),
    ]
    used: list[str] = []
    for given, device in devices:
        short = slug(Path(given).stem if given.endswith(".toml") else given)
        target = short if short not in used else f"{short}-{len(used) + 1}"
        used.append(target)
        lines += _target(target, _relative(Path(given), base) if given.endswith(".toml") else given, device, limits)
    text = "\n".join(lines) + "\n"

    from cli.recipe import check

    check(tomllib.loads(text), "the new recipe")
    return text


def _key(key: str, value: Any, comment: str, off: bool = False) -> list[str]:
    """A wrapped comment and under it the key; `off`: switched off, to show what could be asked."""
    import tomlkit

    words = [f"# {line}" for line in textwrap.wrap(comment, _WIDTH)]
    return [*words, f"{'# ' if off else ''}{key} = {tomlkit.item(value).as_string()}"]


def _strategy(teacher: Teacher) -> list[str]:
    """How the teacher itself could learn, switched off; nothing for a teacher that cannot."""
    kind = next(value for key, value, _ in teacher.keys if key == "kind")
    if kind not in ("train", "torch", "transformers") or (kind != "train" and teacher.objective == "ec"):
        return []
    return _key(
        "strategy",
        "generic",
        "how the teacher itself learns: generic prepares it for students of many sizes, lgtm lets it learn along with "
        "the student (slower); more: edgestill methods generic",
        off=True,
    )


def _explore(data: OwnData, teacher: Teacher) -> list[str]:
    """What the student could learn on besides, switched off; nothing for a teacher that cannot be asked."""
    if next(value for key, value, _ in teacher.keys if key == "kind") in ("none", "array"):
        return []
    kind, around = ("real", "unlabelled") if data.is_text else ("random", "train")
    lines = [
        "",
        *_table("explore", "few labels: the student learns from the teacher on further inputs, too"),
        *_key(
            "kind",
            kind,
            "real: unlabelled inputs as they are; random: made near real ones by a generator"
            + (", which needs a masked language model" if data.is_text else "; more")
            + ": edgestill methods TGT",
            off=True,
        ),
        *_key(
            "around",
            around,
            "which inputs: train, unlabelled, or both; the last two need [data.unlabelled] above",
            off=True,
        ),
    ]
    if not data.is_text:
        lines += _key("sigma", 0.5, "how far from the real images; look at explored/explored.png afterwards", off=True)
    return lines


def _table(name: str, comment: str) -> list[str]:
    """A wrapped comment and under it the head of a table, switched off."""
    return [*(f"# {line}" for line in textwrap.wrap(comment, _WIDTH)), f"# [{name}]"]


def _data(data: OwnData, task: Task, base: Path) -> list[str]:
    lines = ["", "[data]", *_key("source", data.source, f"the kind of data; found here: {data.seen}")]
    if data.path is not None:
        lines += _key("path", _relative(data.path, base), "where it is; a relative path starts from this file's folder")
    meaning = {
        "multiclass": "every sample belongs to exactly one class",
        "multilabel": "a sample may carry several labels, or none",
    }
    lines += _key("task", task, meaning[task])
    named = (
        ("image_column", data.image_column, "what holds the image, or its path"),
        ("text_column", data.text_column, "what holds the text"),
        ("label_column", data.label_column, "what holds the label"),
        ("split_column", data.split_column, "what says train, validation or test"),
    )
    for key, value, comment in named:
        if value is not None:
            lines += _key(key, value, comment)
    if task == "multilabel" and data.label_column is None and data.source in ("csv", "jsonl", "parquet"):
        classes = list(data.other_columns)
        lines += _key("label_columns", classes, "one column of 0 and 1 for each class; an empty entry is not known")
    if data.path is not None and not data.is_text:
        size = "pixels, height and width; more keep more detail and take longer with the square"
        lines += _key("image_size", data.image_size or _SHOWN_SIZE, size, off=data.image_size is None)
    if data.split_column is None and data.path is not None:
        made = "share of the samples that is set aside, where the data has no such split of its own"
        lines += _key("validation_fraction", 0.15, f"{made}: to choose the best epoch and precision")
        lines += _key("test_fraction", 0.15, f"{made}: to tell the accuracy, used once at the end")
    if task == "multiclass":
        tail = "makes a long tail of balanced data, to try methods on: the first class keeps 100 times the training"
        lines += _key("imbalance", "exp:100", f"{tail} samples of the last", off=True)
    if data.path is not None and not data.is_text:
        lines += [
            "",
            "[data.augment]",
            *_key("crop", 2, "shift images by up to this many pixels while training; 0: never"),
            *_key("flip", False, "also mirror them left-right; leave it off where left and right mean something"),
        ]
    source, path = ("lines", "more.txt") if data.is_text else ("imagefolder", "more-images")
    what = "a text file, one text per line" if data.is_text else "any folder of images"
    lines += [
        "",
        *_table("data.unlabelled", "few labels: further inputs without labels, for [explore] below"),
        *_key("source", source, f"{what}; others: a table, or rest, what train_size leaves over", off=True),
        *_key("path", path, "where they are", off=True),
    ]
    return lines


def _student(data: OwnData) -> list[str]:
    words = {"text": "a small network for texts", "conv": "a small convolutional network for images"}
    family = "text" if data.is_text else "conv"
    return [
        "",
        "[student]",
        *_key("family", family, f"{words[family]}; each target's device decides its size"),
        *_key(
            "pool",
            family,
            "or: the most accurate of many sizes that is within the limits of its target, found by trying and "
            "measuring; every target then needs latency_ms, memory_mib or file_size_mib",
            off=True,
        ),
    ]


def _target(name: str, given: str, device: Device, limits: Limits) -> list[str]:
    stacks = [stack.name for stack in device.stacks]
    lines = [
        "",
        "[[target]]",
        *_key("name", name, "any name; the report has one row for each target"),
        *_key("device", given, f"the device that it is for: {device.title}; others: edgestill devices"),
    ]
    if len(stacks) > 1:
        lines += _key("stack", stacks[0], f"the software on the device; known: {', '.join(stacks)}")
    modes = [mode.name for mode in device.power_modes if not mode.stacks or stacks[0] in mode.stacks]
    if modes:
        lines += _key("power_mode", modes[0], f"the power mode that it runs in; known: {', '.join(modes)}", off=True)
    lines += _key(
        "precision", "auto", "auto: the fastest that keeps the accuracy; or one of " + ", ".join(device.precisions)
    )
    for key, shown, comment in _LIMITS:
        value = getattr(limits, key)
        lines += _key(key, shown if value is None else value, f"limit: {comment}", off=value is None)
    lines += _key("percentile", 99, "99: at most one answer in a hundred may take longer than latency_ms")
    return lines
