"""Optimisers by name: which parameters Muon updates, how, and that a run goes on bit for bit."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from study_fixtures import (
    DENSE,
    SEARCHED,
    printed_by_run,
    results_at,
    run_at,
    undisturbed_and_resumed,
    write_search,
    write_study,
)
from torch import nn

from analysis.runs.load import load_study, resolve_study
from mpo_core import LowRankLinear, MonarchLinear, MPOLinear, PrunedLinear, StructuredLinear
from study.commands.winners import write_winners
from study.ledger.directory import StudyDirectory
from study.spec.values import OptimiserName
from study.training.optimisers import OPTIMISERS, MuonAndAdamW, matrices_of, muon_groups
from study.training.seed_run import train_seed
from study.training.stacked import StackedTraining
from study.training.train import Training
from study.training.unit import run_unit

MUON = {"optimiser": "muon"}
ARMS = {
    "dense": {},
    "mpo": {"chi": 3},
    "mpo-mup": {"chi": 4, "n_sites": 3, "lr_rule": "mup", "decay": "matrix"},
    "fixed-gauge": {"chi": 3, "gauge": "fixed"},
    "low-rank": {"family": "low_rank", "as_chi": 3},
    "monarch": {"family": "monarch", "as_chi": 4},
    "pruned": {"family": "pruned", "as_chi": 2},
}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups_of(parameters, shapes, **options):
    plain = {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1, "lr_mult": 1.0, "weight_decay": 0.0}
    return [{**plain, "params": parameters, "shapes": shapes} | options, plain]


def test_names_of_a_study_file_are_those_of_the_optimisers():
    assert get_args(OptimiserName) == tuple(OPTIMISERS)


# The step -------------------------------------------------------------------------------------------------------------


def test_muon_on_a_matrix_is_pytorchs_own():
    ours, theirs = (nn.Parameter(random(6, 4)) for _ in range(2))
    optimiser = MuonAndAdamW(groups_of([ours], [(1, 6, 4)], lr=0.05, weight_decay=0.3), "cpu")
    expected = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    before = ours.detach().clone()
    for step in range(3):
        for parameter in (ours, theirs):
            parameter.grad = random(6, 4, seed=step + 1)
        optimiser.step()
        expected.step()
        assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, before)


@pytest.mark.parametrize("shape", [(1, 6, 4), (3, 2, 4)], ids=["core", "blocks"])
def test_muon_on_a_core_or_blocks_is_muon_on_matrices_made_by_hand(shape):
    core = nn.Parameter(random(3, 2, 1, 4))
    by_hand = [nn.Parameter(matrix.clone()) for matrix in core.detach().reshape(shape)]
    optimiser = MuonAndAdamW(groups_of([core], [shape], weight_decay=0.2), "cpu")
    expected = torch.optim.Muon(by_hand, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        core.grad = random(3, 2, 1, 4, seed=step + 1)
        for parameter, grad in zip(by_hand, core.grad.reshape(shape), strict=True):
            parameter.grad = grad.clone()
        optimiser.step()
        expected.step()
    assert torch.equal(core.reshape(shape), torch.stack(by_hand))
    optimiser.zero_grad()
    assert core.grad is None
    after = core.detach().clone()
    optimiser.step()  # without gradients there is nothing to do
    assert torch.equal(core, after)


def test_monarch_matrices_are_the_diagonal_blocks_of_its_two_factors():
    layer = MonarchLinear(12, 8, rank=2, n_blocks=(4, 3), dtype=torch.float64)
    shapes = layer.matrix_shapes()
    L, R = (torch.block_diag(*layer.get_parameter(name).detach().view(shapes[name])) for name in ("L", "R"))
    down, across, rank = 4, 3, 2
    # R gives (across, down, rank), L takes (down, across, rank).
    order = torch.arange(across * down * rank).view(across, down, rank).transpose(0, 1).flatten()
    torch.testing.assert_close(L @ R[order], layer.to_matrix().detach())


def test_matrix_shapes_hold_all_of_a_factor():
    layers = [
        MPOLinear(12, 8, chi=3, n_sites=3),
        MPOLinear(12, 8, chi=3, n_sites=3, gauge="fixed"),
        LowRankLinear(12, 8, rank=3),
        LowRankLinear(12, 8, rank=3, gauge="fixed"),
        MonarchLinear(12, 8, rank=2, n_blocks=(4, 3)),
        PrunedLinear(12, 8, sparsity=0.5),
    ]
    for layer in layers:
        shapes = layer.matrix_shapes()
        assert shapes.keys() == layer.fan_ins().keys()
        for name, shape in shapes.items():
            assert torch.Size(shape).numel() == layer.get_parameter(name).numel()
    assert layers[0].matrix_shapes()["cores.1"] == (1, 3 * layers[0].d_out[1], layers[0].d_in[1] * 3)


# Which parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest(spec_of, corpus, arm):
    spec = spec_of(MUON | {"embedding_learning_rate": 0.002}, **arm)
    model = Training(spec, 0, corpus).model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds, rates, decays = {}, {}, {}
    for group in muon_groups(model, spec):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in kinds
            kinds[name] = "muon" if "shapes" in group else "adamw"
            rates[name], decays[name] = group["lr"], group["weight_decay"]
            assert group["lr"] == pytest.approx(group["lr_mult"] * 0.01)
    assert kinds.keys() == set(names.values())
    for name, kind in kinds.items():
        is_plain = name.endswith("bias") or "norm" in name
        assert kind == ("muon" if name.startswith("blocks.") and not is_plain else "adamw"), name
    assert rates["embedding.weight"] == rates["final_norm.weight"] == pytest.approx(0.002)
    head = [name for name in names.values() if name.startswith("lm_head")]
    assert {kinds[name] for name in head} == {"adamw"}
    if "lr_rule" not in arm:
        assert [rates[name] for name in head] == pytest.approx([0.002] * len(head))
        assert {rates[name] for name, kind in kinds.items() if kind == "muon"} == {0.01}
        assert set(decays.values()) == {0.1}
    else:
        layer = model.get_submodule("blocks.0.feed_forward.up")
        assert isinstance(layer, StructuredLinear)
        for name, fan_in in layer.fan_ins().items():
            multiplier = layer.in_features / fan_in / 3
            assert rates[f"blocks.0.feed_forward.up.{name}"] == pytest.approx(0.01 * multiplier)
            assert decays[f"blocks.0.feed_forward.up.{name}"] == pytest.approx(0.1 / 3 / multiplier)


def test_embeddings_have_the_rate_of_the_layers_by_default(spec_of, corpus):
    spec = spec_of(MUON)
    assert {group["lr"] for group in muon_groups(Training(spec, 0, corpus).model, spec)} == {0.01}


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_matrices_share_the_memory_of_parameters(spec_of, corpus, arm):
    training = Training(spec_of(MUON, **arm), 0, corpus)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    shapes = matrices_of(training.model)
    training.optimiser_step()
    for name, parameter in training.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    n_matrices = sum(shape[0] for shape in shapes.values())
    assert sum("momentum_buffer" in each for each in training.optimiser.state_dict()["state"].values()) == n_matrices


def test_muon_learns(spec_of, corpus):
    result, _ = train_seed(spec_of(MUON | {"steps": 100, "batch_size": 8, "eval_every": 50}, chi=4), 0, corpus)
    assert result.curve[-1]["val_loss"] < result.curve[0]["val_loss"] - 0.7


# Resumed --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
@pytest.mark.parametrize("protocol", [MUON, MUON | {"schedule": "wsd", "gradient_accumulation": 2}], ids=str)
def test_resumed_is_undisturbed_bit_for_bit(spec_of, corpus, arm, protocol):
    spec = spec_of(protocol, **arm)
    undisturbed, second = undisturbed_and_resumed(spec, 0, corpus, n_steps=5)
    assert second.curve == undisturbed.curve
    for name, value in undisturbed.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    one, other = (training.state()[0] for training in (undisturbed, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# Several seeds --------------------------------------------------------------------------------------------------------


def test_stack_refuses_muon(spec_of, corpus):
    trainings = {seed: Training(spec_of(MUON), seed, corpus) for seed in (0, 1)}
    with pytest.raises(ValueError, match="seeds cannot be trained as one model with optimiser muon"):
        StackedTraining(trainings, "cpu", {})


def test_unit_of_several_seeds_trains_them_one_by_one(unit_of, spec_of, corpus):
    spec = spec_of(MUON | {"schedule": "wsd"}, chi=3)
    rows, said = [], []
    results = run_unit(unit_of(spec=spec), lambda seed, row: rows.append((seed, row["step"])), said.append)
    assert [(result.seed, result.state) for result in results] == [(0, "complete"), (1, "complete")]
    assert rows == [(seed, step) for seed in (0, 1) for step in (0, 4, 8, 12)]
    assert said == []
    for result in results:
        alone, _ = train_seed(spec, result.seed, corpus)
        assert result.curve == alone.curve
        assert result.ran_on["mpo.stacked"] == "1"


def test_winners_have_the_best_optimiser(tmp_path):
    arms = [{"name": "dense", "family": "dense", "optimiser": ["adamw", "muon"]}]
    file = write_study(tmp_path, arms=arms, seeds=[100, 101], protocol={"steps": 40, "eval_every": 20})
    run_at(file, tmp_path / "study")
    losses = {}
    for (trial, _), result in results_at(tmp_path / "study").items():
        losses[trial] = losses.get(trial, 0.0) + result.final["final/val_loss"]
    best = ("adamw", "muon")[min(losses, key=losses.__getitem__)]
    [arm] = write_winners(StudyDirectory(tmp_path / "study"), tmp_path / "final.yaml").arms
    assert (arm.name, arm.optimiser, arm.tuned_among) == ("dense", best, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")
def test_a_sampler_chooses_the_optimiser_and_runs_record_it(tmp_path):
    searched = SEARCHED | {"optimiser": {"choices": ["adamw", "muon"]}}
    file = write_search(tmp_path, arms=[DENSE, searched], trials=6, protocol={"schedule": "wsd"})
    run_at(file, tmp_path / "study", tracking=None)
    runs = load_study(resolve_study(tmp_path / "study"))
    assert set(runs.trials.loc[runs.trials["arm"] == "found", "optimiser"]) == {"adamw", "muon"}
    assert set(runs.trials["schedule"]) == {"wsd"}
    assert runs.trials.set_index("arm").loc["dense", "optimiser"] == "adamw"


def test_study_says_once_that_seeds_are_trained_one_by_one(tmp_path):
    arms = [DENSE, {"name": "mpo", "family": "mpo", "chi": [2, 3], "optimiser": ["adamw", "muon"]}]
    file = write_study(tmp_path, arms=arms, protocol={"schedule": "wsd"}, seeds=3, execution={"seeds_per_unit": 3})
    outcome, printed = printed_by_run(file, tmp_path / "study", tracking="off")
    assert (outcome.n_complete, outcome.n_failed) == (15, 0)
    assert printed.count("with optimiser muon, seeds are trained one by one") == 1
    stacked = {result.ran_on["mpo.stacked"] for result in results_at(tmp_path / "study").values()}
    assert stacked == {"1", "3"}


@pytest.mark.parametrize("arm", [{}, {"chi": 2}, {"family": "dense", "d_model": 4}])
def test_rates_of_matrices_fall_with_the_width(spec_of, corpus, arm):
    def rates(protocol):
        training = Training(spec_of(protocol, **arm), 0, corpus)
        names = {id(parameter): name for name, parameter in training.model.named_parameters()}
        groups = training.optimiser.param_groups
        return {names[id(each)]: group["lr_mult"] for group in groups for each in group["params"]}

    width = spec_of(**arm).model.width
    plain, wide = rates({}), rates({"rate_width": 2 * width})
    is_matrix = {name: not ("norm" in name or "embedding" in name or name.endswith("bias")) for name in plain}
    assert len(set(is_matrix.values())) == 2
    assert wide == {name: pytest.approx(rate * (2 if is_matrix[name] else 1)) for name, rate in plain.items()}
