"""Training by sweeps: one core of each layer changes at a time, the gauge changes no output, and resuming no number."""

from __future__ import annotations

import pytest
import torch
from study_fixtures import DENSE, results_at, run_at, undisturbed_and_resumed, write_study

import mpo_core
from study.spec.sweep import Sweep
from study.training.bonds import chains_of
from study.training.model import trial_shape
from study.training.optimisers import why_alone
from study.training.sweeps import move_centres
from study.training.train import Training
from study.training.weights import weights_of

PROTOCOL = {"steps": 12, "warmup_steps": 1, "eval_every": 4, "learning_rate": 1e-2}


@pytest.fixture
def swept(spec_of):
    """The trial of an MPO arm that is trained by sweeps."""

    def make(every=2, n_sites=3, **arm):
        sweep = None if every is None else {"every": every}
        return spec_of(PROTOCOL, chi=3, sweep=sweep, n_sites=n_sites, factorisation="balanced", **arm)

    return make


def test_sites_take_turns_there_and_back():
    assert [Sweep(every=1).site(step, 3) for step in range(9)] == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert [Sweep(every=2).site(step, 2) for step in range(9)] == [0, 0, 1, 1, 0, 0, 1, 1, 0]
    assert [Sweep(every=3).site(step, 1) for step in range(7)] == [0] * 7


def test_one_core_of_each_layer_changes_at_a_time_and_all_else_does(swept, corpus):
    training = Training(swept(), 0, corpus)
    for step in range(12):
        moves = step % 2 == 0
        before = {name: tensor.clone() for name, tensor in weights_of(training.model).items()}
        training.optimiser_step()
        if moves:
            continue  # the gauge changes all cores
        after = weights_of(training.model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        site = Sweep(every=2).site(step, 3)
        for layer in chains_of(training.model):
            assert [name for name in changed if name.startswith(f"{layer}.cores.")] == [f"{layer}.cores.{site}"]
        assert any("embedding" in name for name in changed)


def test_a_change_of_gauge_changes_no_output_and_moments_change_with_it(swept, corpus):
    training = Training(swept(every=5), 0, corpus)
    for _ in range(7):
        training.optimiser_step()
    model, tokens = training.model, corpus.train[:64].reshape(8, 8).long()
    with torch.no_grad():
        before = model(tokens)
    moments = training._moments()
    size = {core: moments[core]["exp_avg"].clone() for chain in chains_of(model).values() for core in chain.cores
            if core in moments}  # fmt: skip
    move_centres(model, Sweep(every=5), 10, moments)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), before, atol=1e-4, rtol=1e-4)
    assert size
    assert any(not torch.equal(moments[core]["exp_avg"], old) for core, old in size.items())
    assert all((moments[core]["exp_avg_sq"] >= 0).all() for core in size)
    for chain in chains_of(model).values():  # the last core's turn
        for core in list(chain.cores)[:-1]:
            M = core.detach().reshape(-1, core.shape[3]).double()
            torch.testing.assert_close(M.T @ M, torch.eye(M.shape[1], dtype=torch.float64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_sites", [2, 3])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_first_moments_of_a_gradient_are_the_gradient_after_the_change(n_sites, turn):
    config = mpo_core.GPTConfig(vocab_size=12, d_model=16, n_heads=2, n_layers=1, context=8)
    model = mpo_core.PicoGPT(config, dtype=torch.float64)
    model.init_parameters(lambda name: torch.Generator().manual_seed(len(name)), "variance")
    model, _ = mpo_core.compress(model, chi=4, n_sites=n_sites, factorisation="balanced")
    tokens = torch.arange(24).reshape(3, 8) * 5 % 12
    cores = [core for chain in chains_of(model).values() for core in chain.cores]

    def gradients():
        return torch.autograd.grad(mpo_core.next_token_losses(model, tokens).mean(), cores)

    moments = {
        core: {"exp_avg": gradient.clone(), "exp_avg_sq": gradient.square()}
        for core, gradient in zip(cores, gradients(), strict=True)
    }
    own = [moments[core]["exp_avg"] for core in cores]
    before = [core.detach().clone() for core in cores]
    move_centres(model, Sweep(every=1), turn, moments)
    assert not all(torch.equal(core, old) for core, old in zip(cores, before, strict=True))
    for core, moment, gradient in zip(cores, own, gradients(), strict=True):
        assert moments[core]["exp_avg"] is moment  # the optimiser's own tensor
        torch.testing.assert_close(moment, gradient)


@pytest.mark.parametrize("n_steps", [1, 2, 5, 8])
def test_a_sweep_resumed_anywhere_ends_bit_identical(swept, corpus, n_steps):
    undisturbed, resumed = undisturbed_and_resumed(swept(), 0, corpus, n_steps)
    assert resumed.curve == undisturbed.curve
    ours, theirs = weights_of(resumed.model), weights_of(undisturbed.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_sweep_lowers_the_loss_and_is_another_trial(swept, corpus):
    training = Training(swept(), 0, corpus)
    training.run()
    assert training.curve[-1]["val_loss"] < training.curve[0]["val_loss"]
    shapes = [
        trial_shape(swept(every), corpus.vocab_size, len(corpus.validation), swept().model) for every in (None, 2)
    ]
    assert shapes[0].identity != shapes[1].identity
    assert shapes[0].n_params == shapes[1].n_params
    assert "sweep" in why_alone(swept())


def test_a_study_trains_by_sweeps_beside_all_at_once(tmp_path):
    arms = [{"name": name, "family": "mpo", "chi": 3, **sweep} for name, sweep in
            (("all", {}), ("swept", {"sweep": {"every": 1}}))]  # fmt: skip
    run_at(write_study(tmp_path, arms=[DENSE, *arms], seeds=1), tmp_path / "out")
    losses = [result.final["final/val_loss"] for result in results_at(tmp_path / "out").values()]
    assert len(set(losses)) == 3
