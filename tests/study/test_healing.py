"""Training after compression: which parameters change, the loss against a teacher, and what is recorded."""

from __future__ import annotations

import math

import pytest
import torch
from study_fixtures import DENSE, printed_by_run, results_at, undisturbed_and_resumed, write_study

from analysis.runs.load import load_study, resolve_study
from mpo_core import StructuredLinear
from study.commands.plan import plan
from study.errors import StudyError
from study.spec.definition import definition
from study.spec.heal import Heal
from study.spec.search_space import listed_specs, start_spec
from study.spec.study_file import dump_config, parse_yaml, validate
from study.spec.trial import TrialSpec, budget_hash
from study.training.healing import distillation_loss
from study.training.model import trial_shape
from study.training.seed_run import train_seed, train_seeds
from study.training.stacked import StackedTraining
from study.training.train import Training
from study.training.weights import weights_of

TUNED = {"name": "tuned", "start": "dense", "steps": 6}
FAMILIES = {
    "mpo": {"family": "mpo", "chi": 3},
    "low_rank": {"family": "low_rank", "as_chi": 3},
    "monarch": {"family": "monarch", "as_chi": 4},
    "pruned": {"family": "pruned", "as_chi": 3},
}
DISTILLED = {"loss": "distillation", "temperature": 2.0}
BOTH = {"layers": "structured", **DISTILLED}


@pytest.fixture
def config_of(small_study):
    """The study of a dense arm and of one that is healed from it."""

    def make(heal=None, protocol=None, model=None, **arm):
        arm = TUNED | (arm or FAMILIES["mpo"]) | ({} if heal is None else {"heal": heal})
        return validate(small_study(arms=[DENSE, arm], protocol=protocol or {}, model=model or {}), "here")

    return make


@pytest.fixture
def healed_of(config_of):
    """The spec of the arm that is healed."""
    return lambda *arguments, **arm: listed_specs(config_of(*arguments, **arm))[-1]


@pytest.fixture
def start(spec_of, corpus):
    """Weights of a trained dense model."""
    return train_seed(spec_of({"steps": 60, "eval_every": 60}), 0, corpus)[1]


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_distillation_loss_and_its_gradient_are_those_of_the_formula(temperature):
    generator = torch.Generator().manual_seed(0)
    logits, expected = (3 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_(True)
    loss = distillation_loss(logits, expected, temperature)
    by_hand = 0.0
    for ours, theirs in zip(logits.detach().flatten(0, 1).tolist(), expected.flatten(0, 1).tolist(), strict=True):
        q, p = ([math.exp(x / temperature) for x in each] for each in (ours, theirs))
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        by_hand += temperature**2 * sum(b * math.log(b / a) for a, b in zip(q, p, strict=True)) / 10
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    loss.backward()
    student, teacher = (torch.softmax(each / temperature, dim=-1) for each in (logits.detach(), expected))
    torch.testing.assert_close(logits.grad, temperature * (student - teacher) / 10, rtol=1e-10, atol=1e-14)


def test_loss_of_a_step_compares_the_model_with_its_start(healed_of, corpus, start):
    spec = healed_of(DISTILLED, {"gradient_accumulation": 2}, family="mpo", chi=1)
    training = Training(spec, 0, corpus, start_weights=start)
    teacher = Training(healed_of(family="dense"), 0, corpus, start_weights=start).model
    inputs, _ = training.training_windows.batch(0)
    with torch.no_grad():
        loss = distillation_loss(training.model(inputs), teacher(inputs), 2.0)
    training.optimiser_step()
    assert training._loss_sum == pytest.approx(loss.item(), rel=1e-5)
    assert loss > 0.01


def test_teacher_is_the_start_and_stays_it(healed_of, corpus, start):
    training = Training(healed_of(BOTH), 0, corpus, start_weights=start)
    training.run()
    assert not training._teacher.training
    assert all(parameter.grad is None for parameter in training._teacher.parameters())
    assert all(torch.equal(start[name], value) for name, value in weights_of(training._teacher).items())


def test_a_dense_model_has_nothing_to_learn_from_itself(healed_of, corpus, start):
    result, _ = train_seed(healed_of(DISTILLED, {"weight_decay": 0.0}, family="dense"), 0, corpus, start_weights=start)
    rows = result.curve
    assert rows[0]["val_loss"] == pytest.approx(rows[-1]["val_loss"], abs=0.1)
    training = Training(healed_of(DISTILLED, family="dense"), 0, corpus, start_weights=start)
    training.optimiser_step()
    assert training._loss_sum == pytest.approx(0, abs=1e-6)


def test_distillation_brings_a_compressed_model_nearer_to_its_start(healed_of, corpus, start):
    spec = healed_of(DISTILLED, {"eval_every": 20}, **FAMILIES["mpo"], steps=60)
    result, _ = train_seed(spec, 0, corpus, start_weights=start)
    plain, _ = train_seed(
        healed_of(None, {"eval_every": 20}, steps=60, **FAMILIES["mpo"]), 0, corpus, start_weights=start
    )
    assert result.curve[0]["val_loss"] == plain.curve[0]["val_loss"]  # of the text, whatever the training loss
    losses = [row["train_loss"] for row in result.curve[1:]]
    assert losses[-1] < losses[0] / 2
    assert losses[-1] < plain.curve[-1]["train_loss"] / 2  # a divergence, without the entropy of the text


# The layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("family", FAMILIES)
def test_structured_layers_change_and_all_else_stays_bit_for_bit(healed_of, corpus, start, family, optimiser):
    spec = healed_of(BOTH, {"optimiser": optimiser}, **FAMILIES[family])
    training = Training(spec, 0, corpus, start_weights=start)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.run()
    layers = [name for name, module in training.model.named_modules() if isinstance(module, StructuredLinear)]
    assert layers
    parameters = dict(training.model.named_parameters())
    is_of_layer = {name: any(name.startswith(f"{layer}.") for layer in layers) for name in parameters}
    assert set(is_of_layer.values()) == {True, False}
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, before[name]) != is_of_layer.get(name, False), name
    assert {name for name, value in parameters.items() if value.requires_grad} == {
        name for name, is_trained in is_of_layer.items() if is_trained
    }


@pytest.mark.slow
def test_factors_alone_can_be_trained_by_muon(small_study, corpus):
    """Without biases AdamW has no parameters."""
    model = {"architecture": "huggingface", "config": "llama", "context": 8, "hidden_size": 16, "intermediate_size": 24,
             "num_hidden_layers": 1, "num_attention_heads": 4}  # fmt: skip
    arms = [DENSE, TUNED | FAMILIES["mpo"] | {"optimiser": "muon", "heal": {"layers": "structured"}}]
    spec = listed_specs(validate({**small_study(arms=arms), "model": model}, "here"))[-1]
    _, weights = train_seed(listed_specs(validate({**small_study(arms=[DENSE]), "model": model}, "here"))[0], 0, corpus)
    undisturbed, resumed = undisturbed_and_resumed(spec, 0, corpus, n_steps=3, start_weights=weights)
    assert resumed.curve == undisturbed.curve
    trained = weights_of(undisturbed.model)
    assert torch.equal(trained["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_layers_that_all_stay_dense_cannot_be_healed(healed_of, corpus, config_of):
    spec = healed_of({"layers": "structured"}, family="monarch", as_chi=1000)
    with pytest.raises(
        StudyError, match=r"^arms\[tuned\]: `heal.layers: structured` trains nothing: every layer stays"
    ):
        trial_shape(spec, corpus.vocab_size, len(corpus.validation), config_of().model)


# Resumed, and several seeds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("heal", [{"layers": "structured"}, DISTILLED, BOTH], ids=str)
def test_resumed_is_undisturbed_bit_for_bit(healed_of, corpus, start, heal, optimiser):
    spec = healed_of(heal, {"optimiser": optimiser})
    undisturbed, resumed = undisturbed_and_resumed(spec, 0, corpus, n_steps=3, start_weights=start)
    assert resumed.curve == undisturbed.curve
    for name, value in undisturbed.state()[0].items():
        assert torch.equal(value, resumed.state()[0][name]), name


def test_stacked_seeds_train_structured_layers_alone(healed_of, spec_of, corpus):
    spec = healed_of({"layers": "structured"})
    starts = {seed: train_seed(spec_of(), seed, corpus)[1] for seed in (0, 1)}
    stacked = train_seeds(spec, (0, 1), corpus, start_weights=starts)
    for seed, (result, weights) in zip((0, 1), stacked, strict=True):
        alone, expected = train_seed(spec, seed, corpus, start_weights=starts[seed])
        assert result.ran_on["mpo.stacked"] == "2"
        for row, own in zip(result.curve, alone.curve, strict=True):
            assert row == pytest.approx(own, rel=1e-4)
        torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(weights["embedding.weight"], starts[seed]["embedding.weight"])


def test_stack_refuses_teachers(healed_of, corpus, start):
    trainings = {seed: Training(healed_of(DISTILLED), seed, corpus, start_weights=start) for seed in (0, 1)}
    with pytest.raises(ValueError, match=r"seeds cannot be trained as one model with heal.loss distillation"):
        StackedTraining(trainings, "cpu", {})


# What is recorded -----------------------------------------------------------------------------------------------------


def test_defaults_are_recorded_as_before_there_was_a_choice(config_of):
    without, plain = config_of(), config_of({})
    assert definition(without) == definition(plain)
    assert dump_config(without) == dump_config(plain)
    assert "heal" not in dump_config(without)
    spec, other = listed_specs(without)[-1], listed_specs(plain)[-1]
    assert spec == other
    assert "heal" not in spec.model_dump_json()
    assert TrialSpec.model_validate(spec.model_dump() | {"heal": Heal()}) == spec


def test_identity_tells_how_a_trial_is_healed_but_size_and_budget_do_not(config_of, corpus):
    shapes, budgets = [], []
    for heal in (None, {"layers": "structured"}, DISTILLED, DISTILLED | {"temperature": 1.0}, BOTH):
        config = config_of(heal)
        spec = listed_specs(config)[-1]
        shapes.append(trial_shape(spec, corpus.vocab_size, len(corpus.validation), config.model))
        budgets.append(budget_hash(spec, config, "", start_spec(config, spec)))
        assert validate(parse_yaml(dump_config(config), "here"), "here") == config
    assert len({shape.identity for shape in shapes}) == 5
    assert len({shape.n_params for shape in shapes}) == 1
    assert len(set(budgets)) == 1


def test_flops_of_distillation_count_the_teachers_forward_pass(config_of, corpus):
    plain, structured, distilled = (
        trial_shape(listed_specs(config)[-1], corpus.vocab_size, len(corpus.validation), config.model)
        for config in (config_of(), config_of({"layers": "structured"}), config_of(DISTILLED))
    )
    [dense, _] = listed_specs(config_of())
    of_dense = trial_shape(dense, corpus.vocab_size, len(corpus.validation), config_of().model)
    assert structured.step_flops == plain.step_flops
    assert distilled.step_flops == plain.step_flops + of_dense.step_flops / 3
    assert distilled.flops - plain.flops == 6 * of_dense.step_flops / 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")
def test_a_study_heals_says_once_that_seeds_are_alone_and_records_how(tmp_path):
    arms = [
        DENSE,
        {"name": "plain", "family": "mpo", "chi": 2, "start": "dense", "steps": 4},
        {"name": "healed", "family": "mpo", "chi": [2, 3], "start": "dense", "steps": 4, "heal": BOTH},
    ]
    file = write_study(tmp_path, arms=arms, execution={"seeds_per_unit": 2})
    outcome, printed = printed_by_run(file, tmp_path / "study")
    assert (outcome.n_complete, outcome.n_failed) == (8, 0)
    assert printed.count("with heal.loss distillation, seeds are trained one by one") == 1
    trials = load_study(resolve_study(tmp_path / "study")).trials.set_index("arm")["heal"]
    assert set(trials["healed"]) == {"structured layers, distillation at temperature 2"}
    assert trials[["dense", "plain"]].isna().all()
    results = results_at(tmp_path / "study")
    assert results[1, 0].curve[0]["val_loss"] == results[2, 0].curve[0]["val_loss"]  # the same compressed model
    assert results[1, 0].final["final/train_loss"] > 5 * results[2, 0].final["final/train_loss"]


def test_arms_with_keep_are_healed_and_planned(config_of, corpus, start, healed_of):
    arm = {"family": "low_rank", "keep": 0.5, "metric": "outputs"}
    spec = healed_of(BOTH, {"calibration_batches": 2}, **arm)
    training = Training(spec, 0, corpus, start_weights=start)
    training.run()
    assert torch.equal(training.model.state_dict()["embedding.weight"], start["embedding.weight"])
    planned = plan(config_of(BOTH, {"calibration_batches": 2}, **arm), corpus)
    assert all(trial.seconds > 0 for trial in planned.trials)
    plain = trial_shape(healed_of(None, {"calibration_batches": 2}, **arm), corpus.vocab_size, 100, config_of().model)
    assert planned.trials[-1].shape.n_params == plain.n_params
