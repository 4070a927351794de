"""The size of a configuration: the horizontal axis of a frontier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from analysis.results.numbers import format_count


@dataclass(frozen=True)
class Size:
    """A metric that a frontier is drawn against. word: what it is called in sentences; shown: a value as text."""

    name: str
    axis_label: str
    word: str
    shown: Callable[[float], str] = "{:g}".format

    def of(self, summary: pd.DataFrame, seeds: pd.DataFrame) -> pd.Series:
        """The size of each trial, aligned with the summary; a measured one is the mean over seeds. NaN if not known
        of every seed."""
        if self.name in summary:
            return summary[self.name].astype("float64")
        measured = seeds.groupby("trial")[self.name]
        means = measured.mean().where(measured.count() == measured.size())
        return summary["trial"].map(means).astype("float64")


PARAMETERS = Size("n_params", "Trainable parameters", "parameters", format_count)
SIZES = {
    "parameters": PARAMETERS,
    "bytes": Size("bytes", "Size of the stored model (bytes)", "bytes", format_count),
    "flops": Size("flops_per_token", "FLOPs per token of a forward pass", "FLOPs", format_count),
    "decode_ms": Size("decode_ms", "Time to decode a token (ms)", "decoding time"),
    "prefill_ms": Size("prefill_ms", "Time to read a context (ms)", "prefill time"),
}
"""By the names that commands and notebooks use."""
