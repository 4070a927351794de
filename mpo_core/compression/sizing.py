"""Replace dense layers by structured ones of a given cap, error or number of parameters."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpo_core.compression.allocation import allocate
from mpo_core.fitting.ladders import Rung
from mpo_core.layers.structured import StructuredLinear, rounding
from mpo_core.values import check_matrix

Outcome = tuple[StructuredLinear | None, str | None]
"""The new layer, or None if the dense one stays; and a note about it."""


@dataclass(frozen=True)
class Sizer:
    """Makes layers of one kind. `gram` is E[x xᵀ] of the layer's inputs, or None; see `compress` for the rest."""

    kind: type[StructuredLinear]
    init: str | None = None
    generator_for: Callable[[str], torch.Generator] | None = None
    allow_growth: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def with_chi(self, name: str, linear: nn.Linear, chi: int, gram: Tensor | None) -> Outcome:
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
        return self._drawn(name, linear, shape) if self.init else self._fitted(linear, gram, **size), reason

    def with_params(self, name: str, linear: nn.Linear, max_params: int, gram: Tensor | None) -> Outcome:
        """Return the largest layer with at most max_params parameters; keep the dense one if it has at most that
        many."""
        if max_params >= linear.weight.numel():
            return None, f"its share, {max_params:,} parameters, holds the dense matrix"
        if self.init:
            return self._drawn(name, linear, self._empty(linear, max_params=max_params)), None
        return self._fitted(linear, gram, max_params=max_params), None

    def with_error(self, linear: nn.Linear, target: float, gram: Tensor | None) -> Outcome:
        """Return the smallest layer found within a relative error, or keep the dense one.

        The error is that of the weights, or of the outputs if a gram is given."""
        check_matrix(linear.weight)
        if gram is None:
            layer = self._within_weight_error(linear, target)
        else:
            layer = self._within_output_error(linear, target, gram)
        if layer is None or layer.n_params_matrix >= linear.weight.numel():
            error = "rel_error" if gram is None else "output error"
            return None, f"no {self.kind.kind} layer with fewer parameters found within {error} {target:g}"
        return layer, None

    def shares(self, targets: Mapping[str, nn.Linear], grams: Mapping[str, Tensor], max_params: int) -> dict[str, int]:
        """The most parameters that each layer may have, so that all together have at most max_params.

        Raises:
            ValueError: max_params is too small for the smallest layers; or as `StructuredLinear.rungs`, with the name
                of the layer.
        """
        ladders: dict[str, list[Rung]] = {}
        for name, linear in targets.items():
            W = linear.weight.detach()
            try:
                check_matrix(W)
                ladders[name] = [*self.kind.rungs(W, grams.get(name), **self.options), Rung(W.numel(), 0.0)]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return {name: rung.n_params for name, rung in allocate(ladders, max_params).items()}

    def _within_output_error(self, linear: nn.Linear, target: float, gram: Tensor) -> StructuredLinear | None:
        layers: dict[int, StructuredLinear] = {}

        def meets(size: int) -> bool:
            layer = self._fitted(linear, gram, max_params=size)
            if not layer.error(linear.weight, gram) <= target:  # the error may be NaN
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

    def _fitted(self, linear: nn.Linear, gram: Tensor | None, **size: Any) -> StructuredLinear:
        return self.kind.from_linear(linear, gram=gram, **self.options, **size)

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
