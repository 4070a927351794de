"""What follows from a trial's configuration before anything is trained: counts, identity, budget."""

from __future__ import annotations

import hashlib
from functools import partial

import pytest
import torch

from study.spec.definition import definition
from study.spec.models import PicoGPTModel as Model
from study.spec.protocol import Protocol, evaluation_steps
from study.spec.search_space import listed_specs
from study.spec.study_file import validate
from study.spec.trial import TrialSpec, budget_hash, json_hash
from study.training.model import build_model, trial_shape
from study.training.randomness import generator

PAPER = Model()
TINY_SHAKESPEARE = {"vocab_size": 65, "n_validation": 111_540, "reference": PAPER}


def mpo(**changes):
    values = {"arm": "mpo", "family": "mpo", "chi": 8, "factorisation": "paper", "init": "variance"}
    return TrialSpec(**{"model": PAPER, "protocol": Protocol()} | values | changes)


def dense(**changes):
    return TrialSpec(**{"arm": "dense", "family": "dense", "model": PAPER, "protocol": Protocol()} | changes)


def low_rank(**changes):
    return mpo(**{"arm": "low", "family": "low_rank", "chi": None, "as_chi": 8, "factorisation": "balanced"} | changes)


def shape(spec):
    return trial_shape(spec, **TINY_SHAKESPEARE)


# Counts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chi", "n_params"), [(4, 42_336), (8, 79_168), (16, 177_408), (32, 472_192)])
def test_mpo_counts_follow_from_the_papers_definitions(chi, n_params):
    counted = shape(mpo(chi=chi))
    assert counted.n_params == n_params == 13_696 + 6_136 * chi + 256 * chi**2
    assert counted.n_params_compressed == n_params - 13_696
    assert counted.n_params_dense == 808_448
    assert counted.bonds["blocks.3.feed_forward.up"] == (1, chi, chi, 1)
    assert counted.bonds["lm_head"] == (1, chi, 1)
    assert len(counted.bonds) == 4 * 6 + 1


def test_mpo_of_a_study_grows_where_its_chi_asks_for_it():
    counted = shape(mpo(chi=1000))
    assert counted.n_params_compressed == 902_848 > counted.n_params_dense
    assert len(counted.bonds) == 4 * 6 + 1


def test_dense_counts_are_the_papers_architecture():
    counted = shape(dense())
    assert (counted.n_params, counted.n_params_dense, counted.n_params_compressed) == (808_448, 808_448, 794_752)
    assert counted.bonds == {}


def test_narrow_model_is_counted_against_the_studys_own():
    counted = shape(dense(model=Model(d_model=32)))
    # Embedding and head, final norm; per layer two norms, four matrices and one bias, two feed-forward layers.
    d, V = 32, 65
    assert counted.n_params == 2 * V * d + 2 * d + 4 * (4 * d + 4 * d**2 + d + 2 * 4 * d**2 + 4 * d + d)
    assert counted.n_params_dense == 808_448


@pytest.mark.parametrize(
    "spec",
    [
        dense(),
        mpo(),
        *(mpo(chi=3, factorisation="balanced", n_sites=3, init=init) for init in ("tt_svd", "tt_svd_fresh")),
        *(mpo(chi=3, gauge="fixed", init=init) for init in ("paper", "tt_svd")),
        low_rank(as_chi=3, gauge="fixed"),
    ],
)
def test_shapes_are_those_of_the_built_model(spec):
    spec = spec.model_copy(update={"model": Model(d_model=16, n_layers=2, context=8)})
    built, _ = build_model(spec, 11, partial(generator, 0, "init"))
    counted = trial_shape(spec, 11, 100, spec.model)
    assert counted.n_params == sum(parameter.numel() for parameter in built.parameters())
    assert all(parameter.isfinite().all() for parameter in built.parameters())


def test_flops_are_those_of_matrix_products():
    model = Model(d_model=8, n_heads=2, n_layers=1, context=4)
    protocol = Protocol(
        steps=10, warmup_steps=1, batch_size=3, eval_every=5, sampled_eval_batches=2, sampled_eval_batch_size=5
    )
    counted = trial_shape(dense(model=model, protocol=protocol), 11, 100, model)
    weights = 4 * 8 * 8 + 2 * 8 * 32 + 11 * 8
    forward = 2 * weights + 4 * 4 * 8  # per token; then scores, and weights times values
    assert counted.step_flops == 3 * forward * 3 * 4
    assert counted.flops == 10 * counted.step_flops + 3 * forward * (100 + 2 * 5 * 4)


def test_train_tokens_are_steps_times_batch_times_context():
    assert mpo().train_tokens == 2000 * 32 * 256


# Identity -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (mpo(chi=64), mpo(chi=1000)),  # no bond of the paper's layers can use more than 64
        (mpo(), mpo(arm="another")),
        (mpo(factorisation="balanced"), mpo(factorisation="balanced", n_sites=2)),
        (mpo(model=Model(d_model=64), factorisation="paper"), mpo(model=Model(d_model=64), factorisation="balanced")),
        (mpo(factorisation="balanced", n_sites=1, chi=1), mpo(factorisation="balanced", n_sites=1, chi=7)),
        (mpo(chi=64, init="tt_svd"), mpo(chi=65, init="tt_svd")),
        (mpo(chi=64, init=None, start="dense"), mpo(chi=999, init=None, start="dense")),
        (mpo(), mpo(gauge="free")),
        (low_rank(), low_rank(gauge="free")),
        (mpo(factorisation="balanced", n_sites=1), mpo(factorisation="balanced", n_sites=1, gauge="fixed")),
        (low_rank(as_chi=1000), low_rank(as_chi=1000, gauge="fixed")),  # every layer stays dense
    ],
)
def test_same_run_under_other_words_is_the_same_configuration(one, two):
    assert shape(one).identity == shape(two).identity


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (mpo(chi=63), mpo(chi=64)),
        (mpo(chi=64, init="paper"), mpo(chi=1000, init="paper")),  # its deviation depends on the cap asked for
        (mpo(), mpo(init="paper")),
        (mpo(), mpo(gauge="fixed")),
        (low_rank(), low_rank(gauge="fixed")),
        (mpo(), mpo(init="tt_svd")),
        (mpo(init="tt_svd"), mpo(init="tt_svd_fresh")),
        (mpo(), mpo(init=None, start="dense")),
        (mpo(init=None, start="dense"), mpo(init=None, start="other")),
        (mpo(), mpo(factorisation="balanced")),
        (mpo(), mpo(protocol=Protocol(learning_rate=1e-3))),
        (mpo(), mpo(protocol=Protocol(steps=2001))),
        (mpo(), mpo(protocol=Protocol(embedding_learning_rate=1e-3))),
        (mpo(protocol=Protocol(learning_rate=1e-3)), mpo(protocol=Protocol(embedding_learning_rate=1e-3))),
        (mpo(), mpo(protocol=Protocol(precision="bfloat16"))),
        (mpo(), mpo(protocol=Protocol(optimiser="muon"))),
        (mpo(), mpo(protocol=Protocol(schedule="wsd"))),
        (mpo(), mpo(protocol=Protocol(gradient_accumulation=2))),
        (mpo(protocol=Protocol(precision="tf32")), mpo(protocol=Protocol(precision="bfloat16"))),
        (dense(), dense(model=Model(d_model=64))),
        (dense(), mpo(factorisation="balanced", n_sites=1)),
    ],
)
def test_different_runs_are_different_configurations(one, two):
    assert shape(one).identity != shape(two).identity


@pytest.mark.parametrize(
    ("init", "equal"), [("variance", True), ("tt_svd", True), ("tt_svd_fresh", True), ("paper", False)]
)
def test_identity_tells_whether_the_initial_weights_are_equal(init, equal):
    model = Model(d_model=8, n_heads=2, n_layers=1, context=4)
    pair = [mpo(chi=chi, init=init, model=model) for chi in (64, 1000)]
    weights = [build_model(spec, 11, partial(generator, 0, "init"))[0].state_dict() for spec in pair]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) == equal
    assert (trial_shape(pair[0], 11, 50, model).identity == trial_shape(pair[1], 11, 50, model).identity) == equal


def test_identity_and_budget_are_those_on_record():
    """If they change, `SCHEMA_VERSION` of the ledger must change too."""
    study = validate({"name": "a", "arms": [{"name": "mpo", "family": "mpo", "chi": 8}]}, "here")
    assert shape(mpo()).identity == "41b37fdfe26769a826a68976235d030db1772a919068d73466cba31b4e238b33"
    assert budget_hash(mpo(), study, "a" * 64, None) == "b289f18ef6bf"


RECORDED = [
    ("dense", "5da5747a706d", "f4ef681b75f3", "94eb9d5ab70e"),
    ("mpo", "3ae84639a2c8", "6fd9f1d4e26e", "736c7279b2ec"),
    ("tuned", "474e7635e74e", "290b15c05db2", "2ea9bc85f0ae"),
    ("low", "2cb4526fee3e", "81e341d5cb92", "c0c89ed1d980"),
]
"""Identity of a trial, hash of its spec in checkpoints, and hash of what the ledger holds, from before there were
gauges."""


SINCE = ("gauge", "optimiser", "schedule", "decay_fraction", "gradient_accumulation")
"""Keys that study files did not have at first."""


def test_trials_without_newer_keys_are_those_on_record():
    arms = [
        {"name": "dense", "family": "dense"},
        {"name": "mpo", "family": "mpo", "chi": 8},
        {"name": "tuned", "family": "mpo", "chi": 8, "start": "dense", "forward": "chain"},
        {"name": "low", "family": "low_rank", "as_chi": 8},
    ]
    config = validate({"name": "a", "seeds": 3, "arms": arms}, "here")  # its default was 3
    written = config.model_dump_json()
    assert not any(f'"{key}"' in written for key in SINCE)
    recorded = "af03d30c5057fdc2d5176129e732ae4de78b2dc82fdfa0229c2fdc4474fe9267"
    assert json_hash(definition(config)) == recorded
    spelled_out = {"optimiser": "adamw", "schedule": "cosine", "gradient_accumulation": 1}
    defaults = validate({"name": "a", "seeds": 3, "arms": arms, "protocol": spelled_out}, "here")
    assert json_hash(definition(defaults)) == recorded
    found = []
    for spec in listed_specs(config):
        written = hashlib.sha256(spec.model_dump_json().encode()).hexdigest()
        hashes = (shape(spec).identity, written, json_hash(spec.model_dump(mode="json")))
        found.append((spec.arm, *(each[:12] for each in hashes)))
    assert found == RECORDED


def test_gauge_of_a_spec_is_written_and_read():
    spec = mpo(gauge="fixed")
    assert TrialSpec.model_validate_json(spec.model_dump_json()) == spec
    assert TrialSpec.model_validate_json(mpo().model_dump_json()) == mpo() != spec


def test_fixed_gauge_saves_the_square_of_each_bond_and_no_flops():
    free, fixed = shape(mpo()), shape(mpo(gauge="fixed"))
    assert fixed.bonds == free.bonds
    assert free.n_params - fixed.n_params == sum(bond**2 for bonds in free.bonds.values() for bond in bonds[1:-1])
    assert (fixed.flops, fixed.step_flops) == (free.flops, free.step_flops)


# Budget ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hash_of(small_study):
    def budget(spec=None, corpus="a" * 64, start=None, **changes):
        return budget_hash(spec or dense(), validate(small_study(**changes), "here"), corpus, start)

    return budget


SEARCH = {
    "arms": [{"name": "dense", "family": "dense"}, {"name": "mpo", "family": "mpo", "chi": {"choices": [4, 8]}}],
    "search": {"sampler": "tpe", "trials": 5},
}


def test_dense_and_mpo_of_one_protocol_may_be_paired(hash_of):
    assert hash_of(dense()) == hash_of(mpo()) == hash_of(mpo(chi=32, init="paper", factorisation="balanced"))
    assert hash_of(dense(model=Model(d_model=32))) == hash_of(dense())


def test_learning_rate_is_no_budget(hash_of):
    assert hash_of(dense(protocol=Protocol(learning_rate=1e-2))) == hash_of(dense())


@pytest.mark.parametrize("protocol", [{"optimiser": "muon"}, {"gradient_accumulation": 4}])
def test_optimiser_and_parts_of_a_batch_are_no_budget(hash_of, protocol):
    assert hash_of(dense(protocol=Protocol(**protocol))) == hash_of(dense())


def test_optimiser_is_tuned(hash_of):
    def arms(**changes):
        return {
            "arms": [{"name": "dense", "family": "dense"}, {"name": "mpo", "family": "mpo", "chi": [4, 8]} | changes]
        }

    listed = arms(optimiser=["adamw", "muon"])
    assert hash_of(mpo(), **listed) == hash_of(mpo(), **arms(tuned_among=2)) != hash_of(mpo(), **arms())
    assert hash_of(mpo(), **arms(optimiser="muon")) == hash_of(mpo(), **arms())


def test_number_of_evaluations_is_not_budget(hash_of):
    assert hash_of(dense(protocol=Protocol(eval_every=50))) == hash_of(dense())


@pytest.mark.parametrize(
    "protocol",
    [
        {"steps": 2001},
        {"warmup_steps": 50},
        {"batch_size": 16},
        {"sampled_eval_batches": 10},
        {"sampled_eval_batch_size": 4},
        {"precision": "tf32"},
    ],
)
def test_steps_batches_evaluation_and_precision_are_budget(hash_of, protocol):
    assert hash_of(dense(protocol=Protocol(**protocol))) != hash_of(dense())


def test_context_corpus_and_start_are_budget(hash_of):
    hashes = [
        hash_of(),
        hash_of(dense(model=Model(context=128))),
        hash_of(corpus="b" * 64),
        hash_of(start=dense()),
        hash_of(start=dense(protocol=Protocol(steps=500))),
    ]
    assert len(set(hashes)) == len(hashes)


def test_split_is_budget(small_study):
    configs = [validate(small_study(corpus={"validation_fraction": share}), "here") for share in (0.1, 0.2)]
    assert budget_hash(dense(), configs[0], "a" * 64, None) != budget_hash(dense(), configs[1], "a" * 64, None)


def test_tuning_trials_are_budget_of_the_searched_arm_alone(hash_of):
    assert hash_of(dense(), **SEARCH) == hash_of(dense())
    assert hash_of(mpo(), **SEARCH) != hash_of(mpo())
    assert hash_of(mpo(), **SEARCH) != hash_of(mpo(), **SEARCH | {"search": {"sampler": "tpe", "trials": 6}})


def test_tuning_in_another_study_counts_as_tuning_in_this_one(hash_of):
    def arms(**changes):
        return {
            "arms": [{"name": "dense", "family": "dense"}, {"name": "mpo", "family": "mpo", "chi": [4, 8]} | changes]
        }

    rates = {"learning_rate": [1e-3, 1e-2, 1e-1]}
    assert hash_of(mpo(), **arms(tuned_among=3)) == hash_of(mpo(), **arms(**rates)) != hash_of(mpo(), **arms())
    by_size = {"learning_rate": {4: 1e-3, 8: 1e-2}}
    assert hash_of(mpo(), **arms(**by_size)) == hash_of(mpo(), **arms())
    assert hash_of(mpo(), **arms(**by_size, tuned_among=3)) == hash_of(mpo(), **arms(**rates))
    both = arms(tuned_among=2, **rates)
    assert hash_of(mpo(), **both) == hash_of(mpo(), **arms(tuned_among=6))
    assert hash_of(dense(), **both) == hash_of(dense())
    searched = [SEARCH["arms"][0], SEARCH["arms"][1] | {"tuned_among": 2}]
    assert hash_of(mpo(), **SEARCH | {"arms": searched}) == hash_of(
        mpo(), **SEARCH | {"search": {"sampler": "tpe", "trials": 10}}
    )


def test_evaluations_are_at_the_first_and_last_step():
    assert evaluation_steps(Protocol(steps=10, warmup_steps=0, eval_every=4)) == [0, 4, 8, 10]
    assert evaluation_steps(Protocol(steps=8, warmup_steps=0, eval_every=4)) == [0, 4, 8]
    assert evaluation_steps(Protocol(steps=1, warmup_steps=0, eval_every=4)) == [0, 1]
