"""What is kept of a study is shown as long as MLflow holds the same, and never otherwise."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import simulated_study
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from analysis import run_schema as schema
from analysis.commands.cli import app
from analysis.runs.cache import MANIFEST, Cache
from analysis.runs.curves import load_curves
from analysis.runs.load import StudyAddress, load_study

FRAMES = ("trials", "seeds", "failures", "unfinished", "rel_errors", "bonds", "skipped")
USUAL = [replace(c, unfinished=()) for c in simulated_study.configurations()]
FOUND = [USUAL[0], USUAL[3], replace(USUAL[3], duplicate_of=1), replace(USUAL[5], seeds=(), skipped="too large")]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The database of a finished study, as its tracker leaves it."""
    folder = tmp_path_factory.mktemp("finished")
    uri = simulated_study.write_study(folder, FOUND, n_evaluations=3)
    client = MlflowClient(uri)
    experiment_id = client.get_experiment_by_name("tiny").experiment_id
    tags = {
        schema.KIND: schema.KIND_SUMMARY, schema.KEY: f"{simulated_study.UUID}/summary", schema.STUDY_NAME: "tiny",
        schema.STUDY_UUID: simulated_study.UUID, schema.SCHEMA: str(schema.SCHEMA_VERSION),
    }  # fmt: skip
    summary = client.create_run(experiment_id, tags=tags | {schema.DIGEST: schema.digest({}, {}, tags)})
    client.set_terminated(summary.info.run_id, "FINISHED")
    return folder / "mlflow.db"


class Study:
    """A copy of the finished study in MLflow, its cache, and what may happen to it."""

    def __init__(self, folder, template):
        shutil.copyfile(template, folder / "mlflow.db")
        self.cache = folder / "cache"
        self.address = StudyAddress(f"sqlite:///{folder}/mlflow.db", "tiny", simulated_study.UUID)
        self.client = MlflowClient(self.address.tracking_uri)
        self.settle("first")

    def runs(self, kind):
        experiment_id = self.client.get_experiment_by_name("tiny").experiment_id
        return self.client.search_runs([experiment_id], f"tags.`{schema.KIND}` = '{kind}'")

    @property
    def summary(self):
        [run] = self.runs(schema.KIND_SUMMARY)
        return run.info.run_id

    def settle(self, name):
        n = sum(len(self.runs(kind)) for kind in (schema.KIND_TRIAL, schema.KIND_SEED, schema.KIND_SUMMARY))
        self.client.set_tag(self.summary, schema.REVISION, f"{name}/{n}")

    def load(self):
        return load_study(self.address, cache=self.cache)

    def check(self):
        """What the cache makes of the study is what MLflow holds."""
        same(self.load(), load_study(self.address))


@pytest.fixture
def study(tmp_path, template):
    return Study(tmp_path, template)


def same(one, other):
    for name in FRAMES:
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name))
    facts = ("address", "name", "uuid", "n_duplicates", "latest", "budgets", "data_source")
    assert [getattr(one, key) for key in facts] == [getattr(other, key) for key in facts]


@pytest.fixture
def requests(monkeypatch):
    """Kinds of runs that MLflow is asked for, and curves."""
    asked = []
    search, history = MlflowClient.search_runs, MlflowClient.get_metric_history

    def search_runs(self, experiment_ids, wanted="", *arguments, **settings):
        asked.append(wanted.partition(schema.KIND + "` = ")[2])
        return search(self, experiment_ids, wanted, *arguments, **settings)

    def get_metric_history(self, run_id, key):
        asked.append(key)
        return history(self, run_id, key)

    monkeypatch.setattr(MlflowClient, "search_runs", search_runs)
    monkeypatch.setattr(MlflowClient, "get_metric_history", get_metric_history)
    return asked


def test_load_study_reads_a_finished_study_once(study, requests):
    first = study.load()
    assert {"'trial'", "'seed'"} <= set(requests)
    del requests[:]
    second = study.load()
    assert requests == ["'summary'", "", ""]
    same(first, second)
    same(second, load_study(study.address))
    assert len(second.skipped) == second.n_duplicates == 1
    assert len(second.rel_errors) > 0


def test_load_study_keeps_nothing_where_no_folder_is_given(study, tmp_path):
    runs = load_study(study.address)
    load_curves(runs, [0])
    assert runs.cache is None
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def first_seed(study):
    return study.runs(schema.KIND_SEED)[-1].info.run_id


def delete(study):
    study.client.delete_run(first_seed(study))


def delete_for_good(study):
    """As `mlflow gc` does after somebody deleted a run."""
    run_id = first_seed(study)
    study.client.delete_run(run_id)
    study.client._tracking_client.store._hard_delete_run(run_id)


def end(study, run_id):
    """The end of a run as its tracker leaves it: with the digest of what it holds."""
    data = study.client.get_run(run_id).data
    study.client.set_tag(run_id, schema.DIGEST, schema.digest(data.params, data.metrics, data.tags))
    study.client.set_terminated(run_id)


def retry(study):
    """A tracker writes a seed again that was trained again."""
    old = study.client.get_run(first_seed(study))
    study.client.delete_tag(study.summary, schema.REVISION)
    study.client.delete_run(old.info.run_id)
    new = study.client.create_run(old.info.experiment_id, tags=old.data.tags).info.run_id
    for key, value in old.data.params.items():
        study.client.log_param(new, key, value)
    for key, value in old.data.metrics.items():
        study.client.log_metric(new, key, value + (key == "final/val_loss"))
    end(study, new)


def retry_and_settle(study):
    retry(study)
    study.settle("second")


def add(study):
    """Another seed, by a tracker that knows of no revision."""
    old = study.client.get_run(first_seed(study))
    tags = old.data.tags | {schema.KEY: schema.run_key(simulated_study.UUID, int(old.data.params["trial"]), 99)}
    new = study.client.create_run(old.info.experiment_id, tags=tags).info.run_id
    for key, value in (old.data.params | {"seed": "99"}).items():
        study.client.log_param(new, key, value)


@pytest.mark.parametrize("happens", [delete, delete_for_good, retry, retry_and_settle, add])
def test_load_study_reads_anew_whatever_happened(study, happens):
    before = study.load()
    load_curves(before)
    happens(study)
    after = load_study(study.address)
    assert not (after.seeds.equals(before.seeds) and after.unfinished.equals(before.unfinished))
    study.check()
    study.check()


def test_load_study_knows_a_deleted_run_that_changed_places_with_another(study):
    new = study.client.get_run(first_seed(study))
    tags = {key: value for key, value in new.data.tags.items() if not key.startswith("mlflow.")}
    old = study.client.create_run(new.info.experiment_id, tags=tags, start_time=new.info.start_time).info.run_id
    for key, value in new.data.params.items():
        study.client.log_param(old, key, value)
    for key, value in new.data.metrics.items():
        study.client.log_metric(old, key, value / 2 if key.startswith("final/") else value)
    end(study, old)
    study.client.delete_run(old)
    before = study.load()
    assert before.cache is not None
    study.client.restore_run(old)
    study.client.delete_run(new.info.run_id)
    assert old in study.load().seeds["run_id"].tolist()
    study.check()


@pytest.mark.parametrize("state", ["no revision", "no summary", "two summaries", "a run too many", "a run that runs"])
def test_load_study_keeps_nothing_of_a_study_that_may_be_changing(study, state):
    if state == "no revision":
        study.client.delete_tag(study.summary, schema.REVISION)
    elif state == "no summary":
        study.client.delete_run(study.summary)
    elif state == "two summaries":
        summary = study.client.get_run(study.summary)
        study.client.create_run(summary.info.experiment_id, tags=summary.data.tags)
    elif state == "a run too many":
        add(study)
    else:
        add(study)
        study.settle("mistaken")
    study.check()
    assert study.load().cache is None
    assert not study.cache.exists()


def test_load_study_keeps_nothing_that_it_read_while_the_study_changed(study, monkeypatch):
    search = MlflowClient.search_runs
    changed = []

    def search_runs(self, experiment_ids, wanted="", *arguments, **settings):
        page = search(self, experiment_ids, wanted, *arguments, **settings)
        if "'seed'" in wanted and not changed:
            changed.append(True)  # a tracker comes, writes, and goes, while this page is on its way
            retry_and_settle(study)
        return page

    monkeypatch.setattr(MlflowClient, "search_runs", search_runs)
    assert study.load().cache is None
    assert changed
    assert not study.cache.exists()
    study.check()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def test_load_study_replaces_a_damaged_cache(study, requests):
    sound = study.load()
    for name in ("trials.parquet", "study.parquet", MANIFEST):
        truncate(study.cache / name)
        del requests[:]
        same(study.load(), sound)
        assert "'seed'" in requests
        del requests[:]
        same(study.load(), sound)
        assert "'seed'" not in requests


def test_load_study_replaces_a_cache_that_is_anothers(study, requests):
    sound = study.load()
    for key in ("version", "schema", "study", "revision", "deleted", "pandas"):
        manifest = json.loads((study.cache / MANIFEST).read_text())
        manifest["stamp"][key] = "another"
        (study.cache / MANIFEST).write_text(json.dumps(manifest))
        del requests[:]
        same(study.load(), sound)
        assert "'seed'" in requests
        assert json.loads((study.cache / MANIFEST).read_text())["stamp"][key] != "another"


@pytest.mark.parametrize("name", ["trials", "seeds", "failures", "unfinished", "rel_errors", "skipped"])
def test_load_study_replaces_what_another_version_made_of_the_same_runs(study, requests, name):
    sound = study.load()
    frame = getattr(sound, name)
    for changed in (frame.iloc[:, :-1], frame.assign(more=1), frame.astype({"trial": "float64"})):
        sound.cache.write({name: changed})
        del requests[:]
        same(study.load(), sound)
        assert "'seed'" in requests


@pytest.mark.parametrize("harm", [truncate, flip, empty, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["a.parquet", MANIFEST])
def test_cache_that_is_damaged_is_not_there(tmp_path, harm, name):
    cache = Cache(tmp_path, {"revision": "1"})
    frame = pd.DataFrame({"x": [1.5, None], "y": ["a", None], "z": pd.array([1, None], "Int64")}).astype({"y": "str"})
    cache.write({"a": frame})
    kept = cache.read("a")
    assert kept is not None
    pd.testing.assert_frame_equal(kept["a"], frame)
    harm(tmp_path / name)
    assert cache.read("a") is None
    cache.write({"a": frame})
    assert cache.read("a") is not None


def test_cache_that_was_half_written_is_not_there(tmp_path, monkeypatch):
    old, new = Cache(tmp_path, {"revision": "old"}), Cache(tmp_path, {"revision": "new"})
    frames = {name: pd.DataFrame({"x": [number]}) for number, name in enumerate("ab")}
    old.write(frames)
    replace_file = os.replace

    def killed(partial, path):
        if path.name == "b.parquet":
            raise KeyboardInterrupt
        replace_file(partial, path)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        new.write({name: frame + 1 for name, frame in frames.items()})
    monkeypatch.undo()
    assert new.read("ab") is None
    assert old.read("ab") is None
    kept = old.read("b")
    assert kept is not None
    pd.testing.assert_frame_equal(kept["b"], frames["b"])


def test_cache_keeps_frames_beside_others_of_its_state_only(tmp_path):
    one, other = Cache(tmp_path, {"revision": "1"}), Cache(tmp_path, {"revision": "2"})
    frame = pd.DataFrame({"x": [1.5]})
    one.write({"a": frame})
    one.write({"b": frame})
    assert one.read("ab") is not None
    other.write({"b": frame})
    assert other.read("b") is not None
    assert other.read("ab") is None
    assert one.read("b") is None
    assert not list(tmp_path.glob(".*"))


def test_load_study_reads_where_nothing_can_be_kept(study):
    study.cache.write_text("a file, where the folder would be")
    study.check()
    assert len(load_curves(study.load(), [0]))


def test_load_curves_asks_for_each_curve_once(study, requests):
    runs = study.load()
    direct = load_curves(load_study(study.address), keys=("val_loss", "tokens", "val_acc"))
    del requests[:]
    some = load_curves(runs, [0])
    assert requests.count("val_loss") == requests.count("tokens") == 3
    del requests[:]
    again = load_curves(study.load(), keys=("val_loss", "tokens", "val_acc"))
    assert (requests.count("val_loss"), requests.count("tokens"), requests.count("val_acc")) == (3, 3, 6)
    del requests[:]
    pd.testing.assert_frame_equal(load_curves(study.load(), keys=("val_loss", "tokens", "val_acc")), direct)
    pd.testing.assert_frame_equal(load_curves(study.load(), [0]), some)
    assert not {"val_loss", "tokens", "val_acc"} & set(requests)
    pd.testing.assert_frame_equal(again, direct)


def test_load_curves_keeps_nothing_once_the_study_has_changed(study):
    runs = study.load()
    retry(study)
    load_curves(runs, [0])
    assert not (study.cache / "curves.parquet").exists()


def test_cache_behind_a_link_is_not_written(study, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "seeds.parquet").write_text("precious")
    study.cache.symlink_to(elsewhere)
    same(study.load(), load_study(study.address))
    assert [(path.name, path.read_text()) for path in elsewhere.iterdir()] == [("seeds.parquet", "precious")]


@pytest.mark.slow
def test_folder_of_the_cache_that_has_files_of_others_keeps_them(study, tmp_path):
    cache = tmp_path / "kept"
    cache.mkdir()
    (cache / "trials.parquet").write_bytes(b"of others")
    arguments = ["--tracking-uri", study.address.tracking_uri, "--experiment", "tiny", "--cache", cache]
    result = CliRunner().invoke(app, ["report", "-o", str(tmp_path / "out"), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert (cache / "trials.parquet").read_bytes() == b"of others"
    assert list(cache.glob(f"*/{MANIFEST}"))
