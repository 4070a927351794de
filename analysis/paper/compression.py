"""Parameter counts, their ratios and the scale of initial weights: published, and by the paper's definitions."""

from __future__ import annotations

import math

from analysis.paper import published
from analysis.paper.definitions import block_params, initial_std, layer_params, model_params, quadratic_at
from analysis.paper.published import MODELS, PublishedLayer, PublishedModel
from analysis.paper.values import DERIVED, NO, YES, Value, row

Row = dict[str, object]
_BLOCK = "a block"


def layer_rows() -> list[Row]:
    """Table 2: parameters of each layer and of a block, at the χ for which they are printed."""
    chi = published.TABLE_2_CHI
    rows = []
    for layer in published.LAYERS:
        for quantity, number, ours in (
            ("dense parameters", layer.n_dense, layer_params(layer, None)),
            (f"parameters at χ = {chi}", layer.n_mpo, layer_params(layer, chi)),
        ):
            rows.append(_count("Table 2", layer.name, quantity, number, ours, "Eq. 4 gives"))
    printed = sum(layer.n_in_block * layer.n_mpo for layer in published.LAYERS)
    rows.append(_count("Table 2", _BLOCK, "dense parameters", published.BLOCK_DENSE, block_params(None), "Eq. 4 gives"))
    rows.append(
        _count("Table 2", _BLOCK, f"parameters at χ = {chi}", published.BLOCK_MPO, block_params(chi), "Eq. 4 gives",
               printed)
    )  # fmt: skip
    rows.append(
        _ratio("Table 2", _BLOCK, f"compression ratio at χ = {chi}", published.BLOCK_RATIO,
               block_params(None) / block_params(chi), published.BLOCK_DENSE / published.BLOCK_MPO)
    )  # fmt: skip
    return rows


def size_rows(model: PublishedModel) -> list[Row]:
    """Table 3, for one model: its parameters and its compression ratio."""
    ours = model_params(model.chi)
    rows = [_count("Table 3", model.name, "parameters", model.n_params, ours, "the layers give")]
    if model.chi is not None:
        ratio = model_params(None) / ours
        printed = MODELS[0].n_params / model.n_params
        rows.append(_ratio("Table 3", model.name, "compression ratio", model.ratio, ratio, printed))
    return rows


def one_rule_row() -> Row:
    """Table 3: whether any rule with one χ for all layers can give the four printed counts.

    For L ≤ 3 and bonds that are not clipped, Eq. 4 is a quadratic in χ. Three counts determine it; the last tests it.
    """
    *others, last = (model for model in MODELS if model.chi is not None)
    assert last.chi is not None
    ours = round(quadratic_at(last.chi, {model.chi: model.n_params for model in others if model.chi is not None}))
    quantity = f"parameters at χ = {last.chi}, from the others"
    why = f"Eq. 4 with L up to 3 is a quadratic in χ, and the one through the printed counts gives {ours:,} there"
    follows = YES if ours == last.n_params else NO
    return row("Table 3", "MPO, all χ", quantity, last.n_params, Value(ours), (follows, why), said=DERIVED)


def text_rows() -> list[Row]:
    """Numbers of the text: a block's compression, the share of parameters, the scale of initial weights."""
    chi = published.BLOCK_CHI
    whole = next(model for model in MODELS if model.chi == chi)
    ours = block_params(None) / block_params(chi)
    rows = [
        _ratio("Text", _BLOCK, f"compression ratio at χ = {chi}", published.BLOCK_RATIO_THERE, ours, whole.ratio,
               "it is the printed ratio of whole models")
    ]  # fmt: skip
    headline = next(model for model in MODELS if model.chi == published.N_HEADLINE)
    share = 100 * model_params(headline.chi) / model_params(None)
    printed = 100 * headline.n_params / MODELS[0].n_params
    rows.append(_ratio("Text", headline.name, "share of parameters", published.PARAMS_SHARE, share, printed, unit="%"))
    for layer in published.LAYERS:
        rows.append(_std_row(layer, chi))
    attention = published.LAYERS[0]
    over_dense = initial_std(attention, chi) / published.DENSE_STD
    why = (
        f"variances are said to be of one order; section 3.3 gives a std of {initial_std(attention, chi):.3g}, "
        f"dense weights have {published.DENSE_STD:g} in its code"
    )
    rows.append(
        row("Text", attention.name, "initial std, MPO over dense", 1.0, Value(over_dense),
            (_same(1.0, over_dense), why), said=DERIVED)
    )  # fmt: skip
    return rows


def _std_row(layer: PublishedLayer, chi: int) -> Row:
    n_in = math.prod(layer.d_in)
    ours = initial_std(layer, chi) * math.sqrt(n_in)
    follows = _same(1.0, ours)
    why = f"section 3.3 gives Var(W) = 1 / N_in for L = {layer.n_sites}"
    if follows == NO:
        why = f"section 3.3 is right only for L = 2; for L = {layer.n_sites}, N_in = {n_in} the std is too low"
    return row("Text", layer.name, "initial std × √N_in", 1.0, Value(ours), (follows, why), said=DERIVED)


def _same(number: float, ours: float) -> str:
    return YES if math.isclose(number, ours, rel_tol=1e-9) else NO


def _count(
    place: str, name: str, quantity: str, number: int, ours: int, source: str, printed: int | None = None
) -> Row:
    why = f"{source} {'it' if number == ours else format(ours, ',')}"
    if number != ours and printed == number:
        why += "; it is the sum of the printed rows"
    return row(place, name, quantity, number, Value(ours), (YES if number == ours else NO, why))


def _ratio(
    place: str,
    name: str,
    quantity: str,
    number: float,
    ours: float,
    printed: float,
    origin: str = "it follows from the printed ones",
    unit: str = "",
) -> Row:
    """A ratio, right if the definitions give it to its one printed decimal; `printed`: the ratio of printed numbers."""
    rounding = 0.05 + 1e-9
    if math.isclose(number, ours, abs_tol=rounding):
        return row(place, name, quantity, number, Value(ours), (YES, "the parameters give it"), unit)
    why = f"the parameters give {ours:.3g}"
    if math.isclose(number, printed, abs_tol=rounding):
        why += f"; {origin}"
    return row(place, name, quantity, number, Value(ours), (NO, why), unit)
