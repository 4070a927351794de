"""Allocate parameters to layers, by the error that each layer has at each of its sizes."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise

from mpo_core.fitting.ladders import Rung


def allocate(ladders: Mapping[str, Sequence[Rung]], max_params: int) -> dict[str, Rung]:
    """One rung per layer, together at most `max_params` parameters (`Rung.cost`), with a small sum of errors.

    Greedy: every layer starts at its smallest rung. Then the step along the convex hull of a ladder with the largest
    fall of error per parameter is taken, until nothing more fits. If a step does not fit, the layer takes the best rung
    below it that does. Without this last part the result is the optimum for its own number of parameters.

    Raises:
        ValueError: no layers, a layer without rungs, or the smallest rungs together exceed max_params.
    """
    if not ladders:
        raise ValueError("`ladders` must contain at least one layer, but got none")
    hulls: dict[str, list[Rung]] = {}
    rungs = {name: _undominated(name, ladder) for name, ladder in ladders.items()}
    chosen = {name: ladder[0] for name, ladder in rungs.items()}
    left = max_params - sum(rung.cost for rung in chosen.values())
    if left < 0:
        raise ValueError(
            f"the smallest sizes of all layers have {max_params - left:,} parameters together, "
            f"but got max_params={max_params:,}"
        )

    steps: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        hull = hulls[name]
        if len(hull) > 1:
            heapq.heappush(steps, (-_slope(hull[0], hull[1]), name))

    for name, ladder in rungs.items():
        hulls[name] = _hull(ladder)
        offer(name)
    while steps:
        _, name = heapq.heappop(steps)
        now, then = hulls[name][:2]
        if then.cost - now.cost <= left:
            hulls[name].pop(0)
            offer(name)
        else:
            sizes = [rung.cost for rung in rungs[name]]
            then = rungs[name][bisect_right(sizes, now.cost + left) - 1]
        left -= then.cost - now.cost
        chosen[name] = then
    return chosen


def together(ladders: Sequence[Sequence[Rung]]) -> list[Rung]:
    """The best sizes of several layers taken together, along the convex hulls of their ladders."""
    hulls = [_hull(_undominated("a layer", ladder)) for ladder in ladders]
    now = [hull[0] for hull in hulls]
    steps = [(_slope(*pair), index, pair[1]) for index, hull in enumerate(hulls) for pair in pairwise(hull)]
    found = [_sum(now)]
    # Slopes fall along a hull, so its steps stay in order.
    for _, index, rung in sorted(steps, key=lambda step: -step[0]):
        now[index] = rung
        found.append(_sum(now))
    return found


def _sum(rungs: Sequence[Rung]) -> Rung:
    error = math.fsum(rung.error for rung in rungs)
    return Rung(sum(rung.n_params for rung in rungs), error, sum(rung.n_index_bits for rung in rungs), rungs[0].bits)


def _undominated(name: str, ladder: Sequence[Rung]) -> list[Rung]:
    """Rungs in the order of their cost, without those that have more parameters but no smaller error."""
    if not ladder:
        raise ValueError(f"{name} has no size to choose from")
    kept: list[Rung] = []
    for rung in sorted(ladder, key=lambda rung: (rung.cost, rung.error)):
        if not kept or rung.error < kept[-1].error:
            kept.append(rung)
    return kept


def _hull(ladder: Sequence[Rung]) -> list[Rung]:
    hull: list[Rung] = []
    for rung in ladder:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], rung):
            hull.pop()
        hull.append(rung)
    return hull


def _slope(now: Rung, then: Rung) -> float:
    return (now.error - then.error) / (then.cost - now.cost)
