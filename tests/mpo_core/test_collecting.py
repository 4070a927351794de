"""Second moments that are collected from models of every form."""

from __future__ import annotations

import math

import pytest
import torch
from measured_models import Branches, mean_square, with_ridge
from structured_linear_case import make_linear, normal, square_losses
from torch import nn

from mpo_core.calibration.collecting import collect_statistics, next_token_losses
from mpo_core.calibration.statistics import DAMPING, RIDGE
from mpo_core.compression.compress import compress
from mpo_core.models.picogpt import GPTConfig, PicoGPT


def test_inputs_are_those_of_each_layer_and_the_model_is_left_as_it_was():
    model = nn.Sequential(make_linear(4, 3), nn.Dropout(0.5), make_linear(2, 4), nn.Dropout(0.5))
    model[3].eval()
    model[2].weight.requires_grad_(False)
    x = normal(5, 6, 3)
    statistics = collect_statistics(model, [x[:2], x[2:]], held_out=0)
    hidden = model[0](x).detach()
    for name, inputs in (("0", x), ("2", hidden)):
        gram = statistics.metric(name, "outputs").gram
        torch.testing.assert_close(gram, with_ridge(mean_square(inputs), RIDGE))
        assert statistics.n_samples(name) == 30
    assert (model.training, model[1].training, model[3].training) == (True, True, False)
    assert (model[0].weight.requires_grad, model[2].weight.requires_grad) == (True, False)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model[0].weight.grad is None


def test_gradients_are_those_of_the_summed_losses_at_each_output():
    model, x = Branches(), normal(9, 3)
    statistics = collect_statistics(model, [x[:4], x[4:]], loss=square_losses, held_out=0)
    h = (torch.tanh(model.one(x)) + model.other(x)).detach().requires_grad_()
    scale = torch.linspace(0.1, 2, 2, dtype=torch.float64).square()
    of_last = 2 * scale * model.last(h)
    of_hidden = of_last @ model.last.weight
    of_one = of_hidden * (1 - torch.tanh(model.one(x)).square())
    for name, g in (("last", of_last), ("other", of_hidden), ("one", of_one)):
        metric = statistics.metric(name, "loss")
        torch.testing.assert_close(metric.sensitivity, with_ridge(mean_square(g.detach()), DAMPING))
        torch.testing.assert_close(metric.gram, statistics.metric(name, "outputs").gram)


def test_half_the_squared_change_predicts_the_rise_of_a_quadratic_loss():
    """Where the gradient at an output does not depend on its input, the Fisher information is the Kronecker product."""
    W, x, n = normal(4, 3), normal(2000, 3, seed=1), 2000
    noise = normal(n, 4, seed=2)
    model = nn.Sequential(nn.Linear(3, 4, bias=False, dtype=torch.float64))
    model[0].weight.data = W
    targets = x @ W.T + noise  # so that the gradient of half the square is the noise, with E[g gᵀ] = 1 = the Hessian

    def losses(model, batch):
        inputs, target = batch
        return (model(inputs) - target).square().sum(-1) / 2

    statistics = collect_statistics(model, [(x, targets)], loss=losses, held_out=0)
    W_hat = W + 0.3 * normal(4, 3, seed=5)
    predicted = statistics.metric("0", "loss").norm(W_hat - W) ** 2 / 2
    rise = ((x @ W_hat.T - targets).square() - noise.square()).sum(-1).mean() / 2
    assert predicted == pytest.approx(float(rise), rel=0.1)


def test_layers_with_the_same_inputs_share_one_moment():
    model, x = Branches(), normal(9, 3)
    statistics = collect_statistics(model, [x], loss=square_losses, held_out=0)
    moments = statistics._parts[False].inputs
    assert {frozenset(names): moment.n_samples for names, moment in moments.items()} == {
        frozenset({"one", "other"}): 9,
        frozenset({"last"}): 9,
    }


@pytest.mark.parametrize("scales", [(1.0, 2.0), (2.0, 1.0)])
def test_layers_may_share_their_inputs_in_some_batches_only(scales):
    model, x = Branches(), normal(9, 3)
    statistics = collect_statistics(model, [{"x": x, "scale": scale} for scale in scales], held_out=0)
    both = torch.cat([x, 2 * x])
    for name, inputs in (("one", both), ("other", x)):
        gram = statistics.metric(name, "outputs").gram
        torch.testing.assert_close(gram, with_ridge(mean_square(inputs), RIDGE))
        assert statistics.n_samples(name) == len(inputs)


def test_a_tensor_that_is_written_into_is_another_input():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = make_linear(3, 3), make_linear(3, 3)

        def forward(self, x):
            x = x.clone()
            x += self.a(x)
            x += self.b(x)
            return x

    model, x = Residual(), normal(20, 3)
    for loss in (None, square_losses):
        statistics = collect_statistics(model, [x], loss=loss, held_out=0)
        second = (x + model.a(x)).detach()
        for name, inputs in (("a", x), ("b", second)):
            torch.testing.assert_close(statistics.metric(name, "outputs").gram, with_ridge(mean_square(inputs), RIDGE))


def test_a_layer_under_two_names_or_called_twice_is_counted_as_it_is_called():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = make_linear(3, 3)
            self.same = self.a

        def forward(self, x):
            return self.same(torch.tanh(self.a(x)))

    model, x = Twice(), normal(20, 3)
    hidden = torch.tanh(model.a(x)).detach()
    for modules in (None, ["a", "a"], ["a", "same"]):
        statistics = collect_statistics(model, [x], loss=square_losses, modules=modules, held_out=0)
        gram = statistics.metric("a", "outputs").gram
        torch.testing.assert_close(gram, with_ridge(mean_square(torch.cat([x, hidden])), RIDGE))
        assert statistics._parts[False].gradients["a"].n_samples == 40


def test_a_part_without_gradients_has_no_sensitivity_and_stays_dense():
    class Frozen(Branches):
        def forward(self, x):
            with torch.no_grad():
                h = torch.tanh(self.one(x))
            return self.last(h + self.other(x))

    model = Frozen()
    statistics = collect_statistics(model, [normal(9, 3)], loss=square_losses, held_out=0)
    _, report = compress(model, layer="low_rank", keep=0.9, statistics=statistics)
    [reason] = [row.reason for row in report.rows if row.name == "one"]
    assert reason == "its output does not change the loss of any calibration batch"
    assert statistics.metric("one", "outputs").gram.shape == (3, 3)


def test_only_layers_that_can_be_replaced_are_collected():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = nn.Embedding(7, 3, dtype=torch.float64), make_linear(3, 3)
            self.head = make_linear(7, 3)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.layer(self.embedding(tokens)))

    statistics = collect_statistics(Tied(), [torch.arange(6)[None]], held_out=0)
    assert statistics.names == ["layer"]


def test_every_kth_batch_is_held_out():
    model, x = nn.Sequential(make_linear(4, 3)), normal(10, 2, 3)
    seen = []
    statistics = collect_statistics(model, list(x), held_out=0.2, progress=seen.append)
    assert seen == list(range(1, 11))
    held_out, fitted = x[[4, 9]], x[[0, 1, 2, 3, 5, 6, 7, 8]]
    torch.testing.assert_close(statistics.metric("0", "outputs").gram, with_ridge(mean_square(fitted), RIDGE))
    torch.testing.assert_close(statistics.metric("0", "outputs", held_out=True).gram, mean_square(held_out))
    assert (statistics.n_samples("0"), statistics.n_samples("0", held_out=True)) == (16, 4)
    assert collect_statistics(model, list(x[:2]), held_out=0.99).n_samples("0") == 2


def test_a_forward_and_batches_of_every_form():
    model, x = Branches(), normal(4, 3)
    expected = with_ridge(mean_square(x), RIDGE)
    for batch in (x, (x,), {"x": x}):
        torch.testing.assert_close(collect_statistics(model, [batch]).metric("one", "outputs").gram, expected)
    statistics = collect_statistics(model, [x], modules=["one"], forward=lambda model, x: model.one(input=x[:1]))
    torch.testing.assert_close(statistics.metric("one", "outputs").gram, with_ridge(mean_square(x[:1]), RIDGE))


def test_an_owner_may_write_into_an_output():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = make_linear(3, 3), make_linear(2, 3)

        def forward(self, x):
            y = self.a(x)
            y += x
            return self.b(y.relu_())

    model = InPlace()
    statistics = collect_statistics(model, [normal(20, 3)], loss=square_losses, held_out=0)
    x = normal(20, 3)
    hidden = (model.a(x) + x).detach()
    of_last = 2 * torch.linspace(0.1, 2, 2, dtype=torch.float64).square() * model.b(hidden.relu())
    g = (of_last @ model.b.weight * (hidden > 0)).detach()
    torch.testing.assert_close(statistics.metric("a", "loss").sensitivity, with_ridge(mean_square(g), DAMPING))


def test_next_token_losses_of_a_picogpt():
    model = PicoGPT(GPTConfig(vocab_size=11, context=8, d_model=8, n_layers=1, n_heads=2, d_ff=16))
    model.init_parameters(lambda name: torch.Generator().manual_seed(len(name)), "paper")
    tokens = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))
    losses = next_token_losses(model, tokens)
    assert losses.shape == (3, 7)
    logp = torch.log_softmax(model(tokens)[1, 4], -1)
    torch.testing.assert_close(losses[1, 4], -logp[tokens[1, 5]])
    statistics = collect_statistics(model, [tokens], loss=next_token_losses, held_out=0)
    assert statistics.has_loss
    _, report = compress(model, layer="low_rank", keep=0.5, statistics=statistics)
    assert sum(row.predicted_loss for row in report.rows) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "at least one batch, but got none"),
        ({"batches": torch.zeros(2, 3)}, "must be a sequence of batches, but got one tensor"),
        ({"held_out": 1}, "`0 <= held_out < 1` must hold, but got held_out=1"),
        ({"batches": [normal(2, 3) / 0]}, "^one: of its calibration inputs, values must be finite"),
        ({"loss": lambda model, x: model(x).sum()}, "one loss per predicted token"),
        ({"loss": lambda model, x: model(x).detach()}, "does not depend on the outputs"),
        ({"loss": lambda model, x: model(x) * math.inf}, "^last: of its calibration gradients, values must be finite"),
    ],
)
def test_collect_statistics_says_what_is_wrong(options, message):
    model = Branches()
    with pytest.raises(ValueError, match=message):
        collect_statistics(model, **{"batches": [normal(2, 3)], **options})
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
