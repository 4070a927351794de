"""Replace dense layers by structured ones of a given cap, error or number of parameters."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpo_core.fitting.ladders import QUICK_ABOVE, Rung
from mpo_core.fitting.metric import Metric
from mpo_core.layers.structured import StructuredLinear, rounding
from mpo_core.models.dense_layers import DenseLayer
from mpo_core.values import check_matrix

SPREADS = ("loss", "errors", "even")
"""Ways to spread parameters over layers, see `compress`."""

FAR = 1.1
"""A kind whose error is FAR times that of another after its `compared_steps` is not followed further."""

Outcome = tuple[StructuredLinear | None, str | None]
"""The new layer, or None if the dense one stays; and a note about it."""


@dataclass(frozen=True)
class Sizer:
    """Makes layers of one kind. A metric of None is the Frobenius norm; see `compress` for the rest."""

    kind: type[StructuredLinear]
    init: str | None = None
    generator_for: Callable[[str], torch.Generator] | None = None
    allow_growth: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def takes_steps(self) -> bool:
        """Whether a layer is fitted by steps."""
        return "max_steps" in self.kind.option_names()

    def with_chi(self, name: str, linear: nn.Linear, chi: int, metric: Metric | None) -> Outcome:
        """Return a layer of that cap or rank; keep the dense one if it is no larger and growth is not allowed."""
        if self.kind.size is None:
            raise ValueError(
                f"a {self.kind.label} layer cannot be sized by `chi`; give `keep`, `max_params` or `rel_error`"
            )
        size = {self.kind.size: chi}
        shape = self._empty(linear, **size)
        reason = shape.why_no_smaller()
        if reason is not None and not self.allow_growth:
            return None, reason
        return self._drawn(name, linear, shape) if self.init else self._fitted(linear, metric, **size), reason

    def with_params(self, name: str, linear: nn.Linear, max_params: int, metric: Metric | None) -> Outcome:
        """Return the largest layer with at most max_params parameters; keep the dense one if it has at most that
        many."""
        if max_params >= linear.weight.numel():
            return None, f"its share, {max_params:,} parameters, holds the dense matrix"
        if self.init:
            return self._drawn(name, linear, self._empty(linear, max_params=max_params)), None
        return self._fitted(linear, metric, max_params=max_params), None

    def with_error(self, linear: nn.Linear, target: float, metric: Metric | None) -> Outcome:
        """Return the smallest layer found within a relative error, or keep the dense one.

        The error is that in the metric."""
        check_matrix(linear.weight)
        if metric is None:
            layer = self._within_weight_error(linear, target)
        else:
            layer = self._within_metric_error(linear, target, metric)
        if layer is None or layer.n_params_matrix >= linear.weight.numel():
            return None, f"no {self.kind.kind} layer with fewer parameters found within rel_error {target:g}"
        return layer, None

    def why_not(self, linear: nn.Linear) -> str | None:
        """Why there is no layer of this kind for a matrix of this shape; None if there is one."""
        try:
            self._empty(linear, max_params=linear.weight.numel())
        except ValueError as error:
            return str(error)
        return None

    def ladder(self, name: str, W: Tensor, metric: Metric | None, as_loss: bool) -> list[Rung]:
        """The squared relative error at each size, the dense one included; or half the squared error, which is the
        predicted loss.

        Raises:
            ValueError: as `StructuredLinear.rungs`, with the name of the layer.
        """
        try:
            check_matrix(W)
            rungs = [*self.kind.rungs(W, metric, **self.options), Rung(W.numel(), 0.0)]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        unit = metric.on(W).norm_of_weight(W) ** 2 / 2 if metric is not None and as_loss else 1.0
        bits = 8 * W.element_size()
        return [replace(rung, error=rung.error * unit, bits=bits) for rung in rungs]

    def quick_error(self, linear: nn.Linear, max_params: int, metric: Metric | None) -> float:
        """The relative error of a fit of that size by at most `compared_steps` steps, to choose between kinds.

        Raises:
            ValueError: the kind has no layer of that size or shape.
        """
        is_large = linear.weight.numel() > QUICK_ABOVE
        quick = {"max_steps": self.kind.compared_steps} if self.takes_steps and is_large else {}
        return self.kind.fit_error(linear.weight.detach(), max_params, metric, **{**quick, **self.options})

    def parameters_within(self, name: str, linear: nn.Linear, share: int) -> int:
        """The parameters of a layer that costs at most this share, with its mask or indices.

        Raises:
            ValueError: even the smallest layer costs more, with the name of the layer.
        """
        if share >= linear.weight.numel():
            return share
        try:
            n_index_bits = self._empty(linear, max_params=share).n_index_bits
        except ValueError as error:
            raise ValueError(f"{name}: its share is too small: {error}") from error
        size = share - -(-n_index_bits // (8 * linear.weight.element_size()))
        if size < 1:
            raise ValueError(f"{name}: its share, {share:,} parameters, does not hold the mask or indices alone")
        return size

    def _within_metric_error(self, linear: nn.Linear, target: float, metric: Metric) -> StructuredLinear | None:
        layers: dict[int, StructuredLinear] = {}

        def meets(size: int) -> bool:
            layer = self._fitted(linear, metric, max_params=size)
            if not layer.error(linear.weight, metric) <= target:  # the error may be NaN
                return False
            layers[size] = layer
            return True

        # The error of a fit may sometimes rise with the size. The layer that bisection finds does meet the target.
        sizes = self.kind.sizes(linear.weight.detach(), **self.options)
        place = bisect_left(sizes, True, key=meets)
        return layers[sizes[place]] if place < len(sizes) else None

    def _within_weight_error(self, linear: nn.Linear, target: float) -> StructuredLinear | None:
        """Try tighter targets too: rounding the factors to the weight's dtype (bfloat16) may exceed what is left."""
        for share in (1.0, 0.9, 0.5, 0.0):
            layer = self._fitted(linear, None, rel_error=share * target)
            if layer.error(linear.weight) <= max(target * (1 + 1e-6), rounding(linear.weight)):
                return layer
        return None

    def _fitted(self, linear: nn.Linear, metric: Metric | None, **size: Any) -> StructuredLinear:
        return self.kind.from_linear(linear, metric=metric, **self.options, **size)

    def _empty(self, linear: nn.Linear, **size: Any) -> StructuredLinear:
        return self.kind.empty_like(linear, **self.kind.of_constructor(self.options), **size)

    def _drawn(self, name: str, linear: nn.Linear, layer: StructuredLinear) -> StructuredLinear:
        generator_for = self.generator_for
        if not linear.weight.is_meta:
            if generator_for is None:
                raise ValueError(
                    f"init {self.init!r} needs `generator_for`, a function from the name of a "
                    "parameter to its torch.Generator"
                )
            layer.draw(self.init or "", lambda parameter: generator_for(f"{name}.{parameter}"))
        return layer


def best_of(sizers: Sequence[Sizer], dense: DenseLayer, max_params: int, metric: Metric | None) -> int:
    """Which of these has the least error at that size; those that cannot have it are left out.

    Raises:
        ValueError: none can, with the name of the layer and the reason of the first.
    """
    return next(iter(_errors(sizers, dense, max_params, metric))) if len(sizers) > 1 else 0


def ladder_of(
    sizers: Sequence[Sizer], dense: DenseLayer, share: int, metric: Metric | None, as_loss: bool
) -> list[Rung]:
    """The sizes of all kinds that may replace a matrix; those that do not fit its shape are left out.

    Ladders of kinds that are fitted by steps take long. So only the one with the least error at an equal share of the
    parameters counts, and only if that is at most `FAR` times the least error of the other kinds.

    Raises:
        ValueError: as `Sizer.ladder`, if no kind fits.
    """
    others = [index for index, sizer in enumerate(sizers) if not sizer.takes_steps]
    by_steps = [index for index, sizer in enumerate(sizers) if sizer.takes_steps]
    if len(sizers) > 1 and by_steps:
        with suppress(ValueError):  # none is as small as the share, but the layers need not have equal shares
            errors = _errors(sizers, dense, share, metric)
            most = FAR * min((errors[index] for index in others if index in errors), default=math.inf)
            by_steps = [index for index in errors if index in by_steps and errors[index] <= most][:1]
    rungs: list[Rung] = []
    why: ValueError | None = None
    for index in [*others, *by_steps]:
        try:
            ladder = sizers[index].ladder(dense.name, dense.linear.weight.detach(), metric, as_loss)
        except ValueError as error:
            why = why or error
        else:
            rungs += [replace(rung, candidate=index) for rung in ladder]
    if not rungs and why is not None:
        raise why
    return rungs


def _errors(sizers: Sequence[Sizer], dense: DenseLayer, max_params: int, metric: Metric | None) -> dict[int, float]:
    """The errors at that size, the least first; those that cannot have it are left out."""
    name, linear = dense.name, dense.linear
    least = rounding(linear.weight)  # below it errors are equal, and a kind without steps comes first
    errors: dict[int, float] = {}
    why = ""
    for index, sizer in enumerate(sizers):
        try:
            size = sizer.parameters_within(name, linear, max_params)
            errors[index] = max(sizer.quick_error(linear, size, metric), least)
        except ValueError as error:
            why = why or str(error)
    if not errors:
        raise ValueError(f"{name}: {why.removeprefix(f'{name}: ')}")
    return dict(sorted(errors.items(), key=lambda item: (item[1], sizers[item[0]].takes_steps)))
