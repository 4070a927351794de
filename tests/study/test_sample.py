from __future__ import annotations

import pytest
import torch
from study_fixtures import DENSE, MPO, TUNED, results_at, run_at, write_study

import mpo_core
from study.commands.cli import app
from study.commands.sample import sample
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.training.checkpoints import unpack_tensors

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a study whose weights are all kept, and of one that has those of its starts alone."""
    folder = tmp_path_factory.mktemp("finished")
    tuned = TUNED | {"factorisation": "min_params", "refinement": "als", "lr_rule": "mup", "decay": "matrix"}
    file = write_study(folder, arms=[DENSE, MPO, tuned])
    run_at(file, folder / "all", "execution.keep_weights=true")
    run_at(file, folder / "starts")
    return folder


def test_sample_continues_the_prompt_with_the_best_model(finished):
    run, text = sample(StudyDirectory(finished / "all"), prompt="tensor ", n_new=30)
    results = results_at(finished / "all")
    assert run == min(results.values(), key=lambda result: result.final["final/val_loss"])
    assert text.startswith("tensor ")
    assert len(text) == 37
    assert sample(StudyDirectory(finished / "all"), prompt="tensor ", n_new=30) == (run, text)
    assert sample(StudyDirectory(finished / "all"), prompt="tensor ", n_new=30, draw=1)[1] != text


@pytest.mark.parametrize("trial", [0, 1, 3])
def test_sample_draws_from_the_run_asked_for(finished, trial):
    folder = StudyDirectory(finished / "all")
    run, text = sample(folder, prompt="bond", n_new=1, trial=trial, seed=1, temperature=0)
    assert (run.trial, run.seed) == (trial, 1)
    weights, content = unpack_tensors((finished / "all" / "storage" / str(run.weights)).read_bytes())
    assert content["spec"]["arm"] == {0: "dense", 1: "mpo", 3: "tuned"}[trial]
    vocabulary = "".join(sorted(set((finished / "text.txt").read_text())))
    config = mpo_core.GPTConfig(vocab_size=len(vocabulary), d_model=8, n_heads=2, n_layers=1, context=8)
    model = mpo_core.PicoGPT(config)
    if trial:
        method = {1: "paper", 3: "min_params"}[trial]
        model, _ = mpo_core.compress(model, chi=2, factorisation=method)
    model.load_state_dict(weights)
    tokens = torch.tensor([[vocabulary.index(character) for character in "bond"]])
    assert text == "bond" + vocabulary[int(model(tokens)[0, -1].argmax())]


def test_sample_without_weights_says_which_run_has_them(finished):
    with pytest.raises(
        StudyError, match=r"no such run has its weights kept; those that have: trial 0 seed 0, trial 0 seed 1 "
    ):
        sample(StudyDirectory(finished / "starts"), prompt="t", n_new=1, trial=2)
    assert sample(StudyDirectory(finished / "starts"), prompt="t", n_new=1)[0].trial == 0


def test_sample_refuses_what_the_corpus_has_not(finished):
    with pytest.raises(StudyError, match="the character 'Q' is not in the corpus's vocabulary"):
        sample(StudyDirectory(finished / "all"), prompt="Q", n_new=1)
    with pytest.raises(StudyError, match="--prompt: must have at least one character"):
        sample(StudyDirectory(finished / "all"), prompt="", n_new=1)


def test_cli_sample_prints_the_text_alone(finished, capsys):
    app(["sample", str(finished / "all"), "--prompt", "core", "--tokens", "5"], standalone_mode=False)
    printed = capsys.readouterr()
    assert len(printed.out) == 4 + 5 + 1
    assert "val loss" in printed.err
