"""The effect of compression on each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


_ERRORS = ("rel_error", "error", "held_out_error", "predicted_loss", "held_out_loss")


@dataclass(frozen=True)
class CompressedLayer:
    """The result for one linear layer. Parameters are those of its weight matrix, without the bias."""

    name: str
    kind: str
    """The kind of layer, or "dense" if the layer was kept."""
    out_features: int
    in_features: int
    d_out: tuple[int, ...]
    """Local sizes. Like d_in and bonds, empty for layers that are not chains of cores."""
    d_in: tuple[int, ...]
    bonds: tuple[int, ...]
    structure: str
    """The layer's own short description of what fixes its shape."""
    n_params_before: int
    n_params_after: int
    n_counted: int
    """n_params_after, and one for as many bits of a mask or of indices as a parameter has; `keep` limits these."""
    flops_per_token: float
    """FLOPs per token of a forward pass over `n_tokens` tokens, without the bias; a multiply-add counts as two."""
    bytes_per_token: float
    """Bytes that such a forward pass reads and writes, per token."""
    rel_error: float | None = None
    """‖W − Ŵ‖_F / ‖W‖_F. Like all errors, None for a newly drawn layer."""
    error: float | None = None
    """‖W − Ŵ‖ / ‖W‖ in the metric, over the batches that the layer is fitted to; None in the metric "weights"."""
    held_out_error: float | None = None
    """The same over the held-out batches."""
    predicted_loss: float | None = None
    """Predicted rise of the loss in nats per token, over the fitted batches; only in the metric "loss"."""
    held_out_loss: float | None = None
    """The same over the held-out batches."""
    reason: str | None = None
    """Why the layer was kept dense, shares its parameters with another, or is no smaller than before."""


@dataclass(frozen=True)
class CompressionReport:
    """One row per requested layer, in the order of the model; n_params count the whole model's trainable parameters."""

    rows: tuple[CompressedLayer, ...]
    n_params_before: int
    n_params_after: int
    n_tokens: int = 1
    """Tokens per forward for which FLOPs and bytes are given."""

    @property
    def kept(self) -> float:
        """Share of the parameters of all rows that is left, with masks and indices counted. It includes matrices that
        had to stay dense, which `keep` does not."""
        return sum(row.n_counted for row in self.rows) / max(1, sum(row.n_params_before for row in self.rows))

    def total(self, field: str) -> float | None:
        """The sum of a field over all matrices, such as "predicted_loss"; None if one has none.

        A matrix that several layers share counts once.
        """
        values = [getattr(row, field) for row in self.rows if row.n_params_before]
        return None if any(value is None for value in values) else math.fsum(values)

    def to_frame(self) -> pd.DataFrame:
        """One line per row, one column per field; needs pandas."""
        import pandas as pd

        names = [field.name for field in fields(CompressedLayer)]
        return pd.DataFrame([[getattr(row, name) for name in names] for row in self.rows], columns=names)

    def __str__(self) -> str:
        has_chains = any(row.bonds for row in self.rows)
        has_others = any(not row.bonds for row in self.rows)
        explained = any(row.reason is not None for row in self.rows)
        shown = [name for name in _ERRORS if any(getattr(row, name) is not None for row in self.rows)]
        names = ["layer", "out×in", *["d_out", "d_in", "bonds"] * has_chains, *["structure"] * has_others]
        header = [*names, "before", "after", *shown, "kFLOP/token", "kB/token"]
        table = [header + ["note"] * explained]
        for row in self.rows:
            cells = [row.name, f"{row.out_features}×{row.in_features}"]
            cells += [_join(row.d_out), _join(row.d_in), _join(row.bonds)] * has_chains
            cells += ["" if row.bonds else row.structure] * has_others
            cells += [f"{row.n_params_before:,}", f"{row.n_params_after:,}"]
            cells += [_error(getattr(row, name)) for name in shown]
            cells += [f"{row.flops_per_token / 1e3:.1f}", f"{row.bytes_per_token / 1e3:.1f}"]
            table.append(cells + [row.reason or ""] * explained)
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < len(names) or column == len(header) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        before, after = self.n_params_before, self.n_params_after
        ratio = f", {before / after:.2f}×" if after else ""
        return "\n".join([*lines, f"model: {before:,} -> {after:,} parameters{ratio}"])


def _join(sizes: Iterable[int]) -> str:
    return "·".join(str(size) for size in sizes)


def _error(error: float | None) -> str:
    return "–" if error is None else f"{error:.4f}"
