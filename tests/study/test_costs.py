"""What a model costs besides its parameters: bytes, FLOPs per token, and measured times."""

from __future__ import annotations

import math
import weakref

import pandas as pd
import pytest
import torch
import yaml
from study_fixtures import DENSE, LLAMA, results_at, run_at, write_study
from typer.testing import CliRunner

import mpo_core
from analysis.commands.cli import app
from study.errors import StudyError
from study.ledger.snapshot import read_ledger
from study.spec.search_space import listed_specs
from study.spec.study_file import load_config
from study.training import seed_run
from study.training.loading import load_corpus
from study.training.model import trial_shape
from study.training.train import Training

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

N_LINEAR = 12 * 8 * 8
"""Weights of the linear layers of a block of width 8 in the small study."""
PRUNED = {"name": "pruned", "family": "pruned", "as_chi": 2}


def write_llama(folder, arms):
    """A study file of a tiny LLaMA from scratch."""
    file = write_study(folder, arms=arms)
    study = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump({**study, "model": LLAMA}, sort_keys=False), encoding="utf-8")
    return file


def shapes(file):
    config = load_config(file)
    corpus = load_corpus(config.corpus.paths, None, config.corpus.validation_fraction)
    return [
        trial_shape(spec, corpus.vocab_size, len(corpus.validation), config.model, config.bits)
        for spec in listed_specs(config)
    ]


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_bytes_are_those_of_the_values_and_of_one_bit_for_each_weight_of_a_mask(tmp_path, bits):
    arms = [DENSE, {"name": "mpo", "family": "mpo", "chi": 2}, PRUNED]
    dense, mpo, pruned = shapes(write_study(tmp_path, bits=bits, arms=arms))
    assert dense.bytes == math.ceil(dense.n_params * bits / 8)
    assert mpo.bytes == math.ceil(mpo.n_params * bits / 8)
    # The head has a mask too if it became smaller.
    n_masked = [N_LINEAR, N_LINEAR + 8 * pruned.vocab_size]
    assert pruned.bytes in [math.ceil((bits * pruned.n_params + n) / 8) for n in n_masked]


def test_a_mask_takes_its_part_of_a_share_and_counts_once_in_bytes(tmp_path):
    kept = {
        "name": "kept",
        "family": "pruned",
        "keep": 0.5,
        "start": "dense",
        "metric": "weights",
        "layers": ["blocks.*"],
    }
    file = write_study(tmp_path, arms=[DENSE, kept])
    at_32, at_8 = shapes(file), shapes(write_study(tmp_path, arms=[DENSE, kept], bits=8))
    dense, pruned = at_32
    assert dense.n_params - pruned.n_params == N_LINEAR // 2 + N_LINEAR // 32
    assert pruned.bytes == 4 * (dense.n_params - N_LINEAR // 2)
    assert at_8[1].bytes == pruned.n_params + N_LINEAR // 8
    assert [shape.n_params for shape in at_8] == [shape.n_params for shape in at_32]


def test_flops_per_token_follow_from_the_form_of_the_layers(tmp_path):
    chain = {"name": "chain", "family": "mpo", "chi": 2, "forward": "chain"}
    dense, mpo, chained = shapes(
        write_study(tmp_path, arms=[DENSE, {**chain, "name": "m", "forward": "reconstruct"}, chain])
    )
    config = load_config(tmp_path / "tiny.yaml")
    sizes = mpo_core.GPTConfig(vocab_size=dense.vocab_size, context=8, d_model=8, n_heads=2, n_layers=1)
    model = mpo_core.PicoGPT(sizes)
    assert dense.flops_per_token == mpo_core.flops_per_token(model, config.model.context)
    assert mpo.flops_per_token > dense.flops_per_token > chained.flops_per_token


def test_times_are_recorded_where_they_are_asked_for_and_change_no_other_number(tmp_path):
    arms = [DENSE, {"name": "mpo", "family": "mpo", "chi": 2}]
    plain = write_study(tmp_path / "a", arms=arms, seeds=1)
    timed = write_study(tmp_path / "b", arms=arms, seeds=1, execution={"timing": True})
    wanted = write_study(tmp_path / "c", arms=arms, seeds=1, objectives=["bytes", "decode_ms", "val_loss"])
    finals = []
    for file in (plain, timed, wanted):
        run_at(file, file.parent / "out")
        finals.append({key: result.final for key, result in results_at(file.parent / "out").items()})
    names = {"decode_ms", "prefill_ms", "dense_decode_ms", "dense_prefill_ms"}
    for number in range(2):
        without, *others = (final[number, 0] for final in finals)
        assert not names & set(without)
        for each in others:
            assert all(each[name] > 0 for name in names)
            assert {key: each[key] for key in without if key != "train_seconds"} == {
                key: without[key] for key in without if key != "train_seconds"
            }


def test_times_are_measured_when_gradients_and_moments_are_freed(spec_of, corpus, monkeypatch):
    optimisers, gradients = [], []

    def measure(model, *rest):
        gradients.extend(parameter.grad for parameter in model.parameters())
        assert all(optimiser() is None for optimiser in optimisers)
        return {"prefill_ms": 1.0}

    def release(training, released=Training.release):
        assert any(parameter.grad is not None for parameter in training.parameters)
        optimisers.append(weakref.ref(training.optimiser))
        released(training)

    monkeypatch.setattr(seed_run, "times", measure)
    monkeypatch.setattr(Training, "release", release)
    result, _ = seed_run.train_seed(spec_of(), 0, corpus, timing=True)
    assert result.final["prefill_ms"] == 1.0
    assert len(optimisers) == 1
    assert gradients
    assert set(gradients) == {None}


def test_a_search_may_minimise_bytes_and_times(tmp_path):
    searched = {"name": "found", "family": "mpo", "chi": {"low": 1, "high": 8}}
    search = {"sampler": "tpe", "trials": 3}
    file = write_study(tmp_path, arms=[DENSE, searched], search=search, objectives=["bytes", "prefill_ms"], seeds=1)
    outcome = run_at(file, tmp_path / "out")
    assert (outcome.n_failed, outcome.n_missing) == (0, 0)
    snapshot = read_ledger(f"sqlite:///{tmp_path / 'out' / 'ledger.db'}", "tiny")
    assert all(trial.shape.bytes == 4 * trial.shape.n_params for trial in snapshot.trials)


def test_controls_of_other_models_are_narrower_or_shallower(tmp_path):
    arms = [
        DENSE,
        {"name": "narrow", "family": "dense", "model": {"hidden_size": 8, "intermediate_size": 12}},
        {"name": "shallow", "family": "dense", "model": {"num_hidden_layers": 1}},
        {"name": "low-rank", "family": "low_rank", "as_chi": 2},
    ]
    config = load_config(write_llama(tmp_path, arms))
    corpus = load_corpus(config.corpus.paths, None, config.corpus.validation_fraction)
    models = [Training(spec, 0, corpus).model for spec in listed_specs(config)]
    assert [(model.config.hidden_size, model.config.num_hidden_layers) for model in models] == [
        (16, 2), (8, 2), (16, 1), (16, 2),
    ]  # fmt: skip
    full, narrow, shallow, _ = shapes(tmp_path / "tiny.yaml")
    assert narrow.n_params < shallow.n_params < full.n_params == narrow.n_params_dense
    assert len({full.identity, narrow.identity, shallow.identity}) == 3
    trained = Training(listed_specs(config)[1], 0, corpus)
    trained.run()
    assert trained.curve[-1]["val_loss"] < trained.curve[0]["val_loss"]
    assert torch.isfinite(next(iter(trained.model.parameters()))).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 4}, r"arms\[narrow\].model.context: cannot change"),
        ({"hiden_size": 4}, r"arms\[narrow\]: model: llama has no setting hiden_size"),
        ({"hidden_size": 6}, r"arms\[narrow\]: model: .*hidden"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(tmp_path, changes, message):
    file = write_llama(tmp_path, [DENSE, {"name": "narrow", "family": "dense", "model": changes}])
    with pytest.raises(StudyError, match=message) as raised:
        run_at(file, tmp_path / "out")
    assert len(str(raised.value).splitlines()) == 1, str(raised.value)


def test_picogpt_has_keys_of_its_own_for_a_narrower_model(tmp_path):
    file = write_study(tmp_path, arms=[DENSE, {"name": "narrow", "family": "dense", "model": {"width": 4}}])
    with pytest.raises(StudyError, match=r"arms\[narrow\].model: is for a model from scratch that is not PicoGPT"):
        load_config(file)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")
def test_a_changed_control_is_never_the_reference(tmp_path):
    changed = {"name": "changed", "family": "dense", "model": {"rms_norm_eps": 1e-3}}
    file = write_llama(tmp_path, [changed, DENSE, {"name": "mpo", "family": "mpo", "chi": 2}])
    run_at(file, tmp_path / "out", tracking=None)
    said = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "--out", str(tmp_path / "report")])
    assert said.exit_code == 0, said.output
    trials = pd.read_csv(next((tmp_path / "report").rglob("trials.csv"))).set_index("arm")
    assert trials["group"].to_dict() == {"changed": "dense, changed", "dense": "dense", "mpo": "MPO from scratch"}
    assert trials["label"]["changed"] == "rms_norm_eps=0.001"
    assert trials["is_reference"].to_dict() == {"changed": False, "dense": True, "mpo": False}


@pytest.mark.parametrize("model", ["own", "context"])
def test_decoding_needs_a_cache(tmp_path, model):
    objectives = ["decode_ms", "val_loss"]
    if model == "context":
        file = write_study(tmp_path, arms=[DENSE], objectives=objectives, model={"context": 1})
    else:
        file = write_llama(tmp_path, [DENSE])
        study = yaml.safe_load(file.read_text(encoding="utf-8"))
        own = {"architecture": "own_models:OwnGRU", "context": 8, "width": 12}
        file.write_text(yaml.safe_dump({**study, "model": own, "objectives": objectives}), encoding="utf-8")
    with pytest.raises(StudyError, match="objective decode_ms needs a model with a cache"):
        load_config(file)
