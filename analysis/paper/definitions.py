"""Results of the paper's own definitions: parameter counts, and the scale of its initial weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from analysis.paper import published
from analysis.paper.published import PublishedLayer


def mpo_params(d_out: Sequence[int], d_in: Sequence[int], chi: int) -> int:
    """Parameters of an MPO with these sizes per site: Σ χ_{l−1} · d_out · d_in · χ_l (paper, Eq. 4).

    A bond is at most χ, and at most the dimension that the sites on either side allow.
    """
    pairs = [out * into for out, into in zip(d_out, d_in, strict=True)]
    bonds = [min(chi, math.prod(pairs[:site]), math.prod(pairs[site:])) for site in range(len(pairs) + 1)]
    return sum(bonds[site] * pair * bonds[site + 1] for site, pair in enumerate(pairs))


def layer_params(layer: PublishedLayer, chi: int | None) -> int:
    """Parameters of one layer of a row of Table 2; chi None: dense."""
    if chi is None:
        return math.prod(layer.d_out) * math.prod(layer.d_in)
    return mpo_params(layer.d_out, layer.d_in, chi)


def block_params(chi: int | None) -> int:
    """Parameters of the matrices of a transformer block."""
    return sum(layer.n_in_block * layer_params(layer, chi) for layer in published.LAYERS)


def model_params(chi: int | None) -> int:
    """Parameters of the paper's model: embedding, norms, biases, and its linear layers, dense or as MPO (Table 1)."""
    sizes = published.SIZES
    d, d_ff, vocabulary = sizes["d_model"], sizes["d_ff"], sizes["vocab_size"]
    norms_and_biases = 2 * 2 * d + d + d_ff + d  # per block: the output and feed-forward layers have biases
    rest = vocabulary * d + 2 * d + sizes["n_layers"] * norms_and_biases
    outside = sum(layer_params(layer, chi) for layer in published.LAYERS if not layer.n_in_block)
    return rest + sizes["n_layers"] * block_params(chi) + outside


def initial_std(layer: PublishedLayer, chi: int) -> float:
    """Standard deviation of an entry of W at the paper's MPO init.

    W is a sum of χ^(L−1) products of L independent core entries. Each entry has the standard deviation
    N_in^(−1/4) χ^(−(L−1)/(2L)) (section 3.3 and appendix A).
    """
    n_sites = layer.n_sites
    core = math.prod(layer.d_in) ** -0.25 * chi ** (-(n_sites - 1) / (2 * n_sites))
    return math.sqrt(chi ** (n_sites - 1) * core ** (2 * n_sites))


def quadratic_at(chi: int, points: dict[int, int]) -> float:
    """Value at χ of the quadratic through three points; Eq. 4 is quadratic in χ for L ≤ 3 if no bond is clipped.

    Raises:
        ValueError: there are not three points.
    """
    if len(points) != 3:
        raise ValueError(f"`points` must be 3, but got {len(points)}")
    return sum(
        value * math.prod((chi - other) / (at - other) for other in points if other != at)
        for at, value in points.items()
    )
