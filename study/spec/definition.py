"""Decides which study files continue a study on record, and which ones extend it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from study.spec.config import StudyConfig
from study.spec.search_space import listed_specs


def definition(config: StudyConfig) -> dict[str, Any]:
    """The part of a study that may not change.

    It leaves out the description, where the study runs, where its corpus and tokenizer lie, and what ends a search
    early. The checksum of the corpus covers the text and the tokenizer.
    """
    plain = config.model_dump(
        mode="json",
        exclude={
            "description": True,
            "execution": True,
            "corpus": {"path", "sha256", "text_column"},
            "search": {"max_repeats"},
        },
    )
    if config.corpus.tokenizer_folder is not None:
        plain["corpus"]["tokenizer"] = "folder"
    plain["seeds"] = list(config.seed_list)
    plain["arms"] = {arm["name"]: arm for arm in plain["arms"]}
    return plain


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Dotted keys in which two nested structures differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} (was {json.dumps(old)}, now {json.dumps(new)})"


_MAY_GROW = ("seeds", "arms")


def settled(config: StudyConfig, history: Sequence[StudyConfig]) -> StudyConfig:
    """The study that a file means.

    If the file's seeds, arms or number of searched trials equal those that the study had before it grew, the grown ones
    are meant.

    Args:
        history: the study as it was begun, and after each growth.
    """
    known = [definition(before) for before in history]
    own = definition(config)
    grown = {
        part: getattr(history[-1], part) for part in _MAY_GROW if any(own[part] == before[part] for before in known)
    }
    if config.search.trials in {before.search.trials for before in history}:
        grown["search"] = config.search.model_copy(update={"trials": history[-1].search.trials})
    return config.model_copy(update=grown)


def only_adds(old: StudyConfig, new: StudyConfig) -> bool:
    """Whether `new` contains all of `old` and adds only seeds, searched trials or listed trials."""
    tuned_among = [{arm.name: arm.tuned_among for arm in one.arms} for one in (old, new)]
    searched = [{arm.name: arm for arm in one.arms if arm.is_searched} for one in (old, new)]
    return (
        _fixed(new) == _fixed(old)
        and new.seed_list[: len(old.seed_list)] == old.seed_list
        and new.search.trials >= old.search.trials
        and tuned_among[0].items() <= tuned_among[1].items()
        and searched[0] == searched[1]  # Optuna does not allow a parameter's range to change
        and set(listed_specs(old)) <= set(listed_specs(new))
    )


def _fixed(config: StudyConfig) -> dict[str, Any]:
    """The part of a study that may not even grow."""
    fixed = definition(config)
    del fixed["seeds"], fixed["arms"], fixed["search"]["trials"]
    return fixed
