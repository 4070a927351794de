"""The kind of layer that docs/extending.md shows works everywhere, with no other edit."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from structured_linear_case import StructuredLinearTestCase
from study_fixtures import DENSE, results_at, run_at, write_study
from typer.testing import CliRunner

import mpo_core
from analysis.commands.cli import app
from study.errors import StudyError
from study.spec.study_file import load_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's tables

DOCUMENT = Path(__file__).parents[1] / "docs/extending.md"


def shown_kind(folder):
    """The class of the page's first block of Python, from a file as a user would write it."""
    file = folder / "leading.py"
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    file.write_text(code[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("leading", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["leading"] = module
    spec.loader.exec_module(module)
    return module.LeadingLinear


@pytest.fixture(scope="module", autouse=True)
def kind(tmp_path_factory):
    TestLeading.kind = shown_kind(tmp_path_factory.mktemp("kind"))
    return TestLeading.kind


class TestLeading(StructuredLinearTestCase):
    size = {"n_inputs": 5}  # noqa: RUF012


def test_the_kind_is_known_by_name(kind):
    assert mpo_core.kinds()["leading"] is kind
    assert kind.label == "leading inputs"


LEADING = {"family": "leading", "as_chi": 2}


@pytest.mark.slow
def test_a_study_lists_searches_starts_and_stacks_the_kind_and_reports_it(tmp_path):
    rate = {"low": 1e-3, "high": 1e-1, "log": True}
    arms = [
        DENSE,
        {"name": "listed", **LEADING, "as_chi": [2, 4], "lr_rule": "mup"},
        {"name": "searched", **LEADING, "learning_rate": rate},
        {"name": "tuned", **LEADING, "start": "dense", "refinement": "outputs", "steps": 4},
    ]
    search = {"sampler": "random", "trials": 2}
    file = write_study(tmp_path, arms=arms, seeds=3, execution={"seeds_per_unit": 3}, search=search)
    folder = tmp_path / "study"
    outcome = run_at(file, folder, tracking=None)
    assert (outcome.n_failed, outcome.n_missing, outcome.n_complete, outcome.tracking_trouble) == (0, 0, 18, None)
    results = results_at(folder).values()
    assert all(math.isfinite(result.final["final/val_loss"]) for result in results)
    assert {result.ran_on["mpo.stacked"] for result in results} == {"3"}
    said = CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "report")])
    assert said.exit_code == 0, said.output
    trials = pd.read_csv(next((tmp_path / "report").rglob("trials.csv")))
    groups = trials.groupby("arm")["group"].unique().map(list).to_dict()
    assert groups["listed"] == groups["searched"] == ["leading inputs from scratch"]
    assert groups["tuned"] == ["leading inputs fine-tuned"]


def test_an_init_that_the_kind_lacks_is_one_line(tmp_path):
    file = write_study(tmp_path, arms=[DENSE, {"name": "a", **LEADING, "init": "spectral"}])
    with pytest.raises(StudyError, match=r"arms\[a\].init: must be 'variance', but got \"spectral\"$"):
        load_config(file)


def test_a_study_trains_the_model_that_the_page_shows(tmp_path, monkeypatch):
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text[text.index("## A model") :]
    code, given = re.search(r"```python\n(.*?)```.*?```yaml\n(.*?)```", section, re.DOTALL).groups()
    (tmp_path / "my_models.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    model = yaml.safe_load(given)["model"]
    file = write_study(tmp_path, arms=[DENSE, {"name": "mpo", "family": "mpo", "chi": 2}])
    study = yaml.safe_load(file.read_text(encoding="utf-8")) | {"model": {**model, "width": 12, "context": 8}}
    file.write_text(yaml.safe_dump(study), encoding="utf-8")
    outcome = run_at(file, tmp_path / "study")
    assert (outcome.n_failed, outcome.n_missing, outcome.n_complete) == (0, 0, 4)
    for result in results_at(tmp_path / "study").values():
        assert result.curve[-1]["val_loss"] < result.curve[0]["val_loss"]
