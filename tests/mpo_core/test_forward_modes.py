"""All ways of applying an MPOLinear agree, and a kept W is never an old one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, stack_module_state, vmap

from mpo_core.layers.cached_matrix import CachedMatrix
from mpo_core.layers.mpo import FORWARD_MODES, MPOLinear

modes = pytest.mark.parametrize("mode", FORWARD_MODES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_layer(mode, out_features=12, in_features=8, *, seed=0, dtype=torch.float64, **options):
    options = {"chi": 3, "n_sites": 2, **options}
    layer = MPOLinear(in_features, out_features, generator=seeded(seed), dtype=dtype, forward=mode, **options)
    if layer.bias is not None:
        layer.bias.data.normal_(generator=seeded(seed + 1))
    return layer


def make_x(*shape, dtype=torch.float64, seed=2):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


@modes
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 7, 12, 13, 30]),
    st.sampled_from([1, 3, 8, 11, 24]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
)
def test_modes_agree_in_value_and_every_gradient(mode, out_features, in_features, n_sites, chi, padding, bias):
    options = {"n_sites": n_sites, "chi": chi, "padding": padding, "bias": bias}
    layer = make_layer(mode, out_features, in_features, **options)
    x = make_x(2, 3, in_features).requires_grad_()
    dy = make_x(2, 3, out_features, seed=3)
    variables = [x, *layer.parameters()]
    expected = torch.nn.functional.linear(x, layer.to_matrix(), layer.bias)
    for ours, theirs in zip(
        (layer(x), *torch.autograd.grad(layer(x), variables, dy)),
        (expected, *torch.autograd.grad(expected, variables, dy)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    layer.eval()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(x), expected)


@modes
def test_modes_agree_under_vmap_and_grad(mode):
    layers = [make_layer(mode, seed=seed).eval() for seed in (0, 10, 20)]
    parameters, buffers = stack_module_state(layers)
    x = make_x(3, 5, 8)

    def loss(parameters, buffers, x):
        return functional_call(layers[0], (parameters, buffers), (x,)).square().sum()

    with torch.no_grad():
        losses = vmap(loss)(parameters, buffers, x)
        torch.testing.assert_close(vmap(loss)(parameters, buffers, x), losses)
        layers[0](x[0])  # nothing of the transform was kept
    gradients = vmap(grad(loss))(parameters, buffers, x)
    for index, layer in enumerate(layers):
        alone = layer(x[index]).square().sum()
        alone.backward()
        torch.testing.assert_close(losses[index], alone)
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(gradients[name][index], parameter.grad)


@modes
@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False])
def test_modes_compile_to_one_graph(mode, trains):
    torch.compiler.reset()  # graphs of the other cases count towards a limit
    layer = make_layer(mode, 24, 16, n_sites=3).train(trains)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(trains):
        for n_tokens in (5, 6, 1):  # the second makes the size dynamic
            x = make_x(n_tokens, 16)
            torch.testing.assert_close(compiled(x), layer(x))
    if trains:
        cores = list(layer.cores)
        for ours, theirs in zip(
            torch.autograd.grad(compiled(x).square().sum(), cores),
            torch.autograd.grad(layer(x).square().sum(), cores),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


@modes
@pytest.mark.parametrize("evaluates", [True, False])
def test_modes_agree_under_bfloat16_autocast(mode, evaluates):
    layer = make_layer(mode, 64, 64, chi=8, dtype=torch.float32).train(not evaluates)
    x = make_x(5, 64, dtype=torch.float32)
    exact = layer(x)
    with torch.set_grad_enabled(not evaluates):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y.float(), exact, atol=0.05, rtol=0.02, check_dtype=False)
        torch.testing.assert_close(layer(x), exact)  # W kept for autocast is not used outside
    if not evaluates:
        y.float().sum().backward()
        assert all(parameter.grad.dtype is torch.float32 for parameter in layer.parameters())


@modes
def test_modes_stay_in_float64_under_autocast_as_a_dense_layer_does(mode):
    layer, x = make_layer(mode).eval(), make_x(5, 8)
    dense = torch.nn.functional.linear(x, layer.to_matrix(), layer.bias)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x), dense)


@modes
def test_modes_work_in_bfloat16(mode):
    layer = make_layer(mode, 64, 64, chi=8)
    x = make_x(5, 64)
    exact = layer(x)
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.double(), exact, atol=0.06, rtol=0.03)


@modes
def test_modes_work_on_meta_and_on_no_rows(mode):
    assert make_layer(mode).to("meta")(torch.empty(3, 8, device="meta", dtype=torch.float64)).shape == (3, 12)
    assert make_layer(mode).eval()(make_x(0, 8)).shape == (0, 12)
    assert make_layer(mode).to("meta").flops(7) > 0


@modes
def test_modes_refuse_inputs_of_another_size(mode):
    layer = make_layer(mode, 12, 7, padding=True, d_out=[3, 4], d_in=[2, 4], n_sites=None)
    with pytest.raises((ValueError, RuntimeError), match=r"in_features|cannot be multiplied"):
        layer(make_x(3, 8))


def test_an_unknown_mode_is_refused_when_it_is_used():
    layer = make_layer("chain")
    layer.forward_mode = "Chain"
    with pytest.raises(ValueError, match=r"`forward` must be one of .*, but got 'Chain'"):
        layer(make_x(3, 8))


# What is kept ---------------------------------------------------------------------------------------------------------


def kept(layer):
    """The layer after a forward that keeps W."""
    layer.eval()
    with torch.no_grad():
        layer(make_x(1, 8))
    assert layer._cache is not None
    return layer


def change_in_place(layer):
    with torch.no_grad():
        layer.cores[0].mul_(2)


def change_data(layer):
    layer.cores[1].data.mul_(2)


def load(layer):
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def load_assigned(layer):
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}, assign=True)


def take_a_step(layer):
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True)
    layer(make_x(3, 8)).square().sum().backward()
    optimiser.step()


def train_and_change(layer):
    layer.train()
    layer.cores[0].data.add_(1)
    layer.eval()


def replace_a_core(layer):
    layer.cores[0] = torch.nn.Parameter(layer.cores[0].detach() + 1)


def cast(layer):
    layer.to(torch.float32).to(torch.float64)
    layer.cores[0].data.neg_()


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_data, load, load_assigned, take_a_step, train_and_change, replace_a_core, cast],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("mode", ["cached", "auto"])
def test_a_kept_matrix_is_dropped_when_a_core_changes(change, mode):
    layer = kept(make_layer("cached"))
    layer.forward_mode = mode
    before = layer.to_matrix().detach().clone()
    change(layer)
    x = make_x(3, 8)
    W = layer.to_matrix().detach()
    assert (W - before).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, W, layer.bias))


def test_a_kept_matrix_is_used_until_then(monkeypatch):
    layer = kept(make_layer("cached"))
    calls = []
    monkeypatch.setattr(MPOLinear, "to_matrix", lambda self: calls.append(1))
    with torch.no_grad():
        first, second = layer(make_x(3, 8)), layer(make_x(3, 8))
    assert torch.equal(first, second)
    assert calls == []


def test_kept_matrices_are_found_out_by_their_marks_where_values_are_not_compared(monkeypatch):
    """The rule on accelerators, with tensors of the CPU."""
    layer = make_layer("cached")

    def holds(change):
        cores = [core.detach().clone() for core in layer.cores]
        cached = CachedMatrix(cores, layer.to_matrix().detach())
        cached._by_value, cached._cores = False, list(cores)
        cached._marks = CachedMatrix.marks(cores)
        assert cached.holds_for(cores, torch.float64)
        change(cores)
        return cached.holds_for(cores, torch.float64)

    def set_data(cores):
        cores[1].data = cores[1].clone()

    def replace(cores):
        cores[0] = cores[0].clone()

    assert holds(lambda cores: None)
    assert not holds(lambda cores: cores[0].mul_(1))
    assert not holds(set_data)
    assert not holds(replace)


@pytest.mark.parametrize("free", [MPOLinear.train, MPOLinear.float, MPOLinear.drop_cached_matrix, MPOLinear.to])
def test_a_kept_matrix_is_freed(free):
    layer = kept(make_layer("cached"))
    free(layer)
    assert layer._cache is None


def test_nothing_is_kept_where_a_gradient_is_asked_for_or_in_training():
    layer, x = make_layer("cached").eval(), make_x(3, 8)
    layer(x).sum().backward()
    assert layer._cache is None
    assert all(core.grad is not None for core in layer.cores)
    layer.train()
    with torch.no_grad():
        layer(x)
    assert layer._cache is None


def test_a_frozen_layer_keeps_its_matrix_and_passes_the_gradient_of_x():
    layer = make_layer("cached").eval().requires_grad_(False)
    with torch.inference_mode():
        layer(make_x(3, 8))
    x = make_x(3, 8).requires_grad_()
    layer(x).sum().backward()
    assert layer._cache is not None
    torch.testing.assert_close(x.grad, layer.to_matrix().sum(0).expand(3, 8))


def test_functional_call_does_not_meet_the_kept_matrix():
    layer, x = kept(make_layer("cached")), make_x(3, 8)
    other = make_layer("cached", seed=30)
    with torch.no_grad():
        y = functional_call(layer, dict(other.named_parameters()), (x,))
        torch.testing.assert_close(y, other(x))
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.to_matrix(), layer.bias))


def test_copies_do_not_carry_the_kept_matrix():
    layer = kept(make_layer("cached"))
    assert copy.deepcopy(layer)._cache is None
    assert layer._cache is not None
    assert len(pickle.dumps(layer)) == len(pickle.dumps(make_layer("cached").eval()))
    assert set(layer.state_dict()) == {"bias", "cores.0", "cores.1"}
