"""A tree of tensors for a fit: the singular values of its edges, and coordinates in which steps are good."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpo_core.fitting.ladders import squared_tail
from mpo_core.fitting.whitening import FLOOR, Roots, on_cores
from mpo_core.tensor_train.algebra import by_sites
from mpo_core.tensor_train.tree import Node, left_half, nodes_of
from mpo_core.values import in_range


def squared_tails(W: Tensor, d_out: Sequence[int], d_in: Sequence[int]) -> list[list[float]]:
    """For the edge above each node but the last: entry r is the share of ‖W‖² beyond the r largest singular values."""
    sizes = [o * i for o, i in zip(d_out, d_in, strict=True)]
    T = in_range(by_sites(W.double(), d_out, d_in))[0]
    tails = []
    for node in nodes_of(len(sizes))[:-1]:
        before, own = math.prod(sizes[: node.first]), math.prod(sizes[node.first : node.last])
        tails.append(squared_tail(T.reshape(before, own, -1).transpose(0, 1).reshape(own, -1)))
    return tails


def on_leaves(tensors: Sequence[Tensor], nodes: Sequence[Node], of_out: Roots, of_in: Roots) -> list[Tensor]:
    """The tree with a symmetric factor per site applied to its output and to its input indices."""
    leaves = [number for number, node in enumerate(nodes) if node.below is None]
    changed = list(tensors)
    for number, core in zip(leaves, on_cores([tensors[leaf][None] for leaf in leaves], of_out, of_in), strict=True):
        changed[number] = core[0]
    return changed


def centred(tensors: Sequence[Tensor], nodes: Sequence[Node]) -> tuple[list[Tensor], list[Tensor]]:
    """Factors F_k and positive vectors v_k with the tree F_k / v_k; v_k are the singular values of the edge above.

    The last tensor is divided by nothing: its v is 1. Seen from each factor, the others are then orthogonal, as in a
    chain with the singular values on its bonds (Vidal 2003).

    Args:
        tensors: all but the last are isometries, as `hierarchical_svd` gives them.
    """
    left, last = left_half(nodes[-1].last), len(tensors) - 1
    isometries = list(tensors)
    centres = {last: tensors[last]}
    values = [torch.ones_like(tensor[0, 0]) for tensor in tensors]
    if left is not None:
        # The edge between the halves, first: the last tensor is P diag(s) Qᵀ.
        shape = tensors[last].shape
        P, s, Qh = torch.linalg.svd(tensors[last].reshape(-1, shape[2]), full_matrices=False)
        centres[last] = (P * s).reshape(*shape[:2], -1)
        isometries[left] = isometries[left] @ Qh.T
        values[left] = _floored(s)
        centres[left] = isometries[left] * values[left]
    for number in range(last, -1, -1):
        below = nodes[number].below
        for leg, child in enumerate(below or ()):
            centre = centres[number].transpose(0, leg)  # (leg, other leg, above)
            X, s, _ = torch.linalg.svd(centre.reshape(centre.shape[0], -1), full_matrices=False)
            for held in (centres, isometries):
                turned = torch.tensordot(X.T, held[number].transpose(0, leg), dims=1)
                held[number] = turned.transpose(0, leg)
            isometries[child] = isometries[child] @ X
            values[child] = _floored(s)
            centres[child] = isometries[child] * values[child]
    factors = [isometry * value for isometry, value in zip(isometries, values, strict=True)]
    factors[last] = centres[last]
    return factors, values


def _floored(s: Tensor) -> Tensor:
    return s.clamp(min=FLOOR * float(s[0]) or 1.0)
