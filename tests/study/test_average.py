"""The average of the weights: its shares, that it leaves the training alone, and that resuming changes no number."""

from __future__ import annotations

import shutil
from contextlib import suppress

import pytest
import torch
from study_fixtures import DENSE, MPO, mlflow_template, results_at, run_at, undisturbed_and_resumed, write_study  # noqa: F401

from analysis.report.report import write_report
from analysis.runs.load import load_study, resolve_study
from study.training.average import WeightAverage
from study.training.optimisers import why_alone
from study.training.train import Training, evaluate
from study.training.weights import weights_of

PROTOCOL = {"steps": 12, "warmup_steps": 1, "eval_every": 4, "learning_rate": 1e-2}


def test_shares_fall_by_the_decay_and_add_up_to_one():
    parameter, decay = torch.nn.Parameter(torch.zeros(3)), 0.9
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    average = WeightAverage([parameter, frozen], decay)
    values = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for step, value in enumerate(values, start=1):
        parameter.data.copy_(value)
        average.update(step)
        shares = torch.tensor([decay ** (step - k) for k in range(1, step + 1)])
        expected = (shares[:, None] * values[:step]).sum(0) / shares.sum()
        torch.testing.assert_close(average.values[0], expected)
    assert len(average.values) == 1


def test_model_has_its_own_weights_again_also_after_an_error(spec_of, corpus):
    training = Training(spec_of(PROTOCOL | {"ema": 0.9}, chi=3), 0, corpus)
    for _ in range(3):
        training.optimiser_step()
    average, before = training._average, {name: t.clone() for name, t in weights_of(training.model).items()}
    with suppress(RuntimeError), average.in_the_model():
        assert not all(torch.equal(before[name], t) for name, t in weights_of(training.model).items())
        raise RuntimeError
    assert all(torch.equal(before[name], t) for name, t in weights_of(training.model).items())


@pytest.mark.parametrize("arm", [{}, {"chi": 3}, {"chi": 3, "gauge": "fixed"}])
def test_average_is_evaluated_beside_a_training_that_it_leaves_alone(spec_of, corpus, arm):
    plain, averaged = (Training(spec_of(PROTOCOL | ema, **arm), 0, corpus) for ema in ({}, {"ema": 0.8}))
    plain.run()
    steps, optimiser_step = [], averaged.optimiser_step

    def noted():
        optimiser_step()
        steps.append([parameter.detach().clone() for parameter in averaged.parameters])

    averaged.optimiser_step = noted
    averaged.run()
    rows = [{key: value for key, value in row.items() if not key.startswith("ema_")} for row in averaged.curve]
    assert rows == plain.curve
    first, last = averaged.curve[0], averaged.curve[-1]
    assert (first["ema_val_loss"], first["ema_val_acc"]) == (first["val_loss"], first["val_acc"])
    assert last["ema_val_loss"] != last["val_loss"]
    shares = torch.tensor([0.8 ** (12 - k) for k in range(1, 13)])
    shares /= shares.sum()
    with torch.no_grad():
        for at, parameter in enumerate(averaged.parameters):
            parameter.copy_(sum(share * step[at] for share, step in zip(shares, steps, strict=True)))
    loss, _ = evaluate(averaged.model, averaged.validation_batches())
    assert last["ema_val_loss"] == pytest.approx(loss, rel=1e-5)


def test_resumed_training_is_bit_identical(spec_of, corpus):
    spec = spec_of(PROTOCOL | {"ema": 0.9}, chi=3)
    undisturbed, resumed = undisturbed_and_resumed(spec, 0, corpus, 5)
    assert undisturbed.curve == resumed.curve
    for name, value in undisturbed.state()[0].items():
        assert torch.equal(value, resumed.state()[0][name]), name


def test_seeds_with_an_average_are_trained_one_by_one(spec_of):
    assert why_alone(spec_of(PROTOCOL | {"ema": 0.9})) == "protocol.ema"
    assert why_alone(spec_of(PROTOCOL)) is None


def test_report_says_how_much_the_average_shrinks_the_spread(tmp_path, mlflow_template):  # noqa: F811
    folder = tmp_path / "study"
    folder.mkdir()
    shutil.copy(mlflow_template, folder / "mlflow.db")
    file = write_study(
        tmp_path, arms=[DENSE, MPO], seeds=3, protocol={"ema": 0.9, "steps": 8, "warmup_steps": 1},
        objectives=["n_params", "ema_val_loss"],
    )  # fmt: skip
    run_at(file, folder, tracking=None)
    assert all("final/ema_val_loss" in result.final for result in results_at(folder).values())
    write_report(load_study(resolve_study(folder)), tmp_path / "report")
    table = (tmp_path / "report" / "tables" / "average.md").read_text("utf-8")
    assert "all, geometric mean" in table
    assert "Averaged weights" in (tmp_path / "report" / "index.html").read_text("utf-8")
    assert len(table.splitlines()) == 2 + len({trial for trial, _ in results_at(folder)}) + 1
