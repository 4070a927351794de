"""Bonds that change while an MPO is trained: the budget, what stays as it is, moments, resumption and records."""

from __future__ import annotations

import pytest
import torch
from study_fixtures import DENSE, results_at, run_at, undisturbed_and_resumed, write_study

import mpo_core
from analysis import run_schema
from analysis.runs.load import load_study, resolve_study
from study.errors import StudyError
from study.ledger.snapshot import read_ledger
from study.spec.bonds import Bonds
from study.training.bonds import bonds_of, chains_of, change_bonds, check_chains
from study.training.model import trial_shape
from study.training.optimisers import why_alone
from study.training.seed_run import train_seed
from study.training.train import Diverged, Training
from study.training.weights import load_weights, weights_of

EVERY_3 = {"every": 3, "until": 1.0, "grow": 0.3, "prune": 0.3}
PROTOCOL = {"steps": 12, "warmup_steps": 1, "eval_every": 4, "learning_rate": 1e-2, "calibration_batches": 2}
pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")


@pytest.fixture
def adaptive(spec_of):
    """The trial of an MPO arm whose bonds change."""

    def make(bonds=EVERY_3, chi=3, **arm):
        return spec_of(PROTOCOL, chi=chi, bonds=bonds, factorisation="balanced", **arm)

    return make


def n_in_chains(model):
    return sum(chain.n_params_matrix for chain in chains_of(model).values())


def test_parameters_move_between_layers_and_stay_within_the_budget(adaptive, corpus):
    training = Training(adaptive(), 0, corpus)
    most = n_in_chains(training.model)
    changed = set()
    for _ in range(12):
        training.optimiser_step()
        assert n_in_chains(training.model) <= most
        assert {id(each) for each in training.parameters} == {id(each) for each in training._in_order()}
        changed |= {name for name, noted in training.bonds.items() if len(noted) > 1}
    assert changed
    assert bonds_of(training.model) == {name: noted[-1][1:] for name, noted in training.bonds.items()}
    assert all(noted[0][0] == 0 for noted in training.bonds.values())
    assert {step for noted in training.bonds.values() for step, *_ in noted[1:]} <= {3, 6, 9}


def test_bonds_grow_to_the_budget_and_leave_the_outputs_as_they_are(adaptive, corpus):
    most = 1600
    bonds = Bonds(every=3, grow=1.0, prune=1e-9, max_params=most)
    training = Training(adaptive(bonds.model_dump(), chi=1), 0, corpus)
    for _ in range(3):
        training.optimiser_step()
    model, tokens = training.model, corpus.train[:64].reshape(8, 8).long()
    with torch.no_grad():
        before = model(tokens)
    n_before = n_in_chains(model)
    order = training._in_order()
    state = training.optimiser.state_dict()["state"]
    moments = {parameter: state[at] for at, parameter in enumerate(order)}
    batches = [training._bond_changes._windows.batch(index)[0] for index in range(2)]
    after = change_bonds(model, bonds, most, batches, moments)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), before, atol=1e-4, rtol=1e-4)
    assert n_before < n_in_chains(model) <= most
    for parameter in model.parameters():
        assert after[parameter]["exp_avg"].shape == parameter.shape
        assert after[parameter]["exp_avg_sq"].shape == parameter.shape
        assert (after[parameter]["exp_avg_sq"] >= 0).all()
        assert float(after[parameter]["step"]) == 3
    # Biases and embeddings are the same parameters, with the same moments.
    cores = {core for chain in chains_of(model).values() for core in chain.cores}
    same = [parameter for parameter in model.parameters() if parameter not in cores]
    assert same
    assert all(after[parameter] is moments[parameter] for parameter in same)


def test_new_directions_learn_from_the_first_step(adaptive, corpus):
    bonds = {"every": 3, "grow": 1.0, "prune": 1e-9, "max_params": 1600}
    training = Training(adaptive(bonds, chi=1), 0, corpus)
    for _ in range(4):
        training.optimiser_step()
    grown = [name for name, noted in training.bonds.items() if len(noted) > 1]
    assert grown
    for name in grown:
        chain = chains_of(training.model)[name]
        # The rows that were zero.
        assert all(core[1:].abs().max() > 0 for core in list(chain.cores)[1:] if core.shape[0] > 1)


def test_nothing_changes_if_nothing_is_worth_it(adaptive, corpus):
    training = Training(adaptive({**EVERY_3, "grow": 1e-9, "prune": 1e-9}), 0, corpus)
    plain = Training(adaptive(None), 0, corpus)
    for _ in range(12):
        training.optimiser_step()
        plain.optimiser_step()
    assert all(torch.equal(one, other) for one, other in zip(training.parameters, plain.parameters, strict=True))


@pytest.mark.parametrize("n_steps", [2, 3, 5, 10])
def test_training_resumed_before_or_after_a_change_ends_bit_identical(adaptive, corpus, n_steps):
    undisturbed, resumed = undisturbed_and_resumed(adaptive(), 0, corpus, n_steps)
    assert resumed.bonds == undisturbed.bonds
    assert any(len(noted) > 1 for noted in resumed.bonds.values())
    assert resumed.curve == undisturbed.curve
    ours, theirs = weights_of(resumed.model), weights_of(undisturbed.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_trained_weights_are_loaded_into_a_model_of_the_first_bonds(adaptive, corpus):
    spec = adaptive()
    result, weights = train_seed(spec, 0, corpus)
    model = Training(spec, 0, corpus).model
    load_weights(model, weights, bonds_differ=True)
    assert bonds_of(model) == {name: noted[-1][1:] for name, noted in result.bonds.items()}
    assert mpo_core.n_params(model) == result.final["n_params_end"]
    cut = {name: tensor[..., :1] if name.endswith("cores.0") else tensor for name, tensor in weights.items()}
    with pytest.raises(RuntimeError):
        load_weights(model, cut, bonds_differ=True)
    with pytest.raises(RuntimeError):  # weights of another run are refused
        load_weights(Training(spec, 0, corpus).model, weights)


def test_seeds_are_alone(adaptive, corpus):
    assert "change the layers of each seed" in why_alone(adaptive())
    bonds = [train_seed(adaptive(), seed, corpus)[0].bonds for seed in (0, 1)]
    assert bonds[0] != bonds[1]


def test_parameters_are_those_of_the_limit_and_a_limit_that_is_too_small_is_refused(adaptive, corpus):
    def shape(spec):
        return trial_shape(spec, corpus.vocab_size, len(corpus.validation), spec.model)

    plain, moved, larger = (shape(adaptive(bonds)) for bonds in (None, EVERY_3, {**EVERY_3, "max_params": 1500}))
    assert moved.n_params == plain.n_params
    assert moved.identity != plain.identity
    assert larger.n_params == plain.n_params - n_in_chains(Training(adaptive(), 0, corpus).model) + 1500
    assert moved.flops > plain.flops
    for most in (10, 50_000):
        told = rf"arms\[mpo\]: `bonds.max_params` must be from [\d,]+ \(bonds of 1\) to 1,\d+ .*, but got {most:,}$"
        with pytest.raises(StudyError, match=told):
            shape(adaptive({**EVERY_3, "max_params": most}))


@pytest.mark.parametrize("key", [{"bonds": EVERY_3}, {"sweep": {"every": 2}}])
def test_layers_of_one_site_and_shared_layers_are_refused(spec_of, corpus, key):
    spec = spec_of(PROTOCOL, chi=3, n_sites=1, factorisation="balanced", **key)
    with pytest.raises(StudyError, match=r"arms\[mpo\]: `(bonds|sweep)` needs MPO layers of at least two sites"):
        trial_shape(spec, corpus.vocab_size, len(corpus.validation), spec.model)
    linears = [torch.nn.Linear(8, 8) for _ in range(2)]
    linears[1].weight = linears[0].weight
    shared, _ = mpo_core.compress(torch.nn.Sequential(*linears), chi=2)
    with pytest.raises(ValueError, match="`bonds` is not possible: 0 and 1 share their cores"):
        check_chains(shared, "bonds")


@pytest.mark.parametrize("key", [{"bonds": EVERY_3}, {"sweep": {"every": 1}}])
def test_a_run_that_diverges_before_a_change_is_recorded_as_diverged(spec_of, corpus, key):
    protocol = {**PROTOCOL, "learning_rate": 1e20, "grad_clip": 1e9}
    result, _ = train_seed(spec_of(protocol, chi=3, factorisation="balanced", **key), 0, corpus)
    assert result.state == "failed"
    assert result.failure.startswith("diverged: ")
    assert result.failure_step is not None
    assert result.curve


def test_a_change_that_cannot_be_measured_changes_nothing(adaptive, corpus):
    training = Training(adaptive(), 0, corpus)
    for _ in range(2):
        training.optimiser_step()
    core = next(iter(chains_of(training.model).values())).cores[0]
    core.data[0, 0, 0, 0] = float("inf")
    before = bonds_of(training.model)
    training.step = 3
    with pytest.raises(Diverged, match="at step 3"):
        training.optimiser_step()
    assert bonds_of(training.model) == before


@pytest.mark.parametrize("forward", ["reconstruct", "chain"])
def test_a_study_records_each_change(tmp_path, forward):
    arm = {"name": "adaptive", "family": "mpo", "chi": 3, "bonds": {**EVERY_3, "every": 2}, "forward": forward}
    file = write_study(tmp_path, arms=[DENSE, {"name": "mpo", "family": "mpo", "chi": 3}, arm], seeds=2)
    run_at(file, tmp_path / "out")
    results = results_at(tmp_path / "out")
    bonds = results[2, 0].bonds
    assert any(len(noted) > 1 for noted in bonds.values())
    assert not results[1, 0].bonds
    assert "n_params_end" not in results[1, 0].final
    trial = read_ledger(f"sqlite:///{tmp_path / 'out' / 'ledger.db'}", "tiny").trials[1]
    assert 0 < results[2, 0].final["n_params_end"] <= trial.shape.n_params


def test_mlflow_has_the_bonds_over_steps_and_analysis_reads_them(tmp_path):
    arm = {"name": "adaptive", "family": "mpo", "chi": 3, "bonds": {**EVERY_3, "every": 2}}
    file = write_study(tmp_path, arms=[DENSE, arm], seeds=1)
    run_at(file, tmp_path / "out", tracking=None)
    bonds = results_at(tmp_path / "out")[1, 0].bonds
    runs = load_study(resolve_study(tmp_path / "out"))
    frame = runs.bonds
    assert set(frame["layer"]) == set(bonds)
    for layer, noted in bonds.items():
        of_layer = frame[frame["layer"] == layer]
        assert of_layer["bond"].tolist() == [noted[-1][1 + number] for number in of_layer["number"]]
    assert run_schema.parse_bond_key(run_schema.bond_key("blocks.0.attn.q_proj", 1)) == ("blocks.0.attn.q_proj", 1)
