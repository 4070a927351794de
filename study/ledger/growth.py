"""Growing a begun study: by searched trials, by seeds, by additions to its file, by seeds for some trials."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from study.errors import StudyError
from study.ledger.ledger import Ledger
from study.ledger.refine import more_seeds, refine_contrasts, refine_frontier
from study.spec.config import StudyConfig


@dataclass(frozen=True)
class Growth:
    """The growth that a user asks for.

    trials: number of further searched trials. seeds: further seeds for every trial. refine: further seeds for every
    trial near the frontier, and for the trials that it is compared with. contrasts: whether to add seeds up to the next
    look for declared contrasts that are undecided. extend: whether to add everything in the study file that the
    recorded study does not have yet.
    """

    trials: int = 0
    seeds: int = 0
    refine: int = 0
    contrasts: bool = False
    extend: bool = False

    @property
    def command(self) -> str:
        """The options as the ledger records them."""
        if self.contrasts:
            return "refine --on contrasts"
        asked = [("--trials", self.trials), ("--seeds", self.seeds), ("refine --on frontier --seeds", self.refine)]
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
    if growth.refine or growth.contrasts:
        if ledger.tally.n_missing:
            raise StudyError(
                f"study {config.name} is not finished: {ledger.tally.n_missing} runs are missing, so it is unknown "
                "which trials need more seeds; run it again first"
            )
        found = refine_contrasts(ledger) if growth.contrasts else refine_frontier(ledger, growth.refine)
        if found.more_seeds:
            ledger.record_growth(command, more_seeds=found.more_seeds)
        say(found.shown)
        return bool(found.more_seeds)
    if growth.trials and config.search.trials == 0:
        raise StudyError(
            f"--trials +{growth.trials}: no arm of study {config.name} has searched values; add listed values or arms "
            "to its file, and run it with --extend"
        )
    if growth.trials and ledger.tally.search_ended is not None:
        raise StudyError(f"--trials +{growth.trials}: {ledger.tally.search_ended}")
    seeds = (
        config.seeds + growth.seeds if isinstance(config.seeds, int) else tuple(more_seeds(config.seeds, growth.seeds))
    )
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


def _size(config: StudyConfig) -> str:
    searched = f"{config.search.trials} searched trials, " if config.search.trials else ""
    return f"{searched}{len(config.seed_list)} seeds"
