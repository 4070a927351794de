"""One row per trial, over its complete seeds: the data of the tables, the figures and the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import run_schema as schema
from analysis.results.pairs import DENSE, DENSE_TUNED, LARGER_DENSE, MPO_SCRATCH, MPO_TUNED, SMALLER_DENSE, group_of
from analysis.results.selection import is_sound
from analysis.results.sizes import PARAMETERS, Size
from analysis.run_schema import MIN_SEEDS
from analysis.runs.study_runs import StudyRuns
from analysis.statistics.intervals import mean_interval
from analysis.statistics.nondominated import on_frontier

TOKENS = ("train_tokens", "total_tokens")
SECONDS = "train_seconds"
BITS_PER_BYTE = "final/bits_per_byte"


@dataclass(frozen=True)
class Measure:
    """A final metric for which a frontier is drawn. short: a word for it, for tables."""

    name: str
    short: str

    @property
    def metric(self) -> schema.Metric:
        return schema.OBJECTIVES[self.name]

    @property
    def key(self) -> str:
        return schema.key_of(self.metric)

    @property
    def title(self) -> str:
        return self.metric.label.partition(",")[0].capitalize()

    @property
    def scale(self) -> float:
        """Factor from the recorded unit to `unit`."""
        return 100 if self.metric.unit == "fraction" else 1

    @property
    def unit(self) -> str:
        return "%" if self.metric.unit == "fraction" else self.metric.unit

    @property
    def margin(self) -> float:
        """How much worse still counts as near, in the recorded unit, if no margin of a study file is known; 0 for a
        metric on which no claims rest."""
        return schema.MARGINS.get(self.name, 0.0)

    @property
    def direction(self) -> schema.Direction:
        return schema.direction_of(self.name)

    @property
    def difference_unit(self) -> str:
        """Unit of a difference: percentages differ by points."""
        return "points" if self.unit == "%" else self.unit

    @property
    def axis_label(self) -> str:
        return f"{self.title} ({self.unit})"


VAL_LOSS, VAL_ACC = Measure("val_loss", "loss"), Measure("val_acc", "accuracy")
MEASURES = (VAL_LOSS, VAL_ACC)
AGGREGATED = tuple(f"{which}/{measure.name}" for which in ("final", "best") for measure in MEASURES)
NO_FRONTIER = f"no configuration has {MIN_SEEDS} complete seeds without a failed one"
"""The reason why no configuration is on a frontier."""


def half_width_key(key: str) -> str:
    """Column of a summary: half the width of the 95 % t interval of the mean of `key`; NaN below MIN_SEEDS."""
    return f"half_width/{key}"


def frontier_key(measure: Measure) -> str:
    """Column of a summary: whether the trial is on the frontier of parameters and `measure`."""
    return f"on_frontier/{measure.name}"


def summarise(runs: StudyRuns) -> pd.DataFrame:
    """The trials frame, sorted by group and size, with these additional columns:

    group: the family, as readers distinguish families. label: short and unique in its group. is_reference: the
    dense model from scratch with which others are compared, the first trial of that size with enough seeds.
    percent_of_dense: parameters relative to the study's dense model. For each metric of AGGREGATED: its mean, std
    and half-width over seeds. The means of the seconds of training and of bits per byte. The largest number of
    tokens of any seed. For each measure: whether the trial is on its frontier.
    """
    summary = runs.trials.copy()
    summary["percent_of_dense"] = (100 * summary["n_params"] / summary["n_params_dense"]).astype("float64")
    summary["group"] = [
        group_of(*row)
        for row in zip(
            *(summary[key] for key in ("family", "family_label", "start", "steps", "percent_of_dense", "resized")),
            strict=True,
        )
    ]
    summary["label"] = labels_of(summary)
    for key in AGGREGATED:
        _add_interval(summary, runs.seeds, key)
    # Time as measured: it depends on the machine, and on other programs that ran there.
    for key in (SECONDS, BITS_PER_BYTE):
        means = summary["trial"].map(runs.seeds.groupby("trial")[key].mean())
        summary[schema.mean_key(key)] = means.astype("float64")
    for key in TOKENS:
        tokens = summary["trial"].map(runs.seeds.groupby("trial")[key].max()).astype("Int64")
        # All trials of one budget have the same number of tokens, even one without a complete seed.
        summary[key] = tokens.fillna(tokens.groupby(summary["budget_hash"]).transform("max"))
    for measure in MEASURES:
        _add_frontier(summary, measure)
    # The first trial, not the best: a choice by the loss that is then compared would flatter it.
    candidates = summary[(summary["group"] == DENSE) & (summary["n_seeds"] > 0)]
    enough = candidates[candidates["n_seeds"] >= MIN_SEEDS]
    first = (enough if len(enough) else candidates)["trial"].min()
    summary["is_reference"] = (summary["trial"] == first) & summary.index.isin(candidates.index)
    order = {group: rank for rank, group in enumerate(group_order(summary["group"]))}
    summary["rank"] = summary["group"].map(order)
    return summary.sort_values(["rank", "n_params", "trial"], ignore_index=True).drop(columns="rank")


def sole_reference(summary: pd.DataFrame) -> pd.DataFrame:
    """The row of the dense reference, if it is the only dense model of its budget; else none.

    If there are several, such as at two learning rates, the first may be the worst. A figure or table with room for one
    dense model then shows none.
    """
    reference = summary[summary["is_reference"]]
    alike = (summary["group"] == DENSE) & summary["budget_hash"].isin(reference["budget_hash"])
    return reference if (alike & (summary["n_seeds"] > 0)).sum() == 1 else reference.iloc[:0]


def group_order(groups: Iterable[str]) -> list[str]:
    """The groups present: the known ones first, then others by name."""
    known = (DENSE, SMALLER_DENSE, LARGER_DENSE, DENSE_TUNED, MPO_SCRATCH, MPO_TUNED)
    present = set(groups)
    return [group for group in known if group in present] + sorted(present - set(known), key=str.casefold)


def n_statement(counts: pd.Series) -> str:
    """`n = 3`, or `n = 3 to 5` if trials differ."""
    low, high = int(counts.min()), int(counts.max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def interval_statement(drawn_as: str, counts: pd.Series) -> str:
    """A statement of the intervals that a figure shows; counts: number of seeds of each trial."""
    if counts.max() < MIN_SEEDS:
        return f"no intervals below n = {MIN_SEEDS}"
    where = f" where n ≥ {MIN_SEEDS}" if counts.min() < MIN_SEEDS else ""
    return f"{drawn_as}: 95 % t intervals{where}"


def _add_interval(summary: pd.DataFrame, seeds: pd.DataFrame, key: str) -> None:
    columns = [schema.mean_key(key), schema.std_key(key), half_width_key(key)]
    summary[columns] = float("nan")
    ordered = seeds.sort_values(["trial", "seed"])
    counts = ordered["trial"].map(ordered["trial"].value_counts())
    for n, own in ordered.groupby(counts):  # trials with the same number of seeds form one table
        interval = mean_interval(own[key].to_numpy().reshape(-1, int(n)))
        half_width = interval.half_width if interval.n >= MIN_SEEDS else np.full(interval.mean.shape, np.nan)
        found = pd.DataFrame(
            dict(zip(columns, (interval.mean, interval.std, half_width), strict=True)), index=own["trial"].unique()
        )
        rows = summary["trial"].isin(found.index)
        summary.loc[rows, columns] = found.loc[summary.loc[rows, "trial"]].to_numpy()


def with_frontier(runs: StudyRuns, summary: pd.DataFrame, measure: Measure, size: Size) -> pd.DataFrame:
    """The summary, with the size, and with the mean and the frontier of a measure by that size.

    Trials without that size or without a mean are left out.
    """
    summary = summary.copy()
    if size.name not in summary:
        summary[size.name] = size.of(summary, runs.seeds)
    if measure.key not in AGGREGATED:
        _add_interval(summary, runs.seeds, measure.key)
    known = summary[summary[size.name].notna() & summary[schema.mean_key(measure.key)].notna()].copy()
    _add_frontier(known, measure, size)
    return known


def _add_frontier(summary: pd.DataFrame, measure: Measure, size: Size = PARAMETERS) -> None:
    summary[frontier_key(measure)] = on_frontier(
        summary[size.name].astype("float64"),
        summary[schema.mean_key(measure.key)],
        summary["n_seeds"],
        is_sound(summary),
        measure.direction,
    )


def _scientific(value: float) -> str:
    """`3e-4`: the usual form of a learning rate."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


_NAMED = {
    "d_model": "d_model={}".format, "n_layers": "{} layers".format, "d_ff": "d_ff={}".format,
    "n_sites": "L={}".format, "factorisation": str, "init": str,
    "refinement": str, "heal": str, "options": str, "bonds": str, "sweep": "sweep every {}".format,
    "learning_rate": lambda value: f"lr {_scientific(value)}", "lr_rule": "{} rates".format,
    "rate_width": "rates of width {}".format,
    "optimiser": str, "embedding_learning_rate": lambda value: f"embeddings {_scientific(value)}",
    "metric": "{} metric".format, "spread": "{} spread".format, "narrow": lambda value: "narrow" * (value == "True"),
    "decay": "decay of each {}".format, "gauge": "{} gauge".format, "forward": "by {}".format,
    "precision": "in {}".format,
    "steps": "{} steps".format, "schedule": "{} schedule".format,
    "batch_size": "batch {}".format, "weight_decay": "decay {:g}".format,
    "arm": str, "study": str, "trial": "#{}".format,
}  # fmt: skip
"""Params that distinguish trials, in the order in which a label uses them."""


def labels_of(summary: pd.DataFrame) -> pd.Series:
    """Labels that say what differs between these trials.

    A label is χ, or the χ to which a control corresponds, or a description. Then come the params that distinguish
    trials of a group with equal labels.
    """
    dense = summary.loc[summary["group"] == DENSE, ["d_model", "n_layers", "d_ff"]]
    reference_shape = {key: dense[key].iloc[0] for key in dense.columns if len(dense)}

    def shortest(row: dict) -> str:
        if pd.notna(row["chi"]):
            return f"χ={row['chi']}"
        if pd.notna(row["as_chi"]):
            return f"as χ={row['as_chi']}"
        if pd.notna(row["keep"]):
            return f"keep {row['keep']:g}"
        if row["family"] == "dense" and pd.notna(row["resized"]):
            return row["resized"]
        if row["group"] in (SMALLER_DENSE, LARGER_DENSE) and reference_shape:
            differing = [key for key, value in reference_shape.items() if pd.notna(value) and row[key] != value]
            return _NAMED[differing[0]](row[differing[0]]) if differing else row["arm"]
        return row["group"] if row["group"] == DENSE else row["arm"]

    named_first = summary[["group", "arm", "chi", "as_chi", "keep", "family", "resized", *dense.columns]]
    labels = pd.Series([shortest(row) for row in named_first.to_dict("records")], summary.index, dtype="str")
    for key, form in _NAMED.items():
        codes, distinct = pd.factorize(summary[key], use_na_sentinel=False)
        if len(distinct) < 2:
            continue
        differ = (
            pd.Series(codes, summary.index).groupby([summary["group"], labels], sort=False).transform("nunique") > 1
        )
        # In words, changes of bonds are long, and an arm has one way to change them: its name is enough.
        shown = summary["arm"].where(summary[key].notna()) if key == "bonds" else summary[key]
        named = shown[differ].map(lambda value, form=form: "" if pd.isna(value) else f", {form(value)}")
        labels[differ] += named.astype("str")
    return labels
