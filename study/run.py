"""Run a study: open all its parts, run what is missing, leave everything written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from study.config import StudyConfig
from study.corpus import Corpus, load_corpus
from study.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.environment import environment
from study.errors import StudyError
from study.ledger import Asked, Ledger, Trial
from study.progress import StudyProgress
from study.scheduler.inline import run_inline
from study.scheduler.queue import Queue
from study.scheduler.unit import store_corpus
from study.search_space import listed_specs
from study.storage import Storage
from study.study_file import dump_config
from study.tracking import BackgroundTracker, StudyRecord, Tracker, first_line, hide_password
from study.trial import SeedResult, TrialSpec, budget_hash, trial_shape, tuning_trials

TRACKING_OFF = "off"


@dataclass(frozen=True)
class Outcome:
    """How a run of a study ended."""

    n_trials: int
    n_complete: int
    n_failed: int
    n_missing: int
    aborted: str | None
    tracking_trouble: str | None


def study_corpus(config: StudyConfig) -> Corpus:
    """The study's corpus, checked to be long enough for its context."""
    corpus = load_corpus(config.corpus.path, config.corpus.sha256, config.corpus.validation_fraction)
    corpus.check_context(config.model.context)
    return corpus


def open_ledger(config: StudyConfig, corpus: Corpus, directory: StudyDirectory) -> Ledger:
    """The ledger of a study folder, begun where there is none."""
    specs = {spec.arm: spec for spec in listed_specs(config)}

    def examine(spec: TrialSpec) -> Asked:
        teacher = specs[spec.teacher] if spec.teacher is not None else None
        return Asked(
            trial_shape(spec, len(corpus.vocabulary), len(corpus.validation), config.model),
            budget_hash(spec, config, corpus.sha256, teacher),
            tuning_trials(spec.arm, config),
        )

    return Ledger(directory.ledger_url, config, corpus.sha256, examine)


def run_study(
    config: StudyConfig,
    directory: StudyDirectory,
    console: Console,
    *,
    storage_url: str | None = None,
    executor: Literal["ray", "inline"] = "ray",
    address: str | None = None,
    tracking: str | None = None,
) -> Outcome:
    """Run what a study lacks, from its beginning or from where it stopped.

    Args:
        storage_url: path or URL of checkpoints and weights; what the last run had, at first in the study's folder.
        address: of a Ray cluster.
        tracking: an MLflow tracking URI, "off", or None for what the last run had, at first the folder's own database.

    Raises:
        StudyError: the study cannot be opened, or another driver has it.
    """
    if tracking not in (None, TRACKING_OFF):
        directory.resolve_tracking_uri(tracking)  # a wrong one is better refused now than by the writer's thread
    corpus = study_corpus(config)
    with directory.locked():
        directory.check_is_for(config)
        storage = Storage(storage_url or directory.storage_url())
        try:
            store_corpus(storage, corpus)
        except OSError as error:
            raise StudyError(f"--storage {storage.url}: cannot write there: {error.strerror or error}") from None
        ledger = open_ledger(config, corpus, directory)
        ledger.record_driver(environment())
        uri = tracking or directory.tracking_uri() or DEFAULT_TRACKING_URI
        directory.write(config, ledger.uuid, directory.tracking_uri() if uri == TRACKING_OFF else uri, storage.url)
        n_trials = len(listed_specs(config)) + config.budget.trials
        with StudyProgress(console, ledger, n_trials, len(config.seed_list)) as progress:
            tracker = None
            if uri != TRACKING_OFF:
                tracker = BackgroundTracker(
                    lambda: open_tracker(uri, config, directory, ledger, corpus, storage),
                    len(config.seed_list),
                    progress.say,
                )
                for trial in ledger.trials.values():
                    tracker.put(trial, results_of(ledger, trial))

            def on_result(result: SeedResult) -> None:
                progress.on_result(result)
                if tracker is not None:
                    for trial in ledger.trials.values():
                        if result.trial in (trial.number, trial.duplicate_of):
                            tracker.put(trial, results_of(ledger, trial))

            queue = Queue(config, ledger, storage, corpus.sha256, on_result)
            try:
                _execute(queue, progress, executor, address)
            finally:
                trouble = tracker.close() if tracker is not None else None
        outcome = _outcome(ledger, n_trials, len(config.seed_list), queue.aborted, trouble)
        ledger.close()
        return outcome


def _execute(queue: Queue, progress: StudyProgress, executor: str, address: str | None) -> None:
    first = queue.next_unit()  # a study that lacks nothing needs no Ray
    if isinstance(first, str) or first is None:
        return
    queue.put_back(first)
    if executor == "inline":
        run_inline(queue, progress.on_evaluation)
    else:
        from study.scheduler.ray import run_on_ray  # the inline executor must work where Ray is not installed

        run_on_ray(queue, progress.on_evaluation, address)


def results_of(ledger: Ledger, trial: Trial) -> list[SeedResult]:
    """A trial's results, or those of the trial it repeats."""
    number = trial.number if trial.duplicate_of is None else trial.duplicate_of
    return [result for (of_trial, _), result in ledger.results.items() if of_trial == number]


def open_tracker(
    uri: str, config: StudyConfig, directory: StudyDirectory, ledger: Ledger, corpus: Corpus, storage: Storage
) -> Tracker:
    """A writer for this study's experiment."""
    record = StudyRecord(
        name=config.name,
        uuid=ledger.uuid,
        description=config.description,
        study_file=dump_config(config),
        environment=ledger.first_environment(),
        created=ledger.created,
        corpus_sha256=corpus.sha256,
        vocab_size=len(corpus.vocabulary),
        log_weights=config.execution.keep_weights,
    )
    # A server has a place for artifacts; a database alone has none, and MLflow would take the working folder.
    artifacts = None if uri.startswith("http") else directory.artifacts
    return Tracker(directory.resolve_tracking_uri(uri), artifacts, storage, record)


def sync(config: StudyConfig, directory: StudyDirectory, storage_url: str | None, tracking: str | None) -> int:
    """Write to MLflow whatever of the ledger it lacks; returns the number of trials.

    Raises:
        StudyError: MLflow cannot be reached.
    """
    corpus = study_corpus(config)
    with directory.locked():
        ledger = open_ledger(config, corpus, directory)
        uri = tracking or directory.tracking_uri() or DEFAULT_TRACKING_URI
        storage = Storage(storage_url or directory.storage_url())
        tracker = open_tracker(uri, config, directory, ledger, corpus, storage)
        try:
            for trial in ledger.trials.values():
                tracker.write(trial, results_of(ledger, trial), len(config.seed_list))
        except Exception as error:  # MLflow raises whatever its backend raises
            raise StudyError(f"cannot write to MLflow at {hide_password(uri)}: {first_line(error)}") from error
        directory.write(config, ledger.uuid, uri, storage.url)
        n_trials = len(ledger.trials)
        ledger.close()
        return n_trials


def _outcome(ledger: Ledger, n_trials: int, n_seeds: int, aborted: str | None, trouble: str | None) -> Outcome:
    states = [result.state for result in ledger.results.values()]
    n_duplicates = sum(trial.duplicate_of is not None for trial in ledger.trials.values())
    return Outcome(
        n_trials=n_trials,
        n_complete=states.count("complete"),
        n_failed=states.count("failed"),
        n_missing=(n_trials - n_duplicates) * n_seeds - len(states),
        aborted=aborted,
        tracking_trouble=trouble,
    )
