"""Share of the differences between the MPO trials of a study that is due to each factor."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import run_schema as schema
from analysis.results.selection import seeds_stated, select
from analysis.results.summary import Measure
from analysis.statistics.draws import SeedMeans

ANOVA, FANOVA = "factorial analysis of variance", "fANOVA"
INTERACTIONS = "interactions"
MIN_TRIALS = 20
"""Minimum number of trials for a forest; with 12, the main share of a known truth came out anywhere from .5 to .9."""

MAX_TRIALS = 200
"""Maximum number of trials for a forest, drawn at random; its cost grows with their square."""

_NO_FACTORS = (
    *("trial", "seed", "arm", "family", "as_chi", "sites", "largest_bond", "tuning_trials", "tuned_among"),
    *("budget_hash", "corpus_sha256"),
)
FACTORS = tuple(field.key for field in schema.PARAMS if field.key not in _NO_FACTORS)
"""Params that are set, not names and not values that follow from other params."""

_NAMES = {"chi": "χ", "n_sites": "number of sites L"}
_FEW_LEVELS = 6
_TREES, _TREES_PER_DRAW, _FOREST_DRAWS, _ANOVA_DRAWS = 64, 16, 100, 10_000
_RANGE = (0.025, 0.975)
COLUMNS = ("factor", "levels", "n_levels", "share", "low", "high", "evaluator", "n_trials", "n_seeds", "left_out")


def factor_importance(
    summary: pd.DataFrame,
    seeds: pd.DataFrame,
    measure: Measure,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Share of the variance of a measure's seed means by the main effect of each factor, over the MPO trials.

    On a complete factorial grid: analysis of variance. The variance that the seeds' noise gives to the means is
    subtracted from every sum of squares. So the shares add up to 100 %, with `interactions` as the rest.

    Elsewhere (continuous learning rates, unequal cells): fANOVA of a random forest over the range of each factor here.
    Quantities such as χ are on a logarithmic scale; the levels of all other factors have equal weights. Noise shifts
    the forest's shares. Redrawn means show the same shift against the measured ones, and the shares are corrected by
    it. The rest is interactions and what the forest smooths away; small effects get less than their share.

    Factors whose levels correspond one to one cannot be distinguished, and share one row.

    low and high are the 2.5 and 97.5 % quantiles of the shares over redrawn seed means. The means are redrawn around
    the measured ones, with the noise pooled over trials (`SeedMeans.contrast_draws`); the noise of the seeds and that
    of redrawing are then subtracted. A forest's range also covers the quantiles without this correction, which makes up
    for the forest's own randomness. Each range on its own shows what the seeds leave open. It does not include that the
    trials are a sample of all settings.

    Args:
        summary: `summary.summarise`.
        seeds: `StudyRuns.seeds`.
        rng: source of the redraws and of the forests' seeds.
    Cost: a grid takes well under a second. A forest takes about 10 s for 60 trials of 4 factors, and a minute for
        MAX_TRIALS or more; nearly all of it is for the redraws.
    Returns:
        One row per factor, the largest share first, `interactions` last. factor: its name. levels, n_levels: its
        settings; missing for `interactions`. share, low, high: per cent. evaluator, n_trials, n_seeds, left_out: the
        same in each row. Empty if fewer than two factors vary, if a forest would have fewer than MIN_TRIALS trials, or
        if nothing is left after the noise is subtracted.
    Source: Scheffé 1959, The Analysis of Variance, sections 4.5 and 7.2 (variance components); Hutter, Hoos and
        Leyton-Brown 2014, An efficient approach for assessing hyperparameter importance (fANOVA).
    """
    mpo = summary[summary["family"] == "mpo"]
    if mpo.empty:
        return _nothing()
    selected = select(mpo, seeds, measure.key)
    factors = _factors(selected.trials)
    if len(factors) < 2:
        return _nothing()
    codes = np.column_stack([_codes(selected.trials[keys[0]]) for keys in factors])
    means = SeedMeans.of(selected.values.to_numpy().T)
    if _is_grid(codes):
        evaluator, shares = ANOVA, _anova_shares(codes, means, rng)
    elif len(codes) >= MIN_TRIALS:
        drawn = np.sort(rng.permutation(len(codes))[:MAX_TRIALS])
        coordinates = _coordinates(selected.trials, factors, codes)[drawn]
        evaluator, shares = FANOVA, _fanova_shares(coordinates, means.take(drawn), rng)
    else:
        return _nothing()
    if np.isnan(shares).any():
        return _nothing()
    is_sample = evaluator == FANOVA and len(codes) > MAX_TRIALS
    too_many = f"A random {MAX_TRIALS} of {len(codes)} trials stand for all." if is_sample else ""
    levels = [_levels(selected.trials[keys[0]]) for keys in factors]
    frame = pd.DataFrame(
        {
            "factor": [*(_together(keys) for keys in factors), INTERACTIONS],
            "levels": [*levels, None],
            "n_levels": pd.array([*(codes.max(axis=0) + 1), None], dtype="Int64"),
            "share": 100 * shares[0],
            "low": 100 * shares[1],
            "high": 100 * shares[2],
            "evaluator": evaluator,
            "n_trials": len(codes) if evaluator == ANOVA else min(len(codes), MAX_TRIALS),
            "n_seeds": seeds_stated(selected.values),
            "left_out": " ".join(said for said in (selected.left_out, too_many) if said),
        }
    )
    main = frame.iloc[:-1].sort_values("share", ascending=False, kind="stable")
    return pd.concat((main, frame.iloc[-1:]), ignore_index=True)


def _nothing() -> pd.DataFrame:
    return pd.DataFrame(columns=list(COLUMNS))


def _together(keys: list[str]) -> str:
    first, *others = (_NAMES.get(key, key.replace("_", " ")) for key in keys)
    return f"{first} (with {', '.join(others)})" if others else first


def _factors(trials: pd.DataFrame) -> list[list[str]]:
    """The factors that vary, grouped if their levels correspond one to one."""
    found: dict[bytes, list[str]] = {}
    for key in (key for key in FACTORS if trials[key].nunique(dropna=False) > 1):  # a missing value is a level
        # Levels are numbered in the order in which they occur: the same division of the trials has the same numbers.
        found.setdefault(pd.factorize(trials[key], use_na_sentinel=False)[0].tobytes(), []).append(key)
    return list(found.values())


def _codes(values: pd.Series) -> NDArray[np.intp]:
    """Rank of each trial's level among the levels, (C,); a missing level comes last."""
    return pd.factorize(values, sort=True, use_na_sentinel=False)[0]


def _levels(values: pd.Series) -> str:
    levels = sorted(values.dropna().unique())
    if len(levels) > _FEW_LEVELS:
        return f"{levels[0]:.3g} to {levels[-1]:.3g}" if _is_number(values) else f"{len(levels)} levels"
    named = [f"{level:.3g}" if isinstance(level, float) else str(level) for level in levels]
    return ", ".join(named + ["none"] * bool(values.isna().any()))


def _is_number(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values)


def _is_grid(codes: NDArray[np.intp]) -> bool:
    """Return whether every combination of the factors' levels occurs exactly once."""
    return len(np.unique(codes, axis=0)) == len(codes) == np.prod(codes.max(axis=0) + 1)


def _anova_shares(codes: NDArray[np.intp], means: SeedMeans, rng: np.random.Generator) -> NDArray[np.float64]:
    """Share, low, high of each factor and of the interactions, (3, factors + 1), in [0, 1]; NaN if all is noise."""
    order, shape = np.lexsort(codes.T[::-1]), tuple(codes.max(axis=0) + 1)
    noise = means.residual_se**2
    share = _variance_shares(means.means[order].reshape(shape), len(shape), noise)
    draws = np.concatenate(
        [
            _variance_shares(chunk[:, order].reshape(-1, *shape), len(shape), 2 * noise)
            for chunk in means.contrast_draws(_ANOVA_DRAWS, rng)
        ]
    )
    if np.isnan(share).any():
        return np.full((3, len(shape) + 1), np.nan)
    # A draw in which nothing is left above the noise has no shares.
    return np.vstack((share, np.nanquantile(draws, _RANGE, axis=0)))


def _variance_shares(grid: NDArray[np.float64], n_factors: int, noise: float) -> NDArray[np.float64]:
    """Shares (..., factors + 1) of the sums of squares of a (..., *levels) grid. From each sum, the average addition by
    noise of that variance in each cell is subtracted: its degrees of freedom times the variance."""
    axes = tuple(range(grid.ndim - n_factors, grid.ndim))
    levels, cells = grid.shape[grid.ndim - n_factors :], np.prod(grid.shape[grid.ndim - n_factors :])
    centred = grid - grid.mean(axis=axes, keepdims=True)
    squares = [
        (centred.mean(axis=tuple(other for other in axes if other != axis)) ** 2).sum(axis=-1) * cells / n
        - (n - 1) * noise
        for axis, n in zip(axes, levels, strict=True)
    ]
    rest = (centred**2).sum(axis=axes) - (cells - 1) * noise - sum(squares)
    parts = np.clip(np.stack([*squares, rest], axis=-1), 0, None)
    total = parts.sum(axis=-1, keepdims=True)
    return np.divide(parts, total, out=np.full(parts.shape, np.nan), where=total > 0)


def _coordinates(trials: pd.DataFrame, factors: list[list[str]], codes: NDArray[np.intp]) -> NDArray[np.float64]:
    """Coordinates that a forest splits, (C, factors). A quantity with many levels is on its own scale, logarithmic if
    it is positive. Any other has the rank of its level, between half steps, so that each level has the same weight."""
    columns = []
    for keys, ranks in zip(factors, codes.T, strict=True):
        values = trials[keys[0]]
        continuous = _is_number(values) and values.notna().all() and values.nunique() > _FEW_LEVELS
        column = values.to_numpy(dtype=np.float64) if continuous else ranks.astype(np.float64)
        if continuous and column.min() > 0:
            column = np.log(column)
        half = 0.0 if continuous else 0.5
        low, high = column.min() - half, column.max() + half
        columns.append((column - low) / (high - low))
    return np.column_stack(columns)


def _fanova_shares(coordinates: NDArray[np.float64], means: SeedMeans, rng: np.random.Generator) -> NDArray[np.float64]:
    """Shares as in `_anova_shares`, but by forests; coordinates in [0, 1]."""
    if np.ptp(means.means) == 0:
        return np.full((3, coordinates.shape[1] + 1), np.nan)
    forest_seeds = rng.integers(2**31, size=_FOREST_DRAWS + 1)
    share = _forest_shares(coordinates, means.means, int(forest_seeds[0]), _TREES)
    redrawn = np.concatenate(list(means.contrast_draws(_FOREST_DRAWS, rng)))
    draws = [
        _forest_shares(coordinates, values, int(seed), _TREES_PER_DRAW)
        for values, seed in zip(redrawn, forest_seeds[1:], strict=True)
    ]
    # Redrawing shifts a share as much as the original noise did. So the shift is subtracted once from the measured
    # share, and twice from the redrawn ones. Of 20 simulated searches (40 trials, 3 seeds), the shifted ranges alone
    # held a forest's noise-free shares in .65 to .9, by factor and noise, and with the unshifted ones in .85 to 1.
    shift = np.mean(draws, axis=0) - share
    low, high = np.quantile(draws, _RANGE, axis=0)
    found = np.vstack((share - shift, low - np.maximum(2 * shift, 0), high - np.minimum(2 * shift, 0)))
    return np.clip(found, 0, 1)


def _forest_shares(
    coordinates: NDArray[np.float64], values: NDArray[np.float64], seed: int, n_trees: int
) -> NDArray[np.float64]:
    # Imported here, so that the report of a study without a search does not need Optuna.
    from optuna import logging
    from optuna.distributions import BaseDistribution, FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.study import create_study
    from optuna.trial import create_trial

    names = [str(column) for column in range(coordinates.shape[1])]
    space: dict[str, BaseDistribution] = dict.fromkeys(names, FloatDistribution(0, 1))
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        study = create_study()
        for row, value in zip(coordinates.tolist(), values.tolist(), strict=True):
            study.add_trial(create_trial(params=dict(zip(names, row, strict=True)), distributions=space, value=value))
        # Evaluator, target and seed are explicit: Optuna's default asks which factor matters among the best trials.
        evaluator = FanovaImportanceEvaluator(n_trees=n_trees, seed=seed)
        found = evaluator.evaluate(study, names, target=lambda trial: trial.values[0])
    finally:
        logging.set_verbosity(verbosity)
    main = np.array([found[name] for name in names])
    return np.append(main, max(0.0, 1 - main.sum()))
