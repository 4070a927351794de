"""A result depends on trial, corpus and seed alone: not on the process's state, and not on interruptions."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from study.training.checkpoints import Checkpoints
from study.training.seed_run import train_seed
from study.training.storage import Storage
from study.training.train import Training


def equal_states(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def without_times(result):
    final = {key: value for key, value in result.final.items() if key != "train_seconds"}
    return (result.state, final, result.curve, result.rel_errors, result.failure, result.failure_step)


# What a result depends on ---------------------------------------------------------------------------------------------


def seen_by(spec, seed, corpus, start_weights=None):
    """Every training batch that reaches the model, in order."""
    training = Training(spec, seed, corpus, start_weights=start_weights)
    seen = []
    training.model.register_forward_pre_hook(
        lambda model, arguments: seen.append(arguments[0].clone()) if torch.is_grad_enabled() else None
    )
    training.run()
    assert len(seen) == spec.protocol.steps
    return torch.stack(seen)


def test_one_seed_means_one_data_order_for_every_family(spec_of, corpus):
    dense = seen_by(spec_of(), 0, corpus)
    assert torch.equal(dense, seen_by(spec_of(), 0, corpus))
    assert torch.equal(dense, seen_by(spec_of(chi=3), 0, corpus))
    assert torch.equal(dense, seen_by(spec_of(chi=8, init="paper", learning_rate=0.5), 0, corpus))
    assert not torch.equal(dense, seen_by(spec_of(), 1, corpus))


def test_fine_tuning_sees_other_batches_than_its_start_did(spec_of, corpus):
    _, weights = train_seed(spec_of(), 0, corpus)
    fine_tuned = seen_by(spec_of(chi=3, start="dense"), 0, corpus, weights)
    taught = seen_by(spec_of(), 0, corpus)
    assert fine_tuned.shape == taught.shape
    assert not any(torch.equal(one, two) for one, two in zip(fine_tuned, taught, strict=True))


def test_what_families_share_starts_equal(spec_of, corpus):
    states = [Training(spec, 5, corpus).model.state_dict() for spec in (spec_of(), spec_of(chi=2), spec_of(chi=8))]
    shared = [name for name in states[0] if name in states[1]]
    assert "embedding.weight" in shared
    assert "blocks.0.attention.output.bias" in shared
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in shared)
    assert float(states[0]["embedding.weight"].std()) == pytest.approx(0.02, rel=0.3)
    other_seed = Training(spec_of(), 6, corpus).model.state_dict()
    assert not torch.equal(other_seed["embedding.weight"], states[0]["embedding.weight"])


def test_layers_of_one_shape_start_different(spec_of, corpus):
    state = Training(spec_of(), 0, corpus).model.state_dict()
    square = [state[f"blocks.0.attention.{name}.weight"] for name in ("query", "key", "value", "output")]
    for index, one in enumerate(square):
        assert not any(torch.equal(one, two) for two in square[index + 1 :])


def test_seeds_give_different_results_and_repeat_themselves(spec_of, corpus):
    results = [train_seed(spec_of(chi=3), seed, corpus)[0] for seed in (0, 1, 0)]
    assert without_times(results[0]) == without_times(results[2])
    assert results[0].final["final/val_loss"] != results[1].final["final/val_loss"]


def test_global_random_state_neither_matters_nor_changes(spec_of, corpus):
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        results.append(train_seed(spec_of(chi=3, init="paper"), 0, corpus))
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
    assert without_times(results[0][0]) == without_times(results[1][0])
    assert equal_states(results[0][1], results[1][1])


# Interruption ---------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt(spec, corpus, checkpoints, step, start_weights):
    """Train until the forward pass of this step begins, where the process is taken to end."""
    training = Training(spec, 0, corpus, start_weights=start_weights)

    def end(model, arguments):
        if torch.is_grad_enabled() and training.step == step:
            raise Interrupted

    training.model.register_forward_pre_hook(end)
    with pytest.raises(Interrupted):
        training.run(checkpoints, checkpoint_seconds=0)


@pytest.mark.parametrize(
    "arm",
    [{}, {"chi": 3}, {"chi": 3, "start": "dense"}, {"chi": 8, "n_sites": 3, "start": "dense", "gauge": "fixed"}],
    ids=["dense", "mpo", "fine-tune", "fixed-gauge"],
)
def test_run_interrupted_at_any_step_ends_bit_identical(spec_of, corpus, tmp_path, arm):
    spec = spec_of(**arm)
    start = train_seed(spec_of(), 0, corpus)[1] if "start" in arm else None
    expected, expected_weights = train_seed(spec, 0, corpus, start_weights=start, rel_error_chis=(2,))
    for step in range(spec.protocol.steps):
        checkpoints = Checkpoints(Storage(str(tmp_path)), f"step{step}")
        interrupt(spec, corpus, checkpoints, step, start)
        rows = []
        result, weights = train_seed(
            spec,
            0,
            corpus,
            start_weights=start,
            rel_error_chis=(2,),
            checkpoints=checkpoints,
            on_evaluation=rows.append,
        )
        assert without_times(result) == without_times(expected)
        assert equal_states(weights, expected_weights)
        assert all(row["step"] > step for row in rows)  # it did go on from there


def test_run_interrupted_at_every_step_ends_bit_identical(spec_of, corpus, tmp_path):
    spec = spec_of(chi=3)
    expected, expected_weights = train_seed(spec, 0, corpus)
    checkpoints = Checkpoints(Storage(str(tmp_path)), "run")
    for step in range(spec.protocol.steps):
        training = Training(spec, 0, corpus)
        checkpoint = checkpoints.load()
        assert (checkpoint is None) == (step == 0)
        if checkpoint is not None:
            training.restore(*checkpoint)
            assert training.step == step
        if step in (0, 4, 8):
            training.curve.append(training._evaluation())
        training.optimiser_step()
        checkpoints.save(training.step, *training.state())
    result, weights = train_seed(spec, 0, corpus, checkpoints=checkpoints)
    assert without_times(result) == without_times(expected)
    assert equal_states(weights, expected_weights)


def test_run_interrupted_while_it_reports_ends_bit_identical(spec_of, corpus, tmp_path):
    spec = spec_of()
    expected, expected_weights = train_seed(spec, 0, corpus)
    checkpoints = Checkpoints(Storage(str(tmp_path)), "run")

    def end(row):
        if row["step"] == 8:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_seed(spec, 0, corpus, checkpoints=checkpoints, checkpoint_seconds=0, on_evaluation=end)
    result, weights = train_seed(spec, 0, corpus, checkpoints=checkpoints)
    assert without_times(result) == without_times(expected)
    assert equal_states(weights, expected_weights)


def test_damaged_checkpoints_cost_time_and_nothing_else(spec_of, corpus, tmp_path):
    spec = spec_of(chi=3)
    expected, expected_weights = train_seed(spec, 0, corpus)
    for n_damaged in (1, 2):  # one, then all that are kept
        storage = Storage(str(tmp_path / str(n_damaged)))
        checkpoints = Checkpoints(storage, "run")
        interrupt(spec, corpus, checkpoints, 9, None)
        keys = storage.keys("run")
        assert len(keys) == 2
        for key in keys[-n_damaged:]:
            storage.write(key, storage.read(key)[:-1])
        result, weights = train_seed(spec, 0, corpus, checkpoints=checkpoints)
        assert without_times(result) == without_times(expected)
        assert equal_states(weights, expected_weights)


def test_seconds_add_up_over_an_interruption(spec_of, corpus, tmp_path):
    spec, checkpoints = spec_of(), Checkpoints(Storage(str(tmp_path)), "run")
    interrupt(spec, corpus, checkpoints, 11, None)
    before = checkpoints.load()[1]["seconds"]
    result, _ = train_seed(spec, 0, corpus, checkpoints=checkpoints)
    assert 0 < before < result.final["train_seconds"] < 60


# Divergence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", [{}, {"chi": 3}], ids=["dense", "mpo"])
def test_divergence_is_a_failed_result_with_its_curve(spec_of, corpus, arm):
    protocol = {"learning_rate": 1e4, "eval_every": 1}
    result, _ = train_seed(spec_of(protocol, **arm), 0, corpus, rel_error_chis=(2,))
    healthy, _ = train_seed(spec_of({"eval_every": 1}, **arm), 0, corpus, rel_error_chis=(2,))
    assert result.state == "failed"
    assert result.failure.startswith("diverged: the ")
    assert result.failure.endswith(f" is not finite at step {result.failure_step}")
    assert 0 < result.failure_step <= 12
    assert result.final == {}
    assert [row["step"] for row in result.curve] == list(range(len(result.curve)))
    assert len(result.curve) in (result.failure_step, result.failure_step + 1)
    assert all(math.isfinite(value) for row in result.curve for value in row.values())
    assert result.curve[0]["val_loss"] == healthy.curve[0]["val_loss"]
    # Of the rel_errors, those from before the training are known all the same.
    before = {key: error for key, error in healthy.rel_errors.items() if "/init/" in key}
    assert result.rel_errors == before


def test_divergence_comes_again_at_the_same_step_after_an_interruption(spec_of, corpus, tmp_path):
    spec = spec_of({"learning_rate": 1e2})
    expected, _ = train_seed(spec, 0, corpus)
    assert expected.failure_step > 2
    checkpoints = Checkpoints(Storage(str(tmp_path)), "run")
    interrupt(spec, corpus, checkpoints, expected.failure_step - 1, None)
    result, _ = train_seed(spec, 0, corpus, checkpoints=checkpoints)
    assert without_times(result) == without_times(expected)
