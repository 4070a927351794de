"""Losses, accuracies and quantities derived from them: Table 4 and the curves beside this study's runs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from analysis.paper import published
from analysis.paper.definitions import model_params
from analysis.paper.published import MODELS, PublishedModel
from analysis.paper.trials import PaperTrials
from analysis.paper.values import (
    DERIVED,
    NO,
    OPEN,
    READ_OFF,
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

Row = dict[str, object]
LOSS, ACC = "final/val_loss", "final/val_acc"
SCORE_UNIT = "1e-3"
_ROUNDING = 0.051  # rounding error of a difference of two numbers with one decimal, printed with one


def model_rows(model: PublishedModel, runs: StudyRuns, trials: PaperTrials) -> list[Row]:
    """Table 4, for one model: loss, accuracy, their distance from dense, accuracy over the root of its parameters."""
    trial, base = trials.of(model.chi), MODELS[0]
    acc = _of(runs, trial, ACC, 100)
    rows = [
        row("Table 4", model.name, "validation loss", model.val_loss, _over(_of(runs, trial, LOSS)),
            _beside(runs, trial, LOSS, model.val_loss, 1, 3), "nats"),
        row("Table 4", model.name, "validation accuracy", model.val_acc, _over(acc),
            _beside(runs, trial, ACC, model.val_acc, 100, 1), "%"),
    ]  # fmt: skip
    if model.acc_gap is not None:
        printed = model.val_acc - base.val_acc
        follows = YES if math.isclose(printed, model.acc_gap, abs_tol=_ROUNDING) else NO
        conclusion = follows, f"the printed accuracies give {_signed(printed)}"
        gap = over_seeds(_differences(acc, _of(runs, trials.dense, ACC, 100)))
        rows.append(row("Table 4", model.name, "accuracy gap", model.acc_gap, gap, conclusion, "points"))
        number = round(model.val_loss - base.val_loss, 3)
        gap = over_seeds(_differences(_of(runs, trial, LOSS), _of(runs, trials.dense, LOSS)))
        why = "both of one seed"
        if number < 0 and model.acc_gap < 0:
            why = "the loss is better than dense's and the accuracy is worse, which the text leaves out; " + why
        rows.append(row("Table 4", model.name, "loss gap", number, gap, (OPEN, why), "nats", DERIVED))
    rows.append(_score_row(model, acc))
    return rows


def retained_row(runs: StudyRuns, trials: PaperTrials) -> Row:
    """Text: the share of the dense accuracy that the headline model retains, paired by seed."""
    model = next(model for model in MODELS if model.chi == published.N_HEADLINE)
    printed = 100 * model.val_acc / MODELS[0].val_acc
    follows = YES if math.isclose(printed, published.RETAINED_ACCURACY, abs_tol=_ROUNDING) else NO
    pairs = pd.concat([_of(runs, trials.of(model.chi), ACC), _of(runs, trials.dense, ACC)], axis=1, join="inner")
    retained = ratio_over_seeds(pairs.iloc[:, 0].to_numpy(), pairs.iloc[:, 1].to_numpy(), 100)
    conclusion = follows, f"the printed accuracies give {printed:.1f} %"
    return row("Text", model.name, "retained accuracy", published.RETAINED_ACCURACY, retained, conclusion, "%")


def tuned_rows(runs: StudyRuns, trials: PaperTrials) -> list[Row]:
    """Text: the study's models that were compressed, then fine-tuned. No number is published for them."""
    conclusion = UNPUBLISHED, "the workflow is described without a result"
    rows = []
    for chi, trial in sorted(trials.tuned.items()):
        name = f"MPO χ = {chi}, fine-tuned"
        for quantity, key, scale, unit in (
            ("validation loss", LOSS, 1, "nats"), ("validation accuracy", ACC, 100, "%")
        ):  # fmt: skip
            rows.append(row("Text", name, quantity, math.nan, _over(_of(runs, trial, key, scale)), conclusion, unit))
    return rows


def curve_rows(curves: pd.DataFrame, trials: PaperTrials) -> list[Row]:
    """Figures 3 and 4: whether curves like the published ones can come from evaluations like the published ones.

    The steps of the evaluations determine how often a curve falls and how low it begins. So only models that were
    evaluated at the published steps, on the published sample, are counted.

    Args:
        curves: columns trial, seed, step, val_loss, val_acc, val_acc_sampled, for the paper's models from scratch.
    """
    dense, n_tokens = MODELS[0], math.prod(published.EVALUATED)
    p = dense.val_acc / 100
    error = 100 * math.sqrt(p * (1 - p) / n_tokens)
    conclusion = (
        UNPUBLISHED,
        f"standard error, binomial, of {n_tokens:,} tokens; more where sequences differ in difficulty",
    )
    rows = [
        row("Figure 4", dense.name, "error of one evaluation", math.nan, Value(error), conclusion,
            "points")
    ]  # fmt: skip
    by_trial, n_otherwise = [], 0
    for trial in trials.from_scratch:
        own = curves[curves["trial"] == trial].sort_values("step")
        if len(own) and not _is_evaluated_as_published(own):
            n_otherwise += 1
            continue
        sampled = own.pivot(index="step", columns="seed", values="val_acc_sampled")
        drops = (sampled.diff().iloc[1:] < 0).sum()
        low = own[(own["step"] > 0) & (own["val_loss"] <= published.LOW_LOSS)].groupby("seed")["val_acc"].min()
        by_trial.append(pd.DataFrame({"drops": drops, "low": 100 * low}))
    complete = pd.concat(by_trial, keys=range(len(by_trial))) if by_trial else pd.DataFrame({"drops": [], "low": []})
    # Only seeds that every model has, so that seeds are comparable.
    complete = complete.dropna().groupby(level=-1).filter(lambda of_seed: len(of_seed) == len(by_trial))
    seeds = complete.groupby(level=-1)
    name = "all models" if len(by_trial) == len(MODELS) else f"{len(by_trial)} of {len(MODELS)} models"
    drops = over_seeds(seeds["drops"].sum().to_numpy(dtype=np.float64))
    lacking = too_few(drops)
    if n_otherwise and not by_trial:
        lacking = f"no model of this study is evaluated as published, every {published.EVAL_EVERY} steps on a sample"
    conclusion = (
        (OPEN, lacking)
        if lacking
        else one_more_seed(0, drops, 0.5, "evaluated as published, the curves here fall this often:", 1)
    )
    quantity = "falls between evaluations"
    rows.append(row("Figure 4", name, quantity, 0, drops, conclusion, said=READ_OFF))
    lowest = over_seeds(seeds["low"].min().to_numpy(dtype=np.float64))
    lacking = lacking or too_few(lowest)
    if lacking:
        conclusion = OPEN, lacking
    elif lowest.value - lowest.spread - 0.5 > published.LOW_ACCURACY:
        conclusion = NO, f"no evaluation here is as low: {lowest.value:.1f} ± {lowest.spread:.1g} each"
    else:
        conclusion = YES, "evaluations here are as low"
    quantity = f"lowest accuracy, loss ≤ {published.LOW_LOSS}"
    rows.append(row("Figure 4", name, quantity, published.LOW_ACCURACY, lowest, conclusion, "%", READ_OFF))
    return rows


def _is_evaluated_as_published(curves: pd.DataFrame) -> bool:
    """Return whether each seed of one trial is evaluated at exactly the published steps."""
    steps = list(range(0, published.PROTOCOL["steps"] + 1, published.EVAL_EVERY))
    sampled = curves.dropna(subset=["val_loss", "val_acc", "val_acc_sampled"])
    return all(sampled.loc[sampled["seed"] == seed, "step"].tolist() == steps for seed in curves["seed"].unique())


def _of(runs: StudyRuns, trial: int | None, key: str, scale: float = 1.0) -> pd.Series:
    """A final metric by seed."""
    seeds = runs.seeds[runs.seeds["trial"] == trial] if trial is not None else runs.seeds.iloc[:0]
    return scale * seeds.set_index("seed")[key].astype("float64")


def _over(values: pd.Series) -> Value:
    return over_seeds(values.to_numpy(dtype=np.float64))


def _differences(values: pd.Series, reference: pd.Series) -> np.ndarray:
    """Differences over the seeds that both have."""
    return (values - reference).dropna().to_numpy(dtype=np.float64)


def _beside(
    runs: StudyRuns, trial: int | None, key: str, number: float, scale: float, decimals: int
) -> tuple[str, str]:
    """Compare a published number with one more run here, on the paper's kind of sample if this study evaluated one."""
    sampled = _of(runs, trial, f"{key}_sampled", scale)
    is_sampled = len(sampled) > 0 and sampled.notna().all()
    ours = _over(sampled if is_sampled else _of(runs, trial, key, scale))
    lacking = too_few(ours)
    if lacking:
        return OPEN, lacking
    where = "within" if abs(number - ours.value) <= ours.spread + 0.5 * 10**-decimals else "outside"
    how = "evaluated as published" if is_sampled else "over the whole validation split"
    return OPEN, (
        f"{where} the 95 % prediction interval of one more run, {ours.value:.{decimals}f} ± {ours.spread:.2g} {how}; "
        "published of one seed"
    )


def _score_row(model: PublishedModel, acc: pd.Series) -> Row:
    printed = model.val_acc / 100 / math.sqrt(model.n_params)
    follows = YES if math.isclose(printed, model.acc_per_root_n, rel_tol=0.005) else NO
    why = f"the printed accuracy and parameters give {printed / float(SCORE_UNIT):.3g}"
    if follows == NO:
        why += f"; the printed value is {model.acc_per_root_n / printed:.3g} times that"
    ours = _over(acc / 100 / math.sqrt(model_params(model.chi)) / float(SCORE_UNIT))
    number = model.acc_per_root_n / float(SCORE_UNIT)
    return row("Table 4", model.name, "accuracy / √N", number, ours, (follows, why), SCORE_UNIT)


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")
