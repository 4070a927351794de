"""A new study of a finished study's winners: they become fixed values, to be measured again on fresh seeds."""

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
from study.files import replace_file
from study.ledger.directory import StudyDirectory
from study.ledger.frontier import frontier, points
from study.ledger.snapshot import Snapshot, read_ledger
from study.spec.arms import BY_SIZE_FIELDS, RATES, SIZE_FIELDS, Arm, DenseArm
from study.spec.config import StudyConfig
from study.spec.definition import settled
from study.spec.search_space import check_trials
from study.spec.study_file import dump_sections, parse_yaml, validate
from study.spec.trial import TUNED_FIELDS, SeedResult, Trial, TrialSpec, tuning_trials

Content = dict[str, Any]
"""An arm in the form of a study file."""

FEWEST = 5
"""Smallest default number of seeds in a study that is to decide."""
_WORDS = {"chi": "chi{}", "as_chi": "as-chi{}", "d_model": "d{}", "n_sites": "L{}"}
"""Forms of a value in an arm's name; other fields use the value itself."""
_FIRST, _LAST = ("name", "family", "teacher", *SIZE_FIELDS), ("tuned_among",)


def write_winners(
    directory: StudyDirectory,
    file: Path,
    seeds: int | Sequence[int] | None = None,
    name: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> StudyConfig:
    """Write a study file of a finished study's winners, by the mean of the final validation loss over seeds.

    For a listed arm, each combination of its untuned values gets the tuned values (`TUNED_FIELDS`) with the best mean;
    of equal means the first. For a search, the trials on the frontier are selected; an arm without a trial on it gets
    its trial of lowest mean. Trials with a failed seed are not selected. Arms without tuned values stay as they are.

    Args:
        seeds: seeds of the new study: a list, or a number n for 0 to n - 1. Default: the first that the old study did
            not use, as many as it has and at least FEWEST.
        name: name of the new study. Default: the file's.
        say: receives one line about what could not be selected, or a best learning rate at an end of those tried.
    Returns:
        The new study.

    Raises:
        StudyError: the study is not finished, tunes nothing, or used one of these seeds; no trial of an arm can win; or
            the file exists already or cannot be written.
    """
    if file.exists():
        raise StudyError(f"{file}: is there already; give another file, or remove it")
    own = directory.load_config()
    snapshot = read_ledger(directory.ledger_url, own.name)
    config = settled(own, snapshot.growths.history)
    _check_finished(directory)
    used = {result.seed for result in snapshot.results}.union(config.seed_list)
    usual = _fresh_seeds(used, max(FEWEST, len(config.seed_list)))
    seeds = usual if seeds is None else tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    _check_fresh(config.name, seeds, used)
    if name is None:
        name = file.stem
    if name == config.name:
        raise StudyError(f"--name {name}: is the name of the study that selected; give the new one another")
    arms, sizes = _selected(config, snapshot, say)
    if [arm for new in arms.values() for arm in new] == [_plain(arm) for arm in config.arms]:
        raise StudyError(f"{directory.path}: study {config.name} tuned nothing: no arm has listed or searched values")
    sections = _sections(config, snapshot, name, seeds, file, arms, sizes)
    own_seeds = None if seeds == usual else seeds
    text = _head(directory, file, own_seeds, name, config, snapshot, used) + dump_sections(sections)
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
    lacking += [f"{now.n_unasked} trials that are still to come"] if now.n_unasked else []
    shown = "; ".join(lacking[:4] + ["..."] * (len(lacking) > 4))
    raise StudyError(
        f"{directory.path}: study {now.name} is not finished, so what it selects is not known: it lacks "
        f"{now.n_missing} runs ({shown}); run it again first"
    )


def _missing(row: TrialStatus) -> str:
    return f"trial {row.trial.number} ({row.trial.spec.arm}) seeds {_listed(row.missing)}"


def parse_seeds(text: str | None) -> int | tuple[int, ...] | None:
    """Parse seeds from the command line: a number of seeds, or a list with commas.

    Raises:
        StudyError: the text is neither.
    """
    if text is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,3}|[0-9]{1,10}(,[0-9]{1,10})*,|[0-9]{1,10}(,[0-9]{1,10})+", text):
        raise StudyError(f"--seeds {text}: must be a number of seeds, such as 5, or a list, such as 100,101,102")
    return tuple(int(seed) for seed in text.split(",") if seed) if "," in text else int(text)


def _plain_seeds(seeds: Sequence[int]) -> int | list[int]:
    """Seeds in the form of a study file: a number n for 0 to n - 1, or a list."""
    return len(seeds) if list(seeds) == list(range(len(seeds))) else list(seeds)


def _fresh_seeds(used: Collection[int], n: int) -> tuple[int, ...]:
    return tuple(islice((seed for seed in count() if seed not in used), n))


def _check_fresh(name: str, seeds: Sequence[int], used: Collection[int]) -> None:
    stale = [seed for seed in seeds if seed in used]
    if stale:
        shown = shorten(_listed(stale), 60, placeholder=" ...")
        raise StudyError(
            f"--seeds: the new study would have {shown}, on which study {name} selected, and what is selected counts "
            "on fresh seeds alone; give others, or leave --seeds out: then it has fresh ones"
        )


# Selection ------------------------------------------------------------------------------------------------------------


def _selected(
    config: StudyConfig, snapshot: Snapshot, say: Callable[[str], None]
) -> tuple[dict[str, list[Content]], dict[str, list[int]]]:
    """The new study's arms, by their source arm; and the parameter counts of each new arm's trials, by its name."""
    results = snapshot.results
    losses = _mean_losses(snapshot.trials, results)
    found = frontier(points(snapshot.trials, results), fewest=1)  # a selection for fresh seeds, not a claim
    on_frontier = {point.trial for point in found}
    taken = {arm.name for arm in config.arms}
    arms: dict[str, list[Content]] = {}
    sizes: dict[str, list[int]] = {}
    for arm in config.arms:
        trials = [trial for trial in snapshot.trials if trial.spec.arm == arm.name]
        if not arm.is_searched:
            new = _best_of_listed(arm, config, trials, losses, say)
        else:
            own = [trial for trial in trials if trial.duplicate_of is None and trial.number in losses]
            chosen = [trial for trial in own if trial.number in on_frontier]
            chosen = chosen or sorted(own, key=lambda trial: losses[trial.number])[:1]
            if not chosen:
                say(f"arm {arm.name}: none of its trials has all its seeds; it is left out, with its contrasts")
            chosen.sort(key=lambda trial: (trial.shape.n_params, trial.number))
            new = _of_search(arm, len(own), chosen)
        taken.discard(arm.name)  # the first new arm may keep the name
        arms[arm.name] = [_ordered(_with_own_name(content, taken)) for content, _ in new]
        for content, (_, winners) in zip(arms[arm.name], new, strict=True):
            sizes[content["name"]] = [trial.shape.n_params for trial in winners]
    return arms, sizes


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
    arm: Arm, config: StudyConfig, trials: Sequence[Trial], losses: Mapping[int, float], say: Callable[[str], None]
) -> list[tuple[Content, Sequence[Trial]]]:
    """The arm with its winning tuned values, and the trials that won.

    These are several arms if other tuned values than learning rates depend on the size.
    """
    listed = [key for key, value in arm.values().items() if isinstance(value, tuple)]
    tuned = [key for key in listed if key in TUNED_FIELDS]
    if not tuned:
        return [(_plain(arm), trials)]
    kept = [key for key in listed if key not in tuned]
    alike: dict[tuple[Any, ...], list[Trial]] = defaultdict(list)
    for trial in trials:
        alike[tuple(_value(trial.spec, key) for key in kept)].append(trial)
    winners = []
    for at, own in alike.items():
        sound = [trial for trial in own if trial.number in losses]
        where = "".join(f", {key}={value}" for key, value in zip(kept, at, strict=True))
        if not sound:
            raise StudyError(
                f"arm {arm.name}{where}: a seed of every trial failed, so that none of them can win; "
                "list other values, or take this out of the study"
            )
        winners.append(min(sound, key=lambda trial: losses[trial.number]))
        for key in (key for key in RATES if key in tuned):
            if (end := _at_an_end(key, winners[-1], own)) is not None:
                rate = _value(winners[-1].spec, key)
                say(
                    f"arm {arm.name}{where}: the best {key.replace('_', ' ')}, {rate:g}, is the {end} of those tried; "
                    "a better one may lie beyond: list it and `mpo-study run` with --extend, then select again"
                )
    return list(_as_arms(arm, tuning_trials(arm.name, config), kept, tuned, winners))


def _at_an_end(rate: str, winner: Trial, tried: Iterable[Trial]) -> str | None:
    """ "lowest" or "highest" if the winner's rate is at that end of several rates tried; otherwise None."""
    values = {_value(trial.spec, rate) for trial in tried}
    if len(values) == 1:
        return None
    return {min(values): "lowest", max(values): "highest"}.get(_value(winner.spec, rate))


def _as_arms(
    arm: Arm, tuned_among: int, kept: Sequence[str], tuned: Sequence[str], winners: Sequence[Trial]
) -> Iterator[tuple[Content, Sequence[Trial]]]:
    """The smallest number of arms that express the winners, each with its winners.

    Within one arm only learning rates may depend on the size.

    Args:
        kept, tuned: fields that the arm lists.
        winners: one for each combination of values of the kept fields.
    """
    size = next((key for key in kept if key in SIZE_FIELDS), None)
    others = [key for key in kept if key != size]
    by_size: dict[Any, set[tuple[Any, ...]]] = defaultdict(set)
    for trial in winners:
        by_size[_value(trial.spec, size)].add(tuple(_value(trial.spec, key) for key in tuned))
    if all(len(values) == 1 for values in by_size.values()):
        others = []  # the winner does not depend on these, so they stay listed
    fixed = [*others, *(key for key in tuned if key not in RATES)]
    groups: dict[tuple[Any, ...], list[Trial]] = defaultdict(list)
    for trial in winners:
        groups[tuple(_value(trial.spec, key) for key in fixed)].append(trial)
    chosen = [dict(zip(fixed, values, strict=True)) for values in groups]
    for name, values, own in zip(_names(arm.name, chosen), chosen, groups.values(), strict=True):
        specs = [trial.spec for trial in own]
        content = _plain(arm) | {"name": name, **values, "tuned_among": tuned_among}
        sizes = list(dict.fromkeys(_value(spec, size) for spec in specs))
        if size is not None:
            content[size] = sizes if len(sizes) > 1 else sizes[0]
        for key in (key for key in RATES if key in tuned or isinstance(getattr(arm, key), dict)):
            rates = {_value(spec, size): _value(spec, key) for spec in specs}
            content[key] = rates if len(set(rates.values())) > 1 else next(iter(rates.values()))
        if isinstance(arm, DenseArm) and isinstance(arm.d_ff, dict):
            content["d_ff"] = {each: arm.d_ff[each] for each in sizes}
        yield content, own


def _of_search(arm: Arm, tuned_among: int, chosen: Sequence[Trial]) -> list[tuple[Content, Sequence[Trial]]]:
    """An arm of fixed values for each chosen trial of a searched arm, with that trial.

    Args:
        tuned_among: number of the arm's trained trials, since a sampler does not try all arms equally often.
    """
    values = [{key: _value(trial.spec, key) for key in arm.values()} for trial in chosen]
    return [
        (_plain(arm) | {"name": name, **own, "tuned_among": tuned_among}, [trial])
        for name, own, trial in zip(_names(arm.name, values), values, chosen, strict=True)
    ]


# Arms -----------------------------------------------------------------------------------------------------------------


def _plain(arm: Arm) -> Content:
    content = arm.model_dump(mode="json", exclude_defaults=True)
    for key in BY_SIZE_FIELDS:
        if isinstance(given := getattr(arm, key, None), dict):
            content[key] = dict(given)  # JSON cannot have numbers as keys
    return _ordered(content)


def _ordered(content: Content) -> Content:
    keys = [*(key for key in _FIRST if key in content), *(key for key in content if key not in (*_FIRST, *_LAST))]
    return {key: content[key] for key in [*keys, *(key for key in _LAST if key in content)]}


def _value(spec: TrialSpec, key: str | None) -> Any:
    """A trial's value for a field of its arm."""
    if key is None:
        return None
    return getattr(spec.protocol if key in RATES else spec.model if key == "d_model" else spec, key)


def _names(arm: str, chosen: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of new arms: the old arm's name, and the values in which they differ, except for learning rates."""
    differing = [key for key in chosen[0] if len({own[key] for own in chosen}) > 1] if chosen else []
    differing = [key for key in differing if key not in RATES]
    return ["-".join([arm, *(_WORDS.get(key, "{}").format(own[key]) for key in differing)]) for own in chosen]


def _with_own_name(content: Content, taken: set[str]) -> Content:
    """The arm with a unique name: its own, or its own with a number."""
    name, number = content["name"], 1
    while content["name"] in taken:
        number += 1
        content = content | {"name": f"{name}-{number}"}
    taken.add(content["name"])
    return content


# The file -------------------------------------------------------------------------------------------------------------


def _sections(
    config: StudyConfig,
    snapshot: Snapshot,
    name: str,
    seeds: Sequence[int],
    file: Path,
    arms: Mapping[str, list[Content]],
    sizes: Mapping[str, Sequence[int]],
) -> Content:
    corpus = config.corpus.model_dump(mode="json", exclude_defaults=True)
    if config.corpus.path is not None:
        there = os.path.relpath(config.corpus.path, os.path.dirname(os.path.realpath(file)))
        corpus |= {"path": Path(there).as_posix(), "sha256": snapshot.corpus_sha256}
    claims = {"margins": config.claims.margins.model_dump(), "contrasts": list(_contrasts(config, arms, sizes))}
    sections = {
        "name": name,
        "description": f"What study {config.name} selected, on seeds that it did not have.",
        "corpus": corpus,
        "model": config.model.model_dump(mode="json", exclude_none=True),
        "protocol": config.protocol.model_dump(mode="json", exclude_none=True),
        "seeds": _plain_seeds(seeds),
        "objectives": list(config.objectives),
        "claims": {key: content for key, content in claims.items() if content},
        "rel_error_chi": list(config.rel_error_chi),
        "execution": config.execution.model_dump(mode="json", exclude_defaults=True),
        "arms": [content for new in arms.values() for content in new],
    }
    return {key: content for key, content in sections.items() if content}


def _contrasts(
    config: StudyConfig, arms: Mapping[str, list[Content]], sizes: Mapping[str, Sequence[int]]
) -> Iterator[Content]:
    """Each declared contrast, for each new arm that comes from an arm it names.

    The rivals are those that share a χ, or else those nearest in parameters. For a searched arm always the nearest are
    taken: a trial found by a search may have another number of sites than the control of its χ is meant for.
    """

    def distance(size: int, rival: Content) -> float:
        return min(abs(math.log(other / size)) for other in sizes[rival["name"]])

    for contrast in config.claims.contrasts:
        rivals = arms[contrast.against]
        for own in arms[contrast.arm] if rivals else ():
            alike = {rival["name"] for rival in rivals if _chis(own) & _chis(rival)}
            if config.arm(contrast.arm).is_searched or not alike:
                far = [[distance(size, rival) for rival in rivals] for size in sizes[own["name"]]]
                alike = {
                    rival["name"] for each in far for rival, away in zip(rivals, each, strict=True) if away == min(each)
                }
            for name in (rival["name"] for rival in rivals if rival["name"] in alike):
                yield {"arm": own["name"], "against": name}


def _chis(content: Content) -> set[int]:
    chis = content.get("chi", content.get("as_chi", []))
    return set(chis if isinstance(chis, list) else [chis])


def _head(
    directory: StudyDirectory,
    file: Path,
    own_seeds: Sequence[int] | None,
    name: str,
    config: StudyConfig,
    snapshot: Snapshot,
    used: Iterable[int],
) -> str:
    """The comment that says where the file comes from.

    Args:
        own_seeds: the seeds that the user asked for.
    """
    command = ["mpo-study", "winners", str(directory.path), str(file)]
    if own_seeds is not None:
        plain = _plain_seeds(own_seeds)
        listed = ",".join(map(str, own_seeds)) + ("," if len(own_seeds) == 1 else "")
        command += ["--seeds", str(plain) if isinstance(plain, int) else listed]
    command += ["--name", name] if name != file.stem else []
    said = (
        f"Written by `{shlex.join(command)}`: what study {config.name} (UUID {snapshot.uuid}) selected on the seeds "
        f"{_listed(sorted(used))}, to be measured again on others."
    )
    lines = wrap(said, 118, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
