"""Projects the ledger onto one MLflow experiment.

Every run carries a key (study, trial, seed) and timestamps from the ledger, so that writing it twice changes nothing.
A run that differs from the ledger is corrected. MLflow cannot change a param or remove a metric, so if one of them is
wrong the run is deleted, and a new one is written in its place.
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import run_schema as schema
from study.spec.trial import SeedResult, Trial, milliseconds
from study.tracking.connection import error_kind, shown
from study.tracking.content import (
    RunContent,
    StudyRecord,
    seed_content,
    summary_content,
    trial_content,
    untrained_content,
)
from study.tracking.known_runs import KnownRun, find_runs, id_of_mlflow, is_part, open_experiment
from study.training.storage import Storage

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DIGEST = 36
"""Longest digest of a data set in MLflow, in characters."""


class Tracker:
    """Projects trials and results onto one MLflow experiment.

    Args:
        client: a working connection, see `connect`.
        artifacts: where the experiment's artifacts go if it has to be created; None leaves that to MLflow.
        storage: where trained weights lie.
        is_thorough: also compare what takes one request per run: all points of the curves, and artifacts.
        on_sign: called whenever MLflow has answered.

    Raises:
        TrackingAway: the answer is not from MLflow, or incomplete.
        StudyError: the experiment was deleted, or is another study's.
    """

    def __init__(
        self,
        client: MlflowClient,
        artifacts: str | None,
        storage: Storage,
        record: StudyRecord,
        is_thorough: bool = False,
        on_sign: Callable[[], None] = lambda: None,
    ) -> None:
        self._client, self._record, self._storage = client, record, storage
        self._is_thorough, self._on_sign = is_thorough, on_sign
        self._experiment_id = open_experiment(client, record, artifacts)
        self._summary_key = f"{record.uuid}/{schema.KIND_SUMMARY}"
        self._find_runs()
        self._describe()

    def answers(self) -> bool:
        """Whether MLflow can be reached; if so, a failed write concerns only its run."""
        try:
            return self._client.get_experiment(self._experiment_id).name == self._record.name
        except Exception:  # MLflow raises whatever its backend raises
            return False

    @property
    def _writer(self) -> MlflowClient:
        """The client for calls that change something; readers are warned of the change first."""
        self._on_sign()
        summary = self._known.get(self._summary_key)
        if summary is not None and summary.revision is not None:
            self._client.delete_tag(summary.run_id, schema.REVISION)
            summary.revision = None
        return self._client

    def _drop_training(self, trial_key: str) -> None:
        """Delete the seeds of a trial that were in training: it was stopped, and they have no result."""
        left = [key for key, run in self._known.items() if run.ended is None and key.startswith(f"{trial_key}/")]
        for key in left:
            self._delete(key)

    def end_unfinished(self) -> None:
        """Mark runs that are not over as killed, since nothing trains them now."""
        for run in self._known.values():
            if run.is_checked and run.ended is None:
                ended = int(time.time() * 1000)
                self._writer.set_terminated(run.run_id, "KILLED", end_time=ended)
                run.status, run.ended = "KILLED", ended

    def settle(self, n_missing: int) -> None:
        """Tell readers that this state of the experiment will stay, unless a run in it has not ended yet.

        Call it when this tracker has written every trial: it deletes all other runs of this study.

        Args:
            n_missing: number of runs that the study still lacks.
        """
        for key in [key for key, run in self._known.items() if not run.is_checked]:
            self._delete(key)
        summary = self._known[self._summary_key]
        self._set_missing(summary, n_missing)
        if any(run.ended is None for run in self._known.values()):
            return
        n_runs = str(len(self._known))
        if summary.revision is None or summary.revision.partition("/")[2] != n_runs:
            revision = f"{uuid.uuid4().hex}/{n_runs}"
            self._client.set_tag(summary.run_id, schema.REVISION, revision)
            summary.revision = revision

    def _set_missing(self, summary: KnownRun, n_missing: int) -> None:
        if summary.n_missing != str(n_missing):
            self._writer.set_tag(summary.run_id, schema.MISSING, str(n_missing))
            summary.n_missing = str(n_missing)

    # Existing runs ------------------------------------------------------------------------------------------------

    def _find_runs(self) -> None:
        """Read the active runs of this study by key, and delete those whose key another run has."""
        self._known, doomed = find_runs(self._client, self._experiment_id, self._record.uuid, self._on_sign)
        for run in doomed:  # at the end, since deletions would shift the pages
            self._writer.delete_run(run.run_id)

    def _differ(self, known: KnownRun, content: RunContent, earlier: Callable[[], list[RunContent]]) -> bool:
        """Whether a run has wrong content, or lacks content that cannot be added any more; corrects its tags."""
        if known.digest != content.digest:
            run = self._client.get_run(known.run_id)
            params, metrics, tags = run.data.params, run.data.metrics, run.data.tags
            own = {key: value for key, value in metrics.items() if schema.is_own_metric(key)}
            wrong = [key for key in schema.PARAM_KEYS & params.keys() if params[key] != content.params.get(key)]
            if wrong or own.keys() - content.metrics.keys():
                return True
            if not any(is_part(own, each.metrics) for each in (content, *earlier())):
                return True
            known.metrics = {key: value for key, value in own.items() if is_part({key: value}, content.metrics)}
            for tag in filter(schema.is_own_tag, tags.keys() - content.tags.keys()):
                self._writer.delete_tag(known.run_id, tag)
        return self._is_thorough and any(
            {(point.step, point.value) for point in self._client.get_metric_history(known.run_id, curve.key)}
            != {(point.step, point.value) for point in content.points if point.key == curve.key}
            for curve in schema.CURVES
            if curve.key in content.metrics and (known.digest == content.digest or curve.key in known.metrics)
        )

    # Writing ------------------------------------------------------------------------------------------------------

    def write(self, trial: Trial, results: Iterable[SeedResult], n_seeds: int) -> None:
        """Update one trial's runs; correct content stays.

        Args:
            results: results so far; for a duplicate, those of its original, of which only aggregates are written. A
                paused one is a seed in training, with its learning curve so far.
            n_seeds: number of results that there will be.

        Raises:
            TrackingAway: MLflow did not take all runs; later it may.
            StudyError: MLflow refuses them. Both messages are one line without a password.
        """
        try:
            self._write(trial, sorted(results, key=_by_end), n_seeds)
        except Exception as error:  # MLflow raises whatever its backend raises
            raise error_kind(error)(shown(error, self._client.tracking_uri)) from error
        self._on_sign()

    def _write(self, trial: Trial, results: list[SeedResult], n_seeds: int) -> None:
        why_not = trial.skipped or (trial.stop if not results else None)
        if why_not is not None:
            content = untrained_content(self._record, trial, why_not)
            self._complete(self._ensure(content), content)
            self._drop_training(content.key)
        if not results:
            return
        in_training, results = _split(results)
        trial_key = schema.run_key(self._record.uuid, trial.number)
        own = {schema.run_key(self._record.uuid, trial.number, result.seed): result for result in results}
        if trial.duplicate_of is not None:
            own = {}
        live = {schema.run_key(self._record.uuid, trial.number, result.seed): result for result in in_training}
        was = {key: self._known[key].started for key in own.keys() & self._known.keys()}
        again = {key for key, started in was.items() if started != milliseconds(own[key].started)}
        in_means = {key for key in again if self._known[key].status in ("FINISHED", "FAILED")}
        for key in again | ({trial_key} & self._known.keys() if in_means else set()):
            self._delete(key)  # runs that were trained again, and the means over them

        def of_first(n: int, is_over: bool = False) -> RunContent:
            return trial_content(self._record, trial, results[:n], is_over, begun)

        begun = min(milliseconds(result.started) for result in (*results, *in_training))
        content = of_first(len(results), len(results) >= n_seeds or trial.stop is not None)
        parent = self._ensure(content, lambda: [of_first(n) for n in range(len(results))])
        for key, result in own.items():
            known = self._known.get(key)
            is_written = known is not None and known.is_checked and known.ended == milliseconds(result.ended)
            if known is None or not is_written or known.lost_weights or known.parent != parent.run_id:
                self._write_seed(parent, trial, result)
        for key, result in live.items():
            self._write_live(parent, trial, key, result)
        if trial.stop is not None:
            self._drop_training(trial_key)
        self._complete(parent, content)

    def _write_live(self, parent: KnownRun, trial: Trial, key: str, result: SeedResult) -> None:
        """Show a seed in training, unless the run has an older result, which stays until the new one is there."""
        known = self._known.get(key)
        if known is not None and known.status in ("FINISHED", "FAILED"):
            return
        if known is not None and not (known.is_checked and known.started == milliseconds(result.started)):
            self._delete(key)  # which of its points are there is not known, or an interrupted process began it
        self._write_seed(parent, trial, result)

    def _write_seed(self, parent: KnownRun, trial: Trial, result: SeedResult) -> None:
        content = seed_content(self._record, trial, result)
        live = self._known.get(content.key)
        if live is not None and (_is_part_unknown(live, content) or not _agree(live, content)):
            self._delete(content.key)
        known = self._ensure(content, parent=parent.run_id)
        if known.parent != parent.run_id:  # somebody deleted its former parent
            self._writer.set_tag(known.run_id, schema.PARENT, parent.run_id)
            known.parent = parent.run_id
        if result.weights is not None and self._record.log_weights:
            self._log_weights(known, result.weights)
        self._complete(known, content)

    def _log_weights(self, known: KnownRun, weights: str) -> None:
        name = Path(weights).name
        if known.ended is not None and not known.lost_weights and not (self._is_thorough and self._lacks(known, name)):
            return
        try:
            self._log_file(known, name, self._storage.read(weights))
            if known.lost_weights:
                self._writer.delete_tag(known.run_id, schema.WEIGHTS_LOST)
                known.lost_weights = False
        except FileNotFoundError:  # its numbers are still true
            self._writer.set_tag(known.run_id, schema.WEIGHTS_LOST, weights)
            known.lost_weights = True

    def _describe(self) -> None:
        """Write the summary run, which holds the resolved study file and the environment."""
        content = summary_content(self._record)
        known = self._ensure(content)
        self._set_missing(known, self._record.n_missing)
        files = {
            "study.yaml": self._record.study_file.encode(),
            "environment.json": json.dumps(self._record.environment, indent=2).encode(),
        }
        for name, text in files.items():
            if known.ended != content.ended or (self._is_thorough and self._read(known, name) != text):
                self._log_file(known, name, text)
        self._complete(known, content)

    def _ensure(
        self,
        content: RunContent,
        earlier: Callable[[], Sequence[RunContent]] = list,
        parent: str | None = None,
    ) -> KnownRun:
        """The run with the key of this content; created if there is none, replaced if its content is wrong.

        Args:
            earlier: contents that the run may have had before, which this one replaces.
            parent: parent of a new run.
        """
        known = self._known.get(content.key)
        if known is not None and not known.is_checked:
            if self._differ(known, content, lambda: list(earlier())):
                self._delete(content.key)
                known = None
            else:
                known.is_checked, known.logged = True, frozenset(content.metrics)
        elif known is not None and known.logged - content.metrics.keys():
            # A mean exists while all seeds have its metric. The seeds of a grown study may lack one, such as times.
            self._delete(content.key)
            known = None
        if known is None:
            tags = content.tags if parent is None else content.tags | {schema.PARENT: parent}
            run = self._writer.create_run(
                self._experiment_id, start_time=content.started, tags=tags, run_name=content.name
            )
            known = KnownRun(id_of_mlflow(run.info.run_id), content.started, "RUNNING", parent=parent, is_checked=True)
            self._known[content.key] = known
            if parent is None and schema.SKIPPED not in content.tags:
                self._log_corpus(known)
        return known

    def _complete(self, known: KnownRun, content: RunContent) -> None:
        """Write the missing content of this run, and end it if it is over."""
        if content.ended is None and known.status != "RUNNING":  # the study has grown
            self._writer.update_run(known.run_id, status="RUNNING")
            known.status, known.ended = "RUNNING", None
        if known.digest != content.digest:
            self._log(known, content)
        if content.ended is not None and (known.ended, known.status) != (content.ended, content.status):
            self._writer.set_terminated(known.run_id, content.status, end_time=content.ended)
            known.status, known.ended = content.status, content.ended

    def _log(self, known: KnownRun, content: RunContent) -> None:
        from mlflow.entities import Metric, Param, RunTag

        points = [
            point
            for point in content.points
            if point.key not in known.metrics and (point.key, point.step) not in known.points
        ]
        metrics = [Metric(*point) for point in points]
        params = [Param(key, text) for key, text in content.params.items()]
        tags = [RunTag(tag, text) for tag, text in (content.tags | {schema.DIGEST: content.digest}).items()]
        self._writer.log_batch(known.run_id, metrics, params, tags)
        known.digest, known.metrics, known.logged = content.digest, {}, frozenset(content.metrics)
        if content.ended is None:
            known.points |= {(point.key, point.step): point.value for point in points}
        else:
            known.points = {}

    def _delete(self, key: str) -> None:
        self._writer.delete_run(self._known[key].run_id)
        del self._known[key]

    # Files --------------------------------------------------------------------------------------------------------

    def _log_file(self, run: KnownRun, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            self._writer.log_artifact(run.run_id, str(path))

    def _lacks(self, run: KnownRun, name: str) -> bool:
        return name not in {file.path for file in self._client.list_artifacts(run.run_id)}

    def _read(self, run: KnownRun, name: str) -> bytes | None:
        if self._lacks(run, name):
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(run.run_id, name, folder)).read_bytes()

    def _log_corpus(self, run: KnownRun) -> None:
        """Log the corpus as the run's input, for MLflow's column of data sets."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        sha256 = self._record.corpus_sha256
        source = json.dumps({"sha256": sha256})
        corpus = Dataset("corpus", sha256[:_DIGEST], source_type="sha256", source=source)  # MLflow takes no more
        self._writer.log_inputs(run.run_id, [DatasetInput(corpus, [InputTag("mlflow.data.context", "training")])])


def _by_end(result: SeedResult) -> tuple[str, int]:
    return result.ended, result.seed


def _split(results: Sequence[SeedResult]) -> tuple[list[SeedResult], list[SeedResult]]:
    """The seeds in training, and the results."""
    in_training = [result for result in results if result.state == "paused"]
    return in_training, [result for result in results if result.state != "paused"]


def _is_part_unknown(run: KnownRun, content: RunContent) -> bool:
    """Whether another writer left this run while its seed trained, so that points of its curve may be missing."""
    was_live = not run.is_checked and run.status in ("RUNNING", "KILLED")
    return was_live and run.digest not in ("", content.digest)


def _agree(live: KnownRun, content: RunContent) -> bool:
    """Whether the content has the same values for all that was written while the seed trained."""
    values = {(point.key, point.step): point.value for point in content.points}
    return live.points.items() <= values.items()
