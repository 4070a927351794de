"""Small models whose statistics are collected, and what the moments must be."""

from __future__ import annotations

import torch
from structured_linear_case import make_linear
from torch import nn


def mean_square(x):
    flat = x.reshape(-1, x.shape[-1])
    return flat.T @ flat / len(flat)


def with_ridge(G, ridge):
    return G + ridge * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype)


class Branches(nn.Module):
    """Two layers that get the same inputs, and one that gets what they give."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.last = make_linear(4, 3), make_linear(4, 3), make_linear(2, 4)

    def forward(self, x, *, scale=1.0):
        h = torch.tanh(self.one(x * scale)) if scale != 1.0 else torch.tanh(self.one(x)) + self.other(x)
        return self.last(h)
