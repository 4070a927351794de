"""The whole comparison: every published number, our computed or measured one, and whether it can be right."""

from __future__ import annotations

import math

import pandas as pd

from analysis.paper.compression import layer_rows, one_rule_row, size_rows, text_rows
from analysis.paper.published import MODELS
from analysis.paper.rel_errors import errors_of, order_rows, summary_rows
from analysis.paper.training import curve_rows, model_rows, retained_row, tuned_rows
from analysis.paper.trials import PaperTrials
from analysis.paper.values import BELOW, COLUMNS, READ_OFF
from analysis.report.tables import Table
from analysis.runs.study_runs import StudyRuns

CURVES = ("val_loss", "val_acc", "val_acc_sampled", "train_loss")
"""Learning curves that the comparison needs of the trials from scratch."""


def paper_comparison(runs: StudyRuns, trials: PaperTrials, curves: pd.DataFrame) -> pd.DataFrame:
    """Every published number of Tables 2 to 4, of Figures 2 to 4 and of the text, beside ours.

    Args:
        trials: `paper_trials` of these runs.
        curves: `load_curves` of `trials.from_scratch`, with the keys of CURVES.
    Returns:
        One row per number with `COLUMNS`. place: in the paper. published: in `unit`. said: printed, computed from
        printed numbers, read off a plot, or a bound in words. ours: with the limits of its 95 % interval over n seeds
        (Student's, Fieller's for a ratio; NaN if this study has no such run). difference: ours − published. kind:
        computed from definitions, or measured. follows: whether the published number can follow from the paper's own
        definition, with the reason in `why`.
    """
    random, trained = (errors_of(runs, trials.dense, when) for when in ("init", "trained"))
    rows = layer_rows()
    for model in MODELS:
        rows += size_rows(model)
        if model.chi is not None:
            rows += summary_rows(model, random, trained)
    rows.append(one_rule_row())
    for model in MODELS:
        rows += model_rows(model, runs, trials)
    rows += [*order_rows(random), *curve_rows(curves, trials)]
    rows += [*text_rows(), retained_row(runs, trials), *tuned_rows(runs, trials)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def comparison_table(comparison: pd.DataFrame) -> Table:
    """The comparison, as data and as text: published and ours, with the interval, the seeds and the difference."""
    shown = []
    for row in comparison.to_dict("records"):
        decimals = _decimals(row)
        shown.append(
            {
                "place": row["place"],
                "what": f"{row['row']}: {row['quantity']}" + (f" ({row['unit']})" if row["unit"] else ""),
                "published": _published(row, decimals),
                "here": _with_interval(row, decimals),
                "seeds": str(row["n"]) if row["n"] else "–",
                "difference": _number(row["difference"], decimals, sign=True),
                "can follow": row["follows"],
                "because": row["why"],
            }
        )
    return Table("comparison", comparison, pd.DataFrame(shown))


_BY_WORDS = (
    *(("accuracy / ", 2), ("error of one evaluation", 2), ("(%)", 1), ("(points)", 1), ("compression ratio", 1)),
    *(("parameters", 0), ("falls", 0), ("", 3)),
)


def _decimals(row: dict) -> int:
    """Number of decimals that the paper prints for such a number."""
    return next(decimals for part, decimals in _BY_WORDS if part in f"{row['quantity']} ({row['unit']})")


def _published(row: dict, decimals: int) -> str:
    if row["said"] == BELOW:
        return f"below {row['published']:g}"
    return ("about " if row["said"] == READ_OFF else "") + _number(row["published"], decimals)


def _number(value: float, decimals: int, sign: bool = False) -> str:
    if math.isnan(value):
        return "–"
    rounded = round(value, decimals) or 0.0
    return format(rounded, f"{'+' if sign and rounded else ''},.{decimals}f").replace("-", "−")


def _with_interval(row: dict, decimals: int) -> str:
    """`52.3 ± 0.4`, or with both limits if the interval is not symmetric; more digits if it is narrow."""
    value, low, high = row["ours"], row["low"], row["high"]
    if math.isnan(low):
        return _number(value, decimals + (row["kind"] == "measured" and decimals == 0))
    half_width = (high - low) / 2
    if half_width > 0:
        decimals = min(6, max(decimals, -math.floor(math.log10(half_width))))
    if math.isclose(value - low, high - value, rel_tol=0.01, abs_tol=1e-9):
        return f"{_number(value, decimals)} ± {_number(half_width, decimals)}"
    return f"{_number(value, decimals)} ({_number(low, decimals)} to {_number(high, decimals)})"
