"""A matrix as a binary tree of small tensors: which sites each tensor has below it, its ranks and its decomposition.

The sites of a matrix W are those of a chain (`tensor_train.algebra`): site l has an output index of size d_out[l] and
an input index of size d_in[l]. They are halved again and again down to single sites. Each part but the whole is a node:

- a leaf, one site l: a tensor (d_out[l], d_in[l], rank);
- an inner node, with two parts below it: a tensor (rank of the left part, rank of the right part, rank).

The two halves of the whole share one edge, so there is no tensor at the top. With one or two sites this is a chain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mpo_core.tensor_train.algebra import by_sites, contract, merge_cores
from mpo_core.tensor_train.bonds import check_sizes, check_whole, site_sizes
from mpo_core.tensor_train.contraction import Product
from mpo_core.tensor_train.leading_subspace import leading_left
from mpo_core.values import check_matrix, in_range


class Node(NamedTuple):
    """Sites [first, last), and the numbers of the two nodes below; None for a leaf."""

    first: int
    last: int
    below: tuple[int, int] | None


@cache
def nodes_of(n_sites: int) -> tuple[Node, ...]:
    """The nodes, each after those below it. The last one is the right half, and `left_half` the left one."""
    nodes: list[Node] = []

    def add(first: int, last: int) -> int:
        below = None if last - first == 1 else halves(first, last)
        nodes.append(Node(first, last, below))
        return len(nodes) - 1

    def halves(first: int, last: int) -> tuple[int, int]:
        middle = (first + last + 1) // 2
        return add(first, middle), add(middle, last)

    if n_sites == 1:
        add(0, 1)
    else:
        halves(0, n_sites)
    return tuple(nodes)


def left_half(n_sites: int) -> int | None:
    """The number of the left half among `nodes_of`; None for one site."""
    nodes = nodes_of(n_sites)
    return next((number for number, node in enumerate(nodes) if node.last == nodes[-1].first and node.first == 0), None)


def clip_ranks(chi: int, d_out: Sequence[int], d_in: Sequence[int]) -> tuple[int, ...]:
    """The rank of the edge above each node under a cap; no rank exceeds what its matrix or its neighbours allow.

    Raises:
        ValueError: chi is not a whole number of at least 1, or d_out and d_in are no sizes of sites.
    """
    check_whole(chi=chi)
    if chi < 1:
        raise ValueError(f"`chi >= 1` must hold, but got chi={chi}")
    sizes = site_sizes(d_out, d_in)
    nodes, left = nodes_of(len(sizes)), left_half(len(sizes))
    ranks = [
        min(chi, math.prod(sizes[node.first : node.last]), math.prod(sizes[: node.first] + sizes[node.last :]))
        for node in nodes
    ]
    before: list[int] = []
    while ranks != before:
        before = list(ranks)
        for number, node in enumerate(nodes):
            if node.below is not None:
                a, b = node.below
                ranks[number] = min(ranks[number], ranks[a] * ranks[b])
                ranks[a] = min(ranks[a], ranks[b] * ranks[number])
                ranks[b] = min(ranks[b], ranks[a] * ranks[number])
        if left is not None:
            ranks[left] = ranks[-1] = min(ranks[left], ranks[-1])
    return tuple(ranks)


def shapes_of(ranks: Sequence[int], d_out: Sequence[int], d_in: Sequence[int]) -> list[tuple[int, int, int]]:
    """The shape of each node's tensor."""
    return [
        (d_out[node.first], d_in[node.first], rank)
        if node.below is None
        else (ranks[node.below[0]], ranks[node.below[1]], rank)
        for node, rank in zip(nodes_of(len(d_out)), ranks, strict=True)
    ]


def n_params(chi: int, d_out: Sequence[int], d_in: Sequence[int]) -> int:
    """Entries of all tensors with every rank at most chi; they rise with chi."""
    return sum(math.prod(shape) for shape in shapes_of(clip_ranks(chi, d_out, d_in), d_out, d_in))


@torch.no_grad()
def hierarchical_svd(W: Tensor, d_out: Sequence[int], d_in: Sequence[int], chi: int) -> list[Tensor]:
    """Decompose W into a tree, from the sites to the whole, by truncated SVDs.

    All tensors but the last are isometries towards the whole, and the last carries the norm. The squared error is the
    sum of what the cuts discard. It is at most the sum, over the edges, of the squared singular values of W's own
    unfoldings beyond the rank of that edge (`squared_tails`), and so at most 2 L − 3 times the least possible one.

    Args:
        W: (out_features, in_features), out_features = prod(d_out), in_features = prod(d_in). Computed in float64.
        chi: cap on every rank, which is then `clip_ranks` for any W.
    Returns:
        Tensors in float64, on W's device.
    Raises:
        ValueError: a cap below 1, sizes that do not multiply to W's shape, or as `check_matrix`.
    Source: Grasedyck 2010, Hierarchical singular value decomposition of tensors, Algorithm 3 and Theorem 3.11.
    """
    check_matrix(W)
    check_sizes(W.shape[0], W.shape[1], d_out, d_in)
    nodes, ranks = nodes_of(len(d_out)), clip_ranks(chi, d_out, d_in)
    rest, scale = in_range(by_sites(W.double(), d_out, d_in))
    sizes = [o * i for o, i in zip(d_out, d_in, strict=True)]
    tensors: list[Tensor] = []
    done: list[int] = []  # sizes of the legs of `rest` to the left of the node
    for node, rank in zip(nodes, ranks, strict=True):
        shape: tuple[int, ...] = (d_out[node.first], d_in[node.first])
        if node.below is not None:
            shape = tuple(done[-2:])
            del done[-2:]
        before, own = math.prod(done), math.prod(shape)
        after = math.prod(sizes[node.last :])
        rest = rest.reshape(before, own, after)
        if node is nodes[-1]:  # its edge is that of the left half, which is cut already
            tensors.append(rest[:, :, 0].T.reshape(*shape, before) * scale)
            break
        M = rest.transpose(0, 1).reshape(own, before * after)
        U = leading_left(M, rank)
        if U is None:
            U = torch.linalg.svd(M, full_matrices=False)[0][:, :rank]
        rest = (U.T @ rest.transpose(0, 1).reshape(own, -1)).reshape(rank, before, after).transpose(0, 1)
        tensors.append(U.reshape(*shape, rank))
        done.append(rank)
    return tensors


def chain_of(tensors: Sequence[Tensor], nodes: Sequence[Node]) -> list[Tensor]:
    """The tree as a chain of two cores, one for each half (of one core, for one site); differentiable."""
    cores: list[Tensor] = []
    for node, tensor in zip(nodes, tensors, strict=True):
        if node.below is None:
            cores.append(tensor[None])
        else:
            right, left = cores.pop(), cores.pop()
            cores.append(_merged(left, right, tensor))
    if len(cores) > 1:
        cores[1] = cores[1].permute(3, 1, 2, 0)
    return cores


def to_matrix(tensors: Sequence[Tensor], nodes: Sequence[Node]) -> Tensor:
    """W (out_features, in_features); differentiable."""
    return contract(chain_of(tensors, nodes))


def merge_products(ranks: Sequence[int], d_out: Sequence[int], d_in: Sequence[int]) -> list[Product]:
    """The products of `chain_of`, each with a copy of its result."""
    steps = []
    for node, rank in zip(nodes_of(len(d_out)), ranks, strict=True):
        if node.below is not None:
            left, right = (_n_entries(nodes_of(len(d_out))[below], d_out, d_in) for below in node.below)
            a, b = (ranks[below] for below in node.below)
            if _node_goes_right(left, right, a, b):
                steps += [Product(1, right, b, a * rank, copied=right * a * rank), Product(1, left, a, right * rank)]
            else:
                steps += [Product(1, left, a, b * rank, copied=left * b * rank), Product(1, left * rank, b, right)]
            steps[-1] = steps[-1]._replace(copied=left * right * rank)
    return steps


def _n_entries(node: Node, d_out: Sequence[int], d_in: Sequence[int]) -> int:
    """Entries of the part of W below a node."""
    return math.prod(d_out[node.first : node.last]) * math.prod(d_in[node.first : node.last])


def _node_goes_right(left: int, right: int, a: int, b: int) -> bool:
    """Whether it takes fewer FLOPs to join an inner node to its right part first.

    Args:
        left, right: entries of the parts of W below it. a, b: ranks of their edges.
    """
    return right * a * b + left * right * a <= left * a * b + left * right * b


def _merged(left: Tensor, right: Tensor, node: Tensor) -> Tensor:
    """Parts (1, o, i, a) and (1, p, j, b), and a node (a, b, c), become a part (1, o·p, i·j, c)."""
    _, o, i, a = left.shape
    _, p, j, b = right.shape
    c = node.shape[2]
    if _node_goes_right(o * i, p * j, a, b):
        joined = right.reshape(p * j, b) @ node.transpose(0, 1).reshape(b, a * c)
        core = joined.reshape(p * j, a, c).transpose(0, 1).reshape(a, p, j, c)
        return merge_cores(left, core)
    joined = (left.reshape(o * i, a) @ node.reshape(a, b * c)).reshape(o * i, b, c)
    product = joined.transpose(1, 2).reshape(o * i * c, b) @ right.reshape(p * j, b).T
    return product.reshape(o, i, c, p, j).permute(0, 3, 1, 4, 2).reshape(1, o * p, i * j, c)
