"""A new study of a finished study's winners: it fixes their values and measures them again on fresh seeds."""

from __future__ import annotations

import math
import os
import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

from study.commands.status import TrialStatus, study_status
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.ledger.frontier import frontier, points
from study.ledger.snapshot import Snapshot, read_ledger
from study.spec.arms import PROTOCOL_VALUES, RATES, Arm
from study.spec.cache import CACHE
from study.spec.config import BITS, StudyConfig
from study.spec.definition import settled
from study.spec.search_space import check_trials
from study.spec.study_file import dump_sections, parse_yaml, validate
from study.spec.trial import TUNED_FIELDS, SeedResult, Trial, TrialSpec, tuning_trials
from study.training.files import replace_file

Content = dict[str, Any]
"""An arm as a mapping, as in a study file."""
Winners = list[tuple[Content, Trial]]
"""New arms, each with the trial whose values it fixes."""

FEWEST = 5
"""Smallest default number of seeds of the new study."""
_WORDS = {"chi": "chi{}", "as_chi": "as-chi{}", "d_model": "d{}", "n_sites": "L{}", "keep": "keep{:.4g}"}
"""How a value is written in an arm's name; other fields use the value itself."""


def write_winners(
    directory: StudyDirectory,
    file: Path,
    seeds: Sequence[int] | None = None,
    name: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> StudyConfig:
    """Write a study file of a finished study's winners, by the mean of the final validation loss over seeds.

    Each winner becomes an arm of fixed values. For a listed arm, each combination of its untuned values gets the tuned
    values (`TUNED_FIELDS`) with the best mean; in a tie, the first. For a search, the trials on the frontier are
    selected; an arm without a trial on it gets its trial of lowest mean. Trials with a failed seed are not selected.

    Args:
        seeds: seeds of the new study. Default: as many as the old study has, at least FEWEST; the smallest numbers that
            it did not use.
        name: name of the new study. Default: the file's.
        say: receives one line if an arm has no winner, or if its best learning rate is the lowest or highest one tried.
    Returns:
        The new study.

    Raises:
        StudyError: the study is not finished, tunes nothing, or used one of these seeds; no trial of an arm can win; or
            the file exists already or cannot be written.
    """
    if file.exists():
        raise StudyError(f"{file}: exists already; give another file, or remove it")
    own = directory.load_config()
    snapshot = read_ledger(directory.ledger_url, own.name)
    config = settled(own, snapshot.growths.history)
    _check_finished(directory)
    used = {result.seed for result in snapshot.results}.union(config.seed_list)
    usual = tuple(islice((seed for seed in count() if seed not in used), max(FEWEST, len(config.seed_list))))
    seeds = usual if seeds is None else tuple(seeds)
    _check_fresh(config.name, seeds, used)
    name = file.stem if name is None else name
    if name == config.name:
        raise StudyError(f"--name {name}: is the name of the finished study; give the new study another name")
    if not any(arm.is_searched or _tuned(arm) for arm in config.arms):
        raise StudyError(
            f"{directory.path}: study {config.name} has nothing to select: no arm has listed or searched values"
        )
    command = ["mpo-study", "winners", str(directory.path), str(file)]
    command += ["--seeds", _as_option(seeds)] if seeds != usual else []
    command += ["--name", name] if name != file.stem else []
    sections = _sections(config, snapshot, name, seeds, file, _selected(config, snapshot, say))
    text = _head(command, config, snapshot, used) + dump_sections(sections)
    new = validate(parse_yaml(text, str(file)), str(file))
    check_trials(new)
    try:
        replace_file(file, text.encode(), mode=0o644)
    except OSError as error:
        raise StudyError(f"{file}: cannot write there: {error.strerror or error}; give another file") from None
    return new


def _check_finished(directory: StudyDirectory) -> None:
    now = study_status(directory)
    if not now.n_missing:
        return
    lacking = [_missing(row) for row in now.trials if row.missing]
    lacking += [f"{now.n_unasked} trials that have not begun"] if now.n_unasked else []
    shown = "; ".join(lacking[:4] + ["..."] * (len(lacking) > 4))
    raise StudyError(
        f"{directory.path}: study {now.name} is not finished: {now.n_missing} runs are missing ({shown}); "
        "run it again first"
    )


def _missing(row: TrialStatus) -> str:
    return f"trial {row.trial.number} ({row.trial.spec.arm}) seeds {_listed(row.missing)}"


def parse_seeds(text: str | None) -> tuple[int, ...] | None:
    """Parse seeds from the command line: a number n for 0 to n - 1, or a list with commas.

    Raises:
        StudyError: the text is neither.
    """
    if text is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,3}|[0-9]{1,10}(,[0-9]{1,10})*,|[0-9]{1,10}(,[0-9]{1,10})+", text):
        raise StudyError(f"--seeds {text}: must be a number of seeds, such as 5, or a list, such as 100,101,102")
    return tuple(int(seed) for seed in text.split(",") if seed) if "," in text else tuple(range(int(text)))


def _as_option(seeds: Sequence[int]) -> str:
    """The text from which `parse_seeds` gets these seeds."""
    if list(seeds) == list(range(len(seeds))):
        return str(len(seeds))
    return ",".join(map(str, seeds)) + ("," if len(seeds) == 1 else "")


def _check_fresh(name: str, seeds: Sequence[int], used: Collection[int]) -> None:
    stale = [seed for seed in seeds if seed in used]
    if stale:
        shown = shorten(_listed(stale), 60, placeholder=" ...")
        raise StudyError(
            f"--seeds: study {name} already used the seeds {shown}, but winners count only on fresh seeds; give other "
            "seeds, or omit --seeds for fresh ones"
        )


# Selection ------------------------------------------------------------------------------------------------------------


def _selected(config: StudyConfig, snapshot: Snapshot, say: Callable[[str], None]) -> dict[str, Winners]:
    """The new study's arms, by the arm that each comes from."""
    losses = _mean_losses(snapshot.trials, snapshot.results)
    # One seed is enough for a selection, because fresh seeds test it.
    found = frontier(points(snapshot.trials, snapshot.results), fewest=1)
    on_frontier = {point.trial for point in found}
    taken = {arm.name for arm in config.arms}
    selected = {}
    for arm in config.arms:
        trials = [trial for trial in snapshot.trials if trial.spec.arm == arm.name]
        tuned_among = tuning_trials(arm.name, config) if _tuned(arm) else None
        if arm.is_searched:
            own = [trial for trial in trials if trial.duplicate_of is None and trial.number in losses]
            trials = [trial for trial in own if trial.number in on_frontier]
            trials = trials or sorted(own, key=lambda trial: losses[trial.number])[:1]
            trials.sort(key=lambda trial: (trial.shape.n_params, trial.number))
            tuned_among = len(own)  # not all trials of the search: a sampler does not try all arms equally often
            if not trials:
                say(f"arm {arm.name}: no trial has all its seeds; the new study omits this arm and its contrasts")
        elif _tuned(arm):
            trials = _best_of_listed(arm, trials, losses, say)
        taken.discard(arm.name)  # the first new arm may keep the name
        selected[arm.name] = list(_fixed(arm, trials, tuned_among, taken))
    return selected


def _tuned(arm: Arm) -> list[str]:
    """The listed fields of an arm that are tuned."""
    return [key for key, value in arm.values().items() if isinstance(value, tuple) and key in TUNED_FIELDS]


def _mean_losses(trials: Iterable[Trial], results: Iterable[SeedResult]) -> dict[int, float]:
    """Mean final validation loss by trial, in nats, for trained trials without a failed seed and their repeats."""
    of_trial: dict[int, list[SeedResult]] = defaultdict(list)
    for result in results:
        of_trial[result.trial].append(result)
    return {
        trial.number: statistics.fmean(result.final["final/val_loss"] for result in own)
        for trial in trials
        if (own := of_trial[trial.source]) and trial.stop is None and all(result.state == "complete" for result in own)
    }


def _best_of_listed(
    arm: Arm, trials: Sequence[Trial], losses: Mapping[int, float], say: Callable[[str], None]
) -> list[Trial]:
    """The trial of lowest mean for each combination of the untuned listed values."""
    tuned = _tuned(arm)
    kept = [key for key, value in arm.values().items() if isinstance(value, tuple) and key not in tuned]
    alike: dict[tuple[Any, ...], list[Trial]] = defaultdict(list)
    for trial in trials:
        alike[tuple(_value(trial.spec, key) for key in kept)].append(trial)
    winners = []
    for at, own in alike.items():
        sound = [trial for trial in own if trial.number in losses]
        where = "".join(f", {key}={value}" for key, value in zip(kept, at, strict=True))
        if not sound:
            raise StudyError(
                f"arm {arm.name}{where}: each trial has a failed seed, so none can win; "
                "list other values, or remove these from the study"
            )
        winners.append(min(sound, key=lambda trial: losses[trial.number]))
        for key in (key for key in RATES if key in tuned):
            rates, rate = {_value(trial.spec, key) for trial in own}, _value(winners[-1].spec, key)
            end = {min(rates): "lowest", max(rates): "highest"}.get(rate)
            if end is not None and len(rates) > 1:
                say(
                    f"arm {arm.name}{where}: the best {key.replace('_', ' ')}, {rate:g}, is the {end} of those tried; "
                    "a better one may lie beyond: list more values, run the study with --extend, and select again"
                )
    return winners


def _fixed(
    arm: Arm, winners: Sequence[Trial], tuned_among: int | None, taken: set[str]
) -> Iterator[tuple[Content, Trial]]:
    """An arm of fixed values for each winner, under names that are not taken yet.

    A name is the old arm's name, then the values in which its winners differ, except for learning rates.
    """
    given = arm.model_dump(mode="json", exclude_defaults=True)
    keys = [key for key in arm.values() if key in given]
    values = [{key: _value(trial.spec, key) for key in keys} for trial in winners]
    differing = [key for key in keys if key not in RATES and len({own[key] for own in values}) > 1]
    if tuned_among is None:
        tuned_among = arm.tuned_among
    for trial, own in zip(winners, values, strict=True):
        words = [_WORDS.get(key, "{}").format(own[key]) for key in differing]
        name = "-".join([arm.name, *(word.replace(".", "_") for word in words)])  # a name has no dot
        names = (name, *(f"{name}-{number}" for number in range(2, len(taken) + 3)))
        content: Content = {"name": next(each for each in names if each not in taken), "family": arm.family}
        content |= {key: value for key, value in given.items() if key not in ("name", "tuned_among")} | own
        if "d_ff" in given:
            content["d_ff"] = trial.spec.model.recorded["d_ff"]
        taken.add(content["name"])
        yield content | ({} if tuned_among is None else {"tuned_among": tuned_among}), trial


def _value(spec: TrialSpec, key: str) -> Any:
    """A trial's value for a field of its arm."""
    return getattr(spec.protocol if key in PROTOCOL_VALUES else spec.model if key == "d_model" else spec, key)


# The file -------------------------------------------------------------------------------------------------------------


def _sections(
    config: StudyConfig,
    snapshot: Snapshot,
    name: str,
    seeds: Sequence[int],
    file: Path,
    arms: Mapping[str, Winners],
) -> Content:
    corpus = config.corpus.model_dump(mode="json", exclude_defaults=True)
    folder = os.path.dirname(os.path.realpath(file))
    if config.corpus.path is not None:
        given = config.corpus.given_paths
        paths = [each if each.startswith(CACHE) else Path(os.path.relpath(each, folder)).as_posix() for each in given]
        corpus |= {"path": paths[0] if isinstance(config.corpus.path, str) else paths, "sha256": snapshot.corpus_sha256}
    if config.corpus.tokenizer_folder is not None and not config.corpus.tokenizer.startswith(CACHE):
        # A relative path with a slash is never read as the name of a tokenizer.
        corpus["tokenizer"] = os.path.join(".", os.path.relpath(config.corpus.tokenizer_folder, folder))
    claims = {"margins": config.claims.margins.model_dump(), "contrasts": list(_contrasts(config, arms))}
    looks = config.claims.looks
    claims |= {"looks": looks} if len(seeds) in looks and claims["contrasts"] else {}
    sections = {
        "name": name,
        "description": f"Winners of study {config.name}, measured on fresh seeds.",
        "corpus": corpus,
        "model": config.model.model_dump(mode="json", exclude_none=True),
        "protocol": config.protocol.model_dump(mode="json", exclude_none=True),
        "seeds": len(seeds) if list(seeds) == list(range(len(seeds))) else list(seeds),
        "objectives": list(config.objectives),
        "claims": {key: content for key, content in claims.items() if content},
        "bits": config.bits if config.bits != BITS else None,
        "rel_error_chi": list(config.rel_error_chi),
        "execution": config.execution.model_dump(mode="json", exclude_defaults=True),
        "arms": [content for new in arms.values() for content, _ in new],
    }
    return {key: content for key, content in sections.items() if content}


def _contrasts(config: StudyConfig, arms: Mapping[str, Winners]) -> Iterator[Content]:
    """Each declared contrast, for each new arm that comes from one of its arms.

    The rivals are those of the same χ, otherwise those nearest in parameters. For a searched arm, always the
    nearest: a trial found by a search may have another number of sites than the control of its χ is meant for. Bonds
    that change may leave χ far behind, so such an arm has the nearest too.
    """
    for contrast in config.claims.contrasts:
        rivals = arms[contrast.against]
        for own, trial in arms[contrast.arm] if rivals else ():
            fixed = not config.arm(contrast.arm).is_searched and trial.spec.bonds is None
            size = trial.spec.size if fixed else None
            alike = [rival for rival, other in rivals if size is not None and other.spec.size == size]
            if not alike:
                away = [abs(math.log(other.shape.n_params / trial.shape.n_params)) for _, other in rivals]
                alike = [rival for (rival, _), distance in zip(rivals, away, strict=True) if distance == min(away)]
            for rival in alike:
                yield {"arm": own["name"], "against": rival["name"]}


def _head(command: Sequence[str], config: StudyConfig, snapshot: Snapshot, used: Iterable[int]) -> str:
    """The comment that says where the file comes from."""
    said = (
        f"Written by `{shlex.join(command)}`: the winners of study {config.name} (UUID {snapshot.uuid}) on the "
        f"seeds {_listed(sorted(used))}, to be measured again on fresh seeds."
    )
    lines = wrap(said, 118, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
