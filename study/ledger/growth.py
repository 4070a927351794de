"""Growing a begun study: by searched trials, by seeds, by additions to its file, by seeds for undecided trials."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from analysis.results.pairs import KNOWN, REFERENCE, Known, pairs
from study.errors import StudyError
from study.ledger.frontier import points, undecided
from study.ledger.ledger import Ledger
from study.spec.config import StudyConfig
from study.spec.trial import Trial


@dataclass(frozen=True)
class Growth:
    """The growth that a user asks for.

    trials: number of further searched trials. seeds: further seeds for every trial. refine: further seeds for every
    trial whose place on the frontier is undecided, and for the trials that it is compared with. extend: whether to add
    everything in the study file that the recorded study does not have yet.
    """

    trials: int = 0
    seeds: int = 0
    refine: int = 0
    extend: bool = False

    @property
    def command(self) -> str:
        """The options as the ledger records them."""
        asked = [("--trials", self.trials), ("--seeds", self.seeds), ("refine --seeds", self.refine)]
        return " ".join(f"{option} +{number}" for option, number in asked if number)


NO_GROWTH = Growth()


def parse_more(option: str, text: str | None) -> int:
    """The number N in `+N`. Default: 0.

    Raises:
        StudyError: the text does not have this form.
    """
    if text is None:
        return 0
    if not re.fullmatch(r"\+[1-9][0-9]{0,8}", text):
        raise StudyError(f"{option} {text}: must be + and a whole number, for example {option} +5")
    return int(text[1:])


def grow(ledger: Ledger, growth: Growth, say: Callable[[str], None]) -> bool:
    """Record a growth in the ledger, which must be opened again to apply it; returns whether it was recorded.

    If the last growth is asked for again while the study still lacks its runs, it is not recorded twice. So the same
    command also continues after an interruption.

    Raises:
        StudyError: the study cannot grow in this way.
    """
    config, command = ledger.config, growth.command
    if not command:
        return False
    if ledger.growths and ledger.growths[-1].command == command and ledger.tally.n_missing:
        say(f"continuing: this study has already grown by {command}; {ledger.tally.n_missing} runs are missing")
        return False
    if growth.refine:
        return _refine(ledger, growth, say)
    if growth.trials and config.search.trials == 0:
        raise StudyError(
            f"--trials +{growth.trials}: no arm of study {config.name} has searched values; add listed values or arms "
            "to its file, and run it with --extend"
        )
    if growth.trials and ledger.tally.search_ended is not None:
        raise StudyError(f"--trials +{growth.trials}: {ledger.tally.search_ended}")
    seeds = config.seeds + growth.seeds if isinstance(config.seeds, int) else _more(config.seeds, growth.seeds)
    search = config.search.model_copy(update={"trials": config.search.trials + growth.trials})
    try:
        grown = StudyConfig.model_validate_json(
            config.model_copy(update={"seeds": seeds, "search": search}).model_dump_json()
        )
    except ValidationError as error:
        raise StudyError(f"{command}: the study cannot grow this way: {error.errors()[0]['msg']}") from None
    ledger.record_growth(command, grown)
    say(f"grown by {command}: {_size(grown)}, was {_size(config)}; to resume, omit this option")
    return True


def _refine(ledger: Ledger, growth: Growth, say: Callable[[str], None]) -> bool:
    if ledger.tally.n_missing:
        raise StudyError(
            f"study {ledger.config.name} is not finished: {ledger.tally.n_missing} runs are missing, so it is unknown "
            "which trials are undecided; run it again first"
        )
    asked = points(ledger.trials.values(), ledger.results.values())
    chosen = {point.trial for point in undecided(asked)}
    if not chosen:
        say("nothing to refine: the present seeds decide for every trial whether it is on the frontier")
        return False
    wanted = {n: list(_more(tuple(ledger.tally.seeds_of(ledger.trials[n])), growth.refine)) for n in sorted(chosen)}
    for trial, rival in _compared_with(ledger, chosen):  # a comparison gains little if only one side has more
        wanted[rival] = [*wanted.get(rival, []), *wanted[trial]]
    for number in sorted(wanted):  # each seed starts from the start's run with that seed
        arm = ledger.trials[number].spec.start
        start = next((trial for trial in ledger.trials.values() if trial.spec.arm == arm), None)
        if start is not None:
            wanted[start.number] = [*wanted.get(start.number, []), *wanted[number]]
    had = {number: set(ledger.tally.seeds_of(ledger.trials[number])) for number in wanted}
    more = {n: [seed for seed in dict.fromkeys(seeds) if seed not in had[n]] for n, seeds in sorted(wanted.items())}
    more = {number: seeds for number, seeds in more.items() if seeds}
    ledger.record_growth(growth.command, more_seeds=more)
    others = more.keys() - chosen
    too = f"; also for {_trials(others)}, which these are compared with or start from" if others else ""
    n_runs = sum(map(len, more.values()))
    say(
        f"undecided: {_trials(chosen)}, of {len(asked)}; new seeds for each: {growth.refine}{too}; in total "
        f"{n_runs} run{'s' * (n_runs != 1)}"
    )
    return True


def _compared_with(ledger: Ledger, chosen: Collection[int]) -> list[tuple[int, int]]:
    """Pairs of a chosen trial and a trial it is compared with, as the analysis pairs them.

    Those are its references, and the trials that the study file contrasts it with. Trials with a failed seed are left
    out, since nothing is claimed about them.
    """
    states: dict[int, list[str]] = defaultdict(list)
    for result in ledger.results.values():
        states[result.trial].append(result.state)
    trials = [trial for trial in ledger.trials.values() if trial.duplicate_of is None and trial.skipped is None]
    trials.sort(key=lambda trial: (trial.shape.n_params, trial.number))
    name = ledger.config.name
    contrasts = [(name, contrast.arm, contrast.against) for contrast in ledger.config.claims.contrasts]
    found = pairs([_known(trial, name, states[trial.number]) for trial in trials], contrasts, is_unfinished=False)
    return [
        (pair.trial, pair.against)
        for pair in found
        if pair.trial in chosen
        and (pair.declared or pair.relation == REFERENCE)
        and "failed" not in states[pair.against]
    ]


def _known(trial: Trial, study: str, states: Sequence[str]) -> Known:
    spec = trial.spec
    # Not by `model_dump`, which leaves out some fields at their defaults.
    values = dict(spec) | dict(spec.protocol) | vars(trial.shape)
    values |= {
        "trial": trial.number,
        "study": study,
        "family_label": trial.shape.label,
        "start": spec.start or "scratch",
        "heal": None if spec.heal is None else spec.heal.shown,
        "options": spec.options_shown,
        "bonds": None if spec.bonds is None else spec.bonds.shown,
        "sweep": None if spec.sweep is None else spec.sweep.every,
        "optimiser": spec.protocol.optimiser,
        "n_seeds": states.count("complete"),
        "n_failed": states.count("failed"),
        "stopped": trial.stop and trial.stop.reason,
        "budget_hash": trial.budget_hash,
    }
    return {key: values[key] for key in KNOWN}


def _more(seeds: tuple[int, ...], n: int) -> tuple[int, ...]:
    """The seeds, and `n` more after the largest."""
    return (*seeds, *range(max(seeds) + 1, max(seeds) + 1 + n))


def _size(config: StudyConfig) -> str:
    searched = f"{config.search.trials} searched trials, " if config.search.trials else ""
    return f"{searched}{len(config.seed_list)} seeds"


def _trials(numbers: set[int]) -> str:
    return f"trial{'s' * (len(numbers) != 1)} {', '.join(map(str, sorted(numbers)))}"
