"""Studies that begin from a pretrained model: compression alone, and training after it."""

from __future__ import annotations

import math
from functools import partial

import pandas as pd
import pytest
import torch
import yaml
from language_models import gpt2, llama, write
from study_fixtures import results_at, run_at, undisturbed_and_resumed
from typer.testing import CliRunner

from analysis.commands.cli import app
from study.errors import StudyError
from study.spec.cache import CACHE_VARIABLE
from study.spec.search_space import listed_specs
from study.spec.study_file import load_config
from study.training.loading import load_corpus
from study.training.train import Training
from study.training.weights import weights_of
from study.training.windows import consecutive_windows

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")

HEAL = {"steps": 6, "warmup_steps": 2, "eval_every": 3}
CONTEXT = 32
ARMS = [
    {"name": "dense", "family": "dense", "start": "pretrained"},
    {"name": "low-rank", "family": "low_rank", "as_chi": 4, "start": "pretrained", "refinement": "outputs"},
    {"name": "mpo", "family": "mpo", "chi": [2, 4], "start": "pretrained", "refinement": "als"},
    {"name": "healed", "family": "mpo", "chi": 4, "start": "pretrained", **HEAL},
    {"name": "further", "family": "dense", "start": "pretrained", **HEAL},
]


@pytest.fixture
def study_file(pretrained_study):
    """Makes a study file of a pretrained model, with these arms."""
    return partial(pretrained_study, arms=ARMS)


def corpus_of(config):
    corpus = config.corpus
    return load_corpus(corpus.paths, corpus.sha256, corpus.validation_fraction, tokenizer=corpus.tokenizer)


@pytest.mark.parametrize("model", [llama, gpt2])
def test_a_pretrained_model_is_evaluated_as_it_is(study_file, model):
    config = load_config(study_file(model))
    corpus, spec = corpus_of(config), listed_specs(config)[0]
    training = Training(spec, 0, corpus)
    training.run()
    [row] = training.curve
    expected, total, n = model().eval(), 0.0, 0
    with torch.no_grad():
        for inputs, targets in consecutive_windows(corpus.validation, CONTEXT, 8):
            logits = expected(inputs.long()).logits
            total += float(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.long().flatten(), reduction="sum")
            )
            n += targets.numel()
    assert row["val_loss"] == pytest.approx(total / n, rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / corpus.n_predicted_bytes, rel=1e-5)
    assert row["tokens"] == 0


@pytest.mark.slow
def test_compression_alone_and_training_after_it_are_reported(study_file, tmp_path):
    file = study_file()
    outcome = run_at(file, tmp_path / "out", tracking=None)
    assert (outcome.n_failed, outcome.n_missing, outcome.n_complete) == (0, 0, 18)
    results = results_at(tmp_path / "out")
    losses = {key: result.final["final/val_loss"] for key, result in results.items()}
    assert len({losses[0, seed] for seed in range(3)}) == 1  # a dense model has no calibration text
    assert len({losses[2, seed] for seed in range(3)}) == 3  # a seed is a sample of it
    assert all(results[trial, 0].final["total_tokens"] == 0 for trial in range(4))
    assert all(results[trial, 0].final["total_tokens"] == 6 * 4 * CONTEXT for trial in (4, 5))
    assert all("final/train_loss" not in results[trial, 0].final for trial in range(4))
    said = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "--out", str(tmp_path / "report")])
    assert said.exit_code == 0, said.output
    trials = pd.read_csv(next((tmp_path / "report").rglob("trials.csv")))
    groups = trials.groupby("arm")["group"].unique().map(list).to_dict()
    assert groups == {
        "dense": ["dense"],
        "low-rank": ["low rank compressed"],
        "mpo": ["MPO compressed"],
        "healed": ["MPO fine-tuned"],
        "further": ["dense fine-tuned"],
    }
    assert "there is no dense model" not in said.output


@pytest.mark.parametrize("heal", [{}, {"layers": "structured", "loss": "distillation", "temperature": 2.0}], ids=str)
def test_a_healed_run_that_was_interrupted_ends_as_an_undisturbed_one(study_file, heal):
    config = load_config(study_file(arms=[ARMS[3] | {"heal": heal}]))
    corpus, [spec] = corpus_of(config), listed_specs(config)
    undisturbed, resumed = undisturbed_and_resumed(spec, 1, corpus, n_steps=1)
    assert resumed.curve == undisturbed.curve


@pytest.mark.parametrize("model", [llama, gpt2])
def test_a_pretrained_model_teaches_its_compressed_form(study_file, model):
    heal = {"layers": "structured", "loss": "distillation"}
    config = load_config(study_file(model, arms=[ARMS[3] | {"heal": heal}]))
    corpus, [spec] = corpus_of(config), listed_specs(config)
    training, expected = Training(spec, 0, corpus), model()
    inputs, _ = training.training_windows.batch(0)
    with torch.no_grad():
        ours, theirs = (each(inputs.long()).logits.log_softmax(-1) for each in (training.model, expected))
        loss = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    training.optimiser_step()
    assert training._loss_sum == pytest.approx(loss, rel=1e-4)
    training.run()
    trained, given = weights_of(training.model), expected.state_dict()
    kept = [name for name in trained if name in given and not name.endswith("bias")]
    assert len(kept) > 5
    assert all(torch.equal(trained[name], given[name]) for name in kept)


def test_other_weights_are_another_study(study_file, tmp_path):
    file = study_file()
    arms = [ARMS[0]]
    run_at(study_file(arms=arms), tmp_path / "out")
    first = load_config(file).model.sha256
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    write(model, tmp_path / "model")
    assert load_config(file).model.sha256 != first
    with pytest.raises(StudyError, match=r"it differs in model.sha256 \(was"):
        run_at(file, tmp_path / "out")
    with pytest.raises(StudyError, match=f"have the checksum .*, but the study has {first}"):
        load_config(file, [f"model.sha256={first}"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"hidden_size": 3}}, "model: `hidden_size` is not allowed beside `pretrained`"),
        ({"model": {"config": "llama"}}, "model: exactly one of `config` and `pretrained` must be given"),
        ({"model": {"pretrained": "nowhere"}}, "model: .*nowhere is no folder"),
        (
            {"protocol": {"steps": 0}, "arms": [{"name": "a", "family": "dense"}]},
            r"arms\[a\]: `steps` must be at least 1 ",
        ),
    ],
)
def test_what_does_not_fit_a_pretrained_model_is_one_line(study_file, changes, message):
    with pytest.raises(StudyError, match=message) as raised:
        load_config(study_file(**changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"context": 65}}, "model: `context` must be at most 64, the model's, but got 65"),
        ({"corpus": {"tokenizer": "bytes"}}, "model: the corpus has 256 tokens, but the model only 30"),
    ],
)
def test_text_that_does_not_fit_a_pretrained_model_is_one_line(study_file, tmp_path, changes, message):
    with pytest.raises(StudyError, match=message):
        run_at(study_file(**changes), tmp_path / "out")


def test_a_start_and_a_tokenizer_need_pretrained_weights(study_file, tmp_path):
    file = study_file()
    study = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump({**study, "model": {"d_model": 8, "n_heads": 2}}), encoding="utf-8")
    with pytest.raises(StudyError) as raised:
        load_config(file)
    assert "arms[dense]: `start: pretrained` needs `model.pretrained`, the folder of its weights" in str(raised.value)
    assert "`corpus.tokenizer: model` needs `model.pretrained`, the folder of the tokenizer" in str(raised.value)


def test_a_model_may_be_in_the_cache_folder_wherever_that_is(pretrained_study, tmp_path, monkeypatch):
    file = pretrained_study(arms=[ARMS[0]], model={"pretrained": "cache:models/model"})
    (tmp_path / "models").mkdir()
    (tmp_path / "model").rename(tmp_path / "models" / "model")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    config = load_config(file)
    assert (config.model.pretrained, config.model.named) == ("cache:models/model", "model")
    # The record means the same on every machine.
    assert config.corpus.tokenizer == "cache:models/model"
    assert config.corpus.tokenizer_folder == str(tmp_path / "models" / "model")
    other = load_config(file, ["corpus.path=cache:text.txt"]).corpus
    assert (other.path, other.paths) == ("cache:text.txt", (str(tmp_path / "text.txt"),))
    run_at(file, tmp_path / "out", "seeds=1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models").rename(tmp_path / "elsewhere" / "models")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    assert run_at(file, tmp_path / "out", "seeds=1").n_missing == 0


def test_a_model_may_be_one_of_the_hub(pretrained_study, tmp_path, monkeypatch):
    """Without a network, from the library's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    file = pretrained_study(arms=[ARMS[0]], model={"pretrained": "hub:owner/tiny"})
    known = tmp_path / "hub" / "models--owner--tiny"
    (known / "snapshots").mkdir(parents=True)
    (tmp_path / "model").rename(known / "snapshots" / "0123")
    with pytest.raises(StudyError, match=r"model\.pretrained: hub:owner/tiny is neither in the hub") as raised:
        load_config(file)
    assert "\n" not in str(raised.value)
    (known / "refs").mkdir()
    (known / "refs" / "main").write_text("0123")
    config = load_config(file)
    assert (config.model.pretrained, config.model.named) == ("hub:owner/tiny", "tiny")
    assert run_at(file, tmp_path / "out", "seeds=1").n_complete == 1
