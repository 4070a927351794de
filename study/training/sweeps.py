"""Training by sweeps: the gauge of each MPO layer moves to the core that is trained next."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpo_core.tensor_train.gauge_changes import with_centre
from study.spec.sweep import Sweep
from study.training.bonds import MOMENTS, Moments, NotFinite, chains_of


def train_one_core(model: nn.Module, sweep: Sweep, step: int) -> None:
    """Let gradients reach one core of each MPO layer, the one whose turn is at this step."""
    for chain in chains_of(model).values():
        site = sweep.site(step, chain.n_sites)
        for place, core in enumerate(chain.cores):
            core.requires_grad_(place == site)


def move_centres(model: nn.Module, sweep: Sweep, step: int, moments: Moments) -> None:
    """Bring each MPO layer into the canonical gauge around the core whose turn begins at this step, in place.

    The layer's matrix stays as it is. The moments of its cores are carried over, in place; a core that had no turn yet
    has none.

    Raises:
        NotFinite: a core is not finite.
    """
    for chain in chains_of(model).values():
        before = [core.detach().clone() for core in chain.cores]
        if not all(torch.isfinite(core).all() for core in before):
            raise NotFinite
        after, change = with_centre(before, sweep.site(step, chain.n_sites))
        for core, new in zip(chain.cores, after, strict=True):
            core.data.copy_(new)
        for key, power in MOMENTS.items():
            known = [moments[core][key] if core in moments else None for core in chain.cores]
            given: list[Tensor] = [old.new_zeros(()).expand(old.shape) if one is None else one
                                   for one, old in zip(known, before, strict=True)]  # fmt: skip
            for own, new in zip(known, change.carried(given, power), strict=True):
                if own is not None:
                    own.copy_(new)
