from __future__ import annotations

import pytest
import torch

from mpo_core.compression.compress import compress
from mpo_core.generation import generate
from mpo_core.picogpt import GPTConfig, KeyValueCache, PicoGPT


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model(chi=None):
    config = GPTConfig(vocab_size=11, d_model=8, n_heads=2, n_layers=2, context=6)
    model = PicoGPT(config, dtype=torch.float64)
    draws = generator(1)
    model.init_parameters(lambda name: draws, "variance")
    return model if chi is None else compress(model, chi=chi, forward="cached")[0]


def prompt(length=3):
    return torch.randint(11, (4, length), generator=generator(2))


@pytest.mark.parametrize("pieces", [(6,), (1, 1, 1, 1, 1, 1), (2, 3, 1), (5, 1)])
def test_cache_gives_the_logits_of_the_whole_sequence(pieces):
    model, tokens = small_model(), prompt(6)
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
    assert model.lm_head._cache is None  # what evaluation keeps is not carried into training


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
