"""PicoGPT against a plain reimplementation, and the properties the study leans on."""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from mpo_core.compression.compress import compress
from mpo_core.compression.counting import n_params
from mpo_core.models.language_model import flops_per_token, reconstruct_flops
from mpo_core.models.picogpt import GPTConfig, PicoGPT, sinusoidal_positions

SMALL = GPTConfig(vocab_size=11, d_model=12, n_heads=3, n_layers=2, context=10, d_ff=20)


def generators(seed=0):
    return lambda name: torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def make_model(config=SMALL, seed=0, dtype=None):
    model = PicoGPT(config, dtype=dtype)
    model.init_parameters(generators(seed))
    return model


def make_tokens(*shape, vocab_size=SMALL.vocab_size, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def scramble(model):
    """Every parameter far from its init, so that a term left out shows."""
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=0.5, generator=generators(1)(name))
    return model


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def position(t, c, d_model):
    angle = t / 10000 ** (2 * (c // 2) / d_model)
    return math.cos(angle) if c % 2 else math.sin(angle)


def reference_logits(state, tokens, config):
    """The model for one sequence (T,), head by head, with an explicit mask and softmax."""
    T, width = len(tokens), config.d_model // config.n_heads
    x = state["embedding.weight"][tokens] + torch.tensor(
        [[position(t, c, config.d_model) for c in range(config.d_model)] for t in range(T)], dtype=torch.float64
    )
    for index in range(config.n_layers):
        block = {key.split(".", 2)[2]: value for key, value in state.items() if key.startswith(f"blocks.{index}.")}
        normed = layer_norm(x, block["attention_norm.weight"], block["attention_norm.bias"])
        q, k, v = (normed @ block[f"attention.{name}.weight"].T for name in ("query", "key", "value"))
        heads = []
        for head in range(config.n_heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[:, part] @ k[:, part].T / math.sqrt(width)
            for t in range(T):
                scores[t, t + 1 :] = -math.inf
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            heads.append(weights @ v[:, part])
        x = x + torch.cat(heads, -1) @ block["attention.output.weight"].T + block["attention.output.bias"]
        normed = layer_norm(x, block["feed_forward_norm.weight"], block["feed_forward_norm.bias"])
        hidden = (normed @ block["feed_forward.up.weight"].T + block["feed_forward.up.bias"]).clamp(min=0)
        x = x + hidden @ block["feed_forward.down.weight"].T + block["feed_forward.down.bias"]
    return layer_norm(x, state["final_norm.weight"], state["final_norm.bias"]) @ state["lm_head.weight"].T


@pytest.mark.parametrize("length", [1, 7, 10])
def test_picogpt_matches_the_reference(length):
    model = scramble(make_model(dtype=torch.float64))
    tokens = make_tokens(3, length)
    expected = torch.stack([reference_logits(model.state_dict(), sequence, SMALL) for sequence in tokens])
    torch.testing.assert_close(model(tokens), expected)


def test_picogpt_has_the_paper_codes_parameters():
    model = PicoGPT(GPTConfig(), device="meta")
    assert n_params(model) == 808_448
    assert {name for name, _ in model.named_parameters() if name.endswith("bias") and "norm" not in name} == {
        f"blocks.{index}.{layer}.bias"
        for index in range(4)
        for layer in ("attention.output", "feed_forward.up", "feed_forward.down")
    }
    assert "positions" not in model.state_dict()


def test_future_tokens_do_not_change_past_logits():
    model = scramble(make_model(dtype=torch.float64))
    tokens = make_tokens(2, 10)
    logits = model(tokens)
    for t in range(1, 10):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % SMALL.vocab_size
        torch.testing.assert_close(model(changed)[:, :t], logits[:, :t])
        assert not torch.allclose(model(changed)[:, t:], logits[:, t:])


def test_every_parameter_gets_a_gradient():
    model = scramble(make_model())
    tokens = make_tokens(4, 10)
    cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_construction_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    model = PicoGPT(SMALL)
    assert not model(make_tokens(1, 3)).any()
    model.init_parameters(generators())
    assert torch.equal(torch.get_rng_state(), before)


def test_init_depends_on_the_seed_and_the_name_alone():
    model, deeper, other = make_model(), make_model(GPTConfig(**{**vars(SMALL), "n_layers": 3})), make_model(seed=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, deeper.get_parameter(name))
    assert not torch.equal(model.embedding.weight, other.embedding.weight)
    assert not torch.equal(model.blocks[0].attention.query.weight, model.blocks[1].attention.query.weight)


def test_init_is_the_papers():
    model = make_model(GPTConfig())
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            # Six standard errors of a standard deviation estimated from the 8,320 or more entries of a weight.
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=6 / math.sqrt(2 * 8320))
    tokens = make_tokens(4, 257, vocab_size=65)
    with torch.no_grad():
        loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    # A logit has variance 128 · 0.02² after the LayerNorm, which costs half of it over the uniform ln 65.
    assert float(loss) == pytest.approx(math.log(65) + 128 * 0.02**2 / 2, abs=0.03)


def test_variance_init_gives_linear_weights_the_scale_of_an_mpo():
    model = PicoGPT(GPTConfig())
    model.init_parameters(lambda name: torch.Generator().manual_seed(len(name)), init="variance")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            expected = module.in_features**-0.5
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=6 / math.sqrt(2 * 8320)), name
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.02, rel=6 / math.sqrt(2 * 8320))
    with pytest.raises(ValueError, match="must be one of paper, variance, but got 'xavier'"):
        model.init_parameters(lambda name: torch.Generator(), init="xavier")


@pytest.mark.parametrize("d_model", [1, 6, 7])
def test_sinusoidal_positions_follow_the_formula(d_model):
    positions = sinusoidal_positions(50, d_model)
    for t in (0, 1, 49):
        for c in range(d_model):
            assert float(positions[t, c]) == pytest.approx(position(t, c, d_model), abs=1e-12)


def test_odd_d_model_works():
    model = make_model(GPTConfig(vocab_size=5, d_model=9, n_heads=3, n_layers=1, context=4))
    assert model(make_tokens(2, 4, vocab_size=5)).shape == (2, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_reaches_parameters_and_positions(dtype):
    model = make_model(dtype=dtype)
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {dtype}
    assert model(make_tokens(1, 3)).dtype is dtype


def test_sequences_longer_than_the_context_are_refused():
    with pytest.raises(ValueError, match="`T <= context` must hold, but got T=11, context=10"):
        make_model()(make_tokens(1, 11))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_heads": 5}, "`n_heads` must divide `d_model`, but got n_heads=5, d_model=128"),
        ({"n_layers": 0}, "`n_layers` must be a positive integer, but got 0"),
        ({"context": -1}, "`context` must be a positive integer, but got -1"),
        ({"d_ff": 0}, "`d_ff` must be a positive integer, but got 0"),
        ({"d_model": 128.0}, "`d_model` must be a positive integer, but got 128.0"),
    ],
)
def test_config_says_what_is_allowed(sizes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**sizes)


def test_d_ff_defaults_to_four_times_d_model():
    assert GPTConfig(d_model=64).d_ff == 256
    assert GPTConfig(d_model=64, d_ff=7).d_ff == 7


def test_init_parameters_refuses_a_compressed_model():
    compressed, _ = compress(make_model(), chi=2, include=["lm_head"])
    with pytest.raises(ValueError, match="only a dense PicoGPT can be drawn, but lm_head is an MPOLinear"):
        compressed.init_parameters(generators())


@pytest.mark.parametrize("chi", [None, 4])
def test_stacked_seeds_under_vmap_match_single_ones(chi):
    """With SDPA's math kernel: the CPU's flash kernel has no batching rule in torch 2.13."""
    models = [make_model(seed=seed, dtype=torch.float64) for seed in range(3)]
    if chi is not None:
        models = [
            compress(model, chi=chi, init="variance", generator_for=generators(seed))[0]
            for seed, model in enumerate(models)
        ]
    parameters, buffers = stack_module_state(models)
    tokens = make_tokens(3, 4, 10)

    def loss(parameters, buffers, tokens):
        logits = functional_call(models[0], (parameters, buffers), (tokens[:, :-1],))
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    with sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(loss))(parameters, buffers, tokens)
    for index, model in enumerate(models):
        cross_entropy(model(tokens[index, :, :-1]).flatten(0, 1), tokens[index, :, 1:].flatten()).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name][index], parameter.grad)


def test_flops_count_every_product():
    model = make_model()
    per_layer = 4 * 12 * 12 + 2 * 12 * 20  # multiply-adds of Q, K, V, O, up, down
    attention = 2 * 10 * 12  # scores and weighted values, against 10 keys
    assert flops_per_token(model, 10) == 2 * (2 * (per_layer + attention) + 11 * 12)
    compressed, _ = compress(model, chi=2)
    assert flops_per_token(compressed, 10) == flops_per_token(model, 10)
    assert reconstruct_flops(model) == 0
    assert reconstruct_flops(compressed) == sum(
        2 * row.out_features * row.in_features * row.bonds[1] for row in compress(model, chi=2)[1].rows
    )
