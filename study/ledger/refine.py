"""More seeds for some trials: those near the frontier, or those of declared contrasts that are not decided yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.results.pairs import KNOWN, REFERENCE, Known, pairs
from study.errors import StudyError
from study.ledger.frontier import near_frontier, points
from study.ledger.ledger import Ledger
from study.spec.trial import Trial

if TYPE_CHECKING:
    import pandas as pd

    from analysis.runs.study_runs import Claims


@dataclass(frozen=True)
class NewSeeds:
    """more_seeds: the new seeds of each trial, by its number. shown: what was found, in words; a line if there is
    nothing to add."""

    more_seeds: Mapping[int, Sequence[int]]
    shown: str


def refine_frontier(ledger: Ledger, n_seeds: int) -> NewSeeds:
    """`n_seeds` more for each trial near the frontier, its references, its declared rivals, and the starts of them all.

    A trial that was left out before stays out: it would come back only by the luck of others.
    """
    everywhere = points(ledger.trials.values(), ledger.results.values())
    left_out = _left_out(ledger)
    chosen = {point.trial for point in near_frontier([point for point in everywhere if point.trial not in left_out])}
    if not chosen:
        why = "all trials that refine took before have failed seeds" if everywhere else "no trial has complete seeds"
        return NewSeeds({}, f"nothing to refine: {why}")
    wanted = {n: more_seeds(ledger.tally.seeds_of(ledger.trials[n]), n_seeds) for n in sorted(chosen)}
    for trial, rival in _compared_with(ledger, chosen):  # a comparison gains little if only one side has more
        wanted[rival] = [*wanted.get(rival, []), *wanted[trial]]
    more = _new(ledger, wanted)
    found = f"near the frontier: {_trials(chosen)}, of {len(everywhere)}; new seeds for each: {n_seeds}"
    return NewSeeds(more, found + _others(more.keys() - chosen, "which these are compared with or start from", more))


def refine_contrasts(ledger: Ledger) -> NewSeeds:
    """Seeds up to the next look, for every trial of a declared contrast that is undecided, and for their starts.

    An undecided mean over the sizes of an arm takes all of its sizes.

    Raises:
        StudyError: the study file declares no looks.
    """
    looks = ledger.config.claims.looks
    if not looks:
        raise StudyError(
            f"study {ledger.config.name} declares no `claims.looks`: the numbers of seeds at which its contrasts are "
            "tested must be fixed before it runs. To add seeds near the frontier: refine --on frontier"
        )
    undecided = _undecided_pairs(ledger)
    if not undecided:
        return NewSeeds({}, "nothing to refine: no declared contrast is undecided")
    planned = ledger.config.seed_list
    wanted: dict[int, list[int]] = {}
    for pair in undecided:
        n_seeds = min(len(ledger.tally.seeds_of(ledger.trials[number])) for number in pair)
        following = next((n for n in looks if n > n_seeds), None)
        if following is not None:
            seeds = more_seeds(planned, following - len(planned))
            wanted |= {number: max(wanted.get(number, []), seeds, key=len) for number in pair}
    n_undecided = f"{len(undecided)} pair{'s' * (len(undecided) != 1)} of trials undecided"
    if not wanted:
        return NewSeeds({}, f"nothing to refine: {n_undecided}, and this was the last look")
    own = set(wanted)
    more = _new(ledger, wanted)
    found = f"{n_undecided}; seeds for the next look: {_trials(more.keys() & own)}"
    return NewSeeds(more, found + _others(more.keys() - own, "which these start from", more))


def _left_out(ledger: Ledger) -> set[int]:
    """The trials that were there when the frontier was refined before, and got no seeds."""
    began: dict[int, str] = {}
    for result in ledger.results.values():
        began[result.trial] = min(began.get(result.trial, result.ended), result.ended)
    return {
        trial
        for growth in ledger.growths
        if growth.command.startswith("refine --on frontier")
        for trial, ended in began.items()
        if ended <= growth.made and trial not in growth.more_seeds
    }


def _new(ledger: Ledger, wanted: dict[int, list[int]]) -> dict[int, list[int]]:
    """Those of the wanted seeds that a trial lacks; the trials' starts get them too."""
    waiting = sorted(wanted)
    while waiting:  # each seed starts from the start's run with that seed
        number = waiting.pop()
        arm = ledger.trials[number].spec.start
        start = next((trial for trial in ledger.trials.values() if trial.spec.arm == arm), None)
        if start is not None:
            wanted[start.number] = [*wanted.get(start.number, []), *wanted[number]]
            waiting.append(start.number)
    had = {number: set(ledger.tally.seeds_of(ledger.trials[number])) for number in wanted}
    more = {n: [seed for seed in dict.fromkeys(seeds) if seed not in had[n]] for n, seeds in sorted(wanted.items())}
    return {number: seeds for number, seeds in more.items() if seeds}


def _undecided_pairs(ledger: Ledger) -> list[tuple[int, int]]:
    """The declared pairs of trials that are undecided in one measure or more, as the analysis decides."""
    import pandas as pd

    from analysis.results.comparisons import UNDECIDED, compare
    from analysis.results.summary import MEASURES
    from analysis.runs.study_runs import Claims, Contrast

    config, states = ledger.config, _states(ledger)
    known = [_known(trial, config.name, states[trial.number]) for trial in _trained(ledger)]
    shapes = [ledger.trials[each["trial"]].shape for each in known]
    summary = pd.DataFrame(known, columns=list(KNOWN)).assign(
        label="", group="", total_tokens=0, tuning_trials=0, n_params=[shape.n_params for shape in shapes]
    )
    for name in ("chi", "as_chi"):
        summary[name] = summary[name].astype("float64")
    declared = tuple(Contrast(config.name, each.arm, each.against) for each in config.claims.contrasts)
    claims = Claims(config.claims.margins.model_dump(), declared, config.claims.looks)
    seeds = [
        {"trial": result.trial, "seed": result.seed} | result.final
        for result in ledger.results.values()
        if result.state == "complete"
    ]
    keys = ["trial", "seed", *(measure.key for measure in MEASURES)]
    lost = [(result.trial, result.seed) for result in ledger.results.values() if result.state == "failed"]
    results = _Results(claims, pd.DataFrame(seeds, columns=keys), pd.DataFrame(lost, columns=keys[:2]))
    found = compare(results, summary)
    whole = {(row["arm"], row["against_arm"]) for row in found.arms.to_dict("records") if row["verdict"] == UNDECIDED}
    return sorted(
        {
            (row["trial"], row["against"])
            for row in found.pairs.to_dict("records")
            if row["declared"] and (row["verdict"] == UNDECIDED or (row["arm"], row["against_arm"]) in whole)
        }
    )


@dataclass(frozen=True)
class _Results:
    """The results on record, as the analysis takes them."""

    claims: Claims
    seeds: pd.DataFrame
    failures: pd.DataFrame
    growths: tuple[()] = ()
    n_lacking: int = 0


def _compared_with(ledger: Ledger, chosen: Collection[int]) -> list[tuple[int, int]]:
    """Pairs of a chosen trial and a trial it is compared with, as the analysis pairs them.

    Those are its references, and the trials that the study file contrasts it with. Trials with a failed seed are left
    out, since nothing is claimed about them.
    """
    states, name = _states(ledger), ledger.config.name
    contrasts = [(name, contrast.arm, contrast.against) for contrast in ledger.config.claims.contrasts]
    found = pairs(
        [_known(trial, name, states[trial.number]) for trial in _trained(ledger)], contrasts, is_unfinished=False
    )
    return [
        (pair.trial, pair.against)
        for pair in found
        if pair.trial in chosen
        and (pair.declared or pair.relation == REFERENCE)
        and "failed" not in states[pair.against]
    ]


def _states(ledger: Ledger) -> dict[int, list[str]]:
    states: dict[int, list[str]] = defaultdict(list)
    for result in ledger.results.values():
        states[result.trial].append(result.state)
    return states


def _trained(ledger: Ledger) -> list[Trial]:
    trials = [trial for trial in ledger.trials.values() if trial.duplicate_of is None and trial.skipped is None]
    return sorted(trials, key=lambda trial: (trial.shape.n_params, trial.number))


def _known(trial: Trial, study: str, states: Sequence[str]) -> Known:
    spec = trial.spec
    # Not by `model_dump`, which leaves out some fields at their defaults.
    values = dict(spec) | dict(spec.protocol) | vars(trial.shape)
    values |= spec.recorded | {
        "trial": trial.number,
        "study": study,
        "family_label": trial.shape.label,
        "optimiser": spec.protocol.optimiser,
        "n_seeds": states.count("complete"),
        "n_failed": states.count("failed"),
        "stopped": trial.stop and trial.stop.reason,
        "budget_hash": trial.budget_hash,
    }
    return {key: values[key] for key in KNOWN}


def more_seeds(seeds: Sequence[int], n: int) -> list[int]:
    """The seeds, and `n` more after the largest."""
    return [*seeds, *range(max(seeds) + 1, max(seeds) + 1 + n)]


def _trials(numbers: Collection[int]) -> str:
    return f"trial{'s' * (len(numbers) != 1)} {', '.join(map(str, sorted(numbers)))}"


def _others(numbers: Collection[int], why: str, more: Mapping[int, Sequence[int]]) -> str:
    """The rest of the line: other trials that get seeds, and the number of all new runs."""
    n_runs = sum(map(len, more.values()))
    also = f"; also for {_trials(numbers)}, {why}" if numbers else ""
    return f"{also}; in total {n_runs} run{'s' * (n_runs != 1)}"
