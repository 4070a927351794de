"""What the analysis will compare, what it will not, and which gaps it finds: known before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from analysis.run_schema import LEVEL, MIN_SEEDS
from study.spec.arms import Arm, DenseArm
from study.spec.config import StudyConfig
from study.spec.protocol import Protocol
from study.spec.search_space import example, listed_specs, start_spec
from study.spec.trial import budget_hash, tuning_trials
from study.spec.values import Range, options

if TYPE_CHECKING:
    from analysis.statistics.power import Resolved

T = TypeVar("T", int, str)


class PlannedGap(NamedTuple):
    """The gap that a declared contrast finds in 80 % of studies, in standard deviations over seeds, for each number of
    seeds."""

    arm: str
    against: str
    by_seeds: dict[int, Resolved]


def planned_gaps(config: StudyConfig) -> list[PlannedGap]:
    """The gaps of the declared contrasts of listed arms, with the study's seeds and with more, or at each look.

    A contrast of a searched arm has as many sizes as trials are found, which is not known beforehand. It has no gap
    here, and counts as one contrast of the family.
    """
    from analysis.statistics.power import Contrast, family_gaps  # imports SciPy, which is slow

    n_seeds = len(config.seed_list)
    declared = config.claims.contrasts
    if not declared or n_seeds < MIN_SEEDS:
        return []
    n_listed = Counter(spec.arm for spec in listed_specs(config))
    contrasts, n_chains = [], 0
    for each in declared:
        arm, against = config.arm(each.arm), config.arm(each.against)
        alike = arm.start is not None and arm.start == against.start
        is_paired = alike or arm.start == against.name or against.start == arm.name
        contrasts.append(Contrast(max(n_listed[arm.name], 1), n_listed[against.name] <= 1, is_paired))
        n_chains += _is_reference(config, against) or (alike and against.family == "dense")
    more = next((n for n in (5, 8, 12) if n > n_seeds), n_seeds)
    levels = config.claims.looks or {n_seeds: LEVEL, more: LEVEL}
    gaps = {n: family_gaps(n, contrasts, n_chains, level=level) for n, level in levels.items()}
    return [
        PlannedGap(each.arm, each.against, {n: found[at] for n, found in gaps.items()})
        for at, each in enumerate(declared)
        if not (config.arm(each.arm).is_searched or config.arm(each.against).is_searched)
    ]


def not_compared(config: StudyConfig) -> list[str]:
    """One line for each comparison that a reader expects and will not find, with the reason.

    A reader expects each arm to be compared with the dense model of the study's own size; an arm with a start, with a
    dense model trained further from that start. A reader expects each MPO arm to be compared with the controls
    that have the same start. The analysis compares arms of the same budget (see `budget_hash`), and pairs that
    `claims.contrasts` declares.
    """
    if len(config.arms) == 1:
        return []
    dense = [arm for arm in config.arms if _is_reference(config, arm)]
    dense.sort(key=lambda arm: arm.is_searched)  # listed trials come first, and the first is the reference
    lines, missing = [], []
    for arm in config.arms:
        nearest = dense[:1]
        if arm.start is not None:
            nearest = [other for other in config.arms if isinstance(other, DenseArm) and other.start == arm.start]
        rivals = _uncompared_controls(config, arm, dense) if arm.family == "mpo" else []
        if arm not in (*dense, *nearest) and not _has_reference(config, arm, dense, nearest):
            rivals = list({rival.name: rival for rival in [*nearest, *rivals]}.values())
            if not nearest and arm.start is not None:
                lines.append(
                    f"arm {arm.name} will not be compared with dense: no dense arm is trained further from "
                    f"{arm.start} (family: dense, start: {arm.start})"
                )
        missing += [(arm, rival) for rival in rivals]
    lines += _lines(config, missing)
    if missing:
        lines.append(
            "arms of different budgets are compared only where `claims.contrasts` declares it, for example "
            f"{{arm: {missing[0][0].name}, against: {missing[0][1].name}}}"
        )
    if not dense and any(arm.start is None for arm in config.arms):
        lines.append("nothing will be compared with dense: no dense arm from scratch has the study's own size")
    if len(config.seed_list) < MIN_SEEDS:
        lines.append(
            f"no difference will be tested: that takes {MIN_SEEDS} seeds, but there are {len(config.seed_list)}"
        )
    return lines


def _has_reference(config: StudyConfig, arm: Arm, dense: Sequence[Arm], nearest: Sequence[Arm]) -> bool:
    return any(_one_budget(config, arm, other) for other in nearest) or any(
        _is_declared(config, arm, other) for other in (*dense, *nearest)
    )


def _uncompared_controls(config: StudyConfig, arm: Arm, dense: Sequence[Arm]) -> list[Arm]:
    return [
        other
        for other in config.arms
        if other.family != "mpo"
        and other not in dense
        and other.start == arm.start
        and not _one_budget(config, arm, other)
        and not _is_declared(config, arm, other)
    ]


def _is_reference(config: StudyConfig, arm: Arm) -> bool:
    """Whether a trial of the arm may be the dense model of the study's own size, trained from scratch."""
    if not isinstance(arm, DenseArm) or arm.start is not None or arm.model is not None:
        return False
    own = config.model.width
    if own is None:
        return True
    width = arm.d_model
    has_width = width.low <= own <= width.high if isinstance(width, Range) else {None, own} & set(options(width))
    d_ff = arm.d_ff.get(own) if isinstance(arm.d_ff, dict) else arm.d_ff
    return bool(has_width) and d_ff in (None, config.model.recorded["d_ff"])


def _one_budget(config: StudyConfig, *arms: Arm) -> bool:
    specs = [example(config, arm) for arm in arms]
    return len({budget_hash(spec, config, "", start_spec(config, spec)) for spec in specs}) == 1


def _is_declared(config: StudyConfig, *arms: Arm) -> bool:
    names = {arm.name for arm in arms}
    return any({contrast.arm, contrast.against} == names for contrast in config.claims.contrasts)


def _lines(config: StudyConfig, pairs: Sequence[tuple[Arm, Arm]]) -> Iterator[str]:
    """One line for the arms that lack the same comparisons for the same reasons."""
    rivals: dict[str, list[Arm]] = {}
    for arm, rival in pairs:
        rivals.setdefault(arm.name, []).append(rival)
    alike: dict[str, list[str]] = {}
    for name, others in rivals.items():
        said = f"{', '.join(other.name for other in others)}: {'; '.join(_reasons(config, config.arm(name), others))}"
        alike.setdefault(said, []).append(name)
    for said, names in alike.items():
        yield f"{'arm' if len(names) == 1 else 'arms'} {', '.join(names)} will not be compared with {said}"


def _reasons(config: StudyConfig, arm: Arm, rivals: Sequence[Arm]) -> Iterator[str]:
    def differ(of: Callable[[Arm], T]) -> tuple[T, str] | None:
        others = sorted({of(rival) for rival in rivals} - {of(arm)})
        return (of(arm), " or ".join(map(str, others))) if others else None

    if (tuned := differ(lambda each: tuning_trials(each.name, config))) is not None:
        yield f"chosen among {tuned[0]} trials, and not {tuned[1]}"
    for key in ("steps", "warmup_steps"):
        if (given := differ(lambda each, key=key: getattr(example(config, each).protocol, key))) is not None:
            yield f"{key} {given[0]}, and not {given[1]}"
    if (given := differ(lambda each: _schedule(example(config, each).protocol))) is not None:
        yield f"schedule {given[0]}, and not {given[1]}"


def _schedule(protocol: Protocol) -> str:
    share = protocol.decay_share
    return protocol.schedule if share is None else f"{protocol.schedule} (decay_fraction {share:g})"
