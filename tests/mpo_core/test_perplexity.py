"""Perplexity and its standard error, on a tiny random model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mpo_core.compression.perplexity import Perplexity, _ratio, paired_difference, perplexity


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 30}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None)).eval()


def make_ids(*sizes, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(30, (size,), generator=generator) for size in sizes]


@pytest.fixture(scope="module")
def texts():
    return make_ids(5, 12, 17, 9)


def losses_of(model, window):
    """Loss of each predicted token of a window, from the probabilities."""
    with torch.no_grad():
        probabilities = model(input_ids=window[None]).logits[0].double().softmax(1)
    return [-math.log(float(probabilities[i, window[i + 1]])) for i in range(len(window) - 1)]


def test_perplexity_is_over_all_predicted_tokens(model, texts):
    result = perplexity(model, texts)
    losses = [losses_of(model, text) for text in texts]
    assert result.n_tokens.tolist() == [4, 11, 16, 8]
    assert result.nats.tolist() == pytest.approx([sum(each) for each in losses], rel=1e-5)
    every = [loss for each in losses for loss in each]
    assert result.value == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-5)


def test_windows_start_anew(model, texts):
    result = perplexity(model, texts, window=8)
    by_hand = [sum(sum(losses_of(model, ids)) for ids in text.split(8)) for text in texts]
    assert result.n_tokens.tolist() == [4, 10, 14, 7]
    assert result.nats.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_standard_error_of_equal_documents_is_that_of_a_mean(model):
    result = perplexity(model, make_ids(*[11] * 6, seed=2))
    means = result.nats / 10
    assert result.standard_error == pytest.approx(result.value * float(means.std()) / math.sqrt(6))


def test_standard_error_is_close_to_the_spread_of_repeated_samples():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(50, 1000, (2000, 40), generator=generator)
    level = 3 + 0.3 * torch.randn(2000, 40, generator=generator, dtype=torch.float64)
    pairs = [_ratio(one * n, n) for one, n in zip(level, sizes, strict=True)]
    ratios, errors = torch.tensor(pairs, dtype=torch.float64).T
    assert float(errors.mean()) == pytest.approx(float(ratios.std()), rel=0.05)


def test_one_document_has_no_standard_error(model, texts):
    assert math.isnan(perplexity(model, texts[:1]).standard_error)


def test_paired_difference():
    sizes = torch.tensor([10, 20, 30])
    one = Perplexity(0, 0, torch.tensor([31.0, 66.0, 84.0], dtype=torch.float64), sizes)
    other = Perplexity(0, 0, torch.tensor([30.0, 62.0, 83.0], dtype=torch.float64), sizes)
    difference, error = paired_difference(one, other)
    assert difference == pytest.approx(6 / 60)
    deviations = [1 - 1, 4 - 2, 1 - 3]
    assert error == pytest.approx(math.sqrt(3 / 2 * sum(d * d for d in deviations)) / 60)
    assert paired_difference(other, one) == pytest.approx((-difference, error))
    with pytest.raises(ValueError, match="same documents"):
        paired_difference(one, other._replace(n_tokens=sizes + 1))


def test_a_token_before_every_window_lets_its_first_be_predicted(model, texts):
    result = perplexity(model, texts, window=8, first=3)
    by_hand = [
        sum(sum(losses_of(model, torch.cat([torch.tensor([3]), ids]))) for ids in text.split(8)) for text in texts
    ]
    assert result.n_tokens.tolist() == [5, 12, 17, 9]
    assert result.nats.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_progress_counts_windows_and_modes_are_kept(model, texts):
    seen = []
    model.train()
    perplexity(model, texts, window=8, progress=lambda *counts: seen.append(counts))
    assert seen == [(done, 6) for done in range(1, 7)]  # the windows of one token predict nothing
    assert model.training
    model.eval()


def test_nothing_to_predict_is_said(model):
    with pytest.raises(ValueError, match="at least one predicted token"):
        perplexity(model, make_ids(1, 1))


def test_a_document_without_predicted_tokens_changes_nothing(model, texts):
    result, more = perplexity(model, texts), perplexity(model, [*texts, *make_ids(0, 1)])
    assert more.n_tokens.tolist() == [*result.n_tokens.tolist(), 0, 0]
    assert more[:2] == result[:2]
    assert paired_difference(more, more) == (0, 0)
