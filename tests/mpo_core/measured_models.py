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


class Residual(nn.Module):
    """x + b(tanh(a(x))), with values of its own."""

    def __init__(self, index=0, width=4):
        super().__init__()
        self.a, self.b = make_linear(2 * width, width), make_linear(width, 2 * width)
        for layer in (self.a, self.b):
            layer.weight.data = torch.roll(layer.weight.data, index + 1, 0) / 2

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))


class Stack(nn.Module):
    """Blocks, and a head."""

    def __init__(self, block=Residual, n_blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList(block(index) for index in range(n_blocks))
        self.head = make_linear(3, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def assert_same_statistics(one, other, **tolerances):
    """Of all layers and both parts: counts, G, and S if there is a loss. Without tolerances, bit for bit."""
    assert sorted(one.names) == sorted(other.names)
    assert one.has_loss == other.has_loss
    metric = "loss" if one.has_loss else "outputs"
    for name in one.names:
        for held_out in (False, True):
            assert one.n_samples(name, held_out=held_out) == other.n_samples(name, held_out=held_out)
            why = one.why_not([name], metric, held_out=held_out)
            assert why == other.why_not([name], metric, held_out=held_out)
            if why is None:
                ours, theirs = (each.metric(name, metric, held_out=held_out) for each in (one, other))
                for moment in ("gram", "sensitivity"):
                    torch.testing.assert_close(
                        getattr(ours, moment), getattr(theirs, moment), **(tolerances or {"rtol": 0, "atol": 0})
                    )
