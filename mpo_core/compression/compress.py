"""Turn the linear layers of any model into structured ones, and back, and count the effect."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mpo_core.calibration.statistics import Statistics
from mpo_core.compression.allocation import allocate
from mpo_core.compression.candidates import Candidates, Layer
from mpo_core.compression.checks import check_init, check_names, check_size, chosen_metric, chosen_spread
from mpo_core.compression.counting import n_params
from mpo_core.compression.measuring import errors_of, row_of, warn_where_parted
from mpo_core.compression.narrowing import narrow_mlps
from mpo_core.compression.report import CompressedLayer, CompressionReport
from mpo_core.compression.sizing import best_of, ladder_of
from mpo_core.fitting.metric import Metric
from mpo_core.layers.structured import StructuredLinear
from mpo_core.models.dense_layers import (
    DenseLayer,
    Model,
    copied,
    find_dense_layers,
    note_original_features,
    original_features,
)
from mpo_core.tensor_train.bonds import check_whole
from mpo_core.values import check_matrix


def compress(
    model: Model,
    *,
    layer: Layer = "mpo",
    chi: int | None = None,
    rel_error: float | None = None,
    keep: float | None = None,
    max_params: int | Mapping[str, int] | None = None,
    allow_growth: bool = False,
    include: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    init: str | None = None,
    statistics: Statistics | None = None,
    metric: str | None = None,
    spread: str | None = None,
    narrow: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    generator_for: Callable[[str], torch.Generator] | None = None,
    n_tokens: int = 256,
    **options: Any,
) -> tuple[Model, CompressionReport]:
    """Return a copy of the model with structured layers in place of linear ones; all else is carried over.

    The model itself is not changed. nn.Linear and the Conv1D of Hugging Face are replaced, by name. Layers that share
    one weight get one shared structured weight. The following stay as they are, with the reason in the report; naming
    one of them in `include` exactly is an error.

    - Layers whose weight is also an embedding's, or belongs to a layer that is not replaced.
    - Layers whose weight or bias is computed from other parameters (weight_norm, spectral_norm, prune, parametrize).
    - Layers that have hooks, a forward of their own, or tensors or modules beside weight and bias.
    - Subclasses of nn.Linear, and so the projections of nn.MultiheadAttention, which uses their weights itself.

    Args:
        layer: the kind of layer, such as "mpo" or "low_rank": one of `kinds()`; or a pair of it and options of its own,
            such as ("mpo", {"d_out": (8, 8), "d_in": (16, 16)}). A list of these, or "auto": each matrix takes what has
            the least error at its size. "auto" tries low rank, MPO of several splits and Monarch. A mapping gives all
            this by pattern of module names: the first that matches counts, and without one a layer stays dense. Or a
            function from a layer's name and its weight as an nn.Linear to a StructuredLinear, or to None to leave it
            dense; no size is given then.
        chi, rel_error, keep, max_params: how large the layers become; exactly one of them.
            chi: the cap on the bonds of every layer; the rank of "low_rank" and "monarch". A layer that would save
            nothing stays dense, unless `allow_growth`.
            rel_error: the largest relative error in the metric. The smallest layers found within it are taken; chains
            are within 5 % of the smallest, except in the metric "weights". A layer that would save nothing stays dense.
            max_params: parameters of all these matrices together, see `spread`. Or a mapping from layer name to the
            most parameters of each.
            keep: max_params as a fraction of the parameters that these matrices have. Here and in one number
            as max_params, masks and indices count: as many bits as a parameter has count as one.
        allow_growth: whether `chi` also replaces layers that become no smaller; the report then says so.
        include, exclude: patterns (fnmatch, case-sensitive) of module names such as "blocks.0.attention.query"; a
            layer is replaced if it matches one of `include` and none of `exclude`. A string is one pattern.
        init: draws fresh parameters (one of the kind's `inits`) in layers of the size that `chi`, or `max_params` by
            layer, gives. Default: None: the layers approximate the present weights.
        statistics: of this model, from `collect_statistics`.
        metric: in which the layers approximate the present weights, and errors are measured. "weights": the Frobenius
            norm. "outputs": the change of the layer's outputs over the calibration inputs. "loss": the predicted rise
            of the loss. Default: the last of these for which there are statistics.
        spread: how `keep` and `max_params` are spread over the layers. "loss": by the predicted loss, one price per
            parameter for all layers (`allocate`); a layer may stay dense. "errors": so by the squared relative errors.
            "even": the same share of every layer. Default: "loss" for the metric "loss", else "errors".
        narrow: whether MLPs also lose hidden units, where that costs less predicted loss than smaller matrices
            (`narrow_mlps`). The layers of such an MLP then have fewer features, and the other weights of the layer that
            reads the units make up for them as well as they can. Only with `keep` or one number as max_params, and
            with spread "loss".
        progress: called with "hidden units", "sizes" or "fits", the number of layers done and that of all.
        generator_for: function from a parameter's name, such as "blocks.0.attention.query.cores.1", to the generator of
            its values. Needed with `init`, except on the meta device, where there is nothing to draw.
        n_tokens: tokens per forward for which the report gives FLOPs and bytes.
        options: those of the kind's constructor and `from_matrix`. For "mpo": factorisation, n_sites, padding, d_out,
            d_in, forward, gauge (see MPOLinear), and the `method` of `fit_cores`. With several kinds, each gets those
            that it has.
    Raises:
        ValueError: no layer matches; a layer that is named exactly cannot be replaced; with keep or max_params, no
            layer can be replaced; not exactly one size; max_params that even the smallest layers exceed; an unknown
            kind, init, metric, spread or option; a metric without its statistics, or statistics without a layer; an
            init without generator_for; or as the kind's constructor and `from_matrix`, with the name of the layer.
    Warns:
        UserWarning: the predicted loss on held-out batches is more than `PARTED` times that on the fitted ones.
    """
    check_whole(n_tokens=n_tokens)
    n_tokens = int(n_tokens)
    if n_tokens < 1:
        raise ValueError(f"`n_tokens >= 1` must hold, but got n_tokens={n_tokens}")
    metric = chosen_metric(metric, statistics)
    spread = chosen_spread(spread, metric, keep, max_params)
    check_size(layer, allow_growth, narrow, spread, chi=chi, rel_error=rel_error, keep=keep, max_params=max_params)
    candidates = None
    if not callable(layer):
        made = {"init": init, "generator_for": generator_for, "allow_growth": allow_growth}
        candidates = Candidates(layer, options, **made)
        check_init(init, statistics, chi is not None or isinstance(max_params, Mapping))
        if not candidates.are_fixed and (init is not None or chi is not None or rel_error is not None):
            raise ValueError("with several kinds in `layer`, the size must be `keep` or `max_params`, without `init`")
    elif options or init is not None:
        raise ValueError(f"with a function as `layer`, no options are allowed, but got {', '.join(options) or 'init'}")
    found = find_dense_layers(model, include, exclude)
    if candidates is not None:
        candidates.check_patterns([dense.name for dense in found])
    sizers = {dense.name: candidates.of(dense.name, dense.linear) for dense in found} if candidates is not None else {}
    found = [
        replace(dense, reason="no pattern of `layer` matches it")
        if candidates is not None and dense.reason is None and not sizers[dense.name]
        else dense
        for dense in found
    ]
    targets = [dense for dense in found if dense.reason is None]
    if candidates is not None:
        candidates.check_fit(targets)
        if init is None:
            _check_weights(targets)
    if statistics is not None and targets:
        found = [_measured(dense, statistics, metric) for dense in found]
        first, targets = targets[0].name, [dense for dense in found if dense.reason is None]
        if not targets:
            why = next(dense.reason for dense in found if dense.name == first)
            raise ValueError(f"`statistics` measure no layer that can be replaced; for example {first}: {why}")

    def metric_of(dense: DenseLayer, held_out: bool = False, whole: bool = False) -> Metric | None:
        """None for the metric "weights", and for a layer that the held-out batches do not measure.

        Args:
            whole: whether to return the metric of the layer before it was narrowed.
        """
        if statistics is None or metric == "weights":
            return None
        if dense.linear.weight.is_meta:
            raise ValueError(f"{dense.name}: a weight on the meta device has no values to fit to `statistics`")
        names = (dense.name, *dense.sharers)
        if held_out and statistics.why_not(names, metric, held_out=True) is not None:
            return None
        found = statistics.metric(names, metric, held_out=held_out)
        return found if narrowed is None or whole else narrowed.metric(dense.name, found)

    sizes: dict[str, int] = {}
    chosen: dict[str, int] = {}
    whole, narrowed = model, None
    if isinstance(max_params, Mapping):
        check_names(max_params, found)
        sizes = dict(max_params)
    elif candidates is not None and (keep is not None or max_params is not None):
        if not targets:
            raise ValueError(f"no layer can be replaced; for example {found[0].name}: {found[0].reason}")
        n_dense = sum(dense.linear.weight.numel() for dense in targets)
        most = int(float(keep) * n_dense) if keep is not None else int(max_params or 0)
        if narrow and statistics is not None:
            gauges = {sizer.options.get("gauge") for of in sizers.values() for sizer in of}
            narrowed = narrow_mlps(
                model,
                targets,
                statistics,
                most,
                gauge="fixed" if "fixed" in gauges else "free",
                fits=candidates.fit,
                progress=partial(progress, "hidden units") if progress is not None else None,
            )
            if narrowed is not None:
                model = narrowed.model
                found, targets = narrowed.layers(found), narrowed.layers(targets)
                n_dense = sum(dense.linear.weight.numel() for dense in targets)
                sizers = {dense.name: candidates.of(dense.name, dense.linear) for dense in targets}
        shares = {dense.name: dense.linear.weight.numel() * most // n_dense for dense in targets}
        if spread != "even":
            ladders = {}
            for done, dense in enumerate(targets):
                of, share = sizers[dense.name], shares[dense.name]
                ladders[dense.name] = ladder_of(of, dense, share, metric_of(dense), spread == "loss")
                if progress is not None:
                    progress("sizes", done + 1, len(targets))
            least = sum(min(rung.cost for rung in ladder) for ladder in ladders.values())
            if keep is not None and least > most:
                raise ValueError(
                    f"keep={keep} of {n_dense:,} parameters is too small: the smallest sizes of all layers have "
                    f"{least:,} parameters together"
                )
            rungs = allocate(ladders, most)
            sizes = {name: rung.n_params for name, rung in rungs.items()}
            chosen = {name: rung.candidate for name, rung in rungs.items()}
        else:
            for dense in targets:
                name, share = dense.name, shares[dense.name]
                chosen[name] = best_of(sizers[name], dense, share, metric_of(dense))
                sizes[name] = sizers[name][chosen[name]].parameters_within(name, dense.linear, share)

    def replacement(dense: DenseLayer, fitted: Metric | None) -> tuple[StructuredLinear | None, str | None]:
        if callable(layer):
            new = layer(dense.name, dense.linear)
            if not isinstance(new, StructuredLinear | None):
                raise ValueError(f"`layer` must return a StructuredLinear or None, but returned {type(new).__name__}")
            if new is not None and (new.out_features, new.in_features) != tuple(dense.linear.weight.shape):
                shape = tuple(dense.linear.weight.shape)
                raise ValueError(f"`layer` must return a layer of shape {shape}, but {type(new).__name__} has {new}")
            return new, None if new is not None else "`layer` left it dense"
        sizer = sizers[dense.name][chosen.get(dense.name, 0)]
        if chi is not None:
            return sizer.with_chi(dense.name, dense.linear, chi, fitted)
        if rel_error is not None:
            return sizer.with_error(dense.linear, rel_error, fitted)
        if dense.name not in sizes:
            raise ValueError(f"`max_params` has no entry for it, only for {', '.join(sizes) or 'none'}")
        if dense.name not in chosen:
            sizer = sizers[dense.name][best_of(sizers[dense.name], dense, sizes[dense.name], fitted)]
        return sizer.with_params(dense.name, dense.linear, sizes[dense.name], fitted)

    compressed = copied(model)
    rows: dict[str, CompressedLayer] = {}
    for done, dense in enumerate(found):
        new, fitted, reason = None, None, dense.reason
        if reason is None:
            try:
                fitted = metric_of(dense)
                new, reason = replacement(dense, fitted)
            except ValueError as error:
                told = str(error)
                raise ValueError(told if told.startswith(f"{dense.name}: ") else f"{dense.name}: {told}") from error
        if new is not None:
            _replace(model, compressed, dense, new)
        row = row_of(dense, new, reason, n_tokens)
        if new is None or not (init is not None or dense.linear.weight.is_meta):
            W = dense.linear.weight.detach()
            W_hat = None if new is None else new.to_matrix().detach()
            if narrowed is not None and dense.name in narrowed.inputs:
                # Its error includes that of the units that are gone.
                W, W_hat = narrowed.whole(dense.name, W if W_hat is None else W_hat)
                fitted = metric_of(dense, whole=True)
                held_out = metric_of(dense, held_out=True, whole=True)
            else:
                held_out = metric_of(dense, held_out=True) if fitted else None
            row = replace(row, **errors_of(W, W_hat, metric, fitted, held_out))
        if narrowed is not None:
            row = narrowed.noted(row)
        rows[dense.name] = row
        for name in dense.sharers:
            note = f"shares the parameters of {dense.name}"
            rows[name] = replace(row, name=name, n_params_before=0, n_params_after=0, n_counted=0, reason=note)
        if progress is not None:
            progress("fits", done + 1, len(found))
    warn_where_parted(rows.values())
    in_order = [rows[name] for name, _ in model.named_modules(remove_duplicate=False) if name in rows]
    if narrowed is not None:
        narrowed.mark(compressed)
    return compressed, CompressionReport(tuple(in_order), n_params(whole), n_params(compressed), n_tokens)


def _check_weights(layers: Sequence[DenseLayer]) -> None:
    """Raise ValueError with the name of a layer whose weight cannot be decomposed."""
    for dense in layers:
        if dense.linear.weight.is_meta:
            continue
        try:
            check_matrix(dense.linear.weight.detach())
        except ValueError as error:
            raise ValueError(f"{dense.name}: {error}") from error


def _replace(model: nn.Module, compressed: nn.Module, dense: DenseLayer, new: StructuredLinear) -> None:
    """Put the new layer wherever `compressed`, a copy of `model`, has the dense one or another one with its weight."""
    first = model.get_submodule(dense.name)
    placed, biases = {id(first): new}, {id(first.bias): new.bias, id(None): None}
    matrix = [*new.factors(), *new.buffers()]
    for name in (dense.name, *dense.sharers):
        module = model.get_submodule(name)
        if id(module) not in placed:
            twin = copy.deepcopy(new, {id(tensor): tensor for tensor in matrix})
            if id(module.bias) not in biases:
                biases[id(module.bias)] = copy.deepcopy(module.bias)
            twin.bias = biases[id(module.bias)]
            placed[id(module)] = twin.train(module.training)
        compressed.set_submodule(name, placed[id(module)])
        note_original_features(placed[id(module)], original_features(module))


def _measured(dense: DenseLayer, statistics: Statistics, metric: str) -> DenseLayer:
    """With the reason to stay dense if the statistics give no metric for it."""
    if dense.reason is not None or dense.linear.weight.is_meta:
        return dense
    return replace(dense, reason=statistics.why_not((dense.name, *dense.sharers), metric))
