"""Arms of other kinds of layers: as large as an MPO and no larger, and trained as everything else is."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from study_fixtures import DENSE, cli, ledger_at, results_at, run_at, write_study

import mpo_core
from analysis.results.summary import summarise
from analysis.runs.load import load_study, resolve_study
from study.errors import StudyError
from study.spec.search_space import listed_specs
from study.spec.study_file import load_config
from study.training.checkpoints import Checkpoints
from study.training.model import build_model, trial_shape
from study.training.randomness import generator
from study.training.seed_run import train_seed
from study.training.storage import Storage
from study.training.train import Training

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")

FAMILIES = ("low_rank", "monarch", "pruned", "tree", "block_train")
LAYERS = {
    "low_rank": mpo_core.LowRankLinear,
    "monarch": mpo_core.MonarchLinear,
    "pruned": mpo_core.PrunedLinear,
    "tree": mpo_core.TreeLinear,
    "block_train": mpo_core.BlockTrainLinear,
}
WIDE = {"d_model": 16, "n_heads": 2, "n_layers": 1, "context": 8}


def matrices(model):
    """Parameters of every linear layer's matrix, by name."""
    return {
        name: layer.n_params_matrix if isinstance(layer, mpo_core.StructuredLinear) else layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear | mpo_core.StructuredLinear)
    }


def built(spec, corpus, seed=0):
    return build_model(spec, corpus.vocab_size, partial(generator, seed, "init"))[0]


def test_options_of_the_kind_are_those_of_its_layers_and_another_trial(spec_of, corpus):
    plain = spec_of(model=WIDE, family="tree", as_chi=4)
    deep = spec_of(model=WIDE, family="tree", as_chi=4, options={"n_sites": 2, "forward": "chain"})
    layers = [layer for layer in built(deep, corpus).modules() if isinstance(layer, mpo_core.TreeLinear)]
    assert layers
    assert {(len(layer.d_out), layer.forward_mode) for layer in layers} == {(2, "chain")}
    shapes = [trial_shape(spec, corpus.vocab_size, len(corpus.validation), spec.model) for spec in (plain, deep)]
    assert shapes[0].identity != shapes[1].identity
    assert deep.options_shown == "forward=chain, n_sites=2"
    with pytest.raises(StudyError, match=r"arms\[mpo\]: .*`1 <= n_sites <= 6` must hold"):
        trial_shape(
            spec_of(model=WIDE, family="tree", as_chi=4, options={"n_sites": 9}), corpus.vocab_size, 100, plain.model
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chi", [2, 4, 16])
def test_no_layer_is_larger_than_the_mpos(spec_of, corpus, family, chi):
    as_mpo = matrices(built(spec_of(model=WIDE, chi=chi), corpus))
    dense = matrices(built(spec_of(model=WIDE), corpus))
    model = built(spec_of(model=WIDE, family=family, as_chi=chi), corpus)
    own = matrices(model)
    assert own.keys() == as_mpo.keys()
    for name, n_params in own.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear) == (as_mpo[name] >= dense[name])
        if isinstance(layer, torch.nn.Linear):
            continue
        assert type(layer) is LAYERS[family]
        assert n_params < dense[name]
        assert n_params <= as_mpo[name]
        if family == "pruned":
            assert n_params == as_mpo[name]
        if family == "low_rank":  # one rank more would be larger
            assert n_params + layer.in_features + layer.out_features > as_mpo[name]
    assert any(type(model.get_submodule(name)) is LAYERS[family] for name in own) == (chi < 16)


def test_fixed_gauge_gives_more_rank_within_the_same_limit(spec_of, corpus):
    as_mpo = matrices(built(spec_of(model=WIDE, chi=6), corpus))
    free, fixed = (
        built(spec_of(model=WIDE, family="low_rank", as_chi=6, **gauge), corpus) for gauge in ({}, {"gauge": "fixed"})
    )
    ranks = []
    for name, layer in fixed.named_modules():
        if isinstance(layer, mpo_core.LowRankLinear):
            assert layer.gauge == "fixed"
            ranks.append((free.get_submodule(name).rank, layer.rank))
            more = (layer.rank + 1) * (layer.in_features + layer.out_features - layer.rank - 1)
            assert layer.n_params_matrix <= as_mpo[name] < more
    assert all(rank <= larger for rank, larger in ranks)
    assert any(rank < larger for rank, larger in ranks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [None, "dense"])
def test_shapes_are_those_of_the_built_model(spec_of, corpus, family, start):
    for chi in (3, 5, 16):
        spec = spec_of(model=WIDE, family=family, as_chi=chi, **({"start": start} if start else {}))
        weights = built(spec_of(model=WIDE), corpus).state_dict() if start else None
        model, _ = build_model(spec, corpus.vocab_size, partial(generator, 0, "init"), weights)
        counted = trial_shape(spec, corpus.vocab_size, 100, spec.model)
        assert counted.n_params == mpo_core.n_params(model)
        assert counted.n_params_compressed == mpo_core.n_params_compressed(model)
        assert counted.bonds == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_the_layers_count(spec_of, corpus, family):
    spec = spec_of(model=WIDE, family=family, as_chi=3)
    model = built(spec, corpus)
    tokens = 40
    layers = [m for m in model.modules() if isinstance(m, mpo_core.StructuredLinear)]
    plain = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    linear = sum(layer.flops(tokens) for layer in layers) + sum(2 * m.weight.numel() * tokens for m in plain)
    counted = mpo_core.flops_per_token(model, 8) * tokens + mpo_core.reconstruct_flops(model)
    assert counted == linear + 4 * 8 * 16 * tokens


def test_sizes_that_come_to_the_same_are_one_configuration(spec_of, corpus):
    def identity(**arm):
        return trial_shape(spec_of(model=WIDE, **arm), corpus.vocab_size, 100, spec_of(model=WIDE).model).identity

    assert identity(family="low_rank", as_chi=300) == identity(family="low_rank", as_chi=301)
    assert identity(family="low_rank", as_chi=3) != identity(family="low_rank", as_chi=6)
    assert identity(family="low_rank", as_chi=3) != identity(family="pruned", as_chi=3)
    assert identity(family="low_rank", as_chi=3) != identity(family="low_rank", as_chi=3, init="svd_fresh")
    assert identity(chi=300) == identity(chi=301)


def test_low_rank_starts_from_the_init_it_is_given(spec_of, corpus):
    """The SVD of a dense draw keeps its spectral norm; a product of independent factors has a larger one."""
    norms = {}
    for init in ("variance", "svd_fresh"):
        model = built(spec_of(model=WIDE, family="low_rank", as_chi=2, init=init), corpus)
        layers = [layer for layer in model.modules() if isinstance(layer, mpo_core.LowRankLinear)]
        norms[init] = [float(torch.linalg.matrix_norm(layer.to_matrix().detach(), 2)) for layer in layers]
    assert norms["svd_fresh"]
    assert sum(norms["svd_fresh"]) < 0.8 * sum(norms["variance"])


def test_what_was_pruned_stays_so(spec_of, corpus):
    spec = spec_of(family="pruned", as_chi=2)
    before = Training(spec, 0, corpus).model.state_dict()
    result, weights = train_seed(spec, 0, corpus)
    assert result.state == "complete"
    masks = [name for name in weights if name.endswith(".mask")]
    assert masks
    for name in masks:
        weight = weights[name.replace(".mask", ".weight")]
        assert torch.equal(weights[name], before[name])
        assert (weight[~weights[name]] == 0).all()
        assert not torch.equal(weight, before[name.replace(".mask", ".weight")])


@pytest.mark.parametrize("family", FAMILIES)
def test_interrupted_run_ends_bit_identical(spec_of, corpus, tmp_path, family):
    spec = spec_of(family=family, as_chi=2)
    whole, weights = train_seed(spec, 3, corpus)

    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] == 8:
            raise Stop

    checkpoints = Checkpoints(Storage(str(tmp_path)), "unit")
    with pytest.raises(Stop):
        train_seed(spec, 3, corpus, checkpoints=checkpoints, checkpoint_seconds=0, on_evaluation=stop)
    again, weights_again = train_seed(spec, 3, corpus, checkpoints=checkpoints)
    assert again.curve == whole.curve
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_weights_are_kept_as_well_as_the_arm_says(spec_of, corpus, family):
    start = train_seed(spec_of(model=WIDE), 0, corpus)[1]
    losses = {}
    for refinement in ("weights", "outputs"):
        spec = spec_of(model=WIDE, family=family, as_chi=4, start="dense", refinement=refinement)
        result, _ = train_seed(spec, 0, corpus, start_weights=start)
        assert all(key.startswith("rel_error/compressed/chi_4/") for key in result.rel_errors), list(result.rel_errors)
        assert all(0 <= error < (1 if refinement == "weights" else 9) for error in result.rel_errors.values())
        losses[refinement] = result.curve[0]["val_loss"], sum(result.rel_errors.values())
    drawn = train_seed(spec_of(model=WIDE, family=family, as_chi=4), 0, corpus)[0].curve[0]["val_loss"]
    assert losses["weights"][1] < losses["outputs"][1]  # which gives up some of W for the outputs
    assert losses["weights"][0] < drawn
    assert losses["outputs"][0] < drawn


@pytest.mark.slow
def test_study_with_controls_runs_to_its_end(tmp_path):
    arms = [DENSE]
    arms += [{"name": family, "family": family, "as_chi": [2, 4], "lr_rule": ["uniform", "mup"]} for family in FAMILIES]
    tuned = {"start": "dense", "refinement": "outputs", "steps": 4}
    arms += [{"name": f"tuned-{family}", "family": family, "as_chi": 2} | tuned for family in FAMILIES]
    file = write_study(tmp_path, model=WIDE, arms=arms)
    outcome = run_at(file, tmp_path / "kept", tracking=None)
    assert [result.failure for result in results_at(tmp_path / "kept").values() if result.failure] == []
    assert (outcome.n_failed, outcome.n_missing, outcome.tracking_trouble) == (0, 0, None)
    for result in results_at(tmp_path / "kept").values():
        assert math.isfinite(result.final["final/val_loss"])
    code, out, err = cli("status", "kept", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "monarch as χ=2 balanced, from dense (outputs)" in out


@pytest.mark.slow
def test_study_of_both_gauges_runs_to_its_end(tmp_path):
    arms = [DENSE]
    arms += [{"name": "mpo", "family": "mpo", "chi": [2, 3], "gauge": ["free", "fixed"]}]
    arms += [{"name": "low", "family": "low_rank", "as_chi": 6, "gauge": ["free", "fixed"], "decay": "matrix"}]
    tuned = {"start": "dense", "gauge": "fixed", "steps": 4}
    arms += [{"name": "tuned", "family": "mpo", "chi": 2, "refinement": "als"} | tuned]
    arms += [{"name": "tuned-low", "family": "low_rank", "as_chi": 6, "refinement": "outputs"} | tuned]
    file = write_study(tmp_path, model=WIDE, arms=arms, execution={"seeds_per_unit": 2, "keep_weights": True})
    outcome = run_at(file, tmp_path / "kept", tracking=None)
    assert (outcome.n_failed, outcome.n_missing, outcome.tracking_trouble) == (0, 0, None)
    trials = [trial.spec.gauge for trial in ledger_at(file, tmp_path / "kept").trials.values()]
    assert trials == [None, "free", "free", "fixed", "fixed", "free", "fixed", "fixed", "fixed"]
    code, out, err = cli("status", "kept", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "χ=2 balanced, variance" in out
    assert "χ=2 balanced fixed gauge, variance" in out
    labels = summarise(load_study(resolve_study(tmp_path / "kept")))["label"]
    assert {"χ=2, free gauge", "χ=2, fixed gauge"} <= set(labels)


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ({"family": "low_rank", "as_chi": {"choices": [2, 4]}}, "as_chi: must be a value or a list, but got "),
        ({"family": "low_rank"}, "as_chi: missing, must be given"),
        ({"family": "low_rank", "chi": 2, "as_chi": 2}, "chi: unknown key (did you mean as_chi?); allowed: "),
        ({"family": "monarch", "as_chi": 2, "refinement": "outputs"}, "`refinement` has no meaning without `start`"),
        (
            {"family": "pruned", "as_chi": 2, "n_sites": 3, "factorisation": "paper"},
            "`n_sites` is not allowed with `factorisation: paper`",
        ),
        ({"family": "sparse", "as_chi": 2}, "family: must be 'dense', 'mpo'"),
        (
            {"family": "monarch", "as_chi": 2, "gauge": ["free", "fixed"]},
            "arms[control].gauge: family monarch does not have it; families that do: mpo, low_rank",
        ),
        ({"family": "dense", "gauge": "fixed"}, "arms[control].gauge: unknown key; allowed: "),
        ({"family": "low_rank", "as_chi": 2, "gauge": "loose"}, "gauge: must be 'free' or 'fixed', but got \"loose\""),
    ],
)
def test_wrong_control_is_one_line(tmp_path, arm, said):
    file = write_study(tmp_path, arms=[DENSE, {"name": "control"} | arm])
    with pytest.raises(StudyError) as error:
        load_config(file)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_control_whose_smallest_layer_is_too_large_is_named(tmp_path):
    file = write_study(tmp_path, arms=[DENSE, {"name": "control", "family": "low_rank", "as_chi": 1}])
    [_, spec] = listed_specs(load_config(file))
    with pytest.raises(StudyError, match=r"arms\[control\]: .*max_params"):
        trial_shape(spec, 10, 100, spec.model)
