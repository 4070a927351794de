"""What every kind of layer must do: a new kind inherits the test case, and says its class and a size."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode

import mpo_core
from mpo_core.calibration.moments import Moment, Part
from mpo_core.calibration.statistics import METRICS, Statistics
from mpo_core.fitting.metric import Metric
from mpo_core.layers.structured import StructuredLinear
from mpo_core.tensor_train.algebra import rel_error


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def make_linear(out_features=12, in_features=20, *, bias=True, dtype=torch.float64):
    linear = nn.Linear(in_features, out_features, bias=bias, device="meta", dtype=dtype).to_empty(device="cpu")
    for parameter in linear.parameters():
        parameter.data.normal_(generator=seeded(5))
    return linear


def gram_of(in_features, seed=0):
    """Of inputs that depend on each other, with columns of very different sizes, as activations have them."""
    x = normal(400, in_features, seed=seed) @ normal(in_features, in_features, seed=seed + 1)
    scale = torch.logspace(0, 1, in_features, dtype=torch.float64)
    return x.T @ x / len(x) * scale * scale[:, None]


def metric_of(out_features, in_features, seed=0, with_gram=True, with_sensitivity=True):
    """With moments as `gram_of` gives them."""
    gram, sensitivity = gram_of(in_features, seed), gram_of(out_features, seed + 7)
    return Metric(gram if with_gram else None, sensitivity if with_sensitivity else None)


def statistics_of(grams):
    """Statistics of these second moments of the inputs, by name of the layer."""
    part = Part()
    for name, gram in grams.items():
        part.inputs[name,] = moment = Moment()
        moment.total, moment.n_samples = gram, 1
    return Statistics(part, Part())


def square_losses(model, x):
    """One loss per sample, with gradients that differ between the outputs."""
    y = model(x)
    return (y * torch.linspace(0.1, 2, y.shape[-1], dtype=y.dtype)).square().sum(-1)


def flops_of_mv(matrix, vector, out_shape=None):
    """PyTorch's counter leaves out products with a vector."""
    return 2 * matrix[0] * matrix[1]


class StructuredLinearTestCase:
    """The oracle is the dense layer of `to_matrix`."""

    kind: ClassVar[type[StructuredLinear]]
    size: ClassVar[dict[str, Any]]
    """Options that give the size of a layer from 20 to 12 features, with fewer parameters than a dense one."""
    uses_metric: ClassVar[bool] = True
    """False for a kind whose best fit is the same in every metric."""

    def make(self, seed=0, **options):
        return self.kind(20, 12, **{"generator": seeded(seed), "dtype": torch.float64, **self.size, **options})

    # As a layer -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
    def test_values_and_gradients_are_those_of_the_dense_layer(self, bias, leading):
        layer = self.make(bias=bias)
        x, dy = normal(*leading, 20, seed=1).requires_grad_(), normal(*leading, 12, seed=2)
        variables = [x, *layer.parameters()]
        expected = nn.functional.linear(x, layer.to_matrix(), layer.bias)
        torch.testing.assert_close(layer(x), expected)
        ours, theirs = (torch.autograd.grad(y, variables, dy) for y in (layer(x), expected))
        torch.testing.assert_close(ours, theirs)

    def test_state_copy_compilation_and_meta_device(self):
        layer, x = self.make(), normal(5, 20, seed=1)
        other = self.make(device="meta").to_empty(device="cpu")
        other.load_state_dict(load(save(layer.state_dict())))
        assert torch.equal(other(x), layer(x))
        twin = copy.deepcopy(layer)
        next(parameter for name, parameter in twin.named_parameters() if name != "bias").data.zero_()
        assert layer.to_matrix().any()
        assert not torch.equal(twin.to_matrix(), layer.to_matrix())
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
        shape = self.make(device="meta", dtype=torch.float32)(torch.empty(3, 20, device="meta")).shape
        assert shape == (3, 12)

    def test_layers_stacked_under_vmap_give_what_each_gives(self):
        layers = [self.make(seed) for seed in (0, 1, 2)]
        parameters, buffers = stack_module_state(layers)
        x = normal(3, 5, 20, seed=1)
        y = vmap(lambda *state: functional_call(layers[0], state[:2], (state[2],)))(parameters, buffers, x)
        for index, layer in enumerate(layers):
            torch.testing.assert_close(y[index], layer(x[index]))

    def test_autocast_keeps_the_matrix_in_float32(self):
        layer, x = self.make(dtype=torch.float32), normal(5, 20, seed=1, dtype=torch.float32)
        outside = layer.to_matrix()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer.to_matrix(), outside)
            y = layer(x)
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), atol=0.05, rtol=0.05)

    @pytest.mark.parametrize("n_tokens", [1, 7])
    def test_flops_are_those_that_pytorch_counts(self, n_tokens):
        layer = self.make(bias=False, dtype=torch.float32)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: flops_of_mv}) as counter:
            layer(torch.ones(n_tokens, 20))
        assert layer.flops(n_tokens) == counter.get_total_flops()
        assert layer.bytes(n_tokens) >= 4 * (n_tokens * 12 + layer.n_params_matrix)

    # Fresh parameters -------------------------------------------------------------------------------------------------

    def test_parameters_come_from_the_generator_alone(self):
        for init in self.kind.inits:
            before = torch.get_rng_state()
            one, same, other = (self.make(seed, init=init) for seed in (1, 1, 2))
            assert torch.equal(torch.get_rng_state(), before)
            assert torch.equal(one.to_matrix(), same.to_matrix())
            assert not torch.equal(one.to_matrix(), other.to_matrix())
            assert torch.equal(one.bias, torch.zeros(12, dtype=torch.float64))

    def test_each_parameter_is_drawn_by_its_name(self):
        layer, drawn = self.kind.empty_like(make_linear(), **self.size), []
        layer.draw("variance", lambda name: drawn.append(name) or seeded(len(drawn)))
        assert drawn == [name for name, _ in layer.named_parameters() if name != "bias"]
        assert torch.isfinite(layer.to_matrix()).all()

    def test_an_init_that_the_kind_lacks_is_refused(self):
        with pytest.raises(ValueError, match=r"`init` .* must be .*, but got 'best'"):
            self.make(init="best")

    def test_fan_ins_name_every_factor(self):
        layer = self.make()
        assert list(layer.fan_ins()) == [name for name, _ in layer.named_parameters() if name != "bias"]
        rates = {group["lr_mult"] for group in mpo_core.param_groups(nn.Sequential(layer), 1.0, rule="mup")}
        n_factors = len(layer.fan_ins())
        assert rates == {1.0} | {20 / fan_in / n_factors for fan_in in layer.fan_ins().values()}

    # From a matrix ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("bias", [True, False])
    def test_from_linear_carries_everything_else_over(self, bias):
        linear = make_linear(bias=bias, dtype=torch.bfloat16).eval().requires_grad_(False)
        layer = self.kind.from_linear(linear, **self.size)
        assert not layer.training
        assert all(parameter.dtype is torch.bfloat16 for parameter in layer.parameters())
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert (layer.bias is None) == (not bias)
        if bias:
            assert torch.equal(layer.bias, linear.bias)
            assert layer.bias.data_ptr() != linear.bias.data_ptr()
        empty = self.kind.empty_like(linear, **self.size)
        assert {name: value.shape for name, value in empty.state_dict().items()} == {
            name: value.shape for name, value in layer.state_dict().items()
        }

    def test_a_matrix_of_the_kind_is_found_again(self):
        W = self.make().to_matrix().detach()
        layer = self.kind.from_matrix(W, **self.size)
        torch.testing.assert_close(layer.to_matrix(), W)
        again = self.kind(20, 12, bias=False, device="meta", **layer.options())
        assert {name: value.shape for name, value in again.state_dict().items()} == {
            name: value.shape for name, value in layer.state_dict().items()
        }

    @pytest.mark.parametrize("moments", [(True, False), (False, True), (True, True)])
    def test_a_metric_lowers_its_error(self, moments):
        linear = make_linear()
        for seed in range(3):
            metric = metric_of(12, 20, seed, *moments)
            plain, fitted = (self.kind.from_linear(linear, metric=each, **self.size) for each in (None, metric))
            lower, higher = fitted.error(linear.weight, metric), plain.error(linear.weight, metric)
            # Against S alone a kind may be helpless: nothing else stands in for an input that it drops.
            assert lower < higher if self.uses_metric and moments[0] else lower <= higher * (1 + 1e-9)

    # Sizes ------------------------------------------------------------------------------------------------------------

    def test_max_params_is_kept(self):
        W = make_linear(48, 64).weight.detach()
        errors = []
        for max_params in (400, 800, 1600, 3000):
            layer = self.kind.from_matrix(W, max_params=max_params)
            assert layer.n_params_matrix <= max_params
            errors.append(rel_error(W, layer.to_matrix()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < errors[0]

    @pytest.mark.parametrize("target", [0.3, 0.9])
    def test_rel_error_is_met(self, target):
        linear = make_linear(48, 64)
        assert self.kind.from_linear(linear, rel_error=target).error(linear.weight) <= target

    def test_rungs_say_the_error_of_each_size(self):
        W, metric = make_linear(48, 64).weight.detach(), metric_of(48, 64)
        for each in (None, metric):
            rungs = self.kind.rungs(W, each)
            assert rungs
            assert all(rung.n_params < W.numel() for rung in rungs)
            for rung in rungs[:: max(1, len(rungs) // 3)]:
                layer = self.kind.from_matrix(W, max_params=rung.n_params, metric=each)
                assert layer.n_params_matrix == rung.n_params
                if each is None:  # for a chain in a metric the error is interpolated, and without one a bound
                    assert layer.error(W) ** 2 <= rung.error + 1e-9

    # In a model -------------------------------------------------------------------------------------------------------

    @pytest.mark.filterwarnings("ignore:the predicted loss")
    @pytest.mark.parametrize("metric", METRICS)
    def test_compress_keeps_a_share_of_the_parameters(self, metric):
        model = nn.Sequential(make_linear(48, 64), nn.ReLU(), make_linear(64, 48))
        batches = [normal(100, 64, seed=seed) for seed in range(2)]
        statistics = mpo_core.collect_statistics(model, batches, loss=square_losses, held_out=0.5)
        options = {"layer": self.kind.kind, "keep": 0.5, "statistics": statistics, "metric": metric}
        compressed, report = mpo_core.compress(model, **options)
        kept = mpo_core.n_params_compressed(compressed)
        assert 0 < kept <= 0.5 * 2 * 48 * 64
        assert kept == sum(row.n_params_after for row in report.rows)
        assert {row.kind for row in report.rows} <= {self.kind.kind, "dense"}
        assert self.kind.kind in {row.kind for row in report.rows}

    def test_compress_draws_fresh_layers_of_given_sizes(self):
        model = nn.Sequential(make_linear(48, 64))
        compressed, report = mpo_core.compress(
            model, layer=self.kind.kind, max_params={"0": 1600}, init="variance", generator_for=lambda _: seeded()
        )
        assert isinstance(compressed[0], self.kind)
        assert report.rows[0].n_params_after <= 1600
        assert report.rows[0].rel_error is None

    def test_a_saved_model_is_loaded_with_equal_outputs(self, tmp_path):
        model = nn.Sequential(make_linear(), nn.ReLU())
        compressed = nn.Sequential(self.kind.from_linear(model[0], **self.size), nn.ReLU())
        mpo_core.save(compressed, tmp_path)
        x = normal(3, 20)
        assert torch.equal(mpo_core.load(tmp_path, model)(x), compressed(x))
