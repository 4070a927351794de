"""Projects the ledger onto one MLflow experiment.

Every run carries a key (study, trial, seed) and timestamps from the ledger, so that writing it twice changes nothing.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import field as with_default
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import run_schema as schema
from analysis.urls import hide_password
from study.errors import StudyError
from study.ledger.trials import Trial
from study.storage import Storage
from study.telling import Pruned
from study.tracking.connection import first_line
from study.trial import SeedResult

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_PAGE = 1000
"""Runs asked for at once."""

_DIGEST = 36
"""Characters that MLflow takes of a data set's digest."""


@dataclass(frozen=True)
class StudyRecord:
    """What MLflow is told of a study besides its runs."""

    name: str
    uuid: str
    description: str
    study_file: str
    claims: str
    """JSON, see `run_schema.CLAIMS`."""
    growths: list[dict[str, Any]]
    """See `run_schema.GROWTHS`."""
    environment: dict[str, Any]
    n_missing: int
    """Runs that the study lacks at this start."""
    created: str
    changed: str
    """When the study grew last, or was begun."""
    corpus_sha256: str
    validation_fraction: float
    vocab_size: int
    tuned_among: Mapping[str, int | None]
    """Of each arm, see `config.Arm`."""
    log_weights: bool


@dataclass
class _KnownRun:
    """What this writer knows of a run that MLflow has."""

    run_id: str
    started: int
    ended: int | None = None
    """Times in milliseconds; None while something of it is missing."""
    n_results: int = 0
    parent: str | None = None
    lost_weights: bool = False
    budget_hash: str | None = None
    revision: str | None = None
    """The summary's: what readers know the experiment by, see `analysis.run_schema`."""
    tags: dict[str, str] = with_default(default_factory=dict)
    """The summary's."""


class Tracker:
    """Projects trials and results onto one MLflow experiment.

    Args:
        client: a connection that works, see `connect`.
        artifacts: where the experiment's artifacts go if it has to be created; None leaves that to MLflow.
        storage: where trained weights lie.

    Raises:
        StudyError: the experiment was deleted, or is another study's.
    """

    def __init__(self, client: MlflowClient, artifacts: str | None, storage: Storage, record: StudyRecord) -> None:
        self._client, self._record, self._storage = client, record, storage
        self._experiment_id = self._open_experiment(artifacts)
        self._summary_key = f"{record.uuid}/{schema.KIND_SUMMARY}"
        self._known: dict[str, _KnownRun] = {}
        self._find_runs()
        self._describe()

    def answers(self) -> bool:
        """Whether MLflow can be reached: then a write that failed is that run's own trouble."""
        try:
            self._client.search_experiments(max_results=1)
        except Exception:  # MLflow raises whatever its backend raises
            return False
        return True

    def _open_experiment(self, artifacts: str | None) -> str:
        name = self._record.name
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            tags = {schema.STUDY_UUID: self._record.uuid, "mlflow.note.content": self._record.description}
            return self._client.create_experiment(name, artifact_location=artifacts, tags=tags)
        if experiment.lifecycle_stage == "deleted":
            raise StudyError(f"the experiment {name} was deleted; restore it, or purge it with `mlflow gc`")
        if experiment.tags.get(schema.STUDY_UUID) != self._record.uuid:
            raise StudyError(f"the experiment {name} holds another study of that name; give this one another name")
        return experiment.experiment_id

    @property
    def _writer(self) -> MlflowClient:
        """The client for calls that change something, of which readers are warned first."""
        summary = self._known.get(self._summary_key)
        if summary is not None and summary.revision is not None:
            self._client.delete_tag(summary.run_id, schema.REVISION)
            summary.revision = None
        return self._client

    def settle(self, n_missing: int) -> None:
        """Tell readers that this state of the experiment will stay, unless something in it is still to come.

        To be called when all is written.

        Args:
            n_missing: runs that the study still lacks.
        """
        summary = self._known[self._summary_key]
        self._tag_summary(summary, {schema.MISSING: str(n_missing)})
        if any(run.ended is None for run in self._known.values()):
            return
        n_runs = str(len(self._known))
        if summary.revision is None or summary.revision.partition("/")[2] != n_runs:
            revision = f"{uuid.uuid4().hex}/{n_runs}"
            self._client.set_tag(summary.run_id, schema.REVISION, revision)
            summary.revision = revision

    def _find_runs(self) -> None:
        """Take up the active runs of this study by key.

        Of two under one key (a call whose answer was lost, and that was made again) the one that is over stays.
        """
        known = self._known
        doomed: list[_KnownRun] = []  # deleted at the end: a page begins where the runs before it end
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id],
                filter_string=f"tags.`{schema.STUDY_UUID}` = '{self._record.uuid}'",
                max_results=_PAGE,
                page_token=token,
            )
            for run in page:
                n_results = run.data.metrics.get(schema.N_SEEDS, 0) + run.data.metrics.get(schema.N_FAILED, 0)
                tags, is_over = run.data.tags, run.info.status in ("FINISHED", "FAILED", "KILLED")
                ended = run.info.end_time if is_over and schema.WEIGHTS_LOST not in tags else None
                found = _KnownRun(
                    run.info.run_id,
                    run.info.start_time,
                    ended,
                    int(n_results),
                    tags.get(schema.PARENT),
                    schema.WEIGHTS_LOST in tags,
                    run.data.params.get("budget_hash"),
                    tags.get(schema.REVISION),
                    dict(tags) if tags.get(schema.KIND) == schema.KIND_SUMMARY else {},
                )
                both = sorted(
                    (known.get(tags[schema.KEY], found), found), key=lambda one: (one.ended or 0, one.n_results)
                )
                known[tags[schema.KEY]] = both[1]
                if both[0] is not both[1]:
                    doomed.append(both[0])
            token = page.token
            if not token:
                break
        for run in doomed:
            self._writer.delete_run(run.run_id)

    @property
    def _summary_tags(self) -> dict[str, str]:
        return {
            schema.CLAIMS: self._record.claims,
            schema.GROWTHS: json.dumps(self._record.growths),
            schema.ENVIRONMENT: json.dumps(self._record.environment),
            schema.MISSING: str(self._record.n_missing),
        }

    def _tag_summary(self, run: _KnownRun, tags: dict[str, str]) -> None:
        for tag, value in tags.items():
            if run.tags.get(tag) != value:  # of an older version's run, taken away by hand, or no longer so
                self._writer.set_tag(run.run_id, tag, value)
                run.tags[tag] = value

    def _describe(self) -> None:
        """A summary run that holds the resolved study file and the environment."""
        key = self._summary_key
        known = self._known.get(key)
        created, changed = _milliseconds(self._record.created), _milliseconds(self._record.changed)
        run = known or self._create(key, schema.KIND_SUMMARY, f"study {self._record.name}", created, {})
        self._tag_summary(run, self._summary_tags)
        if run.ended == changed:
            return
        self._log_file(run, "study.yaml", self._record.study_file.encode())
        self._log_file(run, "environment.json", json.dumps(self._record.environment, indent=2).encode())
        self._log_corpus(run)
        self._terminate(run, "FINISHED", changed)

    # Writing ------------------------------------------------------------------------------------------------------

    def write(self, trial: Trial, results: Iterable[SeedResult], n_seeds: int) -> None:
        """Bring one trial's runs up to date; what is there already stays.

        Args:
            results: those that are in; a duplicate's are its original's, and only its aggregates are written.
            n_seeds: how many there will be.

        Raises:
            StudyError: MLflow did not take them, or not all; in one line, without a password.
        """
        try:
            self._write(trial, sorted(results, key=lambda result: (result.ended, result.seed)), n_seeds)
        except Exception as error:  # MLflow raises whatever its backend raises
            raise StudyError(hide_password(first_line(error), self._client.tracking_uri)) from error

    def _write(self, trial: Trial, results: list[SeedResult], n_seeds: int) -> None:
        if trial.pruned is not None:
            self._write_pruned(trial, trial.pruned)
        if not results:
            return
        trial_key = schema.run_key(self._record.uuid, trial.number)
        keys = {result.seed: schema.run_key(self._record.uuid, trial.number, result.seed) for result in results}
        if trial.duplicate_of is not None:
            keys = {}
        again = [r for r in results if r.seed in keys and self._is_outdated(keys[r.seed], trial, r)]
        if again or self._is_outdated(trial_key, trial):
            for key in [trial_key, *(keys[result.seed] for result in again)]:
                if key in self._known:  # of what was trained again nothing may stay, means included
                    self._writer.delete_run(self._known.pop(key).run_id)
        parent = self._known.get(trial_key) or self._create_trial(trial, results[0])
        if trial.duplicate_of is None:
            for result in results:
                known = self._known.get(keys[result.seed])
                if known is not None and known.parent != parent.run_id:  # somebody deleted the parent that it had
                    self._writer.set_tag(known.run_id, schema.PARENT, parent.run_id)
                    known.parent = parent.run_id
                if known is None or known.ended is None:
                    self._write_seed(known or self._create_seed(parent, trial, result), trial, result)
        is_over = len(results) >= n_seeds or trial.stop is not None
        if parent.n_results < len(results) or (is_over and parent.ended != _milliseconds(results[-1].ended)):
            self._write_aggregates(parent, trial, results, is_over)

    def _write_pruned(self, trial: Trial, pruned: Pruned) -> None:
        """A trial's run without seeds, over as soon as it was begun."""
        key, when = schema.run_key(self._record.uuid, trial.number), _milliseconds(pruned.when)
        if self._is_outdated(key, trial):
            self._writer.delete_run(self._known.pop(key).run_id)
        known = self._known.get(key)
        if known is None:
            tags = self._trial_tags(trial) | {schema.PRUNED: pruned.reason}
            known = self._create(key, schema.KIND_TRIAL, trial_name(trial), when, tags)
        if known.ended is None:
            self._log(known, _metrics(_counts(trial), when), self._params(trial))
            self._terminate(known, "KILLED", when)

    def _is_outdated(self, key: str, trial: Trial, result: SeedResult | None = None) -> bool:
        """Whether there is a run under this key of an earlier training of the seed, or from before the study grew
        such that its trial belongs to another budget: MLflow lets no param change."""
        known = self._known.get(key)
        if known is None:
            return False
        was_before = result is not None and known.started != _milliseconds(result.started)
        return was_before or known.budget_hash not in (None, trial.budget_hash)

    def _create_trial(self, trial: Trial, first: SeedResult) -> _KnownRun:
        key, started = schema.run_key(self._record.uuid, trial.number), _milliseconds(first.started)
        run = self._create(key, schema.KIND_TRIAL, trial_name(trial), started, self._trial_tags(trial))
        self._log_corpus(run)
        return run

    def _trial_tags(self, trial: Trial) -> dict[str, str]:
        return _group_tags(trial) | {schema.VALIDATION_FRACTION: str(self._record.validation_fraction)}

    def _create_seed(self, parent: _KnownRun, trial: Trial, result: SeedResult) -> _KnownRun:
        tags = _group_tags(trial) | result.ran_on | {schema.PARENT: parent.run_id}
        if result.failure is not None:
            tags[schema.FAILURE] = result.failure
        if result.failure_step is not None:
            tags[schema.FAILURE_STEP] = str(result.failure_step)
        key = schema.run_key(self._record.uuid, trial.number, result.seed)
        name = f"seed {result.seed} of {trial_name(trial)}"  # MLflow's tables cut names off at their end
        return self._create(key, schema.KIND_SEED, name, _milliseconds(result.started), tags)

    def _write_seed(self, run: _KnownRun, trial: Trial, result: SeedResult) -> None:
        ended = _milliseconds(result.ended)
        metrics = _metrics(_counts(trial) | result.final | result.rel_errors, ended)
        for row in result.curve:
            values = {key: value for key, value in row.items() if key != "step"}
            metrics += _metrics(values, ended, step=int(row["step"]))
        self._log(run, metrics, self._params(trial) | {"seed": result.seed})
        if result.weights is not None and self._record.log_weights:
            try:
                self._log_file(run, Path(result.weights).name, self._storage.read(result.weights))
                if run.lost_weights:
                    self._writer.delete_tag(run.run_id, schema.WEIGHTS_LOST)
            except FileNotFoundError:  # its numbers are no less true for that
                self._writer.set_tag(run.run_id, schema.WEIGHTS_LOST, result.weights)
        self._terminate(run, "FINISHED" if result.state == "complete" else "FAILED", ended)

    def _write_aggregates(self, run: _KnownRun, trial: Trial, results: list[SeedResult], is_over: bool) -> None:
        """Means and standard deviations over the complete seeds that are in; the step is their number."""
        complete = [result for result in results if result.state == "complete"]
        metrics: dict[str, float] = {schema.N_SEEDS: len(complete), schema.N_FAILED: len(results) - len(complete)}
        for field in schema.FINALS if complete else ():
            values = [result.final[field.key] for result in complete]
            metrics[schema.mean_key(field.key)] = statistics.fmean(values)
            if len(values) > 1:
                metrics[schema.std_key(field.key)] = statistics.stdev(values)
        ended = _milliseconds(results[-1].ended)
        counts = _metrics(_counts(trial), _milliseconds(results[0].started))
        self._log(run, counts + _metrics(metrics, ended, step=len(results)), self._params(trial))
        run.n_results = len(results)
        if trial.stop is not None and trial.duplicate_of is None:
            self._writer.set_tag(run.run_id, schema.STOPPED, trial.stop.reason)
        if is_over:
            self._terminate(run, "FINISHED" if complete else "FAILED", ended)
        elif run.ended is not None:  # the study has grown
            self._writer.update_run(run.run_id, status="RUNNING")
            run.ended = None

    # MLflow's calls -----------------------------------------------------------------------------------------------

    def _create(self, key: str, kind: str, name: str, started: int, tags: dict[str, str]) -> _KnownRun:
        own = {
            schema.KIND: kind,
            schema.KEY: key,
            schema.STUDY_NAME: self._record.name,
            schema.STUDY_UUID: self._record.uuid,
            schema.SCHEMA: str(schema.SCHEMA_VERSION),
        }
        run = self._writer.create_run(self._experiment_id, start_time=started, tags=own | tags, run_name=name)
        self._known[key] = _KnownRun(run.info.run_id, started, parent=tags.get(schema.PARENT))
        return self._known[key]

    def _log(self, run: _KnownRun, metrics: list[Metric], params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        own = [Param(key, str(value)) for key, value in params.items() if value is not None]
        self._writer.log_batch(run.run_id, metrics, own)
        run.budget_hash = params.get("budget_hash", run.budget_hash)

    def _log_file(self, run: _KnownRun, name: str, content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(content)
            self._writer.log_artifact(run.run_id, str(path))

    def _log_corpus(self, run: _KnownRun) -> None:
        """Name the text as the run's input, for MLflow's column of data sets."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        sha256 = self._record.corpus_sha256
        source = json.dumps({"sha256": sha256})
        corpus = Dataset("corpus", sha256[:_DIGEST], source_type="sha256", source=source)  # more it does not take
        self._writer.log_inputs(run.run_id, [DatasetInput(corpus, [InputTag("mlflow.data.context", "training")])])

    def _terminate(self, run: _KnownRun, status: str, ended: int) -> None:
        self._writer.set_terminated(run.run_id, status, end_time=ended)
        run.ended = ended

    def _params(self, trial: Trial) -> dict[str, Any]:
        spec = trial.spec
        values = spec.model_dump() | spec.protocol.model_dump() | spec.model.model_dump()
        values |= {
            "trial": trial.number,
            "start": spec.start,
            "vocab_size": self._record.vocab_size,
            "d_ff": spec.model.d_ff or 4 * spec.model.d_model,
            "sites": ", ".join(sorted({str(len(bonds) - 1) for bonds in trial.shape.bonds.values()})) or None,
            "largest_bond": max((max(bonds) for bonds in trial.shape.bonds.values()), default=None),
            "tuning_trials": trial.tuning_trials,
            "tuned_among": self._record.tuned_among.get(spec.arm),
            "budget_hash": trial.budget_hash,
            "corpus_sha256": self._record.corpus_sha256,
        }
        return {field.key: values.get(field.key) for field in schema.PARAMS}


def trial_name(trial: Trial) -> str:
    """What the MLflow UI calls a trial: its arm, with what sets it apart there."""
    spec = trial.spec
    what = f"d_model={spec.model.d_model}" if spec.family == "dense" else f"χ={spec.chi or spec.as_chi}"
    return f"{spec.arm} {what} (trial {trial.number})"


def _group_tags(trial: Trial) -> dict[str, str]:
    repeats = {} if trial.duplicate_of is None else {schema.DUPLICATE_OF: str(trial.duplicate_of)}
    return {schema.FAMILY: trial.spec.family, schema.ARM: trial.spec.arm} | repeats


def _counts(trial: Trial) -> dict[str, float]:
    return {field.key: getattr(trial.shape, field.key) for field in schema.COUNTS}


def _metrics(values: dict[str, float], timestamp: int, step: int = 0) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(key, value, timestamp, step) for key, value in values.items()]


def _milliseconds(time: str) -> int:
    return int(datetime.fromisoformat(time).timestamp() * 1000)
