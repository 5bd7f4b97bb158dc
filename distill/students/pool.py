"""Finite pools of student architectures: combinations of a family's choices, and what some target can carry of them.

No torch here. A pool holds one kind only (conv, convi, text or textc): its members are parts of one largest network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from distill.data.dataset import InputSpec
from distill.students.arch import Arch, ConvArch, TextArch, check_family, parse_arch, stage_count
from profiles.errors import InputError

# A family's own choices keep a pool below 60 members, so that each is sampled often enough within a usual training.
_CONV_WIDTHS = (8, 12, 16, 24, 32, 48, 64)
_TEXT_WIDTHS = (32, 64, 96, 128, 192, 256)
_DEEPEST = 4
_KERNELS = (3, 5)
_HEADS = (2, 4, 8)
_HEAD_CHANNELS = 16
"""Fewest channels of a head among a family's own choices."""
_WHERE = "teacher.generic"


@dataclass(frozen=True)
class Cost:
    """What an architecture needs on a target, each at least; None: not known.

    file_mib, memory_mib: model file and process memory (MiB). latency_bound_ms: no run can be faster.
    """

    file_mib: float | None = None
    memory_mib: float | None = None
    latency_bound_ms: float | None = None


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
            f"({who} {_above(self.needs, self.allowed)} {unit}, {self.smallest})"
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
    teacher: Arch,
    spec: InputSpec,
    *,
    like: Arch,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    kernels: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> tuple[Arch, ...]:
    """Every combination of the choices, sorted, without duplicates.

    None: the family's own choices up to the teacher's width, and up to its depth (but two blocks at least in a conv
    net, and four at most). Where no choice is given at all, `like` itself is a member, too. Transformers whose heads do
    not divide the width are no architectures, so they are left out.

    Args:
        teacher: the architecture of the network that is conditioned.
        spec: one sample's shape.
        like: a student of the recipe; the pool is of its kind (conv, convi, text or textc).
        widths, depths, kernels, heads: the recipe's choices. Kernels: conv, convi, textc. Heads: text.

    Raises:
        InputError: a value outside its range, kernels of a transformer, heads of anything else, or no heads that divide
            a width; the message names the recipe key and the fix.
    """
    check_family(like.family, spec)
    transformer = kind_of(like) == "text"
    if transformer and kernels is not None:
        raise _foreign("kernels", like, "heads")
    if not transformer and heads is not None:
        raise _foreign("heads", like, "kernels")
    kind: type[ConvArch] | type[TextArch] = type(like)
    grid = _CONV_WIDTHS if isinstance(like, ConvArch) else _TEXT_WIDTHS
    chosen_widths = _checked("widths", widths, kind.widths) or tuple(w for w in grid if w <= teacher.width)
    deepest = max(2, teacher.depth) if isinstance(like, ConvArch) else teacher.depth
    chosen_depths = _checked("depths", depths, kind.depths) or tuple(range(1, min(deepest, _DEEPEST) + 1))
    # a teacher narrower than the whole grid is its own upper end
    shapes = list(product(chosen_widths or (teacher.width,), chosen_depths))
    members: set[Arch]
    if transformer:
        given = _checked("heads", heads, TextArch.head_counts)
        members = {TextArch(w, d, heads=h) for w, d in shapes for h in (given or _own_heads(w)) if w % h == 0}
    else:
        given = _checked("kernels", kernels, kind.kernels) or _KERNELS
        inverted = isinstance(like, ConvArch) and like.inverted
        members = {
            ConvArch(w, d, k, inverted=inverted) if isinstance(like, ConvArch) else TextArch(w, d, kernel=k)
            for w, d in shapes
            for k in given
        }
    if not members:
        width = shapes[0][0]
        fitting = [h for h in TextArch.head_counts if width % h == 0]
        raise InputError(
            "no number of heads divides any width of the pool",
            where=f"{_WHERE}.heads",
            evidence=f"heads {_list(heads or ())}; widths {_list(sorted({w for w, _ in shapes}))}",
            fix=f"heads = [{_list(fitting)}] divide a width of {width}",
        )
    if all(choice is None for choice in (widths, depths, kernels, heads)):
        members.add(like)
    return _ordered(members)


def parse_pool(words: Sequence[str], spec: InputSpec) -> tuple[Arch, ...]:
    """The architectures that a recipe's `teacher.generic.archs` names, sorted, without duplicates.

    Raises:
        InputError: not a word of a family, a family that does not read this kind of input, or several kinds; the
            message names the entry.
    """
    archs: list[Arch] = []
    for i, word in enumerate(words):
        where = f"{_WHERE}.archs[{i}]"
        arch = parse_arch(word, where=where)
        check_family(arch.family, spec, where=where)
        if archs and kind_of(arch) != kind_of(archs[0]):
            raise InputError(
                f'"{kind_of(arch)}" and "{kind_of(archs[0])}" cannot share their weights',
                where=where,
                evidence=f"{arch} beside {archs[0]}",
                fix=f'name architectures of one kind, such as "{_counterpart(arch, archs[0])}"',
            )
        archs.append(arch)
    return _ordered(archs)


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
            where=_WHERE,
            evidence="\n            ".join(str(entry) for entry in exclusions),
            fix=f"raise a limit, name smaller architectures, or {_WHERE}.within_limits = false",
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


def _checked(name: str, values: Sequence[int] | None, valid: range) -> tuple[int, ...]:
    """The recipe's values for one choice; empty when it gives none."""
    for i, value in enumerate(values or ()):
        if value not in valid:
            step = f" in steps of {valid.step}" if valid.step > 1 else ""
            raise InputError(
                f"{value} is out of range",
                where=f"{_WHERE}.{name}[{i}]",
                evidence=f"{name} go from {valid[0]} to {valid[-1]}{step}",
                fix=f"{min(valid, key=lambda candidate: abs(candidate - value))} is the nearest",
            )
    return tuple(values or ())


def _foreign(name: str, like: Arch, right: str) -> InputError:
    return InputError(
        f'students of kind "{kind_of(like)}" have no {name}',
        where=f"{_WHERE}.{name}",
        evidence=f"the recipe's student is {like}",
        fix=f"{right} = [{_list(_KERNELS if right == 'kernels' else _HEADS)}]",
    )


def _own_heads(width: int) -> tuple[int, ...]:
    return tuple(h for h in _HEADS if width % h == 0 and width // h >= _HEAD_CHANNELS) or (1,)


def _counterpart(arch: Arch, model: Arch) -> str:
    """A word of the size of `arch` and the kind of `model`."""
    return f"{kind_of(model)}-w{arch.width}-d{arch.depth}-{str(model).rpartition('-')[2]}"


def _ordered(archs: Iterable[Arch]) -> tuple[Arch, ...]:
    def size(arch: Arch) -> tuple[int, int, int]:
        return arch.width, arch.depth, arch.kernel or (arch.heads if isinstance(arch, TextArch) else 0)

    return tuple(sorted(set(archs), key=size))


def _list(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)


def _above(value: float, limit: float) -> str:
    """The value with as many digits as show that it is above the limit."""
    for digits in range(3, 17):
        if float(text := f"{value:.{digits}g}") > limit:
            return text
    return repr(value)
