"""Published numbers beside computed and measured ones: frames in, frames out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.paper import published
from analysis.paper.published import PublishedLayer, PublishedModel
from analysis.runs import StudyRuns
from analysis.statistics.intervals import mean_interval
from analysis.statistics.seed_blocks import MIN_SEEDS

COLUMNS = ("table", "row", "quantity", "unit", "published", "ours", "half_width", "n", "kind", "follows", "why")

YES, NO, OPEN, UNPUBLISHED = "yes", "no", "cannot be told", "nothing published"


@dataclass(frozen=True)
class Value:
    """One number of ours. half_width: of its 95 % t interval over n seeds; NaN where it has none (computed: n = 0)."""

    value: float = math.nan
    half_width: float = math.nan
    n: int = 0

    @property
    def kind(self) -> str:
        return "not measured" if math.isnan(self.value) else "measured" if self.n else "computed"


def paper_comparison(runs: StudyRuns) -> pd.DataFrame:
    """Every published number of Tables 2 to 4, the one computed or measured here, and whether it can be right.

    Returns:
        One row per number with `COLUMNS`: published and ours in `unit` (ours NaN where this study has no such run);
        kind: computed from definitions, or measured over n seeds; follows: whether the published number can follow from
        the paper's own definition, with the reason in `why`.
    """
    dense, by_chi = _paper_trials(runs)
    rows = [*_table_2(), *_table_3(runs, dense), *_table_4(runs, dense, by_chi)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def mpo_params(d_out: Sequence[int], d_in: Sequence[int], chi: int) -> int:
    """Parameters of an MPO with these sizes per site: Σ χ_{l−1} · d_out · d_in · χ_l (paper, Eq. 4).

    Bonds are at most χ and at most what the sites on either side can hold.
    """
    pairs = [out * into for out, into in zip(d_out, d_in, strict=True)]
    bonds = [min(chi, math.prod(pairs[:site]), math.prod(pairs[site:])) for site in range(len(pairs) + 1)]
    return sum(bonds[site] * pair * bonds[site + 1] for site, pair in enumerate(pairs))


def model_params(chi: int | None) -> int:
    """Parameters of the paper's model: embedding, norms, biases, and its linear layers, dense or as MPO (Table 1)."""
    sizes = published.SIZES
    d, d_ff, vocabulary = sizes["d_model"], sizes["d_ff"], sizes["vocab_size"]
    norms_and_biases = 2 * 2 * d + d + d_ff + d  # of a block: the output and feed-forward layers have biases
    rest = vocabulary * d + 2 * d + sizes["n_layers"] * norms_and_biases
    matrices = 0
    for layer in published.LAYERS:
        count = (
            math.prod(layer.d_out) * math.prod(layer.d_in) if chi is None else mpo_params(layer.d_out, layer.d_in, chi)
        )
        matrices += count * (sizes["n_layers"] * layer.n_in_block or 1)
    return rest + matrices


def missing(runs: StudyRuns) -> str | None:
    """What of the comparison this study cannot fill, in one line; None where it has all."""
    dense, by_chi = _paper_trials(runs)
    trials = {model.name: dense if model.chi is None else by_chi.get(model.chi) for model in published.MODELS}
    lacking = [name for name, trial in trials.items() if trial is None]
    if not lacking:
        return None
    sizes = ", ".join(f"{key}={value}" for key, value in published.SIZES.items())
    protocol = ", ".join(f"{key}={value:g}" for key, value in published.PROTOCOL.items())
    return f"no run of {', '.join(lacking)} with the paper's model ({sizes}) and protocol ({protocol})"


# The study's runs of the paper's models -------------------------------------------------------------------------------


def _paper_trials(runs: StudyRuns) -> tuple[int | None, dict[int, int]]:
    """Trial of the paper's dense model, and trials of its MPO models by χ: the first of each."""
    trials = runs.trials.sort_values("trial")
    wanted = np.ones(len(trials), dtype=bool)
    for key, value in (published.SIZES | published.PROTOCOL).items():
        wanted &= (trials[key] == value).to_numpy()
    trials = trials[wanted & (trials["start"] == "scratch").to_numpy()]
    dense = trials[(trials["family"] == "dense") & (trials["init"] == "paper")]["trial"]
    mpo = trials[(trials["family"] == "mpo") & (trials["factorisation"] == "paper") & (trials["init"] == "paper")]
    first = mpo.drop_duplicates("chi")
    by_chi = dict(zip(first["chi"].astype(int).tolist(), first["trial"].astype(int).tolist(), strict=True))
    return (int(dense.iloc[0]) if len(dense) else None), by_chi


def _measured(runs: StudyRuns, trial: int | None, key: str, scale: float = 1.0) -> Value:
    if trial is None:
        return Value()
    values = scale * runs.seeds.loc[runs.seeds["trial"] == trial, key].to_numpy(dtype=np.float64)
    return _over_seeds(values)


def _over_seeds(values: np.ndarray) -> Value:
    interval = mean_interval(values)
    half_width = float(interval.half_width) if interval.n >= MIN_SEEDS else math.nan
    return Value(float(interval.mean), half_width, interval.n) if interval.n else Value()


# The tables -----------------------------------------------------------------------------------------------------------


def _row(
    table: str, row: str, quantity: str, unit: str, number: float, ours: Value, follows: str, why: str
) -> dict[str, object]:
    return {
        "table": table,
        "row": row,
        "quantity": quantity,
        "unit": unit,
        "published": number,
        "ours": ours.value,
        "half_width": ours.half_width,
        "n": ours.n,
        "kind": ours.kind,
        "follows": follows,
        "why": why,
    }


def _table_2() -> list[dict[str, object]]:
    rows = []
    for layer in published.LAYERS:
        for quantity, number, ours in (
            ("dense parameters", layer.n_dense, math.prod(layer.d_out) * math.prod(layer.d_in)),
            (f"parameters at χ = {published.TABLE_2_CHI}", layer.n_mpo, _at_table_2(layer)),
        ):
            same = number == ours
            why = "the sizes per site give it (Eq. 4)" if same else f"Eq. 4 gives {ours:,}"
            rows.append(_row("2", layer.name, quantity, "", number, Value(ours), YES if same else NO, why))
    attention, up, down, _ = published.LAYERS
    printed = attention.n_in_block * attention.n_mpo + up.n_mpo + down.n_mpo
    ours = sum(layer.n_in_block * _at_table_2(layer) for layer in (attention, up, down))
    same = ours == published.BLOCK_MPO
    why = f"Eq. 4 gives {ours:,}" + ("" if printed == ours else f"; the printed rows give {printed:,}")
    rows.append(
        _row("2", "a block", "parameters at χ = 8", "", published.BLOCK_MPO, Value(ours), YES if same else NO, why)
    )
    dense = sum(layer.n_in_block * math.prod(layer.d_out) * math.prod(layer.d_in) for layer in (attention, up, down))
    rows.append(
        _ratio("2", "a block", published.BLOCK_RATIO, dense / ours, published.BLOCK_DENSE / published.BLOCK_MPO)
    )
    return rows


def _at_table_2(layer: PublishedLayer) -> int:
    return mpo_params(layer.d_out, layer.d_in, published.TABLE_2_CHI)


def _ratio(table: str, row: str, number: float, ours: float, printed: float) -> dict[str, object]:
    is_own = math.isclose(number, printed, abs_tol=0.05 + 1e-9)
    value = Value(ours)
    if math.isclose(number, ours, abs_tol=0.05 + 1e-9):
        return _row(table, row, "compression ratio", "", number, value, YES, "the parameters give it")
    why = f"the parameters give {ours:.3g}" + ("; it follows from the printed ones" if is_own else "")
    return _row(table, row, "compression ratio", "", number, value, NO, why)


def _table_3(runs: StudyRuns, dense: int | None) -> list[dict[str, object]]:
    rows = []
    base = published.MODELS[0]
    for model in published.MODELS:
        ours = model_params(model.chi)
        same = ours == model.n_params
        why = "the layers give it" if same else f"the layers give {ours:,}"
        rows.append(_row("3", model.name, "parameters", "", model.n_params, Value(ours), YES if same else NO, why))
        if model.chi is None:
            continue
        rows.append(_ratio("3", model.name, model.ratio, model_params(None) / ours, base.n_params / model.n_params))
        for quantity, number in (("largest", model.max_rel_error), ("mean", model.mean_rel_error)):
            assert number is not None
            error = _rel_error(runs, dense, model.chi, "init", quantity)
            follows, why = _against(number, error, 5e-4, "random weights give")
            rows.append(_row("3", model.name, f"{quantity} rel_error, random weights", "", number, error, follows, why))
            trained = _rel_error(runs, dense, model.chi, "trained", quantity)
            why = "published for random weights alone"
            rows.append(
                _row("3", model.name, f"{quantity} rel_error, trained", "", math.nan, trained, UNPUBLISHED, why)
            )
    return rows


def _rel_error(runs: StudyRuns, dense: int | None, chi: int, when: str, quantity: str) -> Value:
    """Over the dense model's layers, then over its seeds."""
    errors = runs.rel_errors
    errors = errors[(errors["trial"] == dense) & (errors["when"] == when) & (errors["chi"] == chi)]
    if dense is None or errors.empty:
        return Value()
    by_seed = errors.groupby("seed")["rel_error"]
    return _over_seeds((by_seed.max() if quantity == "largest" else by_seed.mean()).to_numpy(dtype=np.float64))


def _against(number: float, ours: Value, rounding: float, says: str) -> tuple[str, str]:
    """Whether a number that the definitions give up to the draw of random weights can be the published one."""
    if math.isnan(ours.value):
        return OPEN, "this study has no such run"
    if ours.n < MIN_SEEDS:
        return OPEN, "this study has fewer than three seeds of it"
    spread = ours.half_width * math.sqrt(ours.n + 1)  # of one more draw, not of the mean of many
    near = abs(number - ours.value) <= spread + rounding
    return (YES, f"{says} {ours.value:.3f}") if near else (NO, f"{says} {ours.value:.3f} ± {spread:.1g} each")


def _table_4(runs: StudyRuns, dense: int | None, by_chi: dict[int, int]) -> list[dict[str, object]]:
    rows = []
    base = published.MODELS[0]
    dense_acc = _measured(runs, dense, "final/val_acc", 100)
    for model in published.MODELS:
        trial = dense if model.chi is None else by_chi.get(model.chi)
        loss, acc = _measured(runs, trial, "final/val_loss"), _measured(runs, trial, "final/val_acc", 100)
        for quantity, unit, number, ours, decimals in (
            ("validation loss", "nats", model.val_loss, loss, 2),
            ("validation accuracy", "%", model.val_acc, acc, 1),
        ):
            rows.append(_row("4", model.name, quantity, unit, number, ours, OPEN, _beside(number, ours, decimals)))
        if model.acc_gap is not None:
            printed = model.val_acc - base.val_acc
            follows = YES if math.isclose(printed, model.acc_gap, abs_tol=0.051) else NO
            gap = _paired_gap(runs, trial, dense)
            why = f"printed accuracies: {printed:+.1f}"
            rows.append(_row("4", model.name, "accuracy gap", "points", model.acc_gap, gap, follows, why))
        rows.append(_per_root_n(model, acc))
    headline = next(model for model in published.MODELS if model.chi == published.N_HEADLINE)
    acc = _measured(runs, by_chi.get(published.N_HEADLINE), "final/val_acc", 100)
    printed = 100 * headline.val_acc / base.val_acc
    follows = YES if math.isclose(printed, published.RETAINED_ACCURACY, abs_tol=0.051) else NO
    why = f"printed accuracies: {printed:.1f} %"
    retained = Value(100 * acc.value / dense_acc.value, n=min(acc.n, dense_acc.n))
    rows.append(_row("4", headline.name, "retained accuracy", "%", published.RETAINED_ACCURACY, retained, follows, why))
    return rows


def _beside(number: float, ours: Value, decimals: int) -> str:
    """How far a published number of one run is from what one more run here would give."""
    if math.isnan(ours.value):
        return "this study has no such run"
    if ours.n < MIN_SEEDS:
        return "fewer than three seeds here: no interval"
    spread = ours.half_width * math.sqrt(ours.n + 1)
    where = "within" if abs(number - ours.value) <= spread + 0.5 * 10**-decimals else "outside"
    return f"{where} the 95 % prediction interval of one more run, ± {spread:.2g}; published of one seed"


def _paired_gap(runs: StudyRuns, trial: int | None, dense: int | None) -> Value:
    """Mean over shared seeds of the difference in accuracy, in points."""
    if trial is None or dense is None:
        return Value()
    seeds = runs.seeds.pivot_table(index="seed", columns="trial", values="final/val_acc")
    if trial not in seeds or dense not in seeds:
        return Value()
    return _over_seeds(100 * (seeds[trial] - seeds[dense]).dropna().to_numpy(dtype=np.float64))


def _per_root_n(model: PublishedModel, acc: Value) -> dict[str, object]:
    printed = model.val_acc / 100 / math.sqrt(model.n_params)
    follows = YES if math.isclose(printed, model.acc_per_root_n, rel_tol=0.005) else NO
    why = f"printed accuracy and parameters: {printed:.2e}"
    if follows == NO:
        why += f"; the printed value is {model.acc_per_root_n / printed:.3g} times that"
    ours = Value(acc.value / 100 / math.sqrt(model_params(model.chi)), n=acc.n)
    return _row("4", model.name, "accuracy / √parameters", "", model.acc_per_root_n, ours, follows, why)


# For people -----------------------------------------------------------------------------------------------------------


def shown(comparison: pd.DataFrame) -> pd.DataFrame:
    """The comparison as text: published and ours side by side, with the interval, the seeds and the difference."""
    rows = []
    for row in comparison.to_dict("records"):
        value = Value(row["ours"], row["half_width"], row["n"])
        rows.append(
            {
                "table": row["table"],
                "what": f"{row['row']}: {row['quantity']}" + (f" ({row['unit']})" if row["unit"] else ""),
                "published": _number(row["published"], row["published"]),
                "here": _with_interval(value, row["published"]),
                "seeds": str(value.n) if value.n else "–",
                "difference": _number(row["ours"] - row["published"], row["published"], sign=True),
                "can follow": row["follows"],
                "because": row["why"],
            }
        )
    return pd.DataFrame(rows)


def _number(value: float, like: float, sign: bool = False) -> str:
    """With the digits that a published number of this size has; a dash where there is none."""
    if math.isnan(value):
        return "–"
    size = abs(value if math.isnan(like) else like)
    mark = "+" if sign else ""
    if size >= 1000:
        return format(round(value), f"{mark},").replace("-", "−")
    decimals = 1 if size >= 5 else 3 if size >= 0.01 else 6
    return format(value, f"{mark}.{decimals}f").replace("-", "−")


def _with_interval(value: Value, like: float) -> str:
    mean = _number(value.value, like)
    return mean if math.isnan(value.half_width) else f"{mean} ± {_number(value.half_width, like)}"
