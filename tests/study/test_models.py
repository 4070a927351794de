"""Studies of other models than PicoGPT: from Hugging Face, and of a user's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import own_models
import pytest
import torch
import yaml
from study_fixtures import LLAMA, undisturbed_and_resumed

import study
from study.commands.opening import study_corpus
from study.errors import StudyError
from study.spec.definition import definition
from study.spec.search_space import listed_specs
from study.spec.study_file import dump_config, load_config, validate
from study.training.model import build_model, trial_shape
from study.training.seed_run import train_seed
from study.training.train import Training
from study.training.weights import load_weights, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")

MODELS = {
    "llama": {**LLAMA, "num_hidden_layers": 1},
    "tied llama": {**LLAMA, "num_hidden_layers": 1, "tie_word_embeddings": True},
    "qwen2": {**LLAMA, "num_hidden_layers": 1, "config": "qwen2"},
    "gpt2": {"architecture": "huggingface", "config": "gpt2", "context": 8, "n_embd": 16, "n_head": 2, "n_layer": 1},
    "own": {"architecture": "own_models:OwnGRU", "context": 8, "width": 12},
}


@pytest.fixture
def study_of(small_study):
    """Makes the content of a small study of one of the models."""

    def make(name, **changes):
        return {**small_study(**changes), "model": MODELS[name]}

    return make


@pytest.fixture
def write_study(tmp_path):
    """Writes a study file; returns its path."""

    def write(content):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", MODELS)
def test_every_arm_of_a_study_trains(study_of, corpus, name):
    arms = [
        {"name": "dense", "family": "dense"},
        {"name": "mpo", "family": "mpo", "chi": 2, "gauge": "fixed"},
        {"name": "low-rank", "family": "low_rank", "as_chi": 4},
        {"name": "fine-tuned", "family": "mpo", "chi": 2, "start": "dense", "refinement": "als"},
        {"name": "dense-on", "family": "dense", "start": "dense"},
    ]
    config = validate(study_of(name, arms=arms), "here")
    specs = {spec.arm: spec for spec in listed_specs(config)}
    dense, weights = train_seed(specs["dense"], 0, corpus, rel_error_chis=[2])
    assert dense.curve[-1]["val_loss"] < dense.curve[0]["val_loss"] - 0.1
    assert any("mix" in key or "proj" in key or "c_" in key for key in dense.rel_errors)
    for arm, spec in specs.items():
        start = {"start_weights": weights, "start_tokens": 5} if spec.start else {}
        result, _ = train_seed(spec, 0, corpus, **start)
        assert result.state == "complete", result.failure
        if spec.start and arm == "dense-on":
            assert result.curve[0]["val_loss"] == pytest.approx(dense.final["final/val_loss"], abs=1e-6)
        shape = trial_shape(spec, corpus.vocab_size, len(corpus.validation), config.model)
        model, _ = build_model(spec, corpus.vocab_size, lambda name: torch.Generator().manual_seed(0), weights)
        assert shape.n_params == sum(parameter.numel() for parameter in model.parameters())
        assert (shape.n_params < shape.n_params_dense) == (spec.family != "dense")


@pytest.mark.parametrize("name", MODELS)
def test_an_interrupted_run_ends_as_an_undisturbed_one(study_of, corpus, name):
    [spec] = listed_specs(validate(study_of(name, arms=[{"name": "mpo", "family": "mpo", "chi": 2}]), "here"))
    undisturbed, resumed = undisturbed_and_resumed(spec, 0, corpus, n_steps=5)
    assert resumed.curve == undisturbed.curve
    for (key, ours), theirs in zip(
        resumed.model.state_dict().items(), undisturbed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), key


def test_seeds_of_other_models_have_other_values_and_the_head_stays(study_of, corpus):
    [spec] = listed_specs(validate(study_of("llama", arms=[{"name": "mpo", "family": "mpo", "chi": 2}]), "here"))
    models = [Training(spec, seed, corpus).model for seed in (0, 0, 1)]
    first, again, other = (model.model.layers[0].self_attn.q_proj.cores[0].detach() for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert isinstance(models[0].lm_head, torch.nn.Linear)


def test_tied_weights_are_kept_once(study_of, corpus):
    [spec] = listed_specs(validate(study_of("tied llama", arms=[{"name": "dense", "family": "dense"}]), "here"))
    _, weights = train_seed(spec, 0, corpus)
    assert "lm_head.weight" not in weights
    model, _ = build_model(spec, corpus.vocab_size, lambda name: torch.Generator().manual_seed(3))
    load_weights(model, weights)
    assert all(torch.equal(weights[key], tensor) for key, tensor in weights_of(model).items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(RuntimeError, match="Missing key"):
        load_weights(model, {key: tensor for key, tensor in weights.items() if "embed" not in key})


@pytest.mark.slow
def test_a_study_of_a_model_of_hugging_face_runs_samples_and_names_its_model(study_of, write_study, tmp_path, command):
    path, folder = write_study(study_of("gpt2", execution={"keep_weights": True})), tmp_path / "out"
    code, out, err = command("run", path, "--dir", folder, "--executor", "inline")
    assert code == 0, out + err
    code, out, err = command("sample", folder, "--prompt", "ten", "--tokens", 12)
    assert code == 0, err
    assert "ten" in out

    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    runs = mlflow.search_runs(experiment_names=["small"])
    assert set(runs["params.model"].dropna()) == {"gpt2 (n_embd=16, n_head=2, n_layer=1)"}
    assert "params.d_model" not in runs


def test_a_study_of_own_code_is_bound_to_that_code(study_of, write_study, tmp_path, monkeypatch, command):
    text = Path(own_models.__file__).read_text(encoding="utf-8")
    code = tmp_path / "user_models.py"
    code.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    study = study_of("own", arms=[{"name": "dense", "family": "dense"}])
    path = write_study({**study, "model": {**MODELS["own"], "architecture": "user_models:OwnGRU"}})
    how = ("run", path, "--dir", tmp_path / "out", "--executor", "inline", "--tracking", "off")
    assert command(*how)[0] == 0
    config = load_config(path)
    assert len(config.model.sha256) == 64
    assert config.model.sha256 in dump_config(config)
    code.write_text(text + "\n# changed\n", encoding="utf-8")
    assert command(*how)[0] == 0  # this program has the old code
    del sys.modules["user_models"]
    status, _, err = command(*how)
    assert status == 2
    assert "it differs in model.sha256 (was" in err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"architecture": "hugingface"}, "must be picogpt, huggingface or MODULE:CLASS, but got .*did you mean huggi"),
        ({"architecture": "huggingface"}, "exactly one of `config` and `pretrained` must be given"),
        ({"d_modell": 8}, "model.d_modell: unknown key .did you mean d_model"),
        ({**LLAMA, "hidden_size": [16]}, "`hidden_size` must be a number, a text, true, false or null, but got .16."),
        (3, "model: must be a mapping of keys to values, but got 3"),
    ],
)
def test_models_that_cannot_be_are_refused(study_of, model, message):
    with pytest.raises(StudyError, match=message):
        validate({**study_of("llama"), "model": model}, "here")


def test_keys_of_picogpt_do_not_go_with_another_model(study_of):
    arms = [{"name": "dense", "family": "dense"}, {"name": "narrow", "family": "dense", "d_model": 8}]
    with pytest.raises(StudyError, match=r"arms\[narrow\]: `d_model` is PicoGPT's, but the study's model is llama"):
        validate(study_of("llama", arms=arms), "here")


def test_wrong_settings_are_one_line_before_anything_runs(study_of, write_study, tmp_path, command):
    path = write_study({**study_of("llama"), "model": {**LLAMA, "hiden_size": 16}})
    for how in (("plan", path), ("run", path, "--dir", tmp_path / "out", "--executor", "inline")):
        status, _, err = command(*how)
        assert status == 2
        assert "model: llama has no setting hiden_size (did you mean hidden_size" in err
        assert err.count("\n") == 1


def test_picogpt_is_recorded_as_before_there_were_other_models(small_study):
    given = small_study()
    named = {**given, "model": {**given["model"], "architecture": "picogpt"}}
    assert definition(validate(given, "here")) == definition(validate(named, "here"))
    assert set(definition(validate(given, "here"))["model"]) == {"d_model", "n_heads", "n_layers", "context", "d_ff"}


@pytest.mark.slow
def test_the_shipped_gpt2_study_is_sized_and_trains_for_ten_steps(tmp_path):
    """With its own twelve layers, on short sequences."""
    lines = [json.dumps({"text": f"document {number} says that {number} is a number"}) for number in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    small = ("steps=10", "warmup_steps=2", "batch_size=4", "eval_every=10", "precision=float32")
    changes = [f"corpus.path={tmp_path / 'text.jsonl'}", "corpus.validation_fraction=0.1", "execution.gpus=0"]
    changes += [f"protocol.{change}" for change in small] + ["model.context=16", "seeds=1"]
    shipped = Path(study.__file__).parent / "configs" / "gpt2-small-scratch.yaml"
    config = load_config(shipped, changes)
    corpus = study_corpus(config)
    specs = {(spec.arm, spec.size): spec for spec in listed_specs(config)}
    counted = len(corpus.validation), config.model
    sizes = {key: trial_shape(spec, corpus.vocab_size, *counted).n_params for key, spec in specs.items()}
    assert sizes["narrow", None] == pytest.approx(sizes["mpo", "χ=128"], rel=0.05)
    assert sizes["shallow", None] == pytest.approx(sizes["mpo", "χ=170"], rel=0.05)
    for key in (("mpo", "χ=64"), ("narrow", None)):  # the larger ones take minutes
        training = Training(specs[key], 0, corpus)
        assert len(training.model.transformer.h) == 12
        training.run()
        first, last = training.curve
        assert (last["step"], last["tokens"]) == (10, 10 * 4 * 16)
        assert last["val_loss"] < first["val_loss"]
