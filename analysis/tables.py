"""frame → CSV and Markdown. A CSV has every digit; a table for people has those the interval leaves meaningful."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis import run_schema as schema
from analysis.runs import StudyRuns
from analysis.summary import MEASURES, VAL_ACC, VAL_LOSS, Measure, frontier_key, half_width_key


@dataclass(frozen=True)
class Table:
    """A table twice: `data` as it is computed on, `shown` as text for people; the same rows in the same order."""

    name: str
    data: pd.DataFrame
    shown: pd.DataFrame


def trials_table(summary: pd.DataFrame) -> Table:
    """Every trial: what it is, how large, its final and best metrics, whether it is on a frontier."""
    on_frontiers = [
        ", ".join(measure.short for measure in MEASURES if row[frontier_key(measure)]) or "–"
        for row in summary.to_dict("records")
    ]
    shown = pd.DataFrame(
        {
            "family": summary["group"],
            "configuration": summary["label"],
            "arm": summary["arm"],
            "parameters": [_count(value) for value in summary["n_params"]],
            "% of dense": [_digits(value, 1) for value in summary["percent_of_dense"]],
            "seeds": [
                f"{n}" + (f" ({failed} failed)" if failed else "") + (" (stopped)" if pd.notna(stopped) else "")
                for n, failed, stopped in zip(summary["n_seeds"], summary["n_failed"], summary["stopped"], strict=True)
            ],
            "val loss (nats)": _intervals(summary, VAL_LOSS.key, VAL_LOSS),
            "val accuracy (%)": _intervals(summary, VAL_ACC.key, VAL_ACC),
            "best val loss": _means(summary, "best/val_loss", VAL_LOSS),
            "best val accuracy": _means(summary, "best/val_acc", VAL_ACC),
            "tokens": [_count(value) for value in summary["total_tokens"]],
            "on frontier of": on_frontiers,
        }
    )
    return Table("trials", summary, shown)


def frontier_table(summary: pd.DataFrame) -> Table:
    """The trials on the frontier of any measure, the smallest first."""
    on_any = summary[[frontier_key(measure) for measure in MEASURES]].any(axis=1)
    rows = summary[on_any].sort_values("n_params", kind="stable")
    columns = [
        "configuration",
        "family",
        "val loss (nats)",
        "val accuracy (%)",
        "parameters",
        "% of dense",
        "seeds",
        "on frontier of",
    ]
    shown = trials_table(summary).shown.loc[rows.index, columns]
    return Table("frontier", rows.reset_index(drop=True), shown.reset_index(drop=True))


def failures_table(runs: StudyRuns) -> Table:
    """Every failed seed, with its step and reason."""
    return Table("failures", runs.failures, _as_text(runs.failures))


def unfinished_table(runs: StudyRuns) -> Table:
    """Every seed that was neither complete nor failed when the runs were read."""
    return Table("unfinished", runs.unfinished, _as_text(runs.unfinished))


def stopped_table(runs: StudyRuns) -> Table:
    """Every trial that was given up before it had all its seeds, with the evidence."""
    columns = ["trial", "arm", "n_params", "n_seeds", "stopped"]
    if runs.parts:  # a reason names a rival by its number in its own study
        columns += ["study", "study_trial"]
    data = runs.trials.loc[runs.trials["stopped"].notna(), columns].reset_index(drop=True)
    named = {"n_params": "parameters", "n_seeds": "seeds", "stopped": "reason"}
    return Table("stopped", data, _as_text(data.rename(columns=named)))


def pruned_table(runs: StudyRuns) -> Table:
    """Every trial that was never trained, since it breaks a limit of the search."""
    data = runs.pruned
    shown = data.assign(n_params=[_count(value) for value in data["n_params"]])
    return Table("pruned", data, _as_text(shown.rename(columns={"n_params": "parameters", "chi": "χ"})))


def budgets_table(summary: pd.DataFrame) -> Table:
    """Which trials share a budget, and the tokens each of their runs was trained on, the teacher's included or not."""
    rows = []
    for budget, group in summary.groupby("budget_hash"):
        rows.append(
            {
                "budget": budget,
                "arms": ", ".join(sorted(group["arm"].unique())),
                "trials": len(group),
                "tokens of the run": _range(group["train_tokens"]),
                "tokens with the teacher's": _range(group["total_tokens"]),
            }
        )
    data = pd.DataFrame(rows)
    return Table("budgets", data, _as_text(data))


def write(table: Table, folder: Path) -> list[Path]:
    """Write `folder`/NAME.csv, NAME.md and NAME.tex."""
    csv, markdown, latex = (folder / f"{table.name}.{kind}" for kind in ("csv", "md", "tex"))
    table.data.to_csv(csv, index=False, lineterminator="\n")
    markdown.write_text(to_markdown(table.shown), encoding="utf-8")
    latex.write_text(to_latex(table.shown), encoding="utf-8")
    return [csv, markdown, latex]


def to_markdown(shown: pd.DataFrame) -> str:
    """A GitHub table; a vertical bar or a line break in a cell stays inside it."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    lines = [line(list(shown.columns)), line(["---"] * len(shown.columns))]
    return "\n".join([*lines, *(line(list(row)) for row in shown.itertuples(index=False))]) + "\n"


def to_latex(shown: pd.DataFrame) -> str:
    """A tabular for any LaTeX engine, with the rules of booktabs; columns of numbers are set right."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(mark, mark) for mark in cell) for cell in cells) + r" \\"

    rows = [list(row) for row in shown.itertuples(index=False)]
    columns = "".join(
        "r" if rows and all(_NUMBER.fullmatch(row[column]) for row in rows) else "l"
        for column in range(len(shown.columns))
    )
    body = [line(list(shown.columns)), r"\midrule", *map(line, rows)]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"


_NUMBER = re.compile(r"[−+]?[\d,.]+( ± [\d,.]+)?( \(.*\))?|–|")
_LATEX = {mark: f"\\{mark}" for mark in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\n": " ",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
    "√": r"$\surd$",
    "χ": r"$\chi$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
}


def with_interval(mean: float, half_width: float, decimals: int) -> str:
    """`1.6543 ± 0.0083`; without the interval where there is none, a dash where there is no mean."""
    if math.isnan(mean):
        return "–"
    shown = _digits(mean, decimals)
    return shown if math.isnan(half_width) else f"{shown} ± {_digits(half_width, decimals)}"


def decimals_for(half_widths: pd.Series) -> int:
    """Decimals, 0 to 6, that give the typical interval of a column two digits; 3 if none has an interval."""
    typical = half_widths.median()
    return min(6, max(0, 1 - math.floor(math.log10(typical)))) if typical > 0 else 3


def _means(summary: pd.DataFrame, key: str, measure: Measure) -> list[str]:
    decimals = decimals_for(measure.scale * summary[half_width_key(key)])
    return [with_interval(measure.scale * mean, math.nan, decimals) for mean in summary[schema.mean_key(key)]]


def _intervals(summary: pd.DataFrame, key: str, measure: Measure) -> list[str]:
    means, half_widths = measure.scale * summary[schema.mean_key(key)], measure.scale * summary[half_width_key(key)]
    decimals = decimals_for(half_widths)
    return [with_interval(mean, half, decimals) for mean, half in zip(means, half_widths, strict=True)]


def _digits(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}".replace("-", "−")


def _count(value: float) -> str:
    return "–" if pd.isna(value) else f"{int(value):,}"


def _range(values: pd.Series) -> str:
    known = values.dropna()
    if known.empty:
        return "–"
    low, high = _count(known.min()), _count(known.max())
    return low if low == high else f"{low} to {high}"


def _as_text(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.astype("object").where(frame.notna(), "–").astype("str")
