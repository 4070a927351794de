"""The pairs of trials that are compared. Uses no frames: a trial is a dict with the keys `KNOWN`; None is missing."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from functools import partial
from operator import ne
from typing import Any, NamedTuple

from analysis.run_schema import MIN_SEEDS

DENSE = "dense"
SMALLER_DENSE = "dense, smaller"
LARGER_DENSE = "dense, larger"
CHANGED_DENSE = "dense, changed"
DENSE_TUNED = "dense fine-tuned"
MPO_SCRATCH = "MPO from scratch"
MPO_TUNED = "MPO fine-tuned"

EQUAL_SIZE = 0.05
"""A control whose parameters differ from a trial's by at most this share has equal parameters."""
REFERENCE, EQUAL_PARAMETERS, DECLARED = "reference", "equal parameters", "declared"

Known = dict[str, Any]
"""A trial: a dict with the keys `KNOWN`."""
_TRAINED = (
    *("budget_hash", "learning_rate", "own_embedding_rate", "lr_rule", "decay", "gauge", "factorisation", "n_sites"),
    *("optimiser", "metric", "spread", "narrow", "heal", "options", "bonds", "sweep"),
)
KNOWN = (
    *(
        "trial",
        "study",
        "arm",
        "family",
        "family_label",
        "start",
        "steps",
        "chi",
        "as_chi",
        "keep",
        "n_params",
        "n_params_dense",
        "n_seeds",
    ),
    *("n_failed", "stopped", "budget_hash", "learning_rate", "embedding_learning_rate", "lr_rule", "decay"),
    *(
        "gauge",
        "factorisation",
        "n_sites",
        "optimiser",
        "metric",
        "spread",
        "narrow",
        "heal",
        "options",
        "bonds",
        "sweep",
    ),
    "resized",
)
"""Properties of a trial that determine its pairs, by their names in runs."""


class Pair(NamedTuple):
    """Two trials that are compared, and the reason."""

    trial: int
    against: int
    relation: str
    declared: bool


def pairs(trials: Iterable[Known], contrasts: Iterable[tuple[str, str, str]], is_unfinished: bool) -> Iterator[Pair]:
    """The pairs that `comparisons.compare` names, the declared ones first.

    Args:
        contrasts: for each, a study and the names of two of its arms; the first arm is compared with the second.
        is_unfinished: whether the study lacks runs.
    """
    everything = list(map(_described, trials))
    over = [trial for trial in everything if trial["stopped"] is None and trial["n_seeds"] + trial["n_failed"] > 0]
    trials = [trial for trial in over if trial["n_seeds"] > 0]  # others can be compared with these
    first = _first([trial for trial in everything if trial["group"] == DENSE and trial["n_seeds"] > 0])
    reference = first if first is not None and first["stopped"] is None else None
    declared = list(_declared_pairs(everything, contrasts, is_unfinished))
    yield from declared
    known = {(pair.trial, pair.against) for pair in declared}
    # A trial that its own study compares with a reference, of any budget, is not compared with other joined studies'.
    group_of = {trial["trial"]: trial["group"] for trial in everything}
    settled = {(pair.trial, group_of[pair.against]) for pair in declared if pair.relation == REFERENCE}
    trained_on = _trained_on(trials)
    budget = None if reference is None else reference["budget_hash"]
    dense = [trial for trial in trials if trial["group"] == DENSE and trial["budget_hash"] == budget]
    others: dict[str, list[Known]] = {}
    for trial in trials:
        if trial["family"] != "mpo":
            others.setdefault(trial["budget_hash"], []).append(trial)
    by_size = {budget: _BySize(alike) for budget, alike in others.items()}
    for trial in over:
        own = []
        if trial["budget_hash"] == budget and trial is not reference:
            # Of several dense models that the study tuned, take the one trained most alike: the first may be the worst.
            is_dense = trial["group"] == DENSE
            near = dense if is_dense else _at_home(trial, dense, (trial["trial"], DENSE) not in settled)
            own += [(rival, REFERENCE) for rival in _of_each_arm(trial, near) if rival is not trial]
        further = trained_on.get(_start_and_budget(trial))
        if further is not None and further is not trial and (trial["trial"], DENSE_TUNED) not in settled:
            own += [(further, REFERENCE)]
        if trial["budget_hash"] in by_size:
            alike = by_size[trial["budget_hash"]].near(trial["n_params"])
            own += [(control, EQUAL_PARAMETERS) for control in _controls(trial, alike)]
        for against, relation in own:
            pair = (trial["trial"], against["trial"])
            if pair not in known and pair[::-1] not in known:
                known.add(pair)
                yield Pair(*pair, relation, declared=False)


def group_of(
    family: str, label: str, start: str, steps: int, percent_of_dense: float, resized: str | None = None
) -> str:
    """The group of a trial: its family by its label, as readers distinguish families.

    A dense model that has a start and no steps is that start.

    Args:
        resized: settings of the study's model that the trial changes; it is then no reference, whatever its size.
    """
    if family == "dense" and (start == "scratch" or steps == 0):
        if percent_of_dense == 100 and isinstance(resized, str):
            return CHANGED_DENSE
        return DENSE if percent_of_dense == 100 else LARGER_DENSE if percent_of_dense > 100 else SMALLER_DENSE
    return f"{label} {'from scratch' if start == 'scratch' else 'compressed' if steps == 0 else 'fine-tuned'}"


def _described(trial: Known) -> Known:
    """The trial with derived values added."""
    layers, embeddings = trial["learning_rate"], trial["embedding_learning_rate"]
    embeddings = layers if embeddings is None else embeddings
    percent = 100 * trial["n_params"] / trial["n_params_dense"] if trial["n_params_dense"] else math.nan
    described = trial | {
        "group": group_of(
            trial["family"], trial["family_label"], trial["start"], trial["steps"], percent, trial["resized"]
        ),
        # Bonds that change may leave χ far behind.
        "cap": None
        if trial["bonds"] is not None
        else next((trial[key] for key in ("chi", "as_chi", "keep") if trial[key] is not None), None),
        "embedding_learning_rate": embeddings,
        "gauge": trial["gauge"] or "free",
        # A rate that equals the layers' is not a rate of its own.
        "own_embedding_rate": embeddings if embeddings != layers else None,
    }
    return described | {"trained": tuple(str(described[key]) for key in _TRAINED)}


def _declared_pairs(
    trials: list[Known], contrasts: Iterable[tuple[str, str, str]], is_unfinished: bool
) -> Iterator[Pair]:
    for study, arm, rival in contrasts:
        own = [trial for trial in trials if trial["study"] == study]
        rivals = [trial for trial in own if trial["arm"] == rival and trial["stopped"] is None]
        reference, trained_on = _reference_of(own), _trained_on(own)
        by_size, of_cap = _BySize(rivals), dict[Any, list[Known]]()
        for trial in rivals:
            if trial["cap"] is not None:
                of_cap.setdefault(trial["cap"], []).append(trial)
        for trial in (trial for trial in own if trial["arm"] == arm and rivals):
            same = of_cap.get(trial["cap"], [])
            # A control's χ is that of an MPO with the control's sites: beside an MPO with other sites it means nothing.
            # `keep` means the same for all.
            meant = [
                other
                for other in same
                if other["keep"] is not None or other["family"] == "mpo" or _sites(other) == _sites(trial)
            ]
            against = _counterpart(trial, meant, by_size)
            is_equal = against["family"] != "mpo" and bool(_controls(trial, [against]))
            is_other_dense = (
                DENSE == against["group"] != trial["group"] and against["budget_hash"] == trial["budget_hash"]
            )
            is_reference = against is reference or is_other_dense or against is trained_on.get(_start_and_budget(trial))
            if is_unfinished and not (same or is_equal or is_reference):
                continue  # its counterpart may be a trial that has not begun
            relation = REFERENCE if is_reference else EQUAL_PARAMETERS if is_equal else DECLARED
            yield Pair(trial["trial"], against["trial"], relation, declared=True)


def _reference_of(own: list[Known]) -> Known | None:
    """The dense trial with which the trials of one study are compared, as `summary.summarise` chooses it."""
    return _first([trial for trial in own if trial["group"] == DENSE])


def _trained_on(trials: list[Known]) -> dict[tuple[Any, Any], Known]:
    """The dense trials that were trained on from another arm, by their start and budget. Of several, the first is
    taken, as a reference is chosen."""
    found: dict[tuple[Any, Any], list[Known]] = {}
    for trial in trials:
        if trial["group"] == DENSE_TUNED and trial["stopped"] is None:
            found.setdefault(_start_and_budget(trial), []).append(trial)
    return {start: first for start, alike in found.items() if (first := _first(alike)) is not None}


def _start_and_budget(trial: Known) -> tuple[Any, Any]:
    return _start_of(trial), trial["budget_hash"]


def _start_of(trial: Known) -> tuple[Any, Any] | None:
    """Study and arm of the start; None from scratch."""
    return (trial["study"], trial["start"]) if trial["start"] != "scratch" else None


def _first(dense: list[Known]) -> Known | None:
    """The first trial with enough seeds, or else the first with any seed, or else the first."""
    enough = [trial for trial in dense if trial["n_seeds"] >= MIN_SEEDS]
    some = [trial for trial in dense if trial["n_seeds"] > 0]
    return min(enough or some or dense, key=lambda trial: trial["trial"], default=None)


def _counterpart(trial: Known, same: list[Known], rivals: _BySize) -> Known:
    """The rival of the same χ, or else the nearest in parameters; of several, the one trained most alike, then the
    first."""
    if same:
        return min(same, key=lambda rival: (_unlike(trial, rival), _distance(trial, rival), rival["trial"]))
    near = rivals.nearest(trial["n_params"])
    return min(near, key=lambda rival: (_distance(trial, rival), _unlike(trial, rival), rival["trial"]))


def _controls(trial: Known, others: list[Known]) -> list[Known]:
    """From each arm of non-MPO trials, one trial of equal parameters with the start of an MPO trial."""
    if trial["family"] != "mpo":
        return []
    families: dict[str, list[Known]] = {}
    for other in others:
        if _start_of(other) == _start_of(trial) and _distance(trial, other) <= math.log1p(EQUAL_SIZE):
            families.setdefault(other["family"], []).append(other)
    return [rival for family in families.values() for rival in _of_each_arm(trial, _at_home(trial, family))]


def _at_home(trial: Known, rivals: list[Known], or_abroad: bool = True) -> list[Known]:
    """The rivals of the trial's own study, if studies are joined; all rivals, if it has none and `or_abroad`."""
    own = [rival for rival in rivals if rival["study"] == trial["study"]]
    return own if own or not or_abroad else rivals


def _of_each_arm(trial: Known, rivals: list[Known]) -> list[Known]:
    """From each arm, the rival trained most like a trial; of several, the nearest in parameters. (Arms, not families: a
    variant that a study lists separately, such as another init, may be the harder rival.)"""
    arms: dict[tuple[Any, Any], list[Known]] = {}
    for rival in rivals:
        arms.setdefault((rival["study"], rival["arm"]), []).append(rival)
    return [min(arm, key=partial(_nearness, trial)) for arm in arms.values()]


class _BySize:
    """Trials in their own order; those near a size are found without a search through all."""

    def __init__(self, trials: list[Known]) -> None:
        self._trials = trials
        self._ascending = sorted(range(len(trials)), key=lambda at: trials[at]["n_params"])
        self._sizes = [trials[at]["n_params"] for at in self._ascending]

    def near(self, size: float) -> list[Known]:
        """Trials within `EQUAL_SIZE` of a size, and possibly some a little further away."""
        reach = 1 + 1.01 * EQUAL_SIZE
        within = slice(bisect_left(self._sizes, size / reach), bisect_right(self._sizes, size * reach))
        return [self._trials[at] for at in sorted(self._ascending[within])]

    def nearest(self, size: float) -> list[Known]:
        """Trials of the next smaller size (below the given one), and of the next larger or equal one."""
        at = bisect_left(self._sizes, size)
        sizes = self._sizes[max(at - 1, 0) : at + 1]
        within = slice(bisect_left(self._sizes, sizes[0]), bisect_right(self._sizes, sizes[-1]))
        return [self._trials[at] for at in self._ascending[within]]


def _nearness(trial: Known, other: Known) -> tuple[tuple[int, float], float]:
    return _unlike(trial, other), _distance(trial, other)


def _unlike(trial: Known, other: Known) -> tuple[int, float]:
    """Number of training settings and arm options in which two trials differ, and the distance of their rates."""
    layers = trial["learning_rate"] / other["learning_rate"]
    embeddings = trial["embedding_learning_rate"] / other["embedding_learning_rate"]
    return sum(map(ne, trial["trained"], other["trained"])), abs(math.log(layers)) + abs(math.log(embeddings))


def _sites(trial: Known) -> tuple[str, str]:
    return str(trial["factorisation"]), str(trial["n_sites"])


def _distance(trial: Known, other: Known) -> float:
    return abs(math.log(other["n_params"] / trial["n_params"]))
