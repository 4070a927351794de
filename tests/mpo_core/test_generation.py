from __future__ import annotations

import copy

import pytest
import torch

from mpo_core.compression.compress import compress
from mpo_core.layers.mpo import MPOLinear
from mpo_core.models.generation import generate
from mpo_core.models.picogpt import GPTConfig, KeyValueCache, PicoGPT


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model(chi=None, forward="cached"):
    config = GPTConfig(vocab_size=11, d_model=8, n_heads=2, n_layers=2, context=6)
    model = PicoGPT(config, dtype=torch.float64)
    draws = generator(1)
    model.init_parameters(lambda name: draws, "variance")
    return model if chi is None else compress(model, chi=chi, forward=forward)[0]


def prompt(length=3, batch=4):
    return torch.randint(11, (batch, length), generator=generator(2))


@pytest.mark.parametrize("pieces", [(6,), (1, 1, 1, 1, 1, 1), (2, 3, 1), (5, 1)])
@pytest.mark.parametrize("chi", [None, 3])
def test_cache_gives_the_logits_of_the_whole_sequence(pieces, chi):
    model, tokens = small_model(chi).eval(), prompt(6)
    cache = KeyValueCache(model, 4)
    with torch.no_grad():
        logits = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
        expected = model(tokens)
    assert cache.length == 6
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-12, atol=1e-12)


def test_cache_refuses_more_than_the_context():
    model = small_model()
    cache = KeyValueCache(model, 4)
    model(prompt(6), cache)
    with pytest.raises(ValueError, match=r"`T <= context` must hold, but got T=7, context=6"):
        model(prompt(1), cache)


@pytest.mark.parametrize("chi", [None, 3])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.7}, {"top_k": 3}])
def test_generate_with_a_cache_gives_what_it_gives_without(chi, options):
    model = small_model(chi)
    both = [generate(model, prompt(), 9, generator=generator(5), use_cache=cache, **options) for cache in (True, False)]
    assert both[0].shape == (4, 12)
    assert torch.equal(*both)
    assert torch.equal(both[0][:, :3], prompt())


@pytest.mark.parametrize("forward", ["reconstruct", "chain", "auto"])
def test_generate_with_a_cache_gives_what_it_gives_without_in_every_forward_mode(forward):
    model = small_model(3, forward)
    held, compared = (generate(model, prompt(), 9, generator=generator(5), use_cache=cache) for cache in (True, False))
    assert torch.equal(held, compared)
    assert torch.equal(held, generate(small_model(3), prompt(), 9, generator=generator(5)))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("length", [1, 5, 6, 8])
def test_generate_with_a_cache_gives_what_it_gives_without_also_beyond_the_context(batch, length):
    tokens = prompt(length, batch)
    both = [generate(small_model(), tokens, 4, generator=generator(5), use_cache=cache) for cache in (True, False)]
    assert both[0].shape == (batch, length + 4)
    assert torch.equal(*both)


@pytest.mark.parametrize(("forward", "n_formed"), [("reconstruct", 1), ("cached", 1), ("chain", 0)])
def test_generate_forms_each_matrix_once_and_frees_it(monkeypatch, forward, n_formed):
    model = small_model(3, forward)
    layers = [module for module in model.modules() if isinstance(module, MPOLinear)]
    formed = []
    to_matrix = MPOLinear.to_matrix
    monkeypatch.setattr(MPOLinear, "to_matrix", lambda layer: formed.append(layer) or to_matrix(layer))
    generate(model, prompt(), 9, temperature=0)
    assert layers
    assert [formed.count(layer) for layer in layers] == [n_formed] * len(layers)
    assert all(layer._held is None and layer._cache is None for layer in layers)


def test_a_held_matrix_is_applied_until_it_is_dropped_and_is_not_copied():
    layer = MPOLinear(8, 6, chi=3, generator=generator(), dtype=torch.float64)
    x = torch.randn(5, 8, generator=generator(3), dtype=torch.float64)
    before = layer(x).detach()
    layer.hold_matrix()
    with torch.no_grad():
        layer.cores[0].mul_(2)
    assert torch.equal(layer(x), before)
    torch.testing.assert_close(copy.deepcopy(layer)(x), 2 * before)
    layer.drop_cached_matrix()
    torch.testing.assert_close(layer(x), 2 * before)
    layer.hold_matrix()
    layer.load_state_dict(
        {name: 2 * tensor for name, tensor in layer.state_dict().items() if name.startswith("cores.0")}, strict=False
    )
    torch.testing.assert_close(layer(x), 4 * before)


def test_generate_at_temperature_0_takes_the_most_likely():
    model, tokens = small_model(), prompt()
    for _ in range(8):
        with torch.no_grad():
            best = model(tokens[:, -6:])[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=1)
    assert torch.equal(generate(model, prompt(), 8, temperature=0), tokens)
    assert torch.equal(generate(model, prompt(), 8, top_k=1, generator=generator()), tokens)


def test_generate_draws_with_the_models_probabilities():
    model = small_model()
    one = prompt()[:1]
    with torch.no_grad():
        logits = model(one)[0, -1]
    n = 20_000
    for temperature, top_k in ((1.0, None), (0.5, 4)):
        drawn = generate(model, one.expand(n, -1), 1, generator=generator(7), temperature=temperature, top_k=top_k)[
            :, -1
        ]
        kept = torch.zeros(11, dtype=torch.bool)
        kept[logits.topk(top_k or 11).indices] = True
        expected = torch.softmax((logits / temperature).masked_fill(~kept, -torch.inf), dim=-1)
        observed = torch.bincount(drawn, minlength=11) / n
        assert (observed - expected).abs().max() < 4 * 0.5 / n**0.5
        assert not observed[~kept].any()


def test_generate_is_repeated_by_its_generator_and_leaves_the_model_alone():
    model = small_model().train()
    one, other, third = (generate(model, prompt(), 9, generator=generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    assert model.training
    assert torch.equal(generate(model, prompt(), 0, temperature=0), prompt())


def test_generate_keeps_no_more_than_k_of_equally_likely_tokens():
    model = small_model()
    model.lm_head.weight.data.zero_()
    drawn = generate(model, prompt().repeat(50, 1), 1, generator=generator(), top_k=3)[:, -1]
    assert sorted(set(drawn.tolist())) == [0, 1, 2]


def test_generate_leaves_every_module_in_its_own_mode_also_after_an_error():
    model = small_model(chi=3).train()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    generate(model, prompt(), 2, temperature=0)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(IndexError):
        generate(model, prompt() + 11, 2, temperature=0)
    assert [module.training for module in model.modules()] == before
    assert model.lm_head._cache is model.lm_head._held is None  # what evaluation keeps is not carried into training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 0, dtype=torch.int64)}, r"`tokens` must have shape \(B, T\) with T >= 1"),
        ({"n_new": -1}, "n_new=-1"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"top_k": 0}, "top_k=0"),
        ({"generator": None}, "drawn from `generator`, but got None"),
    ],
)
def test_generate_says_what_is_allowed(change, message):
    arguments = {"tokens": prompt(), "n_new": 2, "generator": generator()} | change
    with pytest.raises(ValueError, match=message):
        generate(small_model(), **arguments)
