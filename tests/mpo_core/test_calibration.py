"""Gram matrices of calibration inputs, and the output error they define."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mpo_core.fitting.calibration import Gram, check_gram, collect_grams, output_error


def inputs(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(in_features, out_features, seed=0, dtype=torch.float64):
    layer = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype).to_empty(device="cpu")
    layer.weight.data = inputs(out_features, in_features, seed=seed, dtype=dtype)
    return layer


def test_gram_streams_the_mean_outer_product():
    x = inputs(7, 5, 3)
    gram = Gram(3)
    for part in (x[:2], x[2:3], x[3:]):
        gram.update(part)
    flat = x.reshape(-1, 3)
    assert gram.n_samples == 35
    torch.testing.assert_close(gram.matrix(ridge=0), sum(torch.outer(row, row) for row in flat) / 35)


def test_gram_accumulates_in_float64():
    gram = Gram(1)
    gram.update(torch.tensor([[1e5]], dtype=torch.bfloat16))
    for _ in range(3):
        gram.update(torch.tensor([[1.0]]))
    big = float(torch.tensor(1e5, dtype=torch.bfloat16))
    assert float(gram.matrix(ridge=0)) == (big**2 + 3) / 4


def test_gram_ridge_is_relative_and_makes_it_definite():
    gram = Gram(3)
    gram.update(torch.tensor([[2.0, 0.0, 0.0]]))
    expected = torch.diag(torch.tensor([4.0, 0, 0], dtype=torch.float64)) + 0.1 * 4 / 3 * torch.eye(3)
    torch.testing.assert_close(gram.matrix(ridge=0.1), expected)
    assert float(torch.linalg.eigvalsh(gram.matrix())[0]) > 0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (None, "at least one sample, but the calibration data is empty"),
        (torch.zeros(0, 2), "at least one sample, but the calibration data is empty"),
        (torch.zeros(4, 2), "all 4 samples are zero"),
        (torch.tensor([[1.0, math.nan]]), "calibration inputs must be finite, but 1 entries are not"),
        (torch.tensor([[math.inf, math.nan]]), "calibration inputs must be finite, but 2 entries are not"),
        (torch.zeros(4, 3), r"`x` must have shape \(..., 2\), but got \(4, 3\)"),
        (torch.tensor(1.0), r"`x` must have shape \(..., 2\), but got \(\)"),
    ],
)
def test_gram_refuses(samples, message):
    def matrix():
        gram = Gram(2)
        if samples is not None:
            gram.update(samples)
        return gram.matrix()

    with pytest.raises(ValueError, match=message):
        matrix()


def test_gram_refuses_a_negative_ridge():
    gram = Gram(2)
    gram.update(torch.ones(1, 2))
    with pytest.raises(ValueError, match="`ridge >= 0` must hold, but got ridge=-1"):
        gram.matrix(ridge=-1)


def test_collect_grams_sees_what_each_layer_is_given_and_leaves_the_model_as_it_was():
    model = nn.Sequential(linear(3, 4), nn.Dropout(0.5), linear(4, 2, seed=1), nn.Dropout(0.5))
    model[3].eval()
    x = inputs(5, 6, 3)
    grams = collect_grams(model, ["0", "2"], [x[:2], x[2:]], ridge=0)
    hidden = (x @ model[0].weight.T).detach().reshape(-1, 4)
    flat = x.reshape(-1, 3)
    torch.testing.assert_close(grams["0"], flat.T @ flat / 30)
    torch.testing.assert_close(grams["2"], hidden.T @ hidden / 30)
    assert (model.training, model[1].training, model[3].training) == (True, True, False)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model[0].weight.grad is None


def test_collect_grams_takes_tuples_mappings_and_a_forward_of_ones_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear(3, 2)

        def forward(self, x, scale):
            return self.layer(input=x * scale)

    model, x = Model(), inputs(4, 3)
    batches = [(x, 2.0)], [{"x": x, "scale": 2.0}]
    for batch in batches:
        torch.testing.assert_close(collect_grams(model, ["layer"], batch, ridge=0)["layer"], 4 * x.T @ x / 4)
    grams = collect_grams(model, ["layer"], [x], forward=lambda model, x: model.layer(x[:1]), ridge=0)
    torch.testing.assert_close(grams["layer"], torch.outer(x[0], x[0]))


def test_collect_grams_names_the_layer_and_the_fault():
    model = nn.ModuleDict({"used": linear(3, 2), "unused": linear(3, 2)})

    def forward(model, x):
        return model["used"](x)

    with pytest.raises(ValueError, match="at least one batch, but got none"):
        collect_grams(model, ["used"], [], forward=forward)
    with pytest.raises(ValueError, match="no calibration batch reached unused"):
        collect_grams(model, ["used", "unused"], [inputs(2, 3)], forward=forward)
    with pytest.raises(ValueError, match="used: calibration inputs must be finite"):
        collect_grams(model, ["used"], [inputs(2, 3) / 0], forward=forward)
    with pytest.raises(ValueError, match="used: a Gram matrix needs inputs other than zero"):
        collect_grams(model, ["used"], [torch.zeros(2, 3).double()], forward=forward)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_output_error_is_that_of_the_outputs():
    W, W_hat, x = inputs(4, 3), inputs(4, 3, seed=1), inputs(50, 3, seed=2)
    expected = torch.linalg.norm(x @ (W - W_hat).T) / torch.linalg.norm(x @ W.T)
    assert output_error(W, W_hat, x.T @ x / 50) == pytest.approx(float(expected), rel=1e-12)
    assert output_error(W, W, x.T @ x) == 0
    assert output_error(0 * W, W, x.T @ x) == math.inf


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.eye(2), r"`gram` must have shape \(3, 3\), but got \(2, 2\)"),
        (torch.eye(3) / 0, "`gram` must be finite, but 9 entries are not"),
        (torch.zeros(3, 3), "`gram` must not be zero"),
        (torch.arange(9.0).reshape(3, 3), "`gram` must be symmetric"),
        (-torch.eye(3), "`gram` must be symmetric with no negative entry on its diagonal"),
    ],
)
def test_check_gram_refuses(gram, message):
    with pytest.raises(ValueError, match=message):
        check_gram(gram, 3)
