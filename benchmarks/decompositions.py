"""TT-SVD of a 4096 × 4096 matrix at χ = 64 against tensorly's, in float32, each as a user calls it.

There are two matrices. One has independent normal entries: its singular values hardly fall. In the other, the k-th
singular value over the first bond falls about as 1 / k. tensorly's default is a full SVD of each unfolding. Ours is a
subspace iteration or the eigenvectors of a Gram matrix (`leading_subspace.py`). tensorly's two other methods are
measured too. A target is met only if our relative error ‖W − Ŵ‖ / ‖W‖ is at most 1.001 times the rival's; the note has
both errors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.measurement import Row, paired, run_alone
from mpo_core.tensor_train.algebra import contract, rel_error, tt_svd

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import tensorly
    from tensorly.decomposition import tensor_train_matrix

SECTION = "TT-SVD, 4096 × 4096, χ = 64"
WIDTH, CHI = 4096, 64
PAIRS = 3
"""A pair takes minutes, and the ratios are far apart."""
EQUAL = 1.001

LIMITS = {
    SECTION: "The more slowly the singular values fall, the more iterations the leading ones need: the stopping rule "
    "checks each of them."
}


def rows() -> list[Row]:
    before = tensorly.get_backend()
    tensorly.set_backend("pytorch")
    try:
        two, three = (64, 64), (16, 16, 16)
        falling, flat = falling_matrix(), torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
        return [
            compared("falling singular values", falling, two, "truncated_svd", 1 / 3),
            compared("independent entries", flat, two, "truncated_svd", 1 / 3),
            compared("falling singular values", falling, three, "truncated_svd", 1 / 3),
            compared("falling singular values", falling, two, "symeig_svd", 1 / 3),
            compared("falling singular values", falling, two, "randomized_svd", None),
            compared("independent entries", flat, two, "randomized_svd", None),
        ]
    finally:
        tensorly.set_backend(before)


def falling_matrix(n_terms: int = 512) -> Tensor:
    """Σ_k A_k ⊗ B_k / k over 512 terms, A_k and B_k (64, 64) normal, and noise of a hundredth of its norm."""
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, n_terms + 1)
    A = torch.randn(1, 64, 64, n_terms, generator=generator) * weights
    B = torch.randn(n_terms, 64, 64, 1, generator=generator)
    W = contract([A, B])
    noise = torch.randn(WIDTH, WIDTH, generator=generator)
    return W + noise * (0.01 * W.norm() / noise.norm())


def compared(what: str, W: Tensor, sites: Sequence[int], svd: str, target: float | None) -> Row:
    rank = [1, *[CHI] * (len(sites) - 1), 1]
    tensor = W.reshape(*sites, *sites)
    results: dict[str, list[Tensor]] = {}

    def ours() -> None:
        results["ours"] = tt_svd(W, sites, sites, CHI)

    def theirs() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tensor_train_matrix(tensor, rank=list(rank), svd=svd, random_state=0)
        results["theirs"] = list(found.factors)

    row = paired(SECTION, f"{what}, {len(sites)} sites", ours, f"tensorly, {svd}", theirs, target=target, pairs=PAIRS)
    errors = {name: rel_error(W, contract(cores)) for name, cores in results.items()}
    is_equal = errors["ours"] <= EQUAL * errors["theirs"] and math.isfinite(errors["theirs"])
    note = f"relative error {errors['ours']:.5f}, tensorly's {errors['theirs']:.5f}"
    return row._replace(note=note, is_met=None if row.is_met is None else row.is_met and is_equal)


if __name__ == "__main__":
    run_alone(rows)
