"""Finite pools of student architectures: combinations of a family's choices, and what some target can carry of them.

No torch here. A pool that a teacher is conditioned on holds one kind only (conv, convi, text or textc), as its members
are parts of one largest network; a pool that students are chosen from may mix the kinds of a family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from distill.data.dataset import InputSpec
from distill.students.arch import Arch, ConvArch, TextArch, check_family, family_for, parse_arch, stage_count
from profiles.errors import InputError, nearest

Source = Literal["measured", "calibrated", "assumed", "bound"]

KINDS = ("conv", "convi", "text", "textc")
"""First parts of the words of architectures."""
MOST_MEMBERS = 256
"""Of a pool that students are chosen from: every one is exported, to find what it costs."""

# A family's own choices keep a pool below 60 members, so that each is sampled often enough within a usual training.
_CONV_WIDTHS = (8, 12, 16, 24, 32, 48, 64)
_TEXT_WIDTHS = (32, 64, 96, 128, 192, 256)
_DEEPEST = 4
_KERNELS = (3, 5)
_HEADS = (2, 4, 8)
_HEAD_CHANNELS = 16
"""Fewest channels of a head among a family's own choices."""
_GENERIC = "teacher.generic"
_CHOICE = "student.choice"
_POOL = "student.pool"


@dataclass(frozen=True)
class Cost:
    """What an architecture needs on a target; None: not known.

    file_mib, memory_mib: model file and process memory (MiB). latency_bound_ms: no run can be faster. latency_ms: what
    is expected of a run, in the clock, batch and percentile of the target's limit; None where `source` is "bound".

    source: how it is known. "measured": on the device; "calibrated": predicted by the device's calibration; "assumed":
    the bound over an assumed efficiency, with the other figures as lower ends; "bound": every figure is a lower end.

    is_cut_off: nobody looked at it, as a part of it is hopeless already; its bound is what that part needs.
    """

    file_mib: float | None = None
    memory_mib: float | None = None
    latency_bound_ms: float | None = None
    latency_ms: float | None = None
    source: Source = "bound"
    is_cut_off: bool = False

    def __post_init__(self) -> None:
        if self.latency_ms is not None and self.source == "bound":
            raise ValueError("an expected latency needs its source: measured, calibrated or assumed")


@dataclass(frozen=True)
class Limits:
    """What a target allows (MiB, MiB, milliseconds); None: no limit."""

    file_mib: float | None = None
    memory_mib: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Exclusion:
    """One limit of one target that excludes members of a pool.

    limit: its key in a recipe's `[[target]]`. allowed: its value. archs: the excluded members. pool: how many members
    there are. needs: what the most modest of the excluded needs, `smallest`.
    """

    target: str
    limit: str
    allowed: float
    archs: tuple[Arch, ...]
    pool: int
    smallest: Arch
    needs: float

    def __str__(self) -> str:
        everything = len(self.archs) == self.pool
        count = f"all {self.pool}" if everything else f"{len(self.archs)} of {self.pool}"
        unit = "ms" if self.limit == "latency_ms" else "MiB"
        who = "smallest needs" if everything else "the smallest of them needs"
        return (
            f"{self.target}: {self.limit} {self.allowed:g} excludes {count} "
            f"({who} {above(self.needs, self.allowed)} {unit}, {self.smallest})"
        )


def kind_of(arch: Arch) -> str:
    """The first part of an architecture's word: conv, convi, text or textc."""
    return str(arch).partition("-")[0]


def stage_boundaries(teacher: Arch, spec: InputSpec) -> int:
    """Number of places inside a teacher where a student can be grafted on: between stages (conv) or blocks (texts).

    0 for a text teacher of one block.
    """
    return stage_count(spec) - 1 if isinstance(teacher, ConvArch) else teacher.depth - 1


def largest(archs: Sequence[Arch]) -> Arch:
    """The architecture of the largest width, depth and kernel among `archs`, of which all of them are parts.

    Heads only read the same query, key and value channels in other groups, so that any number that divides the width
    serves; the largest among the members is taken.

    Raises:
        ValueError: no architecture, or of several kinds.
    """
    kinds = sorted({kind_of(arch) for arch in archs})
    if len(kinds) != 1:
        raise ValueError(f"a pool holds architectures of one kind, not {' and '.join(kinds) or 'none'}")
    width, depth = max(arch.width for arch in archs), max(arch.depth for arch in archs)
    if isinstance(archs[0], ConvArch):
        return ConvArch(width, depth, max(arch.kernel for arch in archs), inverted=archs[0].inverted)
    if archs[0].kernel:
        return TextArch(width, depth, kernel=max(arch.kernel for arch in archs))
    heads = max(arch.heads for arch in archs if isinstance(arch, TextArch) and width % arch.heads == 0)
    return TextArch(width, depth, heads=heads)


def family_pool(
    teacher: Arch | None,
    spec: InputSpec,
    *,
    like: Arch | str,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    kernels: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    where: str = _GENERIC,
) -> tuple[Arch, ...]:
    """Every combination of the choices, sorted, without duplicates.

    None: the family's own choices up to the teacher's width, and up to its depth (but two blocks at least in a conv
    net, and four at most). Where no choice is given at all, a `like` that is an architecture is a member, too.
    Transformers whose heads do not divide the width are no architectures, so they are left out.

    Args:
        teacher: the architecture of a teacher of this family; None: there is none, the family's own choices are taken.
        spec: one sample's shape.
        like: a student of the recipe, or a kind; the pool is of its kind (conv, convi, text or textc).
        widths, depths, kernels, heads: the recipe's choices. Kernels: conv, convi, textc. Heads: text.
        where: the recipe's table that holds them, for messages.

    Raises:
        InputError: a value outside its range, kernels of a transformer, heads of anything else, or no heads that divide
            a width; the message names the recipe key and the fix.
    """
    kind = like if isinstance(like, str) else kind_of(like)
    _check_reads(kind, spec, where)
    transformer, convolution = kind == "text", kind.startswith("conv")
    if transformer and kernels is not None:
        raise _foreign("kernels", like, where)
    if not transformer and heads is not None:
        raise _foreign("heads", like, where)
    family: type[ConvArch] | type[TextArch] = ConvArch if convolution else TextArch
    grid = _CONV_WIDTHS if convolution else _TEXT_WIDTHS
    own_widths = grid if teacher is None else tuple(w for w in grid if w <= teacher.width) or (teacher.width,)
    deepest = _DEEPEST if teacher is None else max(2, teacher.depth) if convolution else teacher.depth
    chosen_widths = _checked("widths", widths, family.widths, where) or own_widths
    chosen_depths = _checked("depths", depths, family.depths, where) or tuple(range(1, min(deepest, _DEEPEST) + 1))
    shapes = list(product(chosen_widths, chosen_depths))
    members: set[Arch]
    if transformer:
        given = _checked("heads", heads, TextArch.head_counts, where)
        members = {TextArch(w, d, heads=h) for w, d in shapes for h in (given or _own_heads(w)) if w % h == 0}
    else:
        given = _checked("kernels", kernels, family.kernels, where) or _KERNELS
        members = {
            ConvArch(w, d, k, inverted=kind == "convi") if convolution else TextArch(w, d, kernel=k)
            for w, d in shapes
            for k in given
        }
    if not members:
        width = shapes[0][0]
        fitting = [h for h in TextArch.head_counts if width % h == 0]
        raise InputError(
            "no number of heads divides any width of the pool",
            where=f"{where}.heads",
            evidence=f"heads {_list(heads or ())}; widths {_list(sorted({w for w, _ in shapes}))}",
            fix=f"heads = [{_list(fitting)}] divide a width of {width}",
        )
    if not isinstance(like, str) and all(choice is None for choice in (widths, depths, kernels, heads)):
        members.add(like)
    return _ordered(members)


def parse_pool(words: Sequence[str], spec: InputSpec, *, where: str = f"{_GENERIC}.archs") -> tuple[Arch, ...]:
    """The architectures of one kind that a list of a recipe names, sorted, without duplicates.

    Args:
        words: such as conv-w24-d2-k3.
        spec: one sample's shape.
        where: the recipe key that holds the list, for messages.

    Raises:
        InputError: not a word of a family, a family that does not read this kind of input, or several kinds; the
            message names the entry.
    """
    archs: list[Arch] = []
    for i, word in enumerate(words):
        entry = f"{where}[{i}]"
        arch = parse_arch(word, where=entry)
        _check_reads(kind_of(arch), spec, entry)
        if archs and kind_of(arch) != kind_of(archs[0]):
            raise InputError(
                f'"{kind_of(arch)}" and "{kind_of(archs[0])}" cannot share their weights',
                where=entry,
                evidence=f"{arch} beside {archs[0]}",
                fix=f'name architectures of one kind, such as "{_counterpart(arch, archs[0])}"',
            )
        archs.append(arch)
    return _ordered(archs)


def student_pool(
    pool: str | Sequence[str],
    spec: InputSpec,
    *,
    teacher: Arch | None = None,
    shared: bool = False,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    kernels: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> tuple[Arch, ...]:
    """The architectures that a recipe's `student.pool` lets students be chosen from, sorted, without duplicates.

    Args:
        pool: a kind (conv, convi, text or textc), an architecture, or a list of both. A kind stands for its
            `family_pool`.
        spec: one sample's shape.
        teacher: the architecture of a teacher of kind "train", whose size bounds a kind's own choices; None: there is
            none, or it is of no family.
        shared: whether the members share their weights (a teacher of strategy "generic"), so that they must be of one
            kind.
        widths, depths, kernels, heads: the choices of `student.choice`, each for the kinds that have it.

    Raises:
        InputError: nothing to choose between (no or one member), too many members, a word that is neither kind nor
            architecture, one that reads another kind of input, several kinds that would have to share their weights,
            or choices that no kind of the pool has; the message names the recipe key and the fix.
    """
    entries = (pool,) if isinstance(pool, str) else tuple(pool)
    choices = {"widths": widths, "depths": depths, "kernels": kernels, "heads": heads}
    named, kinds = set[Arch](), list[str]()
    first = ""
    for i, word in enumerate(entries):
        where = _POOL if isinstance(pool, str) else f"{_POOL}[{i}]"
        if word not in KINDS and word.partition("-")[0] not in KINDS:
            hint = nearest(word, list(KINDS)) if "-" not in word else "such as conv-w24-d2-k3"
            raise InputError(
                f'"{word}" is neither a kind nor an architecture',
                where=where,
                evidence=f"kinds: {', '.join(KINDS)}; an architecture is one word, such as conv-w24-d2-k3",
                fix=hint,
            )
        arch = None if word in KINDS else parse_arch(word, where=where)
        kind = word if arch is None else kind_of(arch)
        _check_reads(kind, spec, where)
        first = first or kind
        if shared and kind != first:
            raise InputError(
                f'"{kind}" and "{first}" cannot share their weights',
                where=where,
                evidence='teacher.strategy = "generic" trains the pool as parts of one largest network',
                fix=f'a pool of one kind, such as pool = "{first}", or teacher.strategy = "frozen"',
            )
        if arch is None:
            kinds.append(kind)
        else:
            named.add(arch)
    _check_choices(choices, kinds, first)
    members = set(named)
    for kind in kinds:
        own = {name: values for name, values in choices.items() if name not in _without(kind)}
        members.update(family_pool(teacher, spec, like=kind, where=_CHOICE, **own))
    if len(members) < 2:
        only = f'arch = "{next(iter(members))}"' if members else f'pool = "{family_for(spec)}"'
        raise InputError(
            f"a pool of {'one' if members else 'none'} leaves nothing to choose",
            where=_POOL,
            evidence=f"its only member is {next(iter(members))}" if members else "the list is empty",
            fix=f"{only} in place of the pool" if members else only,
        )
    if len(members) > MOST_MEMBERS:
        raise InputError(
            f"the pool has {len(members)} architectures",
            where=_CHOICE if kinds else _POOL,
            evidence=f"each is exported, to find what it costs on every target; at most {MOST_MEMBERS}",
            fix="fewer widths, depths or kernels" if kinds else f"name {MOST_MEMBERS} of them",
        )
    return _ordered(members)


def restrict(
    pool: Sequence[Arch],
    cost: Callable[[Arch], Mapping[str, Cost]],
    limits: Mapping[str, Limits],
) -> tuple[tuple[Arch, ...], tuple[Exclusion, ...]]:
    """Leaves out the architectures that no target can carry.

    A limit excludes what is known to exceed it: an unknown cost excludes nothing, and neither does a target without
    limits. The costs are lower ends (see `Cost`), so nothing that could fit is lost.

    Args:
        pool: architectures.
        cost: an architecture's cost on every target of `limits`, by the target's name; asked once per architecture.
        limits: what every target allows, by its name. Empty: nothing is left out.

    Returns:
        The members that at least one target can carry, in the pool's order, and what every limit of every target
        excludes (also of members that another target carries).

    Raises:
        InputError: nothing is left; the message has a line per target and limit.
    """
    costs = {arch: cost(arch) for arch in pool}
    exclusions = [
        exclusion
        for target, allowed in limits.items()
        for exclusion in _exclusions(target, allowed, [(arch, costs[arch][target]) for arch in pool])
    ]
    refused = {(entry.target, arch) for entry in exclusions for arch in entry.archs}
    kept = tuple(arch for arch in pool if not limits or any((target, arch) not in refused for target in limits))
    if not kept:
        raise InputError(
            f"no target can carry any of the {len(pool)} architectures of the pool",
            where=_GENERIC,
            evidence="\n            ".join(str(entry) for entry in exclusions),
            fix=f"raise a limit, name smaller architectures, or {_GENERIC}.within_limits = false",
        )
    return kept, tuple(exclusions)


def _exclusions(target: str, allowed: Limits, costs: Sequence[tuple[Arch, Cost]]) -> Iterable[Exclusion]:
    for key, limit, needed in (
        ("file_size_mib", allowed.file_mib, [(entry.file_mib, arch) for arch, entry in costs]),
        ("memory_mib", allowed.memory_mib, [(entry.memory_mib, arch) for arch, entry in costs]),
        ("latency_ms", allowed.latency_ms, [(entry.latency_bound_ms, arch) for arch, entry in costs]),
    ):
        over = [(value, arch) for value, arch in needed if limit is not None and value is not None and value > limit]
        if over and limit is not None:
            needs, smallest = min(over, key=lambda pair: pair[0])
            archs = tuple(arch for _, arch in over)
            yield Exclusion(target, key, limit, archs, len(costs), smallest, needs)


def _check_reads(kind: str, spec: InputSpec, where: str) -> None:
    """Raises InputError when the kind's family does not read this kind of input."""
    right = family_for(spec)
    try:
        check_family("conv" if kind.startswith("conv") else "text", spec, where=where)
    except InputError as error:
        reads = " or ".join(f'"{each}"' for each in KINDS if each.startswith(right))
        fix = f"{reads}, or architectures such as {'conv-w24-d2-k3' if right == 'conv' else 'text-w64-d2-h4'}"
        raise InputError(error.message, where=where, evidence=error.evidence, fix=fix) from None


def _check_choices(choices: Mapping[str, Sequence[int] | None], kinds: Sequence[str], first: str) -> None:
    """Refuses choices that no kind of a pool of students has."""
    for name, values in choices.items():
        if values is None:
            continue
        if not kinds:
            raise InputError(
                f"{name} are chosen among the architectures of a kind, the pool names its own one by one",
                where=f"{_CHOICE}.{name}",
                evidence=f"no kind ({', '.join(KINDS)}) is in the pool",
                fix=f'leave {name} out, or pool = "{first or "conv"}"',
            )
        if all(name in _without(kind) for kind in kinds):
            raise _foreign(name, kinds[0], _CHOICE)


def _without(kind: str) -> tuple[str, ...]:
    """The choices that architectures of a kind do not have."""
    return ("kernels",) if kind == "text" else ("heads",)


def _checked(name: str, values: Sequence[int] | None, valid: range, table: str) -> tuple[int, ...]:
    """The recipe's values for one choice; empty when it gives none."""
    for i, value in enumerate(values or ()):
        if value not in valid:
            step = f" in steps of {valid.step}" if valid.step > 1 else ""
            raise InputError(
                f"{value} is out of range",
                where=f"{table}.{name}[{i}]",
                evidence=f"{name} go from {valid[0]} to {valid[-1]}{step}",
                fix=f"{min(valid, key=lambda candidate: abs(candidate - value))} is the nearest",
            )
    return tuple(values or ())


def _foreign(name: str, like: Arch | str, table: str) -> InputError:
    right = "heads" if name == "kernels" else "kernels"
    kind = like if isinstance(like, str) else kind_of(like)
    return InputError(
        f'students of kind "{kind}" have no {name}',
        where=f"{table}.{name}",
        evidence=f'the pool is of kind "{kind}"' if isinstance(like, str) else f"the recipe's student is {like}",
        fix=f"{right} = [{_list(_KERNELS if right == 'kernels' else _HEADS)}]",
    )


def _own_heads(width: int) -> tuple[int, ...]:
    return tuple(h for h in _HEADS if width % h == 0 and width // h >= _HEAD_CHANNELS) or (1,)


def _counterpart(arch: Arch, model: Arch) -> str:
    """A word of the size of `arch` and the kind of `model`."""
    return f"{kind_of(model)}-w{arch.width}-d{arch.depth}-{str(model).rpartition('-')[2]}"


def _ordered(archs: Iterable[Arch]) -> tuple[Arch, ...]:
    def size(arch: Arch) -> tuple[int, int, int, str]:
        return arch.width, arch.depth, arch.kernel or (arch.heads if isinstance(arch, TextArch) else 0), kind_of(arch)

    return tuple(sorted(set(archs), key=size))


def _list(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)


def above(value: float, limit: float) -> str:
    """The value with as many digits as show that it is above the limit."""
    for digits in range(3, 17):
        if float(text := f"{value:.{digits}g}") > limit:
            return text
    return repr(value)
