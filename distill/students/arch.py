"""Architectures of the elastic student families: small typed values that print as one word. No torch here.

| word | family | meaning |
|---|---|---|
| `conv-w24-d2-k3` | conv | residual blocks: width 24, 2 blocks a stage, 3x3 kernels |
| `convi-w16-d2-k5` | conv | inverted-residual blocks (expand, depthwise, project) |
| `text-w64-d2-h4` | text | transformer: width 64, 2 blocks, 4 heads |
| `textc-w64-d2-k5` | text | convolutional encoder: width 64, 2 blocks, kernels of 5 tokens |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from distill.data.dataset import InputSpec
from profiles.errors import InputError

Family = Literal["conv", "text"]
SizeClass = Literal["small", "medium", "large"]

_EXAMPLES = {"conv": "conv-w24-d2-k3", "convi": "convi-w16-d2-k5", "text": "text-w64-d2-h4", "textc": "textc-w64-d2-k5"}
_WORD = re.compile(r"([a-z]+)-w(0|[1-9]\d{0,5})-d(0|[1-9]\d{0,5})-([kh])(0|[1-9]\d{0,5})", re.ASCII)
_SMALL_IMAGE = 32
"""Longest side (pixels) up to which the default teacher is a small one."""
_LARGE_IMAGE = 96
"""Longest side (pixels) from which on the stem divides the resolution by four instead of two."""
_LAST_MAP = 4
"""Stages are added, each halving the resolution, until the longer side of the map is at most this (pixels)."""


@dataclass(frozen=True)
class ConvArch:
    """A convolutional student. Stage i has `width * 2**i` channels and `depth` blocks of `kernel` x `kernel`.

    Raises:
        InputError: a value outside its range.
    """

    width: int
    depth: int
    kernel: int
    inverted: bool = False

    widths: ClassVar[range] = range(4, 513, 4)
    depths: ClassVar[range] = range(1, 9)
    kernels: ClassVar[range] = range(3, 8, 2)
    family: ClassVar[Family] = "conv"

    def __post_init__(self) -> None:
        _check(str(self), "width", self.width, self.widths)
        _check(str(self), "depth", self.depth, self.depths)
        _check(str(self), "kernel", self.kernel, self.kernels)

    def __str__(self) -> str:
        return f"conv{'i' if self.inverted else ''}-w{self.width}-d{self.depth}-k{self.kernel}"


@dataclass(frozen=True)
class TextArch:
    """A text student: a transformer with `heads` heads, or a convolutional encoder with kernels of `kernel` tokens.

    Raises:
        InputError: a value outside its range, or not exactly one of heads and kernel.
    """

    width: int
    depth: int
    heads: int = 0
    kernel: int = 0

    widths: ClassVar[range] = range(16, 1025, 8)
    depths: ClassVar[range] = range(1, 13)
    head_counts: ClassVar[range] = range(1, 17)
    kernels: ClassVar[range] = range(3, 12, 2)
    family: ClassVar[Family] = "text"

    def __post_init__(self) -> None:
        if bool(self.heads) == bool(self.kernel):
            raise InputError(
                "a text architecture has heads (transformer) or a kernel (convolution), exactly one of them"
            )
        _check(str(self), "width", self.width, self.widths)
        _check(str(self), "depth", self.depth, self.depths)
        if self.kernel:
            _check(str(self), "kernel", self.kernel, self.kernels)
            return
        _check(str(self), "heads", self.heads, self.head_counts)
        if self.width % self.heads:
            fitting = [heads for heads in self.head_counts if self.width % heads == 0]
            best = min(fitting, key=lambda heads: abs(heads - self.heads))
            raise InputError(
                f"{self.heads} heads do not divide a width of {self.width}",
                evidence=str(self),
                fix=f"text-w{self.width}-d{self.depth}-h{best}",
            )

    def __str__(self) -> str:
        last = f"k{self.kernel}" if self.kernel else f"h{self.heads}"
        return f"text{'c' if self.kernel else ''}-w{self.width}-d{self.depth}-{last}"


Arch = ConvArch | TextArch


def parse_arch(text: str, *, where: str | None = None) -> Arch:
    """The architecture that a word names; the inverse of `str`.

    Args:
        text: one word, see the table of this module.
        where: the recipe key or option that held it, for the message.

    Raises:
        InputError: not a word of a family, or a value outside its range (the message names range and nearest value).
    """
    match = _WORD.fullmatch(text)
    prefix = match.group(1) if match else re.split(r"[^a-z]", text, maxsplit=1)[0]
    example = _EXAMPLES.get(prefix)
    expected_letter = example.split("-")[-1][0] if example else ""
    if match is None or example is None or match.group(4) != expected_letter:
        raise InputError(
            f'"{text}" names no architecture',
            where=where,
            evidence="words look like " + ", ".join(_EXAMPLES.values()),
            fix=f"such as {example or _EXAMPLES['conv']}",
        )
    width, depth, last = int(match.group(2)), int(match.group(3)), int(match.group(5))
    try:
        if prefix in ("conv", "convi"):
            return ConvArch(width, depth, last, inverted=prefix == "convi")
        # a zero would read as "the other kind", so it is refused here
        if last == 0:
            name, valid = ("heads", TextArch.head_counts) if prefix == "text" else ("kernel", TextArch.kernels)
            _check(text, name, 0, valid)
        return TextArch(width, depth, heads=last) if prefix == "text" else TextArch(width, depth, kernel=last)
    except InputError as error:
        raise InputError(error.message, where=where, evidence=error.evidence, fix=error.fix) from None


def stage_count(spec: InputSpec) -> int:
    """Number of stages of a conv student for this input: see `ConvNet` for the rule."""
    side = -(-max(spec.shape[1:]) // stem_stride(spec))
    count = 1
    while side > _LAST_MAP:
        side, count = -(-side // 2), count + 1
    return min(max(count, 2), 4)


def stem_stride(spec: InputSpec) -> int:
    """2 for images below 96 px on the longer side, 4 from there on."""
    return 4 if max(spec.shape[1:]) >= _LARGE_IMAGE else 2


def family_for(spec: InputSpec) -> Family:
    """The family that reads this kind of input: "conv" for images, "text" for tokens."""
    return "conv" if spec.kind == "image" else "text"


def default_arch(family: Family | None, size_class: SizeClass, spec: InputSpec) -> str:
    """The word of the family's default for a target's size class; None: of the family that reads this input.

    Raises:
        InputError: the family does not read this kind of input.
    """
    family = family or family_for(spec)
    check_family(family, spec)
    if family == "text":
        return {"small": "textc-w64-d2-k5", "medium": "text-w64-d2-h4", "large": "text-w128-d3-h4"}[size_class]
    if max(spec.shape[1:]) >= _LARGE_IMAGE:
        return {"small": "convi-w16-d2-k3", "medium": "conv-w32-d1-k3", "large": "conv-w48-d2-k3"}[size_class]
    return {"small": "conv-w8-d1-k3", "medium": "conv-w16-d1-k3", "large": "conv-w24-d1-k3"}[size_class]


def teacher_arch(family: Family | None, spec: InputSpec) -> str:
    """The word of the default teacher of kind "train": several times the parameters of the medium default student.

    Up to 32 px it is sized so that two CPU cores train it within minutes. None: of the family that reads this input.

    Raises:
        InputError: the family does not read this kind of input.
    """
    family = family or family_for(spec)
    check_family(family, spec)
    if family == "text":
        return "text-w256-d4-h8"
    side = max(spec.shape[1:])
    if side <= _SMALL_IMAGE:
        return "conv-w32-d1-k3"
    return "conv-w48-d2-k3" if side < _LARGE_IMAGE else "conv-w64-d2-k3"


def check_family(family: Family, spec: InputSpec, *, where: str | None = None) -> None:
    """Raises InputError when the family does not read this kind of input."""
    fitting = family_for(spec)
    if family != fitting:
        raise InputError(
            f'the "{family}" family reads {"images" if family == "conv" else "texts"}, the data set has '
            f"{'images' if spec.kind == 'image' else 'texts'}",
            where=where or "student.family",
            fix=f'family = "{fitting}", or leave the key out',
        )


def _check(word: str, name: str, value: int, valid: range) -> None:
    if value not in valid:
        step = f" in steps of {valid.step}" if valid.step > 1 else ""
        closest = min(valid, key=lambda candidate: abs(candidate - value))
        raise InputError(
            f"{name} {value} is out of range",
            evidence=f"{word}: {name} goes from {valid[0]} to {valid[-1]}{step}",
            fix=f"{name} {closest} is the nearest",
        )
