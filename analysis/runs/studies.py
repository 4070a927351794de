"""Several studies read as one, if their runs may be compared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pandas as pd

from analysis.errors import AnalysisError
from analysis.runs.study_runs import FRAMES, Claims, StudyRuns

EVALUATION = ("tokenizer", "corpus_sha256", "validation_fraction", "vocab_size", "context", "model")
"""Params that studies must share: sizes are relative to one dense model, and a loss depends on the others. The budget
hash covers all other differences."""


def join_studies(studies: Sequence[StudyRuns]) -> StudyRuns:
    """The runs of several studies as those of one.

    Trial numbers continue from one study to the next; those of the first study stay. Frames that name trials get two
    more columns: study, the name of the trial's study, and study_trial, its number in that study. Sizes are relative to
    the dense model of the first study: its n_params_dense is used for all studies. Trials may be compared if their
    budget hashes are equal, as in one study.

    Raises:
        AnalysisError: there are none, one is given twice, or two differ in tokenizer, corpus, split, vocabulary,
            context or model.
    """
    if not studies:
        raise AnalysisError("there is no study to report on")
    if len(studies) == 1:
        return studies[0]
    for one, other in combinations(studies, 2):
        _check_comparable(one, other)
    names = part_names(studies)
    offsets, n = [], 0
    for study in studies:
        offsets.append(n)
        n += 1 + max(_last(frame) for frame in (study.trials, study.failures, study.unfinished, study.skipped))
    parts = [_renumbered(study, name, offset) for study, name, offset in zip(studies, names, offsets, strict=True)]
    trials = pd.concat([part["trials"] for part in parts], ignore_index=True)
    frames: dict[str, Any] = {key: pd.concat([part[key] for part in parts], ignore_index=True) for key in FRAMES[1:]}
    of_first = studies[0].trials["n_params_dense"].dropna()
    if len(of_first):
        trials["n_params_dense"] = trials["n_params_dense"].where(trials["n_params_dense"].isna(), of_first.iloc[0])
    ends = [study.latest for study in studies if study.latest is not None]
    return StudyRuns(
        address=studies[0].address,
        name=" + ".join(names),
        uuid=", ".join(study.uuid for study in studies),
        trials=trials,
        **frames,
        n_duplicates=sum(study.n_duplicates for study in studies),
        latest=max(ends) if ends else None,
        n_missing=sum(study.n_missing for study in studies),
        claims=_claims(studies, names),
        growths=tuple(
            growth._replace(study=name) for study, name in zip(studies, names, strict=True) for growth in study.growths
        ),
        environment=_shared([study.environment for study in studies]),
        parts=tuple(studies),
    )


def environments(runs: StudyRuns) -> list[tuple[str, dict[str, Any]]]:
    """The environments at the start of the runs, by the name of the study; one entry without a name if all are equal.

    If joined studies differ, each has an entry, which is empty if its environment is unknown. If none is known, there
    are no entries.
    """
    if runs.environment:
        return [("", runs.environment)]
    known = any(part.environment for part in runs.parts)
    named = zip(part_names(runs.parts), runs.parts, strict=True)
    return [(name, part.environment) for name, part in named] if known else []


def _claims(studies: Sequence[StudyRuns], names: Sequence[str]) -> Claims:
    """Every study's contrasts, and the margins if all studies have the same; otherwise none was fixed for the runs."""
    contrasts = [
        contrast._replace(study=name)
        for study, name in zip(studies, names, strict=True)
        for contrast in study.claims.contrasts
    ]
    declaring = [study for study in studies if study.claims.contrasts]
    looks = [study.claims.looks for study in declaring]
    if any(each != looks[0] for each in looks):
        shown = ", ".join(f"{study.name}: {study.claims.looks or 'none'}" for study in declaring)
        raise AnalysisError(f"studies with different claims.looks are no family of tests ({shown}); give one at a time")
    return Claims(_shared([study.claims.margins for study in studies]), tuple(contrasts), looks[0] if looks else {})


def _shared(all_of_them: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, *others = all_of_them
    return first if all(other == first for other in others) else {}


def _check_comparable(one: StudyRuns, other: StudyRuns) -> None:
    if one.uuid == other.uuid:
        raise AnalysisError(f"study {one.name!r} ({one.uuid}) is given twice")
    for key in EVALUATION:
        values = [sorted(study.trials[key].unique().tolist()) for study in (one, other)]
        if all(values) and values[0] != values[1]:
            listed = [", ".join(map(str, value)) for value in values]
            raise AnalysisError(
                f"studies {one.name!r} and {other.name!r} cannot be compared: {key} is {listed[0]} in the first and "
                f"{listed[1]} in the other"
            )


def part_names(studies: Sequence[StudyRuns]) -> list[str]:
    """Names of joined studies; studies with the same name also get a part of their UUID."""
    names = [study.name for study in studies]
    return [f"{study.name} ({study.uuid[:8]})" if names.count(study.name) > 1 else study.name for study in studies]


def _last(frame: pd.DataFrame) -> int:
    return -1 if frame.empty else int(frame["trial"].max())


def _renumbered(study: StudyRuns, name: str, offset: int) -> dict[str, pd.DataFrame]:
    frames = {}
    for key in FRAMES:
        frame = getattr(study, key).copy()
        if key not in ("seeds", "rel_errors", "bonds"):
            frame["study"] = pd.Series(name, frame.index, dtype="str")
            frame["study_trial"] = frame["trial"]
        frame["trial"] += offset
        frames[key] = frame
    return frames
