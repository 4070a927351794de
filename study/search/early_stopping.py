"""Early stopping: gives up searched trials that a rival beats on every seed that both have.

A trial may be stopped by a rival that ended before it, but not by one that ended after it. The study therefore depends
on the order in which its trials ended. So every decision is recorded with its evidence, and never made again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from analysis import run_schema
from study.spec.config import StudyConfig
from study.spec.search import EarlyStopping
from study.spec.trial import SeedResult, Stop, Trial, TrialSpec, now


def stops_after(
    config: StudyConfig,
    trials: Mapping[int, Trial],
    results: Mapping[tuple[int, int], SeedResult],
    latest: SeedResult,
    lacking: Iterable[Trial],
) -> list[Stop]:
    """Stops of the trials that the latest result ends: its own trial, or trials that its own trial beats.

    Args:
        results: results on record, including the latest.
        lacking: the trials that lack results for seeds that never had one.
    """
    rule = config.search.early_stopping
    if rule is None:
        return []
    stops = []
    for trial in lacking:
        if not _is_stoppable(config, trial):
            continue
        rivals = trials.values() if trial.number == latest.trial else [trials[latest.trial]]
        for rival in rivals:
            stop = _stop(rule, config.seed_list, trial, rival, results, latest)
            if stop is not None:
                stops.append(stop)
                break
    return stops


def _is_stoppable(config: StudyConfig, trial: Trial) -> bool:
    """Whether it is a searched MPO trial with χ and no repeat; references, controls and starts are dense or listed."""
    is_own = trial.duplicate_of is None and trial.skipped is None and trial.stop is None
    return is_own and trial.spec.family == "mpo" and trial.spec.keep is None and config.arm(trial.spec.arm).is_searched


def _stop(
    rule: EarlyStopping,
    seeds: Collection[int],
    trial: Trial,
    rival: Trial,
    results: Mapping[tuple[int, int], SeedResult],
    latest: SeedResult,
) -> Stop | None:
    if rival.number == trial.number or rival.duplicate_of is not None or rival.stop is not None:
        return None
    if rival.shape.n_params > trial.shape.n_params or training_of(rival.spec) != training_of(trial.spec):
        return None
    of_rival = [results[rival.number, seed] for seed in seeds if (rival.number, seed) in results]
    if any(result.state == "failed" for result in of_rival):
        return None  # a rival with a failed seed is on no frontier
    metric = run_schema.OBJECTIVES[rule.metric]
    key = run_schema.key_of(metric)
    shared = [
        (result.seed, own.final[key], result.final[key])
        for result in of_rival
        if (own := results.get((trial.number, result.seed))) is not None and key in own.final and key in result.final
    ]
    sign = 1 if metric.direction == "minimize" else -1
    if len(shared) < rule.min_seeds or any(sign * (own - rivals) < rule.margin for _, own, rivals in shared):
        return None
    numbers, own, rivals = zip(*shared, strict=True)
    after = (latest.trial, latest.seed)
    return Stop(trial.number, rival.number, rule.metric, rule.margin, numbers, own, rivals, after, when=now())


def training_of(spec: TrialSpec) -> tuple[object, ...]:
    """Key that is equal if the same seed means the same data, and neither run has had more training."""
    protocol = spec.protocol
    return spec.start, protocol.steps, protocol.batch_size, spec.model.context
