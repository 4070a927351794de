"""The model of a trial, and its parameter and FLOP counts, computed from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import mpo_core
from study.errors import StudyError, first_line
from study.spec.arms import AUTO, PRETRAINED, DenseArm
from study.spec.config import BITS, StudyConfig
from study.spec.kinds import DECOMPOSED
from study.spec.models import MAX_PARAMS, Model, with_checksum, with_settings
from study.spec.protocol import evaluation_steps
from study.spec.trial import TrialShape, TrialSpec, json_hash
from study.training.bonds import check_chains, room_to_grow
from study.training.calibration import shared_statistics
from study.training.healing import freeze_unhealed, is_distilled
from study.training.weights import load_weights


def build_model(
    spec: TrialSpec,
    vocab_size: int,
    generator_for: Callable[[str], torch.Generator] | None,
    start_weights: dict[str, torch.Tensor] | None = None,
    calibration: Sequence[torch.Tensor] = (),
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, mpo_core.CompressionReport | None]:
    """The model a run starts from.

    Args:
        generator_for: gives the generator of each parameter's initial values; None builds shapes without values (on
            the meta device).
        start_weights: state of the trained dense model that a spec with a start compresses, or trains further.
        calibration: batches of tokens (B, T) on which a data-aware refinement fits the model.
        device: where statistics for `keep` are collected. The model is on the CPU.
    """
    is_pretrained = spec.start == PRETRAINED
    at = None if generator_for is not None else "meta"
    model = dense_model(spec.model, vocab_size, at, with_weights=is_pretrained)
    if start_weights is not None:
        load_weights(model, start_weights)
    elif generator_for is not None and not is_pretrained:
        try:
            mpo_core.draw_parameters(model, generator_for, spec.init if spec.family == "dense" else None)
        except ValueError as error:
            raise StudyError(f"model: {error}") from None
    if spec.family == "dense":
        return model, None
    if spec.keep is not None:
        return _kept(spec, model, calibration, device)
    starts_fresh = start_weights is None and not is_pretrained and spec.init != DECOMPOSED
    # Without values there is nothing to decompose, and shapes do not depend on the initial values.
    init = (spec.init or "variance") if starts_fresh else None if generator_for is not None else "variance"
    chosen = _layers(spec, model)
    # Not every kind of layer has this option.
    gauge: dict[str, Any] = {} if spec.gauge is None else {"gauge": spec.gauge}
    statistics = mpo_core.collect_statistics(model, calibration, held_out=0) if calibration else None
    # "als" is the name that studies of before have for a fit in the metric.
    method = "lbfgs" if spec.refinement == "als" else spec.refinement
    if spec.family != "mpo":
        return mpo_core.compress(
            model,
            layer=spec.family,
            **chosen,
            max_params=_sizes_as_mpo(spec, vocab_size),
            init=init,
            generator_for=generator_for,
            statistics=statistics,
            **gauge,
            **spec.kind_options,
        )
    return mpo_core.compress(
        model,
        chi=spec.chi,
        **chosen,
        allow_growth=True,  # a study may ask for a χ so large that a layer grows
        factorisation=spec.factorisation,
        n_sites=spec.n_sites,
        init=init,
        generator_for=generator_for,
        forward=spec.forward or "reconstruct",
        **gauge,
        **({"statistics": statistics, "method": method} if calibration else {}),
    )


def _layers(spec: TrialSpec, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Which layers are replaced, as arguments of `mpo_core.compress`."""
    if spec.layers is not None:
        return {"include": spec.layers}
    # All linear layers of PicoGPT are replaced, as in the paper; elsewhere the head stays, as people compress them.
    head = None if spec.model.architecture == "picogpt" else mpo_core.head_of(model)
    return {} if head is None else {"exclude": (head,)}


def _kept(
    spec: TrialSpec, model: nn.Module, calibration: Sequence[torch.Tensor], device: torch.device | str
) -> tuple[nn.Module, mpo_core.CompressionReport]:
    """The model of a spec with `keep`, and what became of the layers that can be replaced.

    Raises:
        ValueError: a layer has to stay dense, for example because no calibration text reaches it.
    """
    assert spec.keep is not None
    chosen = _layers(spec, model)
    dense = mpo_core.replaceable_layers(model, **chosen)
    if dense[0].linear.weight.is_meta:
        return _evenly_kept(spec, model, dense, chosen)
    layer: Any = spec.family
    if spec.factorisation == AUTO:
        shapes = dict.fromkeys(tuple(each.linear.weight.shape) for each in dense)
        tried = [split for shape in shapes for split in mpo_core.MPOLinear.options_to_try(*shape)]
        layer = [("mpo", split) for split in tried]
    names = [name for each in dense for name in (each.name, *each.sharers)]
    statistics = shared_statistics(spec.model, model, names, calibration, device) if calibration else None
    for each in dense:
        assert spec.metric is not None
        if statistics and (why := statistics.why_not((each.name, *each.sharers), spec.metric)):
            raise ValueError(f"`keep` cannot be met: {each.name} has to stay dense: {why}")
    small, report = mpo_core.compress(
        model,
        layer=layer,
        **chosen,
        keep=spec.keep,
        statistics=statistics,
        metric=spec.metric,
        spread=spec.spread,
        narrow=bool(spec.narrow),
        **_options(spec),
    )
    return small, replace(report, rows=tuple(row for row in report.rows if row.name in set(names)))


def _evenly_kept(
    spec: TrialSpec, model: nn.Module, dense: Sequence[Any], chosen: Mapping[str, Any]
) -> tuple[nn.Module, mpo_core.CompressionReport]:
    """The shapes of a spec with `keep`, with the same share of every layer; of low rank, if kinds or splits are chosen.

    These are the shapes with `spread: even`; with another spread they have as many FLOPs, about.
    """
    assert spec.keep is not None
    kind = mpo_core.kind_called("low_rank" if _is_chosen(spec) else spec.family)
    options = {key: value for key, value in _options(spec).items() if key in kind.option_names()}
    shares = {each.name: int(spec.keep * each.linear.weight.numel()) for each in dense}

    def made() -> tuple[nn.Module, mpo_core.CompressionReport]:
        return mpo_core.compress(model, layer=kind.kind, **chosen, max_params=shares, init=kind.inits[0], **options)

    small, report = made()
    masks = {row.name: row.n_counted - row.n_params_after for row in report.rows}
    if not any(masks.values()):
        return small, report
    shares = {name: share - masks[name] for name, share in shares.items()}  # a mask takes its part of the share
    return made()


def _is_chosen(spec: TrialSpec) -> bool:
    """Whether each matrix chooses its kind or its split."""
    return AUTO in (spec.family, spec.factorisation)


def _options(spec: TrialSpec) -> dict[str, Any]:
    """Options of the kind of layer."""
    given = {key: getattr(spec, key) for key in ("gauge", "forward", "n_sites", "factorisation")}
    if _is_chosen(spec):  # chains only, and each split has its own sites
        given = {"gauge": spec.gauge}
    given |= spec.kind_options
    return {key: value for key, value in given.items() if value is not None}


def dense_model(sizes: Model, vocab_size: int, device: str | None = None, with_weights: bool = False) -> nn.Module:
    """The dense model of these sizes; its values are not drawn yet, unless it has pretrained weights.

    Raises:
        StudyError: it cannot be made.
        OSError: this machine lacks its files.
    """
    try:
        with_checksum(sizes)
    except ValueError as error:
        if device == "meta":
            raise StudyError(f"model: {error}") from None
        raise OSError(f"model: {error}") from None  # this machine lacks the files: no failure of the run
    try:
        how = {"vocab_size": vocab_size, "context": sizes.context, "device": device, "with_weights": with_weights}
        return mpo_core.build_language_model(sizes.architecture, sizes.settings, **how)
    except ValueError as error:
        raise StudyError(f"model: {error}") from None


def check_model(config: StudyConfig, vocab_size: int) -> None:
    """Raise a StudyError if a model cannot be studied, before anything runs; PicoGPT always can."""
    if config.model.architecture == "picogpt" or min(config.model.context, vocab_size) < 2:
        return
    if config.protocol.recompute:
        try:
            mpo_core.recompute_blocks(dense_model(config.model, vocab_size, "meta"))
        except Exception as error:  # code of a library, or of the user
            raise StudyError(f"protocol.recompute: {first_line(error)}") from error
    _check_sizes(config.model, vocab_size, config.has_pretrained)
    for arm in config.arms:
        if isinstance(arm, DenseArm) and arm.model is not None:
            try:
                _check_sizes(with_settings(config.model, arm.model), vocab_size, False)
            except StudyError as error:
                raise StudyError(f"arms[{arm.name}]: {error}") from None


def _check_sizes(sizes: Model, vocab_size: int, is_pretrained: bool) -> None:
    n_params = mpo_core.n_params(dense_model(sizes, vocab_size, "meta"))
    if n_params > MAX_PARAMS:
        if is_pretrained:
            return  # too large for the driver's machine
        raise StudyError(f"model: a dense model has at most {MAX_PARAMS:,} parameters, but this one has {n_params:,}")
    made = dense_model(sizes, vocab_size, with_weights=is_pretrained)
    try:
        if is_pretrained:
            mpo_core.check_causal(made, sizes.named)
        else:
            mpo_core.draw_parameters(made, lambda name: torch.Generator().manual_seed(0))
            mpo_core.check_trainable(made, sizes.named)
        mpo_core.check_flops(made, sizes.named)
    except Exception as error:  # code of a library, or of the user
        raise StudyError(f"model: {first_line(error)}") from error


def _sizes_as_mpo(spec: TrialSpec, vocab_size: int) -> dict[str, int]:
    """For each layer, the number of parameters that it has in an MPO model of χ = `as_chi`.

    The MPO is in the free gauge, whatever the spec's own gauge, so that controls of both gauges have the same limit.
    """
    changes = {"family": "mpo", "chi": spec.as_chi, "init": "variance", "start": None, "gauge": None, "options": None}
    as_mpo = spec.model_copy(update=changes)
    _, report = build_model(as_mpo, vocab_size, None)
    assert report is not None
    return {row.name: row.n_params_after for row in report.rows}


def trial_shape(spec: TrialSpec, vocab_size: int, n_validation: int, reference: Model, bits: int = BITS) -> TrialShape:
    """Parameters, FLOPs and identity of a spec; the identity is that of its configuration after clipping of bonds.

    Args:
        n_validation: number of tokens in the validation split.
        reference: sizes of the study's dense model; other models' parameters are given as fractions of its parameters.
        bits: in which a parameter is counted in bytes.

    Raises:
        StudyError: a layer of the model cannot be made.
    """
    try:
        model, report = build_model(spec, vocab_size, None)
        dense, _ = build_model(spec.model_copy(update={"family": "dense", "model": reference}), vocab_size, None)
        step_flops = _step_flops(spec, model, dense)
        flops = _flops(spec, model, n_validation, step_flops)
        n_index_bits, n_left_out = _n_index_bits(model), 0
        if spec.keep is not None and (spec.spread != "even" or _is_chosen(spec)):
            n_left_out = _n_left_out(spec, dense) + n_index_bits // BITS
        counts = [count(dense if n_left_out else model) - n_left_out for count in _COUNTS]
        for key in ("bonds", "sweep"):
            if getattr(spec, key) is not None:
                check_chains(model, key)
        if spec.bonds is not None:
            flops += _change_flops(spec, dense)
            if spec.bonds.max_params is not None:
                counts = [count + room_to_grow(model, spec.bonds.max_params) for count in counts]
        freeze_unhealed(model, spec)  # only to know that it can be done; frozen parameters have been counted
    except ValueError as error:  # for example: the smallest layer of a control's kind is larger than the MPO's
        raise StudyError(f"arms[{spec.arm}]: {error}") from None
    rows = [] if report is None else report.rows
    is_mpo = spec.family == "mpo" and spec.keep is None
    has_gauge = any(len(row.bonds) > 2 if is_mpo else row.kind != "dense" for row in rows)
    layers = [(row.name, row.d_out, row.d_in, row.bonds) if is_mpo else (row.name, row.structure) for row in rows]
    return TrialShape(
        n_params=counts[0],
        n_params_compressed=counts[1],
        n_params_dense=mpo_core.n_params(dense),
        bonds={row.name: row.bonds for row in rows if is_mpo},
        label=spec.family if spec.family in ("dense", AUTO) else mpo_core.kind_called(spec.family).label,
        identity=_identity(spec, layers, has_gauge, _own_options(spec, model)),
        step_flops=step_flops,
        flops=flops,
        vocab_size=vocab_size,
        bytes=math.ceil((counts[0] * bits + n_index_bits) / 8),
        flops_per_token=_forward_flops(spec, model, spec.model.context) / spec.model.context,
    )


def _n_index_bits(model: nn.Module) -> int:
    """Bits of all masks and indices; those of layers that share a matrix count once."""
    layers = [module for module in model.modules() if isinstance(module, mpo_core.StructuredLinear)]
    return sum({id(layer.factors()[0]): layer.n_index_bits for layer in layers}.values())


_COUNTS = (mpo_core.n_params, mpo_core.n_params_compressed)


def _n_left_out(spec: TrialSpec, dense: nn.Module) -> int:
    """How many parameters of the dense model a spec with `keep` saves, masks and indices counted as parameters.

    With a spread by errors or loss, which layers lose them depends on weights and seed, but not how many they are
    together, within one step of a layer.
    """
    assert spec.keep is not None
    replaced = mpo_core.replaceable_layers(dense, **_layers(spec, dense))
    n_replaced = sum(layer.linear.weight.numel() for layer in replaced)
    return n_replaced - int(spec.keep * n_replaced)


def _own_options(spec: TrialSpec, model: nn.Module) -> list[Any]:
    """The options that every layer has in effect, if the spec gives any."""
    if not spec.kind_options:
        return []
    layers = [layer for layer in model.modules() if isinstance(layer, mpo_core.StructuredLinear)]
    return [layer.options() for layer in layers]


def _identity(spec: TrialSpec, layers: list[Any], has_gauge: bool, options: list[Any]) -> str:
    """Hash, equal for two specs exactly if they train the same model in the same way; except that a spec which gives an
    option its default value has another one.

    Args:
        has_gauge: whether the gauge changes any layer. options: `_own_options`.
    """
    by_shape = {"chi", "as_chi", "n_sites", "factorisation"} if spec.keep is None else set()
    essence = spec.model_dump(mode="json", exclude={"arm", "layers", "gauge", "resized", "options", *by_shape})
    if options:
        essence["options"] = options
    if has_gauge and spec.gauge == "fixed":  # the free gauge is left out: it was the only one at first
        essence["gauge"] = spec.gauge
    essence["layers"] = layers
    essence["forward"] = spec.forward or "reconstruct"
    essence["protocol"]["embedding_learning_rate"] = (
        spec.protocol.embedding_learning_rate or spec.protocol.learning_rate
    )
    if spec.protocol.decay_share is not None:
        essence["protocol"]["decay_fraction"] = spec.protocol.decay_share
    if spec.family == "mpo" and spec.init == "paper" and any(len(d_out) > 1 for _, d_out, _, _ in layers):
        essence["chi"] = spec.chi  # this init mode depends on the requested cap, not on the resulting bonds
    return json_hash(essence)


def _step_flops(spec: TrialSpec, model: nn.Module, teacher: nn.Module) -> float:
    """FLOPs of an optimiser step: the backward pass costs twice the forward.

    `heal.layers: structured` is counted as training everything, an upper bound: it saves the gradients of weights that
    stay dense. `recompute` is counted as a whole further forward pass, also an upper bound: the head is not computed
    again. Distillation adds a forward pass of the teacher.
    """
    tokens = spec.protocol.batch_size * spec.model.context
    n_passes = 4 if spec.protocol.recompute else 3
    flops = n_passes * _forward_flops(spec, model, tokens)
    return flops + (mpo_core.flops_per_token(teacher, spec.model.context) * tokens if is_distilled(spec) else 0)


def _change_flops(spec: TrialSpec, dense: nn.Module) -> float:
    """FLOPs of measuring the prices of directions, by a pass forward and back."""
    assert spec.bonds is not None
    protocol = spec.protocol
    n_tokens = len(spec.bonds.steps(protocol.steps)) * protocol.calibration_batches * protocol.batch_size
    return 3 * n_tokens * spec.model.context * mpo_core.flops_per_token(dense, spec.model.context)


def _forward_flops(spec: TrialSpec, model: nn.Module, n_tokens: int) -> float:
    flops = mpo_core.flops_per_token(model, spec.model.context) * n_tokens + mpo_core.reconstruct_flops(model)
    if spec.forward == "chain":
        layers = [module for module in model.modules() if isinstance(module, mpo_core.MPOLinear)]
        reconstructed = sum(2 * layer.out_features * layer.in_features for layer in layers) * n_tokens
        flops += sum(layer.flops(n_tokens) for layer in layers) - reconstructed - mpo_core.reconstruct_flops(model)
    return flops


def _flops(spec: TrialSpec, model: nn.Module, n_validation: int, step_flops: float) -> float:
    protocol = spec.protocol
    sampled = protocol.sampled_eval_batches * protocol.sampled_eval_batch_size * spec.model.context
    evaluation = _forward_flops(spec, model, n_validation + sampled)
    if spec.forward != "chain":
        evaluation -= mpo_core.reconstruct_flops(model)
    return protocol.steps * step_flops + len(evaluation_steps(protocol)) * evaluation
