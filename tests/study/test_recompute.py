"""`protocol.recompute`: the same results, counted FLOPs, and models that cannot do it."""

from __future__ import annotations

import pytest
import torch
import yaml
from study_fixtures import LLAMA, printed_by_run, undisturbed_and_resumed, write_study

from mpo_core import n_params
from study.errors import StudyError
from study.spec.definition import definition
from study.spec.search_space import listed_specs
from study.spec.study_file import validate
from study.training.model import check_model, trial_shape
from study.training.seed_run import train_seed, train_seeds
from study.training.train import Training

OWN = {"architecture": "own_models:OwnGRU", "context": 8, "width": 12}


@pytest.fixture
def config_of(small_study):
    """A study of a dense and an MPO arm, with or without recomputation."""

    def make(recompute, model=None, **protocol):
        arms = [{"name": "dense", "family": "dense"}, {"name": "mpo", "family": "mpo", "chi": 2}]
        study = small_study(arms=arms, protocol=protocol | ({} if recompute is None else {"recompute": recompute}))
        return validate(study | ({} if model is None else {"model": model}), "here")

    return make


@pytest.mark.parametrize("model", [None, LLAMA], ids=["picogpt", "llama"])
@pytest.mark.parametrize("arm", [0, 1], ids=["dense", "mpo"])
def test_results_are_the_same_bit_for_bit(config_of, corpus, model, arm):
    plain, again = (listed_specs(config_of(given, model, gradient_accumulation=2))[arm] for given in (False, True))
    expected, weights = train_seed(plain, 0, corpus)
    undisturbed, resumed = undisturbed_and_resumed(again, 0, corpus, n_steps=5)
    assert undisturbed.curve == resumed.curve == expected.curve
    for name, value in weights.items():
        assert torch.equal(undisturbed.model.state_dict()[name], value), name
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_blocks_are_computed_again_in_training_alone(config_of, corpus):
    calls = []
    for given in (False, True):
        training = Training(listed_specs(config_of(given))[0], 0, corpus)
        training.model.blocks[0].register_forward_pre_hook(lambda *_, given=given: calls.append(given))
        training._evaluation()
        training.optimiser_step()
    assert calls.count(True) == calls.count(False) + 1 > 3


def test_a_file_without_it_is_recorded_as_before(config_of):
    assert definition(config_of(None)) == definition(config_of(False))
    assert "recompute" not in definition(config_of(False))["protocol"]
    assert definition(config_of(True))["protocol"]["recompute"] is True


def test_flops_count_a_further_forward_pass(config_of, corpus):
    plain, again = (
        trial_shape(listed_specs(config)[0], corpus.vocab_size, len(corpus.validation), config.model)
        for config in (config_of(False), config_of(True))
    )
    assert again.step_flops == plain.step_flops * 4 / 3
    assert again.flops - plain.flops == pytest.approx(12 * plain.step_flops / 3)
    assert again.n_params == plain.n_params == n_params(Training(listed_specs(config_of(True))[0], 0, corpus).model)


def test_a_module_of_a_users_own_without_the_method_is_one_line(config_of, corpus):
    check_model(config_of(False, OWN), corpus.vocab_size)
    with pytest.raises(
        StudyError, match=r"^protocol.recompute: OwnGRU cannot compute its activations again: it has no"
    ):
        check_model(config_of(True, OWN), corpus.vocab_size)


def test_plan_and_run_refuse_it_before_anything_runs(small_study, tmp_path, command):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**small_study(protocol={"recompute": True}), "model": OWN}), encoding="utf-8")
    for how in (("plan", path), ("run", path, "--dir", tmp_path / "out", "--executor", "inline")):
        status, _, err = command(*how)
        assert status == 2
        assert "protocol.recompute: OwnGRU cannot" in err
        assert err.count("\n") == 1


def test_seeds_are_trained_one_by_one_which_is_said_once(config_of, corpus, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be trained as one model with protocol\.recompute"):
        train_seeds(listed_specs(config_of(True))[0], (0, 1), corpus)
    file = write_study(tmp_path, protocol={"recompute": True}, execution={"seeds_per_unit": 2})
    outcome, printed = printed_by_run(file, tmp_path / "study", tracking="off")
    assert outcome.n_failed == 0
    assert printed.count("with protocol.recompute, seeds are trained one by one") == 1
