"""Training of an MPO by sweeps: one core of each layer at a time."""

from __future__ import annotations

from pydantic import Field

from study.spec.values import PositiveInt, Strict


class Sweep(Strict):
    """One core of each MPO layer is trained at a time, from the first to the last and back, as in DMRG."""

    every: PositiveInt = Field(description="Steps for each core before the next one's turn.")

    def site(self, step: int, n_sites: int) -> int:
        """The site that is trained at this step."""
        there_and_back = [*range(n_sites), *range(n_sites - 2, 0, -1)]
        return there_and_back[step // self.every % len(there_and_back)]
