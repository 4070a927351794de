"""Arms with `keep`: layers whose sizes follow from trained weights and calibration text."""

from __future__ import annotations

import json
import os
import re

import language_models
import pandas as pd
import pytest
import torch
from study_fixtures import results_at, run_at, undisturbed_and_resumed, write_study
from typer.testing import CliRunner

import mpo_core
from analysis.commands.cli import app
from mpo_core import MPOLinear
from study.errors import StudyError
from study.spec.cache import CACHE_VARIABLE
from study.spec.search_space import listed_specs
from study.spec.study_file import load_config
from study.training import calibration
from study.training.loading import load_corpus
from study.training.model import trial_shape
from study.training.seed_run import train_seed
from study.training.storage import Storage
from study.training.train import Training
from study.training.unit import checkpoints_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:::mlflow", "ignore::DeprecationWarning", "ignore:the predicted loss:UserWarning"
)

HEAL = {"steps": 4, "warmup_steps": 1, "eval_every": 2}
PRETRAINED = {"start": "pretrained", "keep": 0.6}
ARMS = [
    {"name": "dense", "family": "dense", "start": "pretrained"},
    {"name": "even", "family": "low_rank", **PRETRAINED, "metric": "outputs", "spread": "even"},
    {"name": "best", "family": "low_rank", **PRETRAINED, "keep": [0.7, 0.5], "gauge": "fixed", "narrow": True},
    {"name": "mpo", "family": "mpo", **PRETRAINED, "factorisation": "auto", "gauge": "fixed"},
    {"name": "auto", "family": "auto", **PRETRAINED, "gauge": "fixed", "layers": ["model.layers.*.mlp.*"]},
    {"name": "pruned", "family": "pruned", **PRETRAINED, "keep": 0.8},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def corpus_of(config):
    corpus = config.corpus
    return load_corpus(corpus.paths, corpus.sha256, corpus.validation_fraction, tokenizer=corpus.tokenizer)


@pytest.mark.slow
def test_every_kind_is_compressed_to_its_share_and_reported(pretrained_study, tmp_path, cache):
    file = pretrained_study(
        arms=ARMS, claims={"contrasts": [{"arm": "mpo", "against": "even"}]}, protocol={"calibration_batches": 5}
    )
    outcome = run_at(file, tmp_path / "out", tracking=None)
    assert (outcome.n_failed, outcome.n_missing, outcome.n_complete) == (0, 0, 21)
    results = results_at(tmp_path / "out")
    for number, keep in enumerate((None, 0.6, 0.7, 0.5, 0.6, 0.6, 0.8)):
        final = results[number, 0].final
        assert ("kept" in final) == (keep is not None)
        if keep is not None:
            assert 0.85 * keep < final["kept"] <= keep
            assert ("predicted_loss" in final) == ("held_out_loss" in final) == (number != 1)
    # Two sets of layers and three seeds; a dense model and the other trials need none of their own.
    assert len(list((cache / "statistics").glob("*.safetensors"))) == 6
    said = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "--out", str(tmp_path / "report")])
    assert said.exit_code == 0, said.output
    trials = pd.read_csv(next((tmp_path / "report").rglob("trials.csv")))
    labels = dict(zip(trials["trial"], trials["group"] + "; " + trials["label"], strict=True))
    assert labels[0] == "dense; dense"
    assert labels[3] == "low rank compressed; keep 0.5"
    assert labels[5] == "auto compressed; keep 0.6"
    assert trials.set_index("trial")["keep"].sort_index().tolist()[1:] == [0.6, 0.7, 0.5, 0.6, 0.6, 0.8]
    pairs = pd.read_csv(next((tmp_path / "report").rglob("comparisons.csv")))
    declared = pairs[pairs["declared"]]
    assert set(zip(declared["trial"], declared["against"], strict=True)) == {(4, 1)}


def test_a_trial_is_the_model_that_compress_makes(pretrained_study):
    config = load_config(pretrained_study(arms=ARMS))
    corpus, spec = corpus_of(config), listed_specs(config)[3]
    trained = Training(spec, 1, corpus)
    dense = Training(listed_specs(config)[0], 1, corpus).model
    batches = calibration.calibration_batches(spec, 1, corpus)
    assert [tuple(batch.shape) for batch in batches] == [(4, config.model.context)] * 3
    statistics = mpo_core.collect_statistics(dense, batches, loss=mpo_core.next_token_losses)
    made, report = mpo_core.compress(
        dense,
        layer="low_rank",
        exclude="lm_head",
        keep=0.5,
        statistics=statistics,
        metric="loss",
        spread="loss",
        gauge="fixed",
        narrow=True,
    )
    assert trained.compression == report
    tokens = batches[0]
    expected = mpo_core.logits_of(made, tokens)
    assert torch.allclose(mpo_core.logits_of(trained.model, tokens), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 7))
def test_the_recorded_size_is_that_of_every_seed_within_a_step_of_a_layer(pretrained_study, number):
    config = load_config(pretrained_study(arms=ARMS))
    corpus, spec = corpus_of(config), listed_specs(config)[number]
    shape = trial_shape(spec, corpus.vocab_size, len(corpus.validation), config.model)
    training = Training(spec, 0, corpus)
    rows = training.compression.rows
    counted = mpo_core.n_params(training.model) + sum(row.n_counted - row.n_params_after for row in rows)
    step = max(row.out_features + row.in_features for row in rows)
    # A parameter has four bytes, and so have 32 bits of masks and indices.
    assert shape.bytes / 4 - (0 if spec.spread == "even" else step) <= counted <= shape.bytes / 4 + 1
    assert shape.n_params <= shape.bytes / 4
    assert 0 < shape.flops < trial_shape(listed_specs(config)[0], corpus.vocab_size, 1000, config.model).flops


@pytest.mark.parametrize("family", ["monarch", "mpo", "low_rank", "pruned"])
def test_an_even_spread_is_recorded_exactly(pretrained_study, family):
    arm = {"name": "even", "family": family, **PRETRAINED, "keep": [0.95, 0.6], "metric": "outputs", "spread": "even"}
    config = load_config(pretrained_study(arms=[ARMS[0], arm]))
    corpus = corpus_of(config)
    for spec in listed_specs(config)[1:]:
        shape = trial_shape(spec, corpus.vocab_size, len(corpus.validation), config.model)
        assert shape.n_params == mpo_core.n_params(Training(spec, 0, corpus).model)


def test_chosen_chains_are_recorded_as_chains(pretrained_study):
    config = load_config(pretrained_study(arms=ARMS))
    corpus = corpus_of(config)
    for spec in listed_specs(config)[4:6]:
        assert spec.forward == "chain"
        chains = [module for module in Training(spec, 0, corpus).model.modules() if isinstance(module, MPOLinear)]
        assert all(chain.forward_mode == "chain" for chain in chains)
        assert chains or spec.family == "auto"


def test_a_layer_that_no_calibration_text_reaches_is_no_silent_exception(pretrained_study, tmp_path):
    arm = {"name": "kept", "family": "low_rank", **PRETRAINED}
    file = pretrained_study(arms=[ARMS[0], arm], seeds=1)
    model = language_models.llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.zero_()
    language_models.write(model, tmp_path / "model")
    outcome = run_at(file, tmp_path / "out")
    assert outcome.n_failed == 1
    failure = results_at(tmp_path / "out")[1, 0].failure
    assert "`keep` cannot be met: model.layers.1.self_attn.q_proj has to stay dense" in failure


def test_statistics_can_be_read_while_another_process_asks_for_them(pretrained_study):
    config = load_config(pretrained_study(arms=ARMS))
    corpus, specs = corpus_of(config), listed_specs(config)
    dense, batches = Training(specs[0], 0, corpus).model, calibration.calibration_batches(specs[2], 0, corpus)
    name = "model.layers.0.mlp.up_proj"
    first, second = (calibration.shared_statistics(config.model, dense, [name], batches, "cpu") for _ in range(2))
    for statistics in (first, second):
        assert statistics.metric(name, "loss").on(dense.get_submodule(name).weight).norm(torch.ones(24, 16)) > 0


def test_statistics_are_those_of_the_configuration(pretrained_study, tmp_path):
    arms = [ARMS[0], {"name": "kept", "family": "low_rank", **PRETRAINED}]
    losses = []
    for activation in ("silu", "relu"):
        file = pretrained_study(arms=arms)
        path = tmp_path / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": activation}))
        config = load_config(file)
        losses.append(_predicted(Training(listed_specs(config)[1], 0, corpus_of(config))))
    (tmp_path / "cache").rename(tmp_path / "gone")
    assert _predicted(Training(listed_specs(config)[1], 0, corpus_of(config))) == losses[1] != losses[0]


def _predicted(training):
    return sum(row.predicted_loss for row in training.compression.rows)


def test_a_checkpoint_with_layers_of_other_sizes_begins_anew(pretrained_study, tmp_path):
    arms = [{"name": "healed", "family": "low_rank", **PRETRAINED, **HEAL}]
    config = load_config(pretrained_study(arms=arms))
    corpus, [spec] = corpus_of(config), listed_specs(config)
    expected, _ = train_seed(spec, 0, corpus)
    checkpoints = checkpoints_of(Storage(str(tmp_path / "storage")), "study", 0, 0, spec)
    other = Training(spec.model_copy(update={"keep": 0.8}), 0, corpus)
    other.optimiser_step()
    checkpoints.save(1, *other.state())
    result, _ = train_seed(spec, 0, corpus, checkpoints=checkpoints)
    assert [row["val_loss"] for row in result.curve] == [row["val_loss"] for row in expected.curve]


@pytest.mark.slow
def test_statistics_are_collected_once_for_a_seed(pretrained_study, monkeypatch):
    config = load_config(pretrained_study(arms=ARMS))
    corpus, specs = corpus_of(config), listed_specs(config)
    collected, collect = [], mpo_core.collect_statistics

    def collecting(*args, **options):
        collected.append(options["modules"])
        return collect(*args, **options)

    monkeypatch.setattr(mpo_core, "collect_statistics", collecting)
    first = [Training(spec, 0, corpus).compression for spec in specs[1:5]]
    assert len(collected) == 1
    assert Training(specs[1], 0, corpus).compression == first[0]
    assert len(collected) == 1
    Training(specs[1], 1, corpus)
    assert len(collected) == 2


def test_old_statistics_are_removed(pretrained_study, cache):
    config = load_config(pretrained_study(arms=ARMS))
    corpus, spec = corpus_of(config), listed_specs(config)[1]
    Training(spec, 0, corpus)
    [old] = (cache / "statistics").glob("*.safetensors")
    os.utime(old, (0, 0))
    Training(spec, 1, corpus)
    [new] = (cache / "statistics").glob("*.safetensors")
    assert new != old


@pytest.mark.slow
def test_a_healed_run_that_was_interrupted_ends_as_an_undisturbed_one(pretrained_study):
    arms = [{"name": "healed", "family": "mpo", **PRETRAINED, "factorisation": "auto", "gauge": "fixed", **HEAL}]
    config = load_config(pretrained_study(arms=arms))
    corpus, [spec] = corpus_of(config), listed_specs(config)
    undisturbed, resumed = undisturbed_and_resumed(spec, 1, corpus, n_steps=1)
    assert resumed.curve == undisturbed.curve


def test_the_start_may_be_an_arm(tmp_path):
    arms = [
        {"name": "dense", "family": "dense"},
        {"name": "kept", "family": "low_rank", "keep": 0.6, "start": "dense", "steps": 2, "warmup_steps": 1},
        {"name": "weights", "family": "mpo", "keep": 0.6, "start": "dense", "metric": "weights", "steps": 0},
    ]
    outcome = run_at(write_study(tmp_path, arms=arms), tmp_path / "out")
    assert (outcome.n_failed, outcome.n_complete) == (0, 6)
    final = {number: results_at(tmp_path / "out")[number, 0].final for number in range(3)}
    assert final[1]["total_tokens"] == final[0]["total_tokens"] + final[1]["train_tokens"]
    assert "predicted_loss" in final[1]
    assert "predicted_loss" not in final[2]


def test_keep_can_be_searched(pretrained_study, tmp_path):
    searched = {"name": "found", "family": "low_rank", **PRETRAINED, "keep": {"low": 0.3, "high": 0.9}}
    searched["gauge"] = {"choices": ["free", "fixed"]}
    arms = [ARMS[0], searched]
    search = {"sampler": "random", "trials": 3}
    outcome = run_at(pretrained_study(arms=arms, search=search), tmp_path / "out")
    assert (outcome.n_failed, outcome.n_complete) == (0, 12)


def test_a_searched_keep_too_small_for_a_layer_is_refused_before_anything_runs(pretrained_study, tmp_path):
    searched = {"name": "found", "family": "low_rank", **PRETRAINED, "keep": {"low": 0.01, "high": 0.9}}
    study = pretrained_study(arms=[ARMS[0], searched], search={"sampler": "random", "trials": 3})
    with pytest.raises(
        StudyError, match=r"^arms\[found\]: model\.layers\.0\.self_attn\.q_proj: .* 32 parameters"
    ) as raised:
        run_at(study, tmp_path / "out")
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "out" / "ledger.db").exists()


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"family": "low_rank", "keep": 0.5}, "`keep` needs `start`"),
        ({"family": "dense", "keep": 0.5, "start": "pretrained"}, "`keep` needs a smaller kind of layer"),
        ({"family": "mpo", **PRETRAINED, "chi": 4}, "chi"),
        ({"family": "mpo", **PRETRAINED, "keep": 1.5}, r"keep.*less than or equal to 1|keep.*at most 1"),
        ({"family": "low_rank", **PRETRAINED, "factorisation": "auto"}, "`factorisation` is for `family: mpo`"),
        ({"family": "mpo", **PRETRAINED, "factorisation": "auto", "n_sites": 3}, "`n_sites` is not allowed with"),
        ({"family": "low_rank", **PRETRAINED, "metric": "outputs", "spread": "loss"}, "`spread: loss` needs"),
        ({"family": "low_rank", **PRETRAINED, "metric": "outputs", "narrow": True}, "`narrow: true` needs"),
        ({"family": "auto", **PRETRAINED, "forward": "chain"}, "`forward` is for `family: mpo`"),
        ({"family": "mpo", **PRETRAINED, "factorisation": "auto", "forward": "chain"}, "`forward` is not allowed with"),
        ({"family": "pruned", **PRETRAINED, "gauge": "fixed"}, "gauge: family pruned does not have it"),
        ({"family": "low_rnak", **PRETRAINED}, "family: must be"),
        ({"family": "low_rank", **PRETRAINED, "layers": ["model.layer.*"]}, "matches include"),
        ({"family": "low_rank", **PRETRAINED, "learning_rate": {8: 1e-3}}, "by size is not allowed beside `keep`"),
    ],
)
def test_what_does_not_go_together_is_one_line(pretrained_study, tmp_path, arm, message):
    with pytest.raises(StudyError, match=message) as raised:
        run_at(pretrained_study(arms=[ARMS[0], {"name": "bad", **arm}]), tmp_path / "out")
    assert len(str(raised.value).splitlines()) == 1, str(raised.value)
    assert re.search(r"arms\[bad\]|arms\.1|arms\[1\]", str(raised.value))
