"""frame → CSV and Markdown. A CSV has every digit; a table for people has those that are meaningful by the interval."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import run_schema as schema
from analysis.results.numbers import (
    count_shown,
    decimals_for,
    difference_shown,
    digits,
    percent,
    range_shown,
    signed,
    with_interval,
)
from analysis.results.selection import is_sound
from analysis.results.summary import (
    BITS_PER_BYTE,
    MEASURES,
    SECONDS,
    VAL_ACC,
    VAL_LOSS,
    Measure,
    frontier_key,
    half_width_key,
)
from analysis.results.uncertainty import CAUTIOUS, FrontierUncertainty
from analysis.runs.study_runs import StudyRuns
from analysis.statistics.intervals import mean_interval

CHARACTERS, BYTES = schema.ABSENT["tokenizer"], "bytes"


@dataclass(frozen=True)
class Table:
    """A table in two forms: `data` for computation, `shown` as text for people; the same rows in the same order."""

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
            "parameters": [count_shown(value) for value in summary["n_params"]],
            "% of dense": [digits(value, 1) for value in summary["percent_of_dense"]],
            "seeds": [
                f"{n}" + (f" ({failed} failed)" if failed else "") + (" (stopped)" if pd.notna(stopped) else "")
                for n, failed, stopped in zip(summary["n_seeds"], summary["n_failed"], summary["stopped"], strict=True)
            ],
            "val loss (nats)": _intervals(summary, VAL_LOSS.key, VAL_LOSS),
            "val accuracy (%)": _intervals(summary, VAL_ACC.key, VAL_ACC),
            "best val loss": _means(summary, "best/val_loss", VAL_LOSS),
            "best val accuracy": _means(summary, "best/val_acc", VAL_ACC),
            "tokens": [count_shown(value) for value in summary["total_tokens"]],
            "training (s)": [count_shown(value) for value in summary[schema.mean_key(SECONDS)].round()],
            "on frontier of": on_frontiers,
        }
    )
    return Table("trials", summary, _with_units_of_text(shown, summary))


def rates_table(summary: pd.DataFrame) -> Table:
    """The mean validation loss at each learning rate of each arm and size that has several, and the best rate.

    If a rate has several trials, for example with several rates of the embeddings, the one of lowest mean counts.
    Trials with a failed seed, or stopped early, have no mean here.
    """
    mean = schema.mean_key(VAL_LOSS.key)
    keys = ["arm", "family", "n_params"]
    sound = summary[is_sound(summary)].dropna(subset=[mean])
    data = sound.groupby([*keys, "learning_rate"], sort=False, as_index=False)[mean].min()
    data = data[data.groupby(keys)["learning_rate"].transform("nunique") > 1].reset_index(drop=True)
    losses = data.pivot(index=keys, columns="learning_rate", values=mean).reindex(data[keys].drop_duplicates())
    shown = pd.DataFrame(
        {
            "arm": losses.index.get_level_values("arm"),
            "parameters": [count_shown(value) for value in losses.index.get_level_values("n_params")],
            "best rate": [f"{value:g}" for value in losses.idxmin(axis=1)],
        }
        | {
            f"loss at {rate:g}": ["–" if pd.isna(value) else digits(value, 3) for value in losses[rate]]
            for rate in losses
        }
    )
    return Table("rates", data, shown)


def arms_compared_table(arms: pd.DataFrame) -> Table:
    """Every declared contrast of arms with several sizes: the mean difference over the sizes, and its verdict."""
    rows = []
    for row in arms.to_dict("records"):
        decimals = decimals_for(pd.Series([row["half_width"]]))
        planned = f" of {row['n_planned']}" if row["n_sizes"] < row["n_planned"] else ""
        rows.append(
            {
                "compared": f"{row['arm']}, mean over {row['n_sizes']}{planned} sizes",
                "against": row["against_arm"],
                "measure": _UNITS[row["measure"]],
                "difference": difference_shown(row),
                "verdict": row["verdict"],
                "seeds": str(row["n"]),
                "p": _p_value(row["p"]),
                "p adjusted": f"{_p_value(row['p_adjusted'])} (family)",
                "95 %, all declared together": _interval_shown(row["low"], row["high"], decimals),
                "test": "paired" if row["paired"] else "Welch",
            }
        )
    return Table("arms_compared", arms.reset_index(drop=True), pd.DataFrame(rows))


def _with_units_of_text(shown: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """With the loss in units that readers of language models know, if tokens are not characters: bits per byte, and
    the perplexity of a token where tokens are words and parts of words."""
    tokenizers = summary["tokenizer"]
    place = list(shown.columns).index("val loss (nats)") + 1
    has_words = ~tokenizers.isin([CHARACTERS, BYTES])
    if has_words.any():
        perplexity = summary[schema.mean_key(VAL_LOSS.key)].map(math.exp).where(has_words)
        shown.insert(place, "perplexity of a token", [digits(value, 1) for value in perplexity])
    if (tokenizers != CHARACTERS).any():
        means = summary[schema.mean_key(BITS_PER_BYTE)]
        shown.insert(place, "bits per byte", [digits(value, 3) for value in means])
    return shown


def frontier_table(summary: pd.DataFrame, uncertainties: Mapping[str, FrontierUncertainty]) -> Table:
    """The trials on the frontier of any measure, the smallest first, with the probability that they truly are."""
    on_any = summary[[frontier_key(measure) for measure in MEASURES]].any(axis=1)
    rows = summary[on_any].sort_values("n_params", kind="stable")
    shown = trials_table(summary).shown.loc[rows.index, list(_ON_FRONTIER)].reset_index(drop=True)
    data = rows.reset_index(drop=True)
    for measure in MEASURES:
        chances = uncertainties[measure.name].chances.set_index("trial")["probability"].reindex(data["trial"])
        data[f"probability/{measure.name}"] = chances.to_numpy(dtype="float64")
        shown[f"P(on frontier), {measure.short}"] = ["–" if pd.isna(share) else percent(share) for share in chances]
    return Table("frontier", data, shown)


_ON_FRONTIER = (
    *("configuration", "family", "val loss (nats)", "val accuracy (%)", "parameters", "% of dense", "seeds"),
    "on frontier of",
)


def _interval_shown(low: float, high: float, decimals: int) -> str:
    """The interval of a declared difference. It ends at zero only where it excludes zero."""
    if pd.isna(low):
        return "–"
    first = "above 0" if low == 0 else signed(low, math.nan, decimals)
    last = "below 0" if high == 0 else signed(high, math.nan, decimals)
    return f"{first} to {last}"


def comparisons_table(compared: pd.DataFrame) -> Table:
    """Every comparison, the declared ones first: the difference with its interval, the tests, the verdict.

    "p adjusted, moderated" is there if the study file declares enough pairs for it.
    """
    data = compared.sort_values(["declared", "relation", "measure"], ascending=[False, False, False], kind="stable")
    rows = []
    for row in data.to_dict("records"):
        decimals = decimals_for(pd.Series([row["half_width"]]))
        rows.append(
            {
                "compared": f"{row['label']} ({row['group']})",
                "against": f"{row['against_label']} ({row['against_group']})",
                "measure": _UNITS[row["measure"]],
                "difference": difference_shown(row),
                "verdict": row["verdict"],
                "not inferior": "–" if pd.isna(row["margin"]) else "yes" if row["non_inferior"] else "no",
                "declared": "yes" if row["declared"] else "no",
                "seeds": str(row["n"]),
                "p": _p_value(row["p"]),
                "p adjusted": f"{_p_value(row['p_adjusted'])} ({row['adjustment']})",
                "p adjusted, moderated": _p_value(row["p_moderated"]),
                "95 %, all declared together": _interval_shown(row["low"], row["high"], decimals),
                "test": "paired" if row["paired"] else "Welch",
                "margin": "–" if pd.isna(row["margin"]) else f"{row['margin']:g}",
                "tokens": _both(row["total_tokens"], row["against_total_tokens"]),
                "tuning trials": _both(row["tuning_trials"], row["against_tuning_trials"]),
            }
        )
    shown = pd.DataFrame(rows)
    if data["p_moderated"].isna().all():
        shown = shown.drop(columns="p adjusted, moderated", errors="ignore")
    return Table("comparisons", data.reset_index(drop=True), shown)


def size_needed_table(uncertainties: Mapping[str, FrontierUncertainty]) -> Table:
    """By measure, how large a configuration has to be in order to lose at most the margin against dense. Shown are the
    sizes that are the smallest such one with a probability of at least half a per cent, or by the means, or that are
    large enough with a probability of 95 %."""
    data = _joined([each.size_needed.assign(measure=key, margin=each.epsilon) for key, each in uncertainties.items()])
    is_chosen = data["observed"].astype(bool) | data["cautious"].astype(bool)
    data = data[(data["probability"] >= 0.005) | is_chosen].reset_index(drop=True)
    marks = {"observed": "by the means", "cautious": f"with {100 * CAUTIOUS:.0f} %"}
    shown = pd.DataFrame(
        {
            "measure": [_UNITS[name] for name in data["measure"]],
            "margin": [f"{margin:g}" for margin in data["margin"]],
            "parameters": [count_shown(size) for size in data["n_params"]],
            "smallest within the margin": [
                ", ".join(mark for column, mark in marks.items() if row[column]) for row in data.to_dict("records")
            ],
            "probability": [percent(share) for share in data["probability"]],
            "this size or smaller": [percent(share) for share in data["cumulative"]],
        }
    )
    return Table("size_needed", data, shown)


def hypervolume_table(uncertainties: Mapping[str, FrontierUncertainty]) -> Table:
    """The area under each frontier, with its interval and its reference."""
    data = _joined([each.hypervolume.assign(measure=name) for name, each in uncertainties.items()])
    shown = pd.DataFrame(
        [
            {
                "measure": _UNITS[row["measure"]],
                "hypervolume": digits(row["observed"], 3),
                "95 % interval": f"{digits(row['low'], 3)} to {digits(row['high'], 3)}",
                "measured against": f"{row['worst_value']:.4g}, {count_shown(row['largest_size'])} parameters",
                "unit": f"unit of the measure × factor {row['base']:g} of parameters",
            }
            for row in data.to_dict("records")
        ]
    )
    return Table("hypervolume", data, shown)


_UNITS = {measure.name: f"{measure.short} ({measure.difference_unit})" for measure in MEASURES}


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)


def _p_value(p: float) -> str:
    return "–" if math.isnan(p) else "<0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def _both(count: int, against: int) -> str:
    shown = count_shown(count)
    return shown if pd.isna(count) or count == against else f"{shown} against {count_shown(against)}"


def run_tables(runs: StudyRuns) -> list[Table]:
    """Every failed seed with its step and reason; every seed that was neither complete nor failed; every trial that was
    stopped early, with the evidence; every trial that was never trained because it breaks a limit of the search."""
    columns = ["trial", "arm", "n_params", "n_seeds", "stopped"]
    if runs.parts:  # a reason names a rival by its number in its own study
        columns += ["study", "study_trial"]
    stopped = runs.trials.loc[runs.trials["stopped"].notna(), columns].reset_index(drop=True)
    named = {"n_params": "parameters", "n_seeds": "seeds", "stopped": "reason"}
    skipped = runs.skipped.assign(n_params=[count_shown(value) for value in runs.skipped["n_params"]])
    return [
        Table("failures", runs.failures, _as_text(runs.failures)),
        Table("unfinished", runs.unfinished, _as_text(runs.unfinished)),
        Table("stopped", stopped, _as_text(stopped.rename(columns=named))),
        Table("skipped", runs.skipped, _as_text(skipped.rename(columns={"n_params": "parameters", "chi": "χ"}))),
    ]


def average_table(runs: StudyRuns, summary: pd.DataFrame) -> Table:
    """For each configuration with averaged weights: their loss and its spread over seeds, beside the last weights'.

    The last row has the geometric mean of the ratios of the spreads, with its 95 % t interval over configurations.
    Configurations with fewer than 3 seeds are left out.
    """
    last, average = "final/val_loss", "final/ema_val_loss"
    rows = []
    for row in summary.to_dict("records"):
        own = runs.seeds.loc[runs.seeds["trial"] == row["trial"], [last, average]].dropna()
        if len(own) < schema.MIN_SEEDS:
            continue
        losses = {"last": own[last].mean(), "average": own[average].mean()}
        spreads = {"spread_last": own[last].std(), "spread_average": own[average].std()}
        ratio = spreads["spread_average"] / spreads["spread_last"] if spreads["spread_last"] > 0 else math.nan
        named = {key: row[key] for key in ("trial", "label", "group")}
        rows.append(named | {"n_seeds": len(own)} | losses | spreads | {"ratio": ratio})
    data = pd.DataFrame(rows)
    shown = pd.DataFrame(
        {
            "configuration": row["label"],
            "family": row["group"],
            "seeds": str(row["n_seeds"]),
            "last weights (nats)": f"{row['last']:.4f}",
            "averaged": f"{row['average']:.4f}",
            "spread over seeds, last": f"{row['spread_last']:.4f}",
            "spread, averaged": f"{row['spread_average']:.4f}",
            "ratio of spreads": f"{row['ratio']:.2f}",
        }
        for row in rows
    )
    ratios = data["ratio"][data["ratio"] > 0] if rows else []
    if len(ratios) >= schema.MIN_SEEDS:
        found = mean_interval(np.log(ratios))
        low, high = (math.exp(found.mean + sign * found.half_width) for sign in (-1, 1))
        text = f"{math.exp(found.mean):.2f} ({low:.2f} to {high:.2f})"
        whole = {"configuration": "all, geometric mean", "ratio of spreads": text}
        shown = pd.concat([shown, pd.DataFrame([whole])], ignore_index=True).fillna("–")
    return Table("average", data, shown)


def budgets_table(summary: pd.DataFrame) -> Table:
    """The trials that share a budget, and the training tokens of each run, with and without the start's."""
    rows = [
        {
            "budget": budget,
            "arms": ", ".join(sorted(group["arm"].unique())),
            "trials": len(group),
            "tokens of the run": range_shown(group["train_tokens"]),
            "tokens with the start's": range_shown(group["total_tokens"]),
        }
        for budget, group in summary.groupby("budget_hash")
    ]
    data = pd.DataFrame(rows)
    return Table("budgets", data, _as_text(data))


def arms_table(summary: pd.DataFrame) -> Table:
    """The settings with which each arm of the study file was trained; several values if its trials differ."""
    rows = []
    for arm, group in summary.groupby("arm", sort=False):
        row: dict[str, object] = {"arm": arm, "trials": len(group)}
        for key in _TRAINED_WITH:
            values = sorted(group[key].dropna().unique())
            row[key] = ", ".join(value if isinstance(value, str) else f"{value:g}" for value in values) or "–"
        rows.append(row)
    data = pd.DataFrame(rows)
    is_usual = pd.Series({key: (data[key] == usual).all() for key, usual in schema.ABSENT.items()})
    some = data.columns[~((data == "–").all() | is_usual.reindex(data.columns, fill_value=False))]
    return Table("arms", data, _as_text(data[some].rename(columns=lambda column: column.replace("_", " "))))


_TRAINED_WITH = (
    *("family", "start", "init", "refinement", "keep", "metric", "spread", "narrow", "layers", "gauge", "lr_rule"),
    *("decay", "factorisation", "sites", "precision", "heal", "options", "bonds", "sweep"),
    *("learning_rate", "embedding_learning_rate", "rate_width", "steps", "warmup_steps", "batch_size", "context"),
    *("weight_decay", "model", "tokenizer", "optimiser", "schedule", "d_model", "tuning_trials", "tuned_among"),
)


def write(table: Table, folder: Path) -> list[Path]:
    """Write `folder`/NAME.csv, NAME.md and NAME.tex.

    The CSV is for programs and leaves every text as it is: a spreadsheet may read a text that begins with = as a
    formula.
    """
    csv, markdown, latex = (folder / f"{table.name}.{kind}" for kind in ("csv", "md", "tex"))
    table.data.to_csv(csv, index=False, lineterminator="\n")
    markdown.write_text(to_markdown(table.shown), encoding="utf-8")
    latex.write_text(to_latex(table.shown), encoding="utf-8")
    return [csv, markdown, latex]


def to_markdown(shown: pd.DataFrame) -> str:
    """A GitHub table. A vertical bar or a line break in a cell stays inside it; HTML, links and pictures in a cell are
    shown as plain text."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_MARKDOWN.sub(r"\\\g<0>", _on_one_line(cell)) for cell in cells) + " |"

    lines = [line(list(shown.columns)), line(["---"] * len(shown.columns))]
    return "\n".join([*lines, *(line(list(row)) for row in shown.itertuples(index=False))]) + "\n"


def to_latex(shown: pd.DataFrame) -> str:
    """A tabular for any LaTeX engine, with the rules of booktabs; columns of numbers are right-aligned."""

    one_line = shown.map(_on_one_line)
    is_number = [len(shown) > 0 and one_line[column].str.fullmatch(_NUMBER).all() for column in shown]
    columns = "".join("r" if each else "l" for each in is_number)
    return one_line.to_latex(index=False, escape=True, column_format=columns).translate(_LATEX)


def _on_one_line(cell: str) -> str:
    return _BREAK.sub(" ", cell)


_BREAK = re.compile(r"\r\n|[\x00-\x1f\x7f\x85\u2028\u2029]")
_MARKDOWN = re.compile(r"[|\[\]]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\\(?=[!-/:-@\[-`{-~])")
"""Characters that would end a cell, or begin HTML, an entity, a link, a picture or an escape; they get a backslash."""
_NUMBER = r"[−+]?[\d,.]+( ± [\d,.]+)?( \(.*\))?|–|"
_LATEX = str.maketrans(
    {
        "[": "{[}",  # the end of a row would read these two as arguments
        "*": "{*}",
        "±": r"$\pm$",
        "−": "$-$",
        "–": "--",
        "×": r"$\times$",
        "√": r"$\surd$",
        "χ": r"$\chi$",
        "≥": r"$\geq$",
        "≤": r"$\leq$",
        "<": "$<$",  # in LaTeX's default font encoding these three are other characters
        ">": "$>$",
        "|": "$|$",
    }
)
"""Characters that pandas does not escape, and that LaTeX does not print as they are; no command of a table has them."""


def _means(summary: pd.DataFrame, key: str, measure: Measure) -> list[str]:
    decimals = decimals_for(measure.scale * summary[half_width_key(key)])
    return [with_interval(measure.scale * mean, math.nan, decimals) for mean in summary[schema.mean_key(key)]]


def _intervals(summary: pd.DataFrame, key: str, measure: Measure) -> list[str]:
    means, half_widths = measure.scale * summary[schema.mean_key(key)], measure.scale * summary[half_width_key(key)]
    decimals = decimals_for(half_widths)
    return [with_interval(mean, half, decimals) for mean, half in zip(means, half_widths, strict=True)]


def _as_text(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.astype("object").where(frame.notna(), "–").astype("str")
