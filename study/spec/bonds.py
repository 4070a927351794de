"""How the bonds of an MPO change while it is trained."""

from __future__ import annotations

from pydantic import Field

from study.spec.values import PositiveInt, Share, Strict


class Bonds(Strict):
    """Bonds that change while the MPO is trained.

    Directions are cut where they matter least for the loss, and grow where its gradient asks for them.
    """

    every: PositiveInt = Field(description="Steps from one change to the next.")
    until: Share = Field(default=0.75, description="Share of the steps after which the bonds stay as they are.")
    grow: Share = Field(default=0.1, description="Most parameters that one change adds, as a share of `max_params`.")
    prune: Share = Field(
        default=0.1, description="Most parameters that one change removes, as a share of `max_params`."
    )
    max_params: PositiveInt | None = Field(
        default=None,
        description="Most parameters of all MPO layers together. Default: those that they have at the start, with the "
        "arm's `chi`: parameters then only move. With fewer than those, the first change cuts to the limit.",
    )

    @property
    def shown(self) -> str:
        """In words, such as "every 100 steps until 0.75, grow 0.1, prune 0.1"."""
        most = "" if self.max_params is None else f", at most {self.max_params:,} parameters"
        return f"every {self.every} steps until {self.until:.3g}, grow {self.grow:.3g}, prune {self.prune:.3g}{most}"

    def steps(self, n_steps: int) -> range:
        """The steps before which the bonds change, of `n_steps` steps."""
        return range(self.every, min(round(self.until * n_steps), n_steps - 1) + 1, self.every)
