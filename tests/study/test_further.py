"""A dense arm that is trained on from another: the control of what is compressed and fine-tuned."""

from __future__ import annotations

import pytest
import torch
from study_fixtures import (
    DENSE,
    MPO,
    TUNED,
    cli,
    database,  # noqa: F401 (a fixture)
    mlflow_template,  # noqa: F401 (a fixture)
    results_at,
    run_at,
    runs_in,
    write_study,
)

from study.ledger.directory import StudyDirectory
from study.ledger.growth import Growth
from study.ledger.snapshot import read_ledger
from study.spec.search_space import listed_specs
from study.spec.study_file import load_config, validate
from study.training.seed_run import train_seed, train_seeds

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")

FURTHER = {"name": "further", "family": "dense", "start": "dense", "steps": 4, "learning_rate": [0.01, 0.001]}


@pytest.fixture
def spec(small_study):
    arms = [DENSE, FURTHER | {"learning_rate": 0.01}]
    dense, further = listed_specs(validate(small_study(arms=arms), "here"))
    return {"dense": dense, "further": further}


@pytest.mark.slow
def test_it_goes_on_from_the_trained_weights_and_is_compared_with_what_is_compressed(tmp_path, database):  # noqa: F811
    once = TUNED | {"learning_rate": [0.01, 0.001]}
    file = write_study(tmp_path, arms=[FURTHER, DENSE, MPO | {"tuned_among": 5}, once])
    folder = tmp_path / "kept"
    outcome = run_at(file, folder, tracking=f"sqlite:///{database}")
    assert (outcome.n_complete, outcome.n_failed, outcome.n_missing, outcome.tracking_trouble) == (14, 0, 0, None)
    trials = {}
    for trial in read_ledger(StudyDirectory(folder).ledger_url, "tiny").trials:
        trials.setdefault(trial.spec.arm, trial)
    further, dense, tuned = (trials[arm] for arm in ("further", "dense", "tuned"))
    assert (further.spec.start, further.spec.init, further.shape.n_params) == ("dense", None, dense.shape.n_params)
    assert further.budget_hash == tuned.budget_hash != dense.budget_hash
    results = results_at(folder)
    for seed in (0, 1):
        taught, own = results[dense.number, seed], results[further.number, seed]
        assert own.curve[0]["val_loss"] == taught.curve[-1]["val_loss"]
        assert own.curve[-1]["val_loss"] != taught.curve[-1]["val_loss"]
        assert own.final["total_tokens"] == own.final["train_tokens"] + taught.final["train_tokens"]
        assert taught.rel_errors  # the paper's tables are of these, and of no others
        assert not own.rel_errors
        assert (taught.weights is not None, own.weights) == (True, None)
    params = [run.data.params for [run] in runs_in(database).values() if "arm" in run.data.params]
    started = {(p["start"], p.get("init")) for p in params if p["arm"] == "further"}
    assert started == {("dense", None)}
    among = {(p["arm"], p["tuning_trials"], p.get("tuned_among")) for p in params}
    assert among == {("further", "2", None), ("dense", "1", None), ("mpo", "5", "5"), ("tuned", "2", None)}
    code, out, err = cli("status", "kept", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "d_model=8, from dense" in out
    code, out, err = cli("plan", file, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "d_model=8, from dense" in out


def test_it_fails_with_its_start(tmp_path):
    wild = DENSE | {"name": "wild", "learning_rate": 1e30}
    file = write_study(tmp_path, arms=[wild, FURTHER | {"start": "wild"}])
    run_at(file, tmp_path / "kept", "protocol.grad_clip=1e30")
    failures = [result.failure for result in results_at(tmp_path / "kept").values()]
    assert len(failures) == 6
    assert sum("its start (arm wild, seed" in failure for failure in failures) == 4


def test_refine_brings_its_start_along(tmp_path):
    file = write_study(tmp_path, seeds=1, arms=[DENSE, FURTHER | {"learning_rate": 1e-9}])  # as good as its start
    run_at(file, tmp_path / "kept")
    outcome = run_at(file, tmp_path / "kept", growth=Growth(refine=1))
    assert (outcome.n_failed, outcome.n_missing) == (0, 0)
    assert results_at(tmp_path / "kept").keys() == {(0, 0), (1, 0), (0, 1), (1, 1)}


def test_stacked_seeds_are_trained_as_each_alone(spec, corpus):
    weights = {seed: train_seed(spec["dense"], seed, corpus)[1] for seed in (0, 1)}
    alone = [train_seed(spec["further"], seed, corpus, start_weights=weights[seed])[0] for seed in (0, 1)]
    stacked = [result for result, _ in train_seeds(spec["further"], [0, 1], corpus, start_weights=weights)]
    for one, other in zip(alone, stacked, strict=True):
        losses = [torch.tensor([row["val_loss"] for row in result.curve]) for result in (one, other)]
        torch.testing.assert_close(*losses)


def test_it_may_be_searched(tmp_path):
    searched = FURTHER | {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
    file = write_study(tmp_path, arms=[DENSE, searched], search={"sampler": "random", "trials": 2})
    outcome = run_at(file, tmp_path / "kept")
    assert (outcome.n_complete, outcome.n_failed, outcome.n_missing) == (6, 0, 0)
    assert load_config(file).arm("further").is_searched
