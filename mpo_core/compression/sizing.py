"""Replace dense layers by structured ones of a given size, error or number of parameters."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpo_core.compression.budget import Rung, Split, chain_ladder, low_rank_ladder, spread_budget
from mpo_core.fitting.calibration import output_error
from mpo_core.layers.low_rank import LowRankLinear, MonarchLinear, PrunedLinear
from mpo_core.layers.mpo import MPOLinear
from mpo_core.layers.structured import StructuredLinear, rounding
from mpo_core.tensor_train.algebra import rel_error
from mpo_core.tensor_train.factorisation import factorise, why_not
from mpo_core.tensor_train.initialisation import FRESH_INITS
from mpo_core.values import check_matrix

KINDS: dict[str, type[StructuredLinear]] = {
    kind.kind: kind for kind in (MPOLinear, LowRankLinear, MonarchLinear, PrunedLinear)
}

N_RUNGS = {"monarch": 16, "pruned": 64}
"""Number of sizes tried for the kinds whose errors are measured one by one."""

N_MEASURED = 6
"""Number of sizes of a calibrated chain whose errors are measured; those between are interpolated."""

QUICK_ABOVE, QUICK_SWEEPS = 2**16, 2
"""If a budget is spread, chains for matrices with more than QUICK_ABOVE entries are fitted by QUICK_SWEEPS sweeps.
These give most of the gain, and the full fit that follows is no worse."""

STEP = 1.05
"""Smallest ratio between the sizes at which a chain is fitted to meet an output error, because each fit takes time."""

Outcome = tuple[StructuredLinear | None, str | None]
"""The new layer, or None if the dense one stays; and a note about it."""


@dataclass(frozen=True)
class Sizer:
    """Makes layers of one kind. `gram` is E[x xᵀ] of the layer's inputs, or None; see `compress` for the rest."""

    kind: str
    init: str
    factorisation: str
    n_sites: int | None
    padding: bool
    method: str | None
    forward: str
    generator_for: Callable[[str], torch.Generator] | None
    allow_growth: bool = False

    def with_chi(self, name: str, linear: nn.Linear, chi: int, gram: Tensor | None) -> Outcome:
        """Return a layer of that cap or rank; keep the dense one if it is no larger and growth is not allowed."""
        if self.kind == "pruned":
            raise ValueError("a pruned layer has no `chi`; give a budget or a rel_error")
        size = {"chi" if self.kind == "mpo" else "rank": chi}
        shape = KINDS[self.kind].empty_like(linear, **size, **self._options)
        reason = _no_smaller(shape, linear)
        if reason is not None and not self.allow_growth:
            return None, reason
        fresh = self.init in FRESH_INITS
        return self._drawn(name, linear, shape) if fresh else self._decomposed(linear, gram, **size), reason

    def with_params(self, linear: nn.Linear, max_params: int, gram: Tensor | None) -> Outcome:
        """Return the largest layer with at most max_params parameters; keep the dense one if it has at most that
        many."""
        if max_params >= linear.weight.numel():
            return None, f"its share of the budget, {max_params:,} parameters, holds the dense matrix"
        return self._decomposed(linear, gram, max_params=max_params), None

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
            return None, f"no {self.kind} layer with fewer parameters found within {error} {target:g}"
        return layer, None

    def ladder(self, linear: nn.Linear, gram: Tensor | None) -> list[Rung]:
        """The sizes below the dense one, ascending, with their squared relative errors."""
        W = linear.weight.detach()
        check_matrix(W)
        if self.kind == "mpo":
            ladder = chain_ladder(W, gram, lambda chi: self._split(linear, chi))
            if gram is not None:
                ladder = self._corrected(linear, gram, ladder)
        elif self.kind == "low_rank":
            ladder = low_rank_ladder(W, gram)
        else:
            n_rungs = N_RUNGS[self.kind]
            ladder = [self._measured(linear, gram, W.numel() * step // n_rungs) for step in range(1, n_rungs)]
        return sorted({rung.n_params: rung for rung in ladder if rung is not None}.values(), key=lambda r: r.n_params)

    def _measured(self, linear: nn.Linear, gram: Tensor | None, max_params: int) -> Rung | None:
        try:
            layer = self._decomposed(linear, gram, max_params=max_params, **self._quick(linear))
        except ValueError:  # even the smallest layer has more
            return None
        return Rung(layer.n_params_matrix, _error(linear, layer, gram) ** 2)

    def _corrected(self, linear: nn.Linear, gram: Tensor, ladder: list[Rung]) -> list[Rung]:
        """Return the ladder with the errors of the fit: measured at some rungs, scaled by the factors there in between.

        The ladder holds the error of a whitened TT-SVD, which follows the shape of the fit's error but not its size.
        """
        if not ladder:
            return ladder
        places: Sequence[int] = range(len(ladder))
        if len(ladder) > N_MEASURED:  # dense where a larger bond changes most
            places = sorted({round(len(ladder) ** (step / (N_MEASURED - 1))) - 1 for step in range(N_MEASURED)})
        tiny = 1e-16
        logs = []
        for place in places:
            layer = self._decomposed(linear, gram, max_params=ladder[place].n_params, **self._quick(linear))
            error = _error(linear, layer, gram) ** 2
            logs.append(math.log((error + tiny) / (ladder[place].error + tiny)))
        at = [math.log(ladder[place].n_params) for place in places]
        return [
            Rung(rung.n_params, (rung.error + tiny) * math.exp(_between(math.log(rung.n_params), at, logs)) - tiny)
            for rung in ladder
        ]

    def _within_output_error(self, linear: nn.Linear, target: float, gram: Tensor) -> StructuredLinear | None:
        if self.kind == "mpo":
            ladder = _thinned(chain_ladder(linear.weight.detach(), None, lambda chi: self._split(linear, chi)))
        else:
            ladder = self.ladder(linear, gram)
        layers: dict[int, StructuredLinear] = {}

        def meets(index: int) -> bool:
            layer = self._decomposed(linear, gram, max_params=ladder[index].n_params)
            if not _error(linear, layer, gram) <= target:  # the error may be NaN
                return False
            layers[index] = layer
            return True

        # The error of a fit may sometimes rise with the size. The layer that bisection finds does meet the target.
        return layers.get(bisect_left(range(len(ladder)), True, key=meets))

    def _within_weight_error(self, linear: nn.Linear, target: float) -> StructuredLinear | None:
        """Try tighter targets too: rounding the factors to the weight's dtype (bfloat16) may exceed what is left."""
        for share in (1.0, 0.9, 0.5, 0.0):
            layer = self._of_weight_error(linear, share * target)
            if layer is None or _error(linear, layer, None) <= max(target * (1 + 1e-6), rounding(linear.weight)):
                return layer
        return None

    def _of_weight_error(self, linear: nn.Linear, target: float) -> StructuredLinear | None:
        sizes = {}
        if self.kind == "mpo" and self.factorisation == "min_params":
            # The split depends on the cap, so the cap comes first.
            rung = next((rung for rung in self.ladder(linear, None) if rung.error <= target**2), None)
            if rung is None:
                return None
            layer = MPOLinear.empty_like(linear, max_params=rung.n_params, **self._options)
            sizes = {"d_out": layer.d_out, "d_in": layer.d_in, "factorisation": "balanced"}
        return self._decomposed(linear, None, rel_error=target, **sizes)

    def _quick(self, linear: nn.Linear) -> dict[str, int]:
        quick = self.kind == "mpo" and linear.weight.numel() > QUICK_ABOVE
        return {"max_sweeps": QUICK_SWEEPS} if quick else {}

    @property
    def _options(self) -> dict[str, Any]:
        if self.kind != "mpo":
            return {}
        split = {"factorisation": self.factorisation, "n_sites": self.n_sites, "padding": self.padding}
        return {**split, "forward": self.forward}

    def _decomposed(self, linear: nn.Linear, gram: Tensor | None, **size: Any) -> StructuredLinear:
        method = {"method": self.method} if self.kind == "mpo" else {}
        return KINDS[self.kind].from_linear(linear, gram=gram, **method, **{**self._options, **size})

    def _drawn(self, name: str, linear: nn.Linear, layer: StructuredLinear) -> StructuredLinear:
        generator_for = self.generator_for
        if not linear.weight.is_meta:
            if generator_for is None:
                raise ValueError(f"init {self.init!r} draws fresh parameters from `generator_for`, but got None")
            layer.draw(self.init, lambda parameter: generator_for(f"{name}.{parameter}"))
        return layer

    def _split(self, linear: nn.Linear, chi: int) -> Split:
        return factorise(
            linear.out_features,
            linear.in_features,
            method=self.factorisation,
            n_sites=self.n_sites,
            chi=chi,
            padding=self.padding,
        )


def spread(
    sizer: Sizer, targets: Mapping[str, nn.Linear], grams: Mapping[str, Tensor], budget: float
) -> dict[str, int]:
    """The most parameters that each layer may have, so that all together have at most `budget`.

    Raises:
        ValueError: a budget that is neither a fraction below 1 nor a whole number, or is too small for the smallest
            layers.
    """
    if isinstance(budget, float) and not 0 < budget < 1:
        raise ValueError(f"`budget` must be a number of parameters or a fraction between 0 and 1, but got {budget}")
    if isinstance(budget, float):
        budget = int(budget * sum(linear.weight.numel() for linear in targets.values()))
    ladders: dict[str, list[Rung]] = {}
    for name, linear in targets.items():
        try:
            ladders[name] = [*sizer.ladder(linear, grams.get(name)), Rung(linear.weight.numel(), 0.0)]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return {name: rung.n_params for name, rung in spread_budget(ladders, budget).items()}


def _error(linear: nn.Linear, layer: StructuredLinear, gram: Tensor | None) -> float:
    W, W_hat = linear.weight, layer.to_matrix()
    return rel_error(W, W_hat) if gram is None else output_error(W, W_hat, gram)


def _thinned(ladder: Sequence[Rung]) -> list[Rung]:
    kept: list[Rung] = []
    for rung in ladder:
        if not kept or rung.n_params >= STEP * kept[-1].n_params:
            kept.append(rung)
    return kept


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return y at x by linear interpolation between points in ascending order, the first and the last included."""
    right = max(1, min(bisect_left(xs, x), len(xs) - 1))
    if len(xs) == 1:
        return ys[0]
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])


def _no_smaller(layer: StructuredLinear, linear: nn.Linear) -> str | None:
    if layer.n_params_matrix < linear.weight.numel():
        return None
    if isinstance(layer, MPOLinear):
        return why_not(layer.out_features, layer.in_features, layer.d_out, layer.d_in, layer.bonds)
    return f"{layer.structure()} has {layer.n_params_matrix:,} parameters, the dense matrix {linear.weight.numel():,}"
