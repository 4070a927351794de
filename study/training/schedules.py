"""Schedules of the learning rate, by name; to add one, add a function here and its name to `study.spec.values`.

Each gives the rate at a step from `warmup_steps` to `steps`. The rate at `steps` is that after the last step: 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from study.spec.protocol import Protocol


def learning_rate_at(step: int, protocol: Protocol) -> float:
    """Learning rate at a step, 0 to `steps`: linear warm-up to the peak, then the protocol's schedule."""
    if protocol.steps == 0:
        return 0.0
    if step < protocol.warmup_steps:
        return protocol.learning_rate * (step + 1) / protocol.warmup_steps
    return SCHEDULES[protocol.schedule](step, protocol)


def cosine(step: int, protocol: Protocol) -> float:
    """A cosine that reaches 0 at the last step (paper, section 4.2)."""
    progress = (step - protocol.warmup_steps) / (protocol.steps - protocol.warmup_steps)
    return protocol.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def wsd(step: int, protocol: Protocol) -> float:
    """Warm-up, stable, decay: the peak, then a linear fall to 0 over the last share `decay_fraction` of the steps.

    If the warm-up ends later than the fall would begin, the fall begins there: then there is no constant part.

    Source: Hu et al. 2024, MiniCPM, section 4; the linear fall and its default length: Hägele et al. 2024, Scaling Laws
        and Compute-Optimal Training Beyond Fixed Training Durations, section 3.
    """
    assert protocol.decay_share is not None
    n_falling = min(protocol.steps * protocol.decay_share, protocol.steps - protocol.warmup_steps)
    return protocol.learning_rate * min(1.0, (protocol.steps - step) / n_falling)


SCHEDULES: dict[str, Callable[[int, Protocol], float]] = {"cosine": cosine, "wsd": wsd}
