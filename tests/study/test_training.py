"""Training one seed: the schedule, what is learned, and what is measured on the way."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from study_fixtures import USUAL_FINALS

import mpo_core
from analysis import run_schema
from study.spec.protocol import Protocol
from study.training.model import build_model
from study.training.seed_run import train_seed
from study.training.train import Training, learning_rate_at
from study.training.windows import Windows

LAYERS = [
    *(
        f"blocks.0.{name}"
        for name in (
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.output",
            "feed_forward.up",
            "feed_forward.down",
        )
    ),
    "lm_head",
]


def model_with(weights, spec, corpus):
    model, _ = build_model(spec, corpus.vocab_size, lambda name: torch.Generator())
    model.load_state_dict(weights)
    return model.eval()


def oracle(weights, spec, corpus):
    """Validation loss and accuracy, one token at a time: each sees its own window up to itself and nothing else."""
    model = model_with(weights, spec, corpus)
    tokens, context = corpus.validation, spec.model.context
    losses, hits = [], []
    for position in range(1, len(tokens)):
        start = (position - 1) // context * context
        with torch.no_grad():
            logits = model(tokens[start:position][None])[0, -1].double()
        losses.append(float(logits.logsumexp(0) - logits[tokens[position]]))
        hits.append(int(logits.argmax()) == int(tokens[position]))
    return sum(losses) / len(losses), sum(hits) / len(hits)


# Schedule -------------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_to_zero():
    protocol = Protocol(steps=100, warmup_steps=10, learning_rate=0.02)
    assert learning_rate_at(0, protocol) == pytest.approx(0.002)
    assert learning_rate_at(4, protocol) == pytest.approx(0.01)
    assert learning_rate_at(9, protocol) == pytest.approx(0.02)
    assert learning_rate_at(10, protocol) == pytest.approx(0.02)
    assert learning_rate_at(55, protocol) == pytest.approx(0.01)  # half way down
    assert learning_rate_at(100, protocol) == pytest.approx(0.0, abs=1e-18)
    rates = [learning_rate_at(step, protocol) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_learning_rate_without_warm_up_begins_at_its_peak():
    assert learning_rate_at(0, Protocol(steps=10, warmup_steps=0, learning_rate=0.02)) == 0.02


@pytest.mark.parametrize("of_embeddings", [{}, {"embedding_learning_rate": 0.05}])
def test_training_is_a_plain_loop(spec_of, corpus, of_embeddings):
    spec = spec_of(protocol={"grad_clip": 0.5, "weight_decay": 0.3, "betas": [0.8, 0.9]} | of_embeddings)
    _, weights = train_seed(spec, 3, corpus)
    training = Training(spec, 3, corpus)
    model, protocol = training.model, spec.protocol
    embedding = model.embedding.weight
    groups = [{"params": [p for p in model.parameters() if p is not embedding]}, {"params": [embedding]}]
    optimiser = torch.optim.AdamW(groups, betas=(0.8, 0.9), weight_decay=0.3, foreach=False, fused=False)
    batches = Windows(corpus.train, 12, 4, 8, 3, "data")
    for step in range(12):
        inputs, targets = batches.batch(step)
        loss = -model(inputs).log_softmax(-1).gather(-1, targets[..., None]).mean()
        optimiser.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float((parameter.grad**2).sum()) for parameter in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 0.5 / norm)
        rate = learning_rate_at(step, protocol)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.param_groups[1]["lr"] = rate / protocol.learning_rate * 0.05 if of_embeddings else rate
        optimiser.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=1e-4, atol=1e-5)


# What is learned and measured -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", [{}, {"chi": 8}, {"chi": 8, "init": "paper"}, {"chi": 8, "init": "tt_svd"}])
def test_loss_falls_on_a_text_that_can_be_learned(spec_of, corpus, arm):
    spec = spec_of({"steps": 150, "batch_size": 8, "eval_every": 50}, {"d_model": 16}, **arm)
    result, _ = train_seed(spec, 0, corpus)
    losses = [row["val_loss"] for row in result.curve]
    assert losses[-1] < losses[0] - 0.7
    assert result.final["final/train_loss"] == pytest.approx(losses[-1], abs=0.3)
    assert result.final["final/val_acc"] > 0.4 > result.curve[0]["val_acc"]


@pytest.mark.parametrize("arm", [{}, {"chi": 3}])
def test_validation_is_every_token_of_the_split_once(spec_of, corpus, arm):
    spec = spec_of({"steps": 30}, **arm)
    result, weights = train_seed(spec, 0, corpus)
    loss, accuracy = oracle(weights, spec, corpus)
    assert result.final["final/val_loss"] == pytest.approx(loss, rel=1e-5)
    assert result.final["final/val_acc"] == accuracy
    assert (len(corpus.validation) - 1) % spec.model.context  # a shorter window at the end took part


def test_validation_does_not_depend_on_its_batches(spec_of, corpus, monkeypatch):
    rows = []
    for tokens in (8, 24, 8192):
        monkeypatch.setattr("study.training.train.EVALUATION_TOKENS", tokens)
        rows.append(train_seed(spec_of(), 0, corpus)[0].final)
    for row in rows[1:]:
        assert row["final/val_loss"] == pytest.approx(rows[0]["final/val_loss"], rel=1e-6)
        assert row["final/val_acc"] == rows[0]["final/val_acc"]


def test_sampled_estimate_is_a_mean_over_random_windows(spec_of, corpus):
    spec = spec_of({"sampled_eval_batches": 100, "sampled_eval_batch_size": 10})
    result, weights = train_seed(spec, 0, corpus)
    model = model_with(weights, spec, corpus)
    windows = corpus.validation.unfold(0, spec.model.context + 1, 1)
    with torch.no_grad():
        logits = model(windows[:, :-1])
    losses = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0].mean(dim=1)
    hits = (logits.argmax(-1) == windows[:, 1:]).double().mean(dim=1)
    for values, key in ((losses, "final/val_loss_sampled"), (hits, "final/val_acc_sampled")):
        error = float(values.std()) / 1000**0.5
        assert abs(result.final[key] - float(values.mean())) < 4 * error
        assert result.final[key] != float(values.mean())


def test_sampled_estimate_draws_anew_at_every_evaluation(spec_of, corpus):
    rows = train_seed(spec_of({"learning_rate": 1e-30}), 0, corpus)[0].curve  # a model that stays as it is
    assert len({row["val_loss"] for row in rows}) == 1
    assert len({row["val_loss_sampled"] for row in rows}) == len(rows) == 4


def test_every_recorded_key_is_in_the_run_schema(spec_of, corpus):
    result, _ = train_seed(spec_of(), 1, corpus, trial=7)
    of_average = {"ema_val_loss", "ema_val_acc"}
    curve_keys = {field.key for field in run_schema.CURVES} - of_average
    assert [row["step"] for row in result.curve] == [0, 4, 8, 12]
    assert [row.keys() - {"step"} for row in result.curve[1:]] == [curve_keys] * 3
    assert result.curve[0].keys() - {"step"} == curve_keys - {"train_loss"}  # there is none before the first step
    assert result.final.keys() == USUAL_FINALS
    assert [row["tokens"] for row in result.curve] == [0, 128, 256, 384]
    assert (result.final["train_tokens"], result.final["total_tokens"]) == (384, 384)
    assert (result.trial, result.seed, result.state, result.failure) == (7, 1, "complete", None)
    assert result.started <= result.ended


def test_final_is_the_last_row_and_best_the_lowest(spec_of, corpus):
    # With a rate this high the curve goes up and down, and the best row in one measure is not the best in the other.
    result, _ = train_seed(spec_of({"steps": 40, "learning_rate": 0.3, "eval_every": 1}), 0, corpus)
    losses = [row["val_loss"] for row in result.curve]
    lowest = min(range(len(losses)), key=losses.__getitem__)
    assert result.curve[lowest]["val_acc"] < result.final["best/val_acc"]
    assert result.final["best/val_loss"] == losses[lowest]
    assert result.final["best/step"] == result.curve[lowest]["step"]
    assert result.final["best/val_acc"] == max(row["val_acc"] for row in result.curve)
    for key in ("val_loss", "val_acc", "val_loss_sampled", "val_acc_sampled", "train_loss"):
        assert result.final[f"final/{key}"] == result.curve[-1][key]


def test_rows_are_handed_on_as_they_come(spec_of, corpus):
    rows = []
    result, _ = train_seed(spec_of(), 0, corpus, on_evaluation=rows.append)
    assert rows == result.curve


def test_dense_layers_are_decomposed_before_and_after(spec_of, corpus):
    spec = spec_of()
    result, weights = train_seed(spec, 0, corpus, rel_error_chis=(2, 64))
    keys = {run_schema.parse_rel_error_key(key) for key in result.rel_errors}
    assert keys == set(product(("init", "trained"), (2, 64), LAYERS))
    for (chi, layer), error in mpo_core.rel_errors(model_with(weights, spec, corpus), (2, 64)).items():
        assert result.rel_errors[run_schema.rel_error_key("trained", chi, layer)] == error
        assert error < 1e-6 if chi == 64 else error > 0.1


def test_mpo_trained_from_scratch_has_no_rel_errors(spec_of, corpus):
    assert train_seed(spec_of(chi=2), 0, corpus, rel_error_chis=(2,))[0].rel_errors == {}


# From a start ---------------------------------------------------------------------------------------------------------


def test_full_chi_starts_where_the_start_ended(spec_of, corpus):
    start, weights = train_seed(spec_of({"steps": 40}), 0, corpus)
    spec = spec_of(chi=64, start="dense", steps=6)
    result, _ = train_seed(spec, 0, corpus, start_weights=weights, start_tokens=1280)
    assert result.curve[0]["val_loss"] == pytest.approx(start.final["final/val_loss"], rel=1e-5)
    assert result.curve[0]["val_acc"] == pytest.approx(start.final["final/val_acc"], abs=0.01)
    errors = {run_schema.parse_rel_error_key(key): error for key, error in result.rel_errors.items()}
    assert errors.keys() == set(product(("compressed",), (64,), LAYERS))
    assert max(errors.values()) < 1e-6
    assert (result.final["train_tokens"], result.final["total_tokens"]) == (6 * 4 * 8, 6 * 4 * 8 + 1280)


def test_compression_costs_what_its_rel_errors_say_and_keeps_the_rest(spec_of, corpus):
    spec = spec_of(chi=2, start="dense")
    start, weights = train_seed(spec_of({"steps": 40}), 0, corpus, rel_error_chis=(2,))
    kept = {name: value.clone() for name, value in weights.items()}
    training = Training(spec, 0, corpus, start_weights=weights)
    for name, value in training.model.state_dict().items():
        if ".cores." not in name:
            assert torch.equal(value, weights[name])
    result, _ = train_seed(spec, 0, corpus, start_weights=weights)
    assert all(torch.equal(weights[name], kept[name]) for name in kept)  # fine-tuning does not write into its start
    for layer in LAYERS:
        compressed = result.rel_errors[run_schema.rel_error_key("compressed", 2, layer)]
        trained = start.rel_errors[run_schema.rel_error_key("trained", 2, layer)]
        assert compressed == pytest.approx(trained, rel=1e-6)
