"""A batch in several parts gives the step of the whole batch."""

from __future__ import annotations

import pytest
import torch

from study.training.seed_run import train_seed, train_seeds
from study.training.train import Training


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def parts(n, **more):
    return {"gradient_accumulation": n, "grad_clip": 0.5} | more


ARMS = [{}, {"chi": 3, "lr_rule": "mup"}, {"family": "monarch", "as_chi": 4}]


@pytest.mark.parametrize("arm", ARMS, ids=str)
@pytest.mark.parametrize("n_parts", [2, 4])
def test_parts_give_the_result_of_the_whole(spec_of, corpus, arm, n_parts):
    whole, weights = train_seed(spec_of(parts(1), **arm), 0, corpus)
    result, in_parts = train_seed(spec_of(parts(n_parts), **arm), 0, corpus)
    torch.testing.assert_close(dict(in_parts), dict(weights), rtol=1e-9, atol=1e-9)
    for row, expected in zip(result.curve, whole.curve, strict=True):
        assert row == pytest.approx(expected, rel=1e-10)  # the recorded training loss is the mean over the batch


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_parts_of_stacked_seeds_give_the_result_of_the_whole(spec_of, corpus, arm):
    whole = train_seeds(spec_of(parts(1), **arm), (0, 1), corpus)
    in_parts = train_seeds(spec_of(parts(2), **arm), (0, 1), corpus)
    for (result, weights), (expected, expected_weights) in zip(in_parts, whole, strict=True):
        torch.testing.assert_close(dict(weights), dict(expected_weights), rtol=1e-9, atol=1e-9)
        for row, expected_row in zip(result.curve, expected.curve, strict=True):
            assert row == pytest.approx(expected_row, rel=1e-10)


def test_a_step_sees_parts_of_equal_size(spec_of, corpus):
    seen = []
    training = Training(spec_of(parts(2)), 0, corpus)
    training.model.register_forward_pre_hook(lambda model, arguments: seen.append(arguments[0]))
    training.optimiser_step()
    assert torch.equal(torch.cat(seen), training.training_windows.batch(0)[0])
    assert [len(tokens) for tokens in seen] == [2, 2]
