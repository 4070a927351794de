"""What all tests of a study share: a small text, and a study file that trains on it in a fraction of a second."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
import torch
import yaml
from language_models import llama, text, write

from study.commands.cli import main
from study.spec.search_space import listed_specs
from study.spec.study_file import validate
from study.training.corpus_storage import store_corpus
from study.training.loading import load_corpus
from study.training.storage import Storage
from study.training.unit import Unit

WORDS = ("tensor", "train", "bond", "site", "core", "chi")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def pretrained_study(tmp_path):
    """Makes a study file of a pretrained model; keywords replace its keys, those of a mapping one by one."""

    def make(kind=llama, **changes):
        write(kind(), tmp_path / "model")
        documents = [json.dumps({"text": text(60, seed)}) for seed in range(20)]
        (tmp_path / "text.jsonl").write_text("\n".join(documents), encoding="utf-8")
        study = {
            "name": "tiny",
            "corpus": {"path": "text.jsonl", "tokenizer": "model"},
            "model": {"architecture": "huggingface", "pretrained": "model", "context": 32},
            "protocol": {"steps": 0, "batch_size": 4, "sampled_eval_batches": 1, "calibration_batches": 3},
            "seeds": 3,
        }
        for key, value in changes.items():
            study[key] = study.get(key, {}) | value if isinstance(value, dict) else value
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(study), encoding="utf-8")
        return path

    return make


@pytest.fixture
def small_text(tmp_path):
    """Path of a text of about 3,000 characters: six words in random order, so that there is something to learn."""
    chosen = np.random.default_rng(0).integers(len(WORDS), size=550)
    path = tmp_path / "small.txt"
    path.write_text(" ".join(WORDS[index] for index in chosen), encoding="utf-8")
    return path


@pytest.fixture
def small_study(small_text):
    """Makes the content of a small study file; keywords replace its keys, a mapping key by key."""

    def make(**changes):
        study = {
            "name": "small",
            "corpus": {"path": str(small_text)},
            "model": {"d_model": 8, "n_heads": 2, "n_layers": 1, "context": 8},
            "protocol": {
                "steps": 12,
                "warmup_steps": 3,
                "batch_size": 4,
                "learning_rate": 0.01,
                "eval_every": 4,
                "sampled_eval_batches": 2,
                "sampled_eval_batch_size": 3,
            },
            "seeds": 2,
            "arms": [
                {"name": "dense", "family": "dense"},
                {"name": "mpo", "family": "mpo", "chi": [2, 4]},
                {"name": "mpo-finetune", "family": "mpo", "chi": 2, "start": "dense", "steps": 6},
            ],
        }
        for key, value in changes.items():
            study[key] = study[key] | value if isinstance(value, dict) and key in study else value
        return study

    return make


@pytest.fixture
def corpus(small_text):
    return load_corpus(small_text)


@pytest.fixture
def spec_of(small_study):
    """Makes the trial of a dense arm (no changes), or of an MPO arm with these values."""

    def make(protocol=None, model=None, **arm):
        arms = [{"name": "dense", "family": "dense"}]
        if arm:
            arms.append({"name": "mpo", "family": "mpo"} | arm)
        return listed_specs(validate(small_study(arms=arms, protocol=protocol or {}, model=model or {}), "here"))[-1]

    return make


@pytest.fixture
def unit_of(tmp_path, corpus, spec_of):
    """Makes a unit of the dense arm with these changes, its corpus in storage."""
    storage = Storage(str(tmp_path / "storage"))
    store_corpus(storage, corpus)
    plain = {
        "trial": 3, "seeds": [0, 1], "storage": storage.url, "study_uuid": "f00", "corpus_sha256": corpus.sha256,
        "validation_fraction": 0.1, "starts": None, "rel_error_chis": [2], "keep_weights": False, "cpus": 1,
        "gpus": 0, "checkpoint_seconds": 1000, "capture": True,
    }  # fmt: skip

    def make(**changes):
        return Unit(**{**plain, "seeds": (0, 1), "until": None, "rel_error_chis": (2,), "spec": spec_of()} | changes)

    return make


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `mpo-study` in this process: exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mpo-study", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        # The command ends its process in this way if a writer hangs; here that would end all tests of the worker.
        monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"a writer of MLflow hangs (exit {code})"))
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return call
