"""Reconstruction errors: those of Table 3 and Figure 2, and those of the paper's dense model in this study."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.paper import published
from analysis.paper.published import MODELS, PublishedModel
from analysis.paper.values import (
    BELOW,
    NO,
    OPEN,
    UNPUBLISHED,
    YES,
    Value,
    one_more_seed,
    over_seeds,
    ratio_over_seeds,
    row,
    too_few,
)
from analysis.runs.study_runs import StudyRuns

MEAN, LARGEST = "mean over layers", "largest of any layer"
_UP = "W_1"
"""The layer with the lowest error at every χ, according to the paper's text."""


def errors_of(runs: StudyRuns, dense: int | None, when: str) -> pd.DataFrame:
    """Errors of the dense trial's layers: chi, seed, layer, kind, n_sites, rel_error.

    kind: the layer's row of Table 2; n_sites: its L. Both are missing if no row has the layer's name.
    """
    errors = runs.rel_errors
    errors = errors[(errors["trial"] == dense) & (errors["when"] == when)] if dense is not None else errors.iloc[:0]
    names = errors["layer"]
    known = {name: layer for name in names for layer in published.LAYERS if name.endswith(layer.modules)}
    return errors[["chi", "seed", "layer", "rel_error"]].assign(
        kind=names.map({name: layer.name for name, layer in known.items()}),
        n_sites=names.map({name: layer.n_sites for name, layer in known.items()}),
    )


def summary_rows(model: PublishedModel, random: pd.DataFrame, trained: pd.DataFrame) -> list[dict[str, object]]:
    """Table 3, for one MPO model: largest and mean error over layers, with random weights and with trained ones."""
    rows = []
    for name, number in ((LARGEST, model.max_rel_error), (MEAN, model.mean_rel_error)):
        assert number is not None
        assert model.chi is not None
        short = name.split()[0]
        ours = over_seeds(of_seeds(random, model.chi, name))
        conclusion = one_more_seed(number, ours, 5e-4, "random weights give")
        rows.append(row("Table 3", model.name, f"{short} rel_error, random", number, ours, conclusion))
        ours = over_seeds(of_seeds(trained, model.chi, name))
        conclusion = (UNPUBLISHED, "published only for random weights")
        rows.append(row("Table 3", model.name, f"{short} rel_error, trained", np.nan, ours, conclusion))
    return rows


def order_rows(random: pd.DataFrame) -> list[dict[str, object]]:
    """Figure 2: the text's claims on the order of the layers, at each χ.

    The text says that W_1 has the lowest error, and that L = 3 has lower errors than L = 2 at the same χ.
    """
    rows = []
    for model in MODELS:
        if model.chi is None:
            continue
        at = random[(random["chi"] == model.chi) & random["kind"].notna()]
        kinds = at.pivot_table(index="seed", columns="kind", values="rel_error")
        others = kinds.drop(columns=_UP, errors="ignore")
        ratio = (
            ratio_over_seeds(kinds[_UP], others.min(axis="columns"))
            if _UP in kinds and len(others.columns)
            else Value()
        )
        follows, why = _below_one(ratio)
        if len(kinds):
            why += f"; the lowest on average is {kinds.mean().idxmin()}"
        quantity = f"rel_error, {_UP} over least other"
        rows.append(row("Figure 2", model.name, quantity, 1.0, ratio, (follows, why), said=BELOW))
        sites = at.pivot_table(index="seed", columns="n_sites", values="rel_error")
        both = {2, 3} <= set(sites.columns)
        ratio = ratio_over_seeds(sites[3].to_numpy(), sites[2].to_numpy()) if both else Value()
        quantity = "rel_error, L=3 over L=2"
        rows.append(row("Figure 2", model.name, quantity, 1.0, ratio, _below_one(ratio), said=BELOW))
    return rows


def of_seeds(errors: pd.DataFrame, chi: int, name: str) -> np.ndarray:
    """One value per seed, (n,): the mean or the largest error over the layers at χ."""
    by_seed = errors[errors["chi"] == chi].groupby("seed")["rel_error"]
    return (by_seed.max() if name == LARGEST else by_seed.mean()).to_numpy(dtype=np.float64)


def _below_one(ratio: Value) -> tuple[str, str]:
    lacking = too_few(ratio)
    if lacking:
        return OPEN, lacking
    if ratio.high < 1:
        return YES, "the 95 % interval is below 1"
    return (NO, "the 95 % interval is above 1") if ratio.low > 1 else (OPEN, "the 95 % interval holds 1")
