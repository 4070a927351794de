"""A driver's knowledge of a study: its trials, the listed specs that are not trials yet, and its results."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence

from study.spec.trial import SeedResult, Trial, TrialSpec


class KnownTrials(dict[int, Trial]):
    """Trials by number, in the order of their numbers, with the indexes by which they are looked up.

    Args:
        listed: listed specs in the order of the file.
    """

    def __init__(self, listed: Sequence[TrialSpec]) -> None:
        super().__init__()
        self._by_identity: dict[str, int] = {}
        self._first_of_arm: dict[str, int] = {}
        self._duplicates: dict[int, list[int]] = defaultdict(list)
        """Numbers of the trials that repeat a trial, by the number of that trial."""
        self._unasked: dict[str | None, OrderedDict[TrialSpec, int]] = defaultdict(OrderedDict)
        """Listed specs that are not trials yet, with their positions in the file, by the start they wait for."""
        for place, spec in enumerate(listed):
            self._unasked[spec.start_arm][spec] = place

    def add(self, trial: Trial) -> None:
        """Add a new trial."""
        self[trial.number] = trial
        self._first_of_arm.setdefault(trial.spec.arm, trial.number)
        if trial.spec.start_arm in self._unasked:
            self._unasked[trial.spec.start_arm].pop(trial.spec, None)
        if trial.duplicate_of is None:
            self._by_identity[trial.shape.identity] = trial.number
        else:
            self._duplicates[trial.duplicate_of].append(trial.number)

    def identical(self, identity: str) -> Trial | None:
        """The last trial with this identity that repeats no other; None if there is none."""
        return self.get(self._by_identity.get(identity, -1))

    def sharing(self, number: int) -> list[Trial]:
        """The trial with this number, and those that repeat it."""
        return [self[each] for each in (number, *self._duplicates.get(number, ()))]

    def first_of(self, arm: str) -> Trial | None:
        """The first trial of an arm; None if it has none yet."""
        return self.get(self._first_of_arm.get(arm, -1))

    @property
    def has_unasked(self) -> bool:
        """Whether a listed spec is not a trial yet."""
        return any(self._unasked.values())

    def unasked(self) -> list[TrialSpec]:
        """Listed specs that are not trials yet."""
        places = {spec: place for specs in self._unasked.values() for spec, place in specs.items()}
        return sorted(places, key=places.__getitem__)

    def next_listed(self, may_start: Callable[[str], bool]) -> TrialSpec | None:
        """The first unasked spec whose start may be started from; None if there is none."""
        heads = [
            next((place, spec) for spec, place in specs.items())
            for start, specs in self._unasked.items()
            if specs and (start is None or may_start(start))
        ]
        return min(heads, key=lambda head: head[0])[1] if heads else None


class KnownResults(dict[tuple[int, int], SeedResult]):
    """Results by (trial, seed), with the lowest and the highest value of each final metric of complete ones."""

    def __init__(self, results: Iterable[SeedResult]) -> None:
        super().__init__()
        self.extremes: dict[str, tuple[float, float]] = defaultdict(lambda: (math.inf, -math.inf))
        self._reopened: dict[tuple[int, int], SeedResult] = {}
        for result in results:
            self.add(result)

    def add(self, result: SeedResult) -> None:
        """Add a new result."""
        key = result.trial, result.seed
        self[key] = result
        self._reopened.pop(key, None)
        if result.state == "complete":
            for metric, value in result.final.items():
                lowest, highest = self.extremes[metric]
                self.extremes[metric] = min(lowest, value), max(highest, value)

    def reopen(self, result: SeedResult) -> None:
        """Treat a result as missing until a new one replaces it."""
        key = result.trial, result.seed
        self._reopened[key] = self.pop(key)

    def on_record(self, trial: int, seeds: Iterable[int]) -> list[SeedResult]:
        """Results of a trial, including those to be replaced."""
        found = [self.get((trial, seed)) or self._reopened.get((trial, seed)) for seed in seeds]
        return [result for result in found if result is not None]
