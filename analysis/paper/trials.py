"""The trials of a study that are the paper's models under its protocol."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.paper import published
from analysis.runs.study_runs import StudyRuns

COLUMNS = ("model", "trial", "arm", "n_seeds", "n_failed", "n_unfinished", "stopped", "others")


@dataclass(frozen=True)
class PaperTrials:
    """dense: trial of the paper's dense model. scratch, tuned: its MPO models by χ, trained from scratch or fine-tuned.

    frame: one row per trial taken, with `COLUMNS`. others: the trials of the same definition that were not taken.
    """

    dense: int | None
    scratch: dict[int, int]
    tuned: dict[int, int]
    frame: pd.DataFrame

    def of(self, chi: int | None) -> int | None:
        """The trial of a model from scratch; None if the study has none."""
        return self.dense if chi is None else self.scratch.get(chi)

    @property
    def from_scratch(self) -> list[int]:
        return [trial for trial in (self.dense, *self.scratch.values()) if trial is not None]


def paper_trials(runs: StudyRuns) -> PaperTrials:
    """The first trial, by number, of each of the paper's models: choosing by results would flatter them."""
    trials = runs.trials.sort_values("trial")
    usual = trials["lr_rule"].fillna("uniform").eq("uniform") & trials["decay"].fillna("parameter").eq("parameter")
    usual &= trials["gauge"].fillna("free").eq("free")
    usual &= trials["precision"].eq("float32")
    usual &= trials["optimiser"].eq("adamw") & trials["schedule"].eq("cosine") & trials["heal"].isna()
    usual &= trials["bonds"].isna() & trials["sweep"].isna() & trials["rate_width"].isna()
    usual &= trials["embedding_learning_rate"].fillna(trials["learning_rate"]).eq(trials["learning_rate"])
    trials = trials[usual & trials["corpus_sha256"].eq(published.CORPUS_SHA256) & _has(trials, published.SIZES)]
    scratch = trials[_has(trials, published.PROTOCOL) & trials["start"].eq("scratch") & trials["init"].eq("paper")]
    groups: dict[tuple[str, int | None], pd.DataFrame] = {}
    groups["dense", None] = scratch[scratch["family"].eq("dense")]
    for chi in (model.chi for model in published.MODELS if model.chi is not None):
        groups["scratch", chi] = scratch[_mpo_of(scratch, chi)]
    taken = groups["dense", None]["arm"].head(1)
    plain = trials["start"].isin(taken) & trials["refinement"].fillna("tt_svd").eq("tt_svd")
    tuned = trials[plain & _has(trials, published.FINE_TUNED)]
    for chi in (model.chi for model in published.MODELS if model.chi is not None):
        groups["tuned", chi] = tuned[_mpo_of(tuned, chi)]
    first = {key: int(group["trial"].iloc[0]) for key, group in groups.items() if len(group)}
    return PaperTrials(
        dense=first.get(("dense", None)),
        scratch={chi: trial for (start, chi), trial in first.items() if start == "scratch" and chi is not None},
        tuned={chi: trial for (start, chi), trial in first.items() if start == "tuned" and chi is not None},
        frame=pd.DataFrame([_taken(key, groups[key]) for key in first], columns=list(COLUMNS)),
    )


def remarks(trials: PaperTrials) -> list[str]:
    """Remarks on the trials taken, one sentence each: other trials like them, and failed seeds."""
    said = []
    for row in trials.frame.to_dict("records"):
        name = f"{row['model']} is trial {row['trial']} ({row['arm']})"
        if row["others"]:
            said.append(f"{name}, the first of its definition; not shown: {row['others']}")
        lost = [
            f"{row[key]} {word}" for key, word in (("n_failed", "failed"), ("n_unfinished", "unfinished")) if row[key]
        ]
        if lost:
            said.append(f"{name}: its seeds are {row['n_seeds']} complete, {', '.join(lost)}; only the complete count")
        if pd.notna(row["stopped"]):
            said.append(f"{name}: stopped early, {row['stopped']}")
    return said


def missing(trials: PaperTrials) -> str | None:
    """One line on the parts of the comparison that this study cannot fill; None if it can fill all."""
    lacking = [model.name for model in published.MODELS if trials.of(model.chi) is None]
    if not lacking:
        return None
    sizes = ", ".join(f"{key}={value}" for key, value in published.SIZES.items())
    protocol = ", ".join(f"{key}={value:g}" for key, value in published.PROTOCOL.items())
    return f"no run of {', '.join(lacking)} with the paper's model ({sizes}), protocol ({protocol}), init and corpus"


def _has(trials: pd.DataFrame, params: dict) -> pd.Series:
    # A model of another kind has none of these sizes.
    has = [(trials[key] == value).fillna(False).astype(bool) for key, value in params.items()]
    return pd.Series(np.all(has, axis=0), trials.index, dtype=bool)


def _mpo_of(trials: pd.DataFrame, chi: int) -> pd.Series:
    return trials["family"].eq("mpo") & trials["factorisation"].eq("paper") & trials["chi"].eq(chi).fillna(False)


def _taken(key: tuple[str, int | None], group: pd.DataFrame) -> dict[str, object]:
    start, chi = key
    model = next(model.name for model in published.MODELS if model.chi == chi)
    first = group.iloc[0]
    others = ", ".join(
        f"trial {row['trial']} ({row['arm']}, lr {row['learning_rate']:g})" for row in group.iloc[1:].to_dict("records")
    )
    counts: dict[str, object] = {key: int(first[key]) for key in ("trial", "n_seeds", "n_failed", "n_unfinished")}
    name = f"{model}, fine-tuned" if start == "tuned" else model
    return {"model": name, "arm": first["arm"], "stopped": first["stopped"], "others": others} | counts
