"""MLflow as somebody else changed it: the analysis says so, and writing it again mends it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
from study_fixtures import (
    DENSE,
    MPO,
    contents,
    database,  # noqa: F401 (a fixture)
    ledger_at,
    mlflow_client,
    mlflow_template,  # noqa: F401 (a fixture)
    run_at,
    runs_in,
    write_study,
)

from analysis import run_schema as schema
from analysis.errors import AnalysisError
from analysis.runs.load import StudyAddress, load_study
from study.commands.opening import study_corpus
from study.commands.sync import sync
from study.ledger.directory import StudyDirectory
from study.spec.config import Execution
from study.spec.study_file import load_config
from study.tracking.opening import open_tracker, study_record
from study.training.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow", "ignore::DeprecationWarning")

NOW = 4_000_000_000_000
"""Milliseconds, later than anything here."""


@pytest.fixture(scope="module")
def study(tmp_path_factory, mlflow_template):  # noqa: F811
    """A finished study: its file, its folder, and MLflow's database with all of it."""
    folder = tmp_path_factory.mktemp("study")
    arms = [DENSE, MPO | {"chi": [500, 1000]}, {"name": "wild", "family": "dense", "learning_rate": 1e30}]
    file = write_study(folder, arms=arms)
    database = shutil.copy(mlflow_template, folder / "mlflow.db")  # noqa: F811
    run_at(file, folder / "study", tracking=f"sqlite:///{database}")
    written = file, folder / "study", Path(database)
    return *written, Tampered((*written, None), folder / "copy.db").substance()


class Tampered:
    """A copy of the study's database, for a test to change as anybody may."""

    def __init__(self, study, path):
        self.file, self.folder, database, before = study  # noqa: F811
        self.path = Path(shutil.copy(database, path))
        self.uuid = json.loads((self.folder / "study.json").read_text())["uuid"]
        self.before = before
        self.client = mlflow_client(self.path)

    def run(self, trial, seed=None):
        [run] = runs_in(self.path)[schema.run_key(self.uuid, trial, seed)]
        return run

    def id(self, trial, seed=None):
        return self.run(trial, seed).info.run_id

    def substance(self, runs=None):
        """All that readers see, by key; ids of runs may change, how a mean became what it is, and when a point was
        written: a run that is written anew has all points at its end."""
        found, skipped = {}, (schema.PARENT, schema.REVISION)
        for key, same in (runs or contents(self.path)).items():
            [(_, name, status, _, end, params, tags, metrics)] = same
            points = {metric: [point[:2] for point in sorted(of)] for metric, of in metrics.items()}
            if "seed" not in params:
                points = {metric: of[-1] for metric, of in points.items()}
            found[key] = name, status, end, params, {t: text for t, text in tags.items() if t not in skipped}, points
        return found

    def read(self):
        return load_study(StudyAddress(f"sqlite:///{self.path}", "tiny", self.uuid))

    def mend(self):
        sync(load_config(self.file), StudyDirectory(self.folder), None, f"sqlite:///{self.path}")

    def check_mended(self):
        self.mend()
        runs = contents(self.path)
        assert self.substance(runs) == self.before
        for key, [(_, _, _, _, _, _, tags, _)] in runs.items():
            if key.count("/") == 2:
                assert tags[schema.PARENT] == runs[key.rpartition("/")[0]][0][0]
        assert len(self.read().seeds) == 4
        self.mend()
        assert contents(self.path) == runs  # the second time there is nothing to do


@pytest.fixture
def tampered(study, tmp_path):
    return Tampered(study, tmp_path / "tampered.db")


def nan(it):
    it.client.log_metric(it.id(0, 1), "final/val_loss", math.nan, NOW, 7)


def better_number(it):
    it.client.log_metric(it.id(0, 1), "final/val_loss", 0.01, NOW, 7)


def worse_mean(it):
    it.client.log_metric(it.id(0), "mean/final/val_loss", 9.0, NOW, 9)


def relative_error(it):
    it.client.log_metric(it.id(1, 0), schema.rel_error_key("trained", 3, "a.layer"), 0.5)


def param(it):
    it.client.log_param(it.id(0, 0), "refinement", "somebody")


def tag(it):
    it.client.set_tag(it.id(0, 0), schema.DEVICE, "abacus")


def hidden_trial(it):
    it.client.set_tag(it.id(1), schema.DUPLICATE_OF, "0")


def reason(it):
    it.client.delete_tag(it.id(3, 0), schema.FAILURE)


def contrasts(it):
    [summary] = runs_in(it.path)[f"{it.uuid}/{schema.KIND_SUMMARY}"]
    it.client.set_tag(summary.info.run_id, schema.CLAIMS, '{"margins": {"val_loss": 9}}')


def added_seed(it):
    """A third seed, better than the others, as a script copies a run."""
    run = it.run(0, 1)
    tags = run.data.tags | {schema.KEY: schema.run_key(it.uuid, 0, 2)}
    tags.pop(schema.DIGEST)
    new = it.client.create_run(run.info.experiment_id, tags=tags)
    for key, text in (run.data.params | {"seed": "2"}).items():
        it.client.log_param(new.info.run_id, key, text)
    for key, value in (run.data.metrics | {"final/val_loss": 0.1}).items():
        it.client.log_metric(new.info.run_id, key, value)
    it.client.set_terminated(new.info.run_id)


CHANGES = [added_seed, nan, better_number, worse_mean, relative_error, param, tag, hidden_trial, reason, contrasts]


def deleted_seed(it):
    it.client.delete_run(it.id(1, 0))


def deleted_failure(it):
    it.client.delete_run(it.id(3, 1))


DELETIONS = [deleted_seed, deleted_failure]


@pytest.mark.slow
@pytest.mark.parametrize("change", [*CHANGES, *DELETIONS])
def test_analysis_says_in_one_line_that_somebody_changed_a_run(tampered, change):
    change(tampered)
    with pytest.raises(AnalysisError, match=r"^run .*mpo-study sync") as error:
        tampered.read()
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("delete", DELETIONS)
def test_sync_writes_a_deleted_run_again(tampered, delete):
    delete(tampered)
    tampered.check_mended()


@pytest.mark.slow
def test_sync_mends_whatever_somebody_changed(tampered):
    for change in CHANGES:
        change(tampered)
    client = tampered.client  # and what the analysis does not look at
    client.log_metric(tampered.id(1, 1), "val_loss", 0.001, 1, 2)  # a second value of an earlier step
    client.set_terminated(tampered.id(1, 0), "KILLED", NOW)
    client.update_run(tampered.id(1), "RUNNING")
    client.set_tag(tampered.id(3, 1), schema.PARENT, tampered.id(0))
    client.create_run(client.get_experiment_by_name("tiny").experiment_id, tags={schema.STUDY_UUID: tampered.uuid})
    tampered.check_mended()


@pytest.mark.slow
def test_what_others_add_of_their_own_stays(tampered):
    tampered.client.log_metric(tampered.id(0, 0), "my_metric", 0.5)
    tampered.client.set_tag(tampered.id(0, 0), "my_tag", "x")
    tampered.client.log_param(tampered.id(0, 0), "my_param", "x")
    before = contents(tampered.path)
    assert len(tampered.read().seeds) == 4
    tampered.mend()
    assert contents(tampered.path) == before


def test_files_of_runs_are_written_again(study, tmp_path, database):  # noqa: F811
    file, folder, *_ = study
    config, directory, ledger = load_config(file), StudyDirectory(folder), ledger_at(file, folder)
    corpus, storage = study_corpus(config), Storage(directory.storage_url())

    def write(keep):
        record = study_record(config.model_copy(update={"execution": Execution(keep_weights=keep)}), ledger, corpus)
        tracker = open_tracker(f"sqlite:///{database}", directory, storage, record, is_thorough=True)
        for trial in ledger.trials.values():
            tracker.write(trial, ledger.on_record(trial), 2)

    write(False)
    [summary] = runs_in(database)[f"{ledger.uuid}/{schema.KIND_SUMMARY}"]
    place = Path(summary.info.artifact_uri.removeprefix("file://"))
    files = {path.name: path.read_bytes() for path in place.iterdir()}
    (place / "study.yaml").write_text("something else")
    (place / "environment.json").unlink()
    write(True)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == files
    stored = [result for result in ledger.results.values() if result.weights is not None]
    for result in stored:
        [run] = runs_in(database)[schema.run_key(ledger.uuid, result.trial, result.seed)]
        [listed] = mlflow_client(database).list_artifacts(run.info.run_id)
        assert listed.path == Path(str(result.weights)).name
    ledger.close()


# Texts that are too long for MLflow -----------------------------------------------------------------------------------


LONG = "a" * 64


@pytest.fixture
def opened(study, database):  # noqa: F811
    """What opens a tracker of the study over an empty database, with another record."""
    file, folder, *_ = study
    config, directory, ledger = load_config(file), StudyDirectory(folder), ledger_at(file, folder)
    record = study_record(config, ledger, study_corpus(config))

    def write(**changes):
        changed = dataclasses.replace(record, **changes)
        tracker = open_tracker(f"sqlite:///{database}", directory, Storage(directory.storage_url()), changed)
        trial = ledger.trials[0]
        tracker.write(trial, ledger.on_record(trial), 2)

    yield write, ledger
    ledger.close()


def read_at(database):  # noqa: F811
    return load_study(StudyAddress(f"sqlite:///{database}", "tiny"))


def test_claims_growths_and_environment_of_any_length_are_read_as_they_were_written(opened, database):  # noqa: F811
    write, ledger = opened
    contrasts = [{"arm": f"{LONG[:60]}{number}", "against": LONG} for number in range(300)]
    growths = [{"by": "--seeds +1", "seeds": [n, n + 1], "over": n} for n in range(300)]
    environment = {"packages": {f"package-{number}": "1.0" for number in range(600)}}
    for n in (300, 70, 300, 1):  # it grows, and may be shorter again
        claims = json.dumps({"margins": {"val_loss": 0.1}, "contrasts": contrasts[:n]})
        write(claims=claims, growths=growths[:n], environment=environment)
        runs = read_at(database)
        assert [pair.arm for pair in runs.claims.contrasts] == [pair["arm"] for pair in contrasts[:n]]
        assert runs.claims.margins == {"val_loss": 0.1}
        assert len(runs.growths) == n
        assert runs.environment == environment
    [summary] = runs_in(database)[f"{ledger.uuid}/{schema.KIND_SUMMARY}"]
    assert {tag for tag in summary.data.tags if tag.startswith(schema.CLAIMS)} == {schema.CLAIMS}
    assert max(map(len, summary.data.tags.values())) <= schema.TAG_LIMIT


def test_a_long_text_of_which_a_part_is_missing_is_refused_and_mended(opened, database):  # noqa: F811
    write, ledger = opened
    contrasts = [{"arm": LONG, "against": LONG}] * 100
    claims = json.dumps({"margins": {}, "contrasts": contrasts})
    write(claims=claims)
    [summary] = runs_in(database)[f"{ledger.uuid}/{schema.KIND_SUMMARY}"]
    client = mlflow_client(database)
    client.delete_tag(summary.info.run_id, f"{schema.CLAIMS}.2")
    client.delete_tag(summary.info.run_id, schema.DIGEST)
    with pytest.raises(AnalysisError, match=r"mpo\.claims.*not all of its \d parts.*mpo-study sync"):
        read_at(database)
    write(claims=claims)
    assert len(read_at(database).claims.contrasts) == 100


@pytest.mark.parametrize("length", [0, 1, 4999, 5000, 5001, 10_000, 10_001, 123_456])
def test_long_tag_is_read_back(length):
    text = ("χ" * length)[:length]
    tags = schema.long_tag("tag", text)
    assert max(map(len, tags.values())) <= schema.TAG_LIMIT
    assert schema.read_long_tag(tags, "tag") == text
    assert schema.read_long_tag({}, "tag") is None
    for missing in tags.keys() - {"tag"}:
        with pytest.raises(ValueError, match="not all"):
            schema.read_long_tag({tag: text for tag, text in tags.items() if tag != missing}, "tag")


def test_a_failure_and_a_description_of_any_length_are_taken(opened, database):  # noqa: F811
    write, ledger = opened
    trial, seed = 0, 1
    failed = dataclasses.replace(ledger.results[trial, seed], state="failed", failure="\0\udc80" + "x" * 30_000)
    ledger.results[trial, seed] = failed
    write(description="y" * 30_000)
    [run] = runs_in(database)[schema.run_key(ledger.uuid, trial, seed)]
    assert run.data.tags[schema.FAILURE] == "??" + "x" * (schema.TAG_LIMIT - 3) + "…"
    described = mlflow_client(database).get_experiment_by_name("tiny").tags["mlflow.note.content"]
    assert described == "y" * (schema.TAG_LIMIT - 1) + "…"
    before = contents(database)
    write(description="y" * 30_000)
    assert contents(database) == before
