"""Choosing the students of a run from a pool, under the limits of its targets: the student follows from the device.

Price every member on every target, drop what cannot fit, tell the others apart by shared weights or short trainings,
train the best in full, export, measure where the device is attached, and keep the most accurate file within the limits.
Every step rests on artefacts of the run, so that an interrupted choice goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from cli.pipeline.choose import Choice
from cli.pipeline.limits import HOW_KNOWN, judge
from cli.pipeline.pool_cost import limits_of, pool_cost
from cli.pipeline.pricing import Costs, Pricing, is_attached
from cli.report.schema import (
    Attempt,
    CostSource,
    LimitName,
    LimitVerdict,
    RankedStudent,
    RejectedStudent,
    Selection,
    SharedTraining,
    Sharing,
)
from distill.students.arch import Arch, parse_arch
from distill.students.choose import (
    Candidate,
    Excess,
    Miss,
    Option,
    Rank,
    Rejected,
    by_cost,
    finalists,
    fitting,
    ladder,
    most_accurate,
    nearest_miss,
    next_smaller,
    ranked,
    resolve_rank,
)
from distill.students.halving import halve
from distill.students.pool import Cost, Limits, restrict, student_pool
from profiles import artifact
from profiles.device import Precision, Target, TargetSection
from profiles.errors import EdgestillError, InputError

if TYPE_CHECKING:
    from cli.pipeline.run import Run, Trained
    from export import Candidate as Exported
    from export import Plan
    from profiles.measurement import Measurement
    from profiles.metrics import Metric

KIND = "choice"
CHOICE_FILE = "choice.json"
_MIB = 2**20
_JUST_OVER = math.nextafter(1.0, 2.0)
_MOST_REJECTED = 512
"""Rejected members that a report lists, each in its precisions; of more it says how many there are."""


@dataclass(frozen=True)
class Tried:
    """One exported file with what decides about it. option: with its measured cost, where the device is attached.

    verdicts: of the limits that were measured. excesses: over limits, as far as is expected where nothing was measured.
    metric_problem: what it loses too much of, on validation.
    """

    option: Option
    name: str
    metric: float
    latency_ms: float | None
    verdicts: tuple[LimitVerdict, ...] = ()
    excesses: tuple[Excess, ...] = ()
    metric_problem: str = ""

    @property
    def passes(self) -> bool:
        """Whether nothing that is known or expected is against it."""
        return not (self.metric_problem or self.excesses or any(_is_over(each) for each in self.verdicts))

    @property
    def overshoot(self) -> float:
        """How many times the limit is needed that is exceeded most; 1 within all of them.

        What is not known to be within a limit counts as over it, so that something smaller is tried next.
        """
        over = [
            max((each.high or each.value or each.limit) / each.limit, _JUST_OVER)
            for each in self.verdicts
            if _is_over(each)
        ]
        return max([1.0, *over, *(each.overshoot for each in self.excesses)])

    @property
    def problem(self) -> str:
        """What it is over, with the numbers."""
        from cli.report.words import limit_sentence

        parts = [limit_sentence(each) for each in self.verdicts if _is_over(each)]
        parts += [f"{each}, {HOW_KNOWN[each.source]}" for each in self.excesses]
        return "; ".join([*parts, *([self.metric_problem] if self.metric_problem else [])])

    @property
    def candidate(self) -> Candidate:
        """As the choice sees it."""
        return Candidate(self.option, self.metric, self.passes)


@dataclass
class Settled:
    """One target's outcome. error: why nothing could be exported or measured for it."""

    selection: Selection
    tried: list[Tried] = field(default_factory=list)
    chosen: Tried | None = None
    miss: Miss | None = None
    error: str | None = None


def best_of(tried: Sequence[Tried]) -> Tried | None:
    """The most accurate file that passes, whichever student and precision; of equals the cheaper one."""
    candidates = [each.candidate for each in tried]
    found = most_accurate(candidates)
    return next((each for each, candidate in zip(tried, candidates, strict=True) if candidate is found), None)


def nearest_of(tried: Sequence[Tried]) -> Tried:
    """Where none passes: the one that is least over the device's limits; of equals the most accurate."""
    return min(tried, key=lambda each: (each.overshoot, -each.metric))


class Budgets:
    """The choice of one run.

    Args:
        run: its recipe has `student.pool`.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.section = run.recipe.student.choice
        self.targets = tuple(target for target in run.targets if self.chooses(target))
        self.pricing = Pricing(run, self.targets)
        self.is_done = False
        self._settled: dict[str, Settled] = {}
        self._exported: dict[tuple[str, str], tuple[Plan, dict[str, Measurement]]] = {}
        self._rescued: set[tuple[str, str]] = set()
        self._served: dict[tuple[str, str], set[str]] = {}
        self._ranked: dict[str, tuple[RankedStudent, ...]] = {}
        self._costs: dict[str, dict[Arch, Costs]] = {}

    # -- what is chosen from -----------------------------------------------------------------------------------------

    @staticmethod
    def chooses(target: Target) -> bool:
        """Whether the target's student is chosen; one that names its own has it."""
        return target.section.arch is None

    @cached_property
    def pool(self) -> tuple[Arch, ...]:
        """Every member.

        Raises:
            InputError: see `student_pool`.
        """
        recipe, section = self.run.recipe, self.section
        assert recipe.student.pool is not None
        trains = recipe.teacher.kind == "train"
        return student_pool(
            recipe.student.pool,
            self.run.dataset.input,
            teacher=parse_arch(self.run.teacher_arch, where="teacher.arch") if trains else None,
            shared=recipe.teacher.strategy == "generic",
            widths=section.widths,
            depths=section.depths,
            kernels=section.kernels,
            heads=section.heads,
        )

    @cached_property
    def carried(self) -> tuple[Arch, ...]:
        """The members that some target can carry by its facts alone; all of them where none can.

        What a teacher of strategy "generic" is conditioned on must not depend on how fast the machine is today.
        """
        limits = limits_of(self.targets)
        try:
            cost = pool_cost(self.targets, self.run.dataset.input, lambda arch: self.run.fresh(str(arch)))
            kept, _ = restrict(self.pool, cost, limits)
        except InputError:
            return self.pool
        return kept

    @property
    def named(self) -> tuple[str, ...]:
        """The students that targets name themselves."""
        return tuple(dict.fromkeys(t.section.arch for t in self.run.targets if t.section.arch is not None))

    @property
    def possible(self) -> tuple[str, ...]:
        """Those, and the members of the pool."""
        return tuple(dict.fromkeys([*self.named, *map(str, self.pool)]))

    # -- what is refused before anything is trained ------------------------------------------------------------------

    def check_recipe(self) -> None:
        """Refuses what cannot be chosen; reads the recipe, and the calibrations of its devices, alone.

        Raises:
            InputError: names the recipe key; a calibration that is out of date.
        """
        recipe, generic = self.run.recipe, self.run.recipe.teacher.generic
        if not self.targets:
            raise InputError(
                "every target names its student, so there is none to choose",
                where="student.pool",
                fix="leave the pool out, or the arch of a target",
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(
                "students are chosen by one process",
                where="student.pool",
                evidence="measurements decide what is trained next",
                fix="edgestill run without torchrun, or student.arch",
            )
        if recipe.teacher.strategy == "sftn" and generic.archs is None:
            raise InputError(
                'strategy "sftn" trains a teacher for every student, so for every one that is only tried, too',
                where="teacher.strategy",
                fix='"generic", which trains one teacher for the whole pool, or "frozen"',
            )
        if recipe.teacher.strategy == "generic":
            for name in ("archs", "widths", "depths", "kernels", "heads"):
                if getattr(generic, name) is not None:
                    raise InputError(
                        "the teacher is conditioned on the pool that students are chosen from",
                        where=f"teacher.generic.{name}",
                        evidence=f"student.pool = {json.dumps(recipe.student.pool)}",
                        fix=f"leave it out, or student.choice.{name}" if name != "archs" else "leave it out",
                    )
        if self.section.rank == "supernet" and recipe.teacher.strategy == "generic" and not generic.inherit:
            raise InputError(
                "the pool's shared weights are only trained from the input on where students start from them",
                where="student.choice.rank",
                evidence="teacher.generic.inherit = false",
                fix='teacher.generic.inherit = true, or rank = "trials"',
            )
        resolve_rank(self.section.rank, supernet=recipe.teacher.strategy == "generic")
        for target in self.targets:
            self._check_limits(target)

    def _check_limits(self, target: Target) -> None:
        section, where = target.section, self._where(target)
        if is_attached(target):
            self.pricing.calibration(target)  # one that is out of date is told now
        if limits_of([target]) == {}:
            raise InputError(
                f"{target.name} has no limit that a student could be chosen by",
                where=where,
                evidence="none of latency_ms, memory_mib and file_size_mib",
                fix="latency_ms = 5, or the arch itself",
            )
        if section.latency_ms is None:
            return
        overhead = self.pricing.overhead_ms(target)
        if section.latency_ms <= overhead:
            raise InputError(
                f"{target.name} asks for less time than {target.device.title} takes to run nothing",
                where=f"{where}.latency_ms",
                evidence=f"latency_ms = {section.latency_ms:g}; a query of an empty graph takes {overhead:.3g} ms",
                fix=f"latency_ms = {overhead * 4:.1g} at the least",
            )

    def check(self) -> None:
        """Refuses limits that contradict each other for every member of the pool; trains nothing.

        Raises:
            InputError: names the recipe key.
        """
        cautious = [target for target in self.targets if target.section.memory_mib is not None]
        if not cautious:
            return
        cost = pool_cost(cautious, self.run.dataset.input, lambda arch: self.run.fresh(str(arch)))
        costs = {arch: cost(arch) for arch in self.pool}
        for target in cautious:
            allowed, name = target.section.memory_mib, target.name
            smallest = min(self.pool, key=lambda arch: costs[arch][name].file_mib or 0.0)
            least = costs[smallest][name].file_mib
            if allowed is not None and least is not None and allowed < least:
                raise InputError(
                    f"{target.name} allows less memory than the weights of the smallest student take",
                    where=f"{self._where(target)}.memory_mib",
                    evidence=f"memory_mib = {allowed:g}; {smallest} has {least:.3g} MiB of weights in the smallest "
                    "precision",
                    fix="raise memory_mib, or a pool with smaller students",
                )

    def _where(self, target: Target) -> str:
        return f"{self.run.loaded.origin}, target[{self.run.targets.index(target)}] ({target.name})"

    # -- what came of it ---------------------------------------------------------------------------------------------

    def settled(self, target: Target) -> Settled:
        """The outcome for a target; `choose` has been called."""
        if not self.is_done:
            raise RuntimeError("no student has been chosen yet")
        return self._settled[target.name]

    def has_student(self, target: Target) -> bool:
        """Whether there is something to ship."""
        return not self.chooses(target) or self.settled(target).chosen is not None

    def arch_of(self, target: Target) -> str:
        """The chosen student, or the one that comes nearest to limits that nothing meets; "-" where there is none."""
        settled = self.settled(target)
        if settled.chosen is not None:
            return str(settled.chosen.option.arch)
        return str(settled.miss.option.arch) if settled.miss is not None else "-"

    def exported(self, target: Target, arch: str) -> tuple[Plan, dict[str, Measurement]]:
        """Every file of a student for a target, and what was measured of them."""
        return self._exported[target.name, arch]

    def measure_again(self, target: Target) -> dict[str, Measurement]:
        """Measures the files of the chosen student anew, where the next choice finds them."""
        arch = self.arch_of(target)
        found, _ = self.exported(target, arch)
        rescued = (target.name, arch) in self._rescued
        measured = self.run.measurements(target, found, arch=arch, rescued=rescued, fresh=True)
        self._exported[target.name, arch] = found, measured
        return measured

    def choice(self, target: Target) -> Choice:
        """Which file of the chosen student is shipped, and why the others are not."""
        settled = self.settled(target)
        chosen = settled.chosen
        assert chosen is not None
        rejected = {
            each.name: each.problem or f"{chosen.name} is more accurate, or as accurate and faster"
            for each in settled.tried
            if each.option.arch == chosen.option.arch and each is not chosen
        }
        return Choice(chosen.name, rejected, ())

    def selection(self, target: Target) -> Selection:
        """How the student of a target was chosen, with the others that got the same one."""
        arch = self.arch_of(target)
        others = tuple(
            other.name
            for other in self.run.targets
            if other is not target and self.has_student(other) and self.run.arch_of(other) == arch
        )
        return self.settled(target).selection.model_copy(update={"shared_with": others})

    def sharing(self) -> Sharing:
        """What was trained once, and for whom."""
        everyone = tuple(target.name for target in self.run.targets)
        rows = []
        for (role, name), trained in self.run.trained.items():
            if role not in ("teacher", "trial", "student", "qat"):
                continue
            arch = trained.student.arch
            served = everyone
            if role != "teacher":
                served = tuple(sorted(self._served.get((role, name if role == "trial" else arch), ())))
            if role in ("student", "qat") and arch in self.named:
                own = {t.name for t in self.run.targets if t.section.arch == arch}
                served = tuple(sorted(own | set(served)))
            rows.append(
                SharedTraining.model_validate(
                    {
                        "role": "supernet" if role == "teacher" and trained.strategy == "generic" else role,
                        "arch": arch,
                        "epochs": trained.result.epochs,
                        "seconds": trained.result.seconds,
                        "targets": served,
                        "kept": role in ("student", "qat") and arch in self.run.archs,
                    }
                )
            )
        return Sharing(trainings=tuple(rows))

    # -- the choice --------------------------------------------------------------------------------------------------

    def priced(self) -> tuple[dict[str, tuple[Option, ...]], dict[str, tuple[Rejected, ...]]]:
        """By target: the options that fit its limits, as far as is known before any training, and the others."""
        self._costs = self.pricing.costs(self.pool)
        fits, rejected = {}, {}
        for target in self.targets:
            options = _options(self._costs[target.name], target)
            fits[target.name], rejected[target.name] = fitting(
                options, _limits(target.section), margin=self.section.margin
            )
        return fits, rejected

    def likely(self) -> dict[str, tuple[Arch, ...]]:
        """By target, the architectures that fit as far as is known without any work; cheapest first."""
        if self.pricing.missing(self.pool) == 0:
            fits, _ = self.priced()
        else:
            fits = {
                target.name: fitting(
                    _options({arch: self.pricing.paper(arch, target) for arch in self.pool}, target),
                    _limits(target.section),
                    margin=self.section.margin,
                )[0]
                for target in self.targets
            }
        return {name: by_cost(options) for name, options in fits.items() if options}

    def choose(self) -> None:
        """Chooses for every target; what earlier calls made is used again.

        Raises:
            EdgestillError, InputError: see the run's stages.
        """
        if self.is_done:
            return
        run = self.run
        with run.timed("price the pool") as stage:
            fits, rejected = self.priced()
            stage["cached"] = not self.pricing.has_worked
        archs = {name: by_cost(options) for name, options in fits.items() if options}
        order = self._rank(archs)
        best = {name: given[: self.section.finalists] for name, given in order.items()}
        for arch in dict.fromkeys(arch for given in best.values() for arch in given):
            run.student(str(arch))
            self._serves("student", str(arch), [name for name, given in best.items() if arch in given])
        for target in self.targets:
            settled = self._settle(target, archs.get(target.name, ()), best, fits[target.name], rejected[target.name])
            self._settled[target.name] = settled
            self._store(target, settled)
        self.is_done = True

    def _rank(self, archs: Mapping[str, Sequence[Arch]]) -> dict[str, tuple[Arch, ...]]:
        """By target, the architectures that are worth a full training, best first."""
        if not archs:
            return {}
        run, section = self.run, self.section
        everyone = tuple(dict.fromkeys(arch for given in archs.values() for arch in given))
        by = self.rank
        if by == "trials":
            return self._by_trials(archs)
        if by == "supernet":
            run.teacher_for(run.recipe.objective, str(everyone[0]))  # a stage of its own
            with run.timed("rank by shared weights"):
                scores = {arch: run.pooled(run.recipe.objective, str(arch))[1].value for arch in everyone}
        else:
            scores = {arch: float(self.pricing.work(arch)) for arch in everyone}
        for name, given in archs.items():
            self._ranked[name] = tuple(
                RankedStudent(arch=str(arch), by=by, score=scores[arch]) for arch in ranked(given, scores)
            )
        return finalists(scores, archs, section.finalists)

    @property
    def rank(self) -> Rank:
        """How the candidates are told apart before any is trained in full."""
        teacher = self.run.recipe.teacher
        return resolve_rank(
            self.section.rank, supernet=teacher.strategy == "generic" and (teacher.generic.inherit or False)
        )

    def candidates(self, archs: Mapping[str, Sequence[Arch]]) -> dict[str, tuple[Arch, ...]]:
        """By target, who gets a trial; cheapest first."""
        picked = set(ladder(archs, self.pricing.work, self.section.trials))
        return {name: tuple(arch for arch in given if arch in picked) for name, given in archs.items()}

    def largest(self, archs: Mapping[str, Sequence[Arch]]) -> dict[str, tuple[Arch, ...]]:
        """By target, as many of those with the most work as may be trained in full."""
        return {
            name: tuple(sorted(given, key=lambda arch: -self.pricing.work(arch))[: self.section.finalists])
            for name, given in archs.items()
        }

    def fallbacks(self, archs: Mapping[str, Sequence[Arch]]) -> dict[str, int]:
        """By attached target: trainings that follow at most where measuring rejects every finalist (see `_descend`)."""
        found = {}
        for target in self.targets:
            count = len(archs.get(target.name, ())) - self.section.finalists
            if is_attached(target) and count > 0:
                near = min(count, self.section.finalists)
                found[target.name] = near + (count - near).bit_length()
        return found

    def _by_trials(self, archs: Mapping[str, Sequence[Arch]]) -> dict[str, tuple[Arch, ...]]:
        run = self.run
        candidates = self.candidates(archs)
        scores: dict[Arch, tuple[int, float]] = {}

        def train(arch: Arch, share: float) -> float:
            epochs = self.trial_epochs(share)
            value = run.trial(str(arch), epochs).result.metric.value
            scores[arch] = (epochs, value)
            self._serves("trial", f"{arch}--{epochs}", [name for name, given in candidates.items() if arch in given])
            return value

        found = halve(candidates, train, finalists=self.section.finalists, share=self.section.trial_share)
        for name, given in found.order.items():
            self._ranked[name] = tuple(
                RankedStudent(arch=str(arch), by="trial", epochs=scores[arch][0], score=scores[arch][1])
                if arch in scores
                else RankedStudent(arch=str(arch), by="trial")
                for arch in given
            )
        return dict(found.finalists)

    def trial_epochs(self, share: float) -> int:
        """Of a trial that gets this share of a full training, at least one."""
        run = self.run
        return max(1, round(share * run.recipe.train.resolved(len(run.dataset.train)).epochs))

    def _serves(self, role: str, name: str, targets: Sequence[str]) -> None:
        self._served.setdefault((role, name), set()).update(targets)

    def _settle(
        self,
        target: Target,
        archs: Sequence[Arch],
        best: Mapping[str, Sequence[Arch]],
        fits: Sequence[Option],
        rejected: Sequence[Rejected],
    ) -> Settled:
        """Exports and measures what was trained, most accurate first, until nothing better can come."""
        settled = Settled(self._described(target, archs, fits, rejected))
        if not archs:
            settled.miss = nearest_miss(rejected, _limits(target.section))
            if settled.miss is None:
                settled.error = "no member of the pool can be exported for this target"
            else:
                passing = {cast(LimitName, key): value for key, value in settled.miss.raised.items()}
                settled.selection = settled.selection.model_copy(update={"passing": passing})
            return settled
        trained = {arch for given in best.values() for arch in given if arch in archs}
        problems: list[str] = []
        for arch in sorted(trained, key=lambda arch: -self._full(arch).result.metric.value):
            leader = best_of(settled.tried)
            # a plain export does not add accuracy (retraining may, see `_rescue`), so a student that is behind what
            # passes need not be looked at
            if leader is not None and self._full(arch).result.metric.value < leader.metric:
                continue
            self._try(target, arch, settled, problems)
        rescued = self._rescue(target, settled, problems)
        untried = 0
        if best_of(settled.tried) is None and any(each.overshoot > 1 for each in settled.tried):
            untried = self._descend(target, next_smaller(archs, trained), settled, problems)
            if not rescued:
                self._rescue(target, settled, problems)
        if settled.tried:
            settled.chosen = best_of(settled.tried) or nearest_of(settled.tried)
        else:
            settled.error = "no file of any student can be used: " + "; ".join(dict.fromkeys(problems))
        settled.selection = settled.selection.model_copy(
            update={
                "attempts": tuple(
                    _attempt(each, each is settled.chosen, is_attached(target)) for each in settled.tried
                ),
                "ranked": self._ranking(target, archs),
                "untried": untried,
            }
        )
        return settled

    def _descend(self, target: Target, smaller: Sequence[Arch], settled: Settled, problems: list[str]) -> int:
        """Where all finalists are over a limit: looks for the most costly of the cheaper ones that passes.

        A few steps down one by one, as predictions err by little; then by halves, so that the cheapest is reached after
        few trainings.

        Args:
            target: which.
            smaller: most costly first.
            settled, problems: get what is found.

        Returns:
            How many were not tried.
        """
        tried = 0

        def attempt(arch: Arch) -> bool:
            """Whether nothing smaller is needed: it passes, or all that is against it is its metric."""
            nonlocal tried
            tried += 1
            self._serves("student", str(arch), [target.name])
            self._try(target, arch, settled, problems)
            made = [each for each in settled.tried if each.option.arch == arch]
            return any(each.passes for each in made) or bool(made and all(each.overshoot <= 1 for each in made))

        near, far = smaller[: self.section.finalists], smaller[self.section.finalists :]
        if any(attempt(arch) for arch in near):
            return len(smaller) - tried
        low, high = 0, len(far)
        while low < high:
            middle = (low + high) // 2
            if attempt(far[middle]):
                high = middle
            else:
                low = middle + 1
        return len(smaller) - tried

    def _rescue(self, target: Target, settled: Settled, problems: list[str]) -> bool:
        """Spends search and quantisation-aware training on one student at most: the best that only they can help.

        That is one whose plain INT8 does not keep the metric but is, or is expected to be, within the limits, and whose
        FP32 is more accurate than what passes: it would be the choice if its INT8 kept the metric.

        Returns:
            Whether there was one.
        """
        leader = best_of(settled.tried)
        plans = [
            (parse_arch(arch), found) for (name, arch), (found, _) in self._exported.items() if name == target.name
        ]
        for arch, found in sorted(plans, key=lambda entry: -_fp32_metric(entry[1])):
            value, lowest = _fp32_metric(found), found.lowest_metric
            if lowest is None or value < lowest or (leader is not None and value <= leader.metric):
                continue
            if _int8_misses(found, target.section) and self._int8_is_within(target, arch, settled):
                settled.tried = [each for each in settled.tried if each.option.arch != arch]
                self._serves("qat", str(arch), [target.name])
                self._rescued.add((target.name, str(arch)))
                self._try(target, arch, settled, problems)
                return True
        return False

    def _int8_is_within(self, target: Target, arch: Arch, settled: Settled) -> bool:
        """Whether an INT8 file of a student is within the limits of a target, as measured or else as expected."""
        made = [each for each in settled.tried if each.option.arch == arch and each.option.precision == "int8"]
        if made:
            return any(each.overshoot <= 1 for each in made)
        cost = self._costs[target.name][arch].get("int8", Cost())
        fits, _ = fitting([Option(arch, "int8", cost)], _limits(target.section), margin=self.section.margin)
        return bool(fits)

    def _full(self, arch: Arch) -> Trained:
        return self.run.student(str(arch))

    def _try(self, target: Target, arch: Arch, settled: Settled, problems: list[str]) -> None:
        """Adds every file of a student for a target; what cannot be made or run is a problem."""
        run, section, word = self.run, target.section, str(arch)
        rescued = (target.name, word) in self._rescued
        self._full(arch)
        try:
            found = run.plan(target, word, rescue=rescued)
            measured = run.measurements(target, found, arch=word, rescued=rescued)
        except InputError:
            raise
        except EdgestillError as error:
            problems.append(f"{word}: " + ": ".join(part for part in (error.message, error.evidence) if part))
            return
        self._exported[target.name, word] = found, measured
        fp32 = found["fp32"].validation
        for candidate in found.candidates:
            asked = section.precision in ("auto", candidate.precision)
            if candidate.refused is not None and asked:
                problems.append(f"{word} {candidate.name}: {candidate.refused}")
            if not candidate.usable or candidate.file is None or candidate.validation is None or not asked:
                continue
            expected = self._costs[target.name][arch].get(candidate.precision)
            if candidate.name != candidate.precision:  # INT8 in part, or with another remainder
                expected = self.pricing.priced_file(target, arch, candidate.file, candidate.precision) or expected
            settled.tried.append(
                tried(
                    section,
                    arch,
                    candidate,
                    candidate.validation,
                    fp32,
                    measured.get(candidate.name),
                    expected,
                    margin=self.section.margin,
                )
            )

    # -- how it is told ----------------------------------------------------------------------------------------------

    def _described(
        self, target: Target, archs: Sequence[Arch], fits: Sequence[Option], rejected: Sequence[Rejected]
    ) -> Selection:
        sources: list[CostSource] = [each.cost.source for each in fits] + [each.option.cost.source for each in rejected]
        known: tuple[CostSource, ...] = ("measured", "calibrated", "assumed", "bound")
        source = next(each for each in known if each in sources or each == "bound")
        efficiency, efficiency_from = self._efficiency(target) if source == "assumed" else (None, "")
        return Selection(
            pool=len(self.pool),
            fitting=len(archs),
            source=source,
            efficiency=efficiency,
            efficiency_from=efficiency_from,
            ranked=self._ranked.get(target.name, ()),
            rejected=tuple(
                RejectedStudent(
                    arch=str(each.option.arch),
                    precision=each.option.precision,
                    reason="; ".join(map(str, each.excesses)),
                    limit=cast(LimitName, each.limit),
                    needs=each.needs,
                    allowed=each.allowed,
                    source=each.excesses[0].source,
                )
                for each in rejected[:_MOST_REJECTED]
            ),
            left_out=max(0, len(rejected) - _MOST_REJECTED),
        )

    def _efficiency(self, target: Target) -> tuple[float, str]:
        """What was assumed of a device, and from where; of INT8 too, where that is another share."""
        asked = target.section.precision
        if asked != "auto":
            return self.pricing.efficiency(target, asked)
        (share, source), (integer, _) = self.pricing.efficiency(target), self.pricing.efficiency(target, "int8")
        return share, source if integer == share else f"{source}; {integer:.0%} in INT8"

    def _ranking(self, target: Target, archs: Sequence[Arch]) -> tuple[RankedStudent, ...]:
        """As it was told before, with the metric of those that were trained in full."""
        full = {
            str(arch): self._full(arch).result.metric.value
            for arch in archs
            if ("student", str(arch)) in self.run.trained
        }
        known = self._ranked.get(target.name, ())
        rows = [each.model_copy(update={"validation": full.get(each.arch)}) for each in known]
        by = known[0].by if known else "capacity"
        rows += [
            RankedStudent(arch=arch, by=by, validation=value)
            for arch, value in full.items()
            if arch not in {each.arch for each in known}
        ]
        return tuple(rows)

    def _store(self, target: Target, settled: Settled) -> None:
        """The choice as an artefact, for a person to read; what it was made from is in the artefacts that it names."""
        run = self.run
        folder = run.folder / "choice" / target.name
        facts: dict[str, Any] = {
            "target": target.name,
            "student": None if settled.chosen is None else str(settled.chosen.option.arch),
            "file": None if settled.chosen is None else settled.chosen.name,
            "nearest": None if settled.miss is None else _miss_words(settled.miss),
            "error": settled.error,
            "selection": settled.selection.model_dump(mode="json"),
        }
        key = artifact.content_key(target.section, run.recipe.student, target.device, target.stack, facts)
        if artifact.current(folder, KIND, key) is None:
            with artifact.create(folder, KIND, key) as temporary:
                artifact.write_text(temporary / CHOICE_FILE, json.dumps(facts, indent=2) + "\n")


def tried(
    section: TargetSection,
    arch: Arch,
    candidate: Exported,
    metric: Metric,
    fp32: Metric | None,
    measurement: Measurement | None,
    expected: Cost | None,
    *,
    margin: float = 1.0,
) -> Tried:
    """What is known of one exported file.

    Args:
        section: the target's limits.
        arch: of the student.
        candidate: the file.
        metric: its, on the validation split.
        fp32: of the FP32 file of the same student.
        measurement: on the device; None where it is not attached.
        expected: what was known before it was made.
        margin: how far an expected latency may be over the limit.
    """
    size = (candidate.size_bytes or 0) / _MIB
    limits = section.model_copy(update={"metric_floor": None, "max_metric_drop": None})
    verdicts: tuple[LimitVerdict, ...] = ()
    excesses: tuple[Excess, ...] = ()
    if measurement is not None:
        verdicts = judge(limits, measurement=measurement, size_mib=size, metric=None, drop=None, on_device=True)
        asked = measurement.asked
        stable = measurement.stable and asked.upper_bound is not None
        latency: float | None = asked.upper_bound if stable else asked.maximum
        bound = None if expected is None else expected.latency_bound_ms
        cost = Cost(size, measurement.memory.peak_mib, bound, latency, "measured")
    else:
        known = expected or Cost()
        latency = known.latency_ms
        cost = Cost(size, known.memory_mib, known.latency_bound_ms, latency, known.source)
        _, over = fitting([Option(arch, candidate.precision, cost)], _limits(section), margin=margin)
        excesses = over[0].excesses if over else ()
    return Tried(
        Option(arch, candidate.precision, cost),
        candidate.name,
        metric.value,
        latency,
        verdicts,
        excesses,
        _metric_problem(section, metric, fp32),
    )


def _metric_problem(section: TargetSection, metric: Metric, fp32: Metric | None) -> str:
    """What the target's own limits say of a metric on validation; what is merely less is for the choice to weigh."""
    if section.metric_floor is not None and metric.value < section.metric_floor:
        return f"{metric.value:.1%} on validation, floor {section.metric_floor:.1%}"
    lost = 0.0 if fp32 is None else fp32.value - metric.value
    if section.max_metric_drop is not None and lost > section.max_metric_drop:
        return f"{-lost * 100:+.1f} pt against fp32 on validation, allowed {-section.max_metric_drop * 100:.1f}"
    return ""


def _fp32_metric(found: Plan) -> float:
    """Of the FP32 file, on validation."""
    validation = found["fp32"].validation
    return -math.inf if validation is None else validation.value


def _int8_misses(found: Plan, section: TargetSection) -> bool:
    """Whether the target may get INT8, a graph of it could be made, and none keeps the metric."""
    made = [each for each in found.candidates if each.precision == "int8" and each.file is not None]
    if section.precision not in ("auto", "int8") or found.lowest_metric is None:
        return False
    return bool(made) and not any(
        each.usable and each.validation is not None and each.validation.value >= found.lowest_metric for each in made
    )


def _attempt(each: Tried, chosen: bool, attached: bool) -> Attempt:
    return Attempt(
        arch=str(each.option.arch),
        name=each.name,
        precision=each.option.precision,
        metric=each.metric,
        latency_ms=each.latency_ms,
        source="measured" if attached else each.option.cost.source,
        passes=each.passes,
        problem=each.problem,
        chosen=chosen,
    )


def _options(costs: Mapping[Arch, Costs], target: Target) -> list[Option]:
    """What the planner makes of every member; with "auto", BF16 and FP8 only follow where a metric is missed."""
    made = ordinary_precisions(target)
    return [
        Option(arch, precision, cost)
        for arch, found in costs.items()
        for precision, cost in found.items()
        if precision in made
    ]


def ordinary_precisions(target: Target) -> tuple[Precision, ...]:
    """What the planner makes of a student whose plain INT8 keeps the metric, as far as the target may get it."""
    return ("fp32", "fp16", "int8") if target.section.precision == "auto" else (target.section.precision,)


def _limits(section: TargetSection) -> Limits:
    return Limits(section.file_size_mib, section.memory_mib, section.latency_ms)


def _miss_words(miss: Miss) -> str:
    """The nearest miss; what an assumption says is not promised to pass."""
    assumed = any(excess.source == "assumed" for excess in miss.excesses)
    return f"{miss}, by an assumed efficiency" if assumed else str(miss)


def _is_over(verdict: LimitVerdict) -> bool:
    return verdict.verdict in ("fail", "inconclusive")
