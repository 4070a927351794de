"""Run a study: open all its parts, run the missing work, and write everything."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from rich.console import Console

from study.commands.backup import BackgroundBackup, open_backup
from study.commands.progress import StudyProgress, say
from study.commands.show import say_not_compared
from study.errors import StudyError
from study.ledger.copies import Copies
from study.ledger.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.ledger.environment import environment, what_changed
from study.ledger.growth import NO_GROWTH, Growth, grow
from study.ledger.ledger import Ledger
from study.ledger.lock import hold_ledger
from study.ledger.snapshot import read_ledger
from study.scheduler.inline import run_inline
from study.scheduler.interrupts import interrupts
from study.scheduler.private_folder import remove_leftovers
from study.scheduler.queue import Queue
from study.scheduler.reports import SilenceWatch
from study.spec.config import StudyConfig
from study.spec.trial import SeedResult, Trial, TrialShape, TrialSpec
from study.tracking.background import BackgroundTracker
from study.tracking.connection import first_line, tracking_error
from study.tracking.opening import open_tracker, study_record
from study.tracking.tracker import Tracker
from study.training.corpus import Corpus, load_corpus
from study.training.model import trial_shape
from study.training.storage import Storage
from study.training.unit import store_corpus, stored_corpus

TRACKING_OFF = "off"

_OPENING_SECONDS = 60.0
"""How long MLflow may delay a study's start; a very slow server may take hours to answer."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run of a study."""

    n_trials: int
    n_complete: int
    n_failed: int
    n_missing: int
    aborted: str | None
    tracking_trouble: str | None
    n_pruned: int = 0
    n_stopped: int = 0
    search_ended: str | None = None
    backup_trouble: str | None = None


def study_corpus(config: StudyConfig) -> Corpus:
    """The study's corpus, checked to be long enough for its context."""
    corpus = load_corpus(config.corpus.path, config.corpus.sha256, config.corpus.validation_fraction)
    corpus.check_context(config.model.context)
    return corpus


def open_ledger(
    config: StudyConfig,
    corpus: Corpus,
    directory: StudyDirectory,
    growth: Growth = NO_GROWTH,
    say: Callable[[str], None] = lambda line: None,
) -> Ledger:
    """The ledger of a study folder; begun if there is none.

    Args:
        growth: growth to apply first.
        say: receives one line about that growth.
    """

    def shape_of(spec: TrialSpec) -> TrialShape:
        return trial_shape(spec, len(corpus.vocabulary), len(corpus.validation), config.model)

    uuid = directory.uuid()
    if uuid is not None:
        directory.check_ledger()
    elif growth.command and not directory.has_ledger:
        raise StudyError(
            f"{directory.path}: no study here that could grow by {growth.command}; run it without that first"
        )
    may_begin = not growth.command
    ledger = Ledger(
        directory.ledger_url, config, corpus.sha256, shape_of, uuid, may_begin=may_begin, extend=growth.extend
    )
    if grow(ledger, growth, say):
        ledger.close()
        ledger = Ledger(directory.ledger_url, ledger.config, corpus.sha256, shape_of, uuid)
    return ledger


def run_study(
    config: StudyConfig,
    directory: StudyDirectory,
    console: Console,
    *,
    storage_url: str | None = None,
    executor: Literal["ray", "inline"] = "ray",
    address: str | None = None,
    tracking: str | None = None,
    retry_failed: bool = False,
    growth: Growth = NO_GROWTH,
) -> Outcome:
    """Run the missing work of a study, from its beginning or from where it stopped.

    Args:
        storage_url: path or URL of checkpoints and weights. Default: that of the last run, at first the study's folder.
        address: address of a Ray cluster.
        tracking: an MLflow tracking URI or "off". Default: that of the last run, at first the folder's own database.
        retry_failed: train failed runs again, except for seeds that diverged, which would diverge again.
        growth: growth of the study.

    Raises:
        StudyError: the study cannot be opened, cannot grow in this way, or another driver has it.
    """
    corpus = study_corpus(config)
    with directory.locked(), hold_ledger(directory.ledger_url, config.name) as hold:
        directory.check_is_for(config)
        storage = directory.storage(storage_url)
        try:
            store_corpus(storage, corpus)
            backup = open_backup(storage, directory, config.name, partial(say, console))
        except OSError as error:
            raise StudyError(f"--storage {storage.shown}: cannot write there: {error.strerror or error}") from None
        ledger = open_ledger(config, corpus, directory, growth, partial(say, console))
        config = ledger.config
        _note_start(ledger, partial(say, console))
        uri = tracking or directory.tracking_uri() or DEFAULT_TRACKING_URI
        with StudyProgress(console, ledger) as progress:
            tracker, record = None, study_record(config, ledger, corpus)

            def open_this_tracker(on_sign: Callable[[], None]) -> Tracker:
                return open_tracker(uri, directory, storage, record, progress.say, on_sign=on_sign)

            if uri != TRACKING_OFF:
                tracker = BackgroundTracker(open_this_tracker, progress.say, _OPENING_SECONDS)
            directory.write(config, ledger.uuid, directory.tracking_uri() if uri == TRACKING_OFF else uri, storage.url)
            _reopen(config, ledger, storage, retry_failed, progress.say)

            def track(trial: Trial) -> None:
                if tracker is not None:
                    tracker.put(trial, ledger.on_record(trial), len(ledger.tally.seeds_of(trial)))

            for trial in ledger.trials.values():
                track(trial)

            beside = Copies(directory.ledger_url, progress.say)
            beside.keep()  # the whole ledger has just been read, and is undamaged

            def keep_copy(keep: Callable[[], None]) -> None:
                try:
                    keep()
                except StudyError as error:
                    queue.aborted = str(error)

            def on_result(result: SeedResult) -> None:
                progress.on_result(result)
                if copies is not None:
                    copies.note_change()
                keep_copy(beside.keep_if_due)
                for trial in ledger.trials.sharing(result.trial):
                    track(trial)

            def on_stop(trial: Trial) -> None:
                progress.on_stop(trial)
                track(trial)

            def on_answered(trial: Trial) -> None:
                progress.on_answered(trial)
                track(trial)

            queue = Queue(config, ledger, storage, corpus.sha256, on_result, on_answered, progress.say, on_stop, hold)
            copies = None
            if backup is not None:
                seconds = config.execution.backup_seconds
                copies = BackgroundBackup(backup, seconds, progress.say, partial(setattr, queue, "aborted"))
            try:
                if growth.extend or not ledger.results:
                    say_not_compared(progress.say, config)
                _execute(queue, progress, executor, directory, address)
                for trial in ledger.trials.values():
                    if trial.duplicate_of is not None or trial.pruned is not None:  # its original had results before
                        track(trial)
                keep_copy(beside.keep)
            except KeyboardInterrupt:
                if tracker is not None:
                    # The second Ctrl-C sets a flag: an exception could come before the wait begins, and be lost.
                    with suppress(KeyboardInterrupt), interrupts(tracker.leave):
                        if tracker.n_pending:
                            progress.say(
                                "stopping; what is done is written to MLflow first (Ctrl-C again: leave that for later)"
                            )
                        tracker.close(ledger.tally.n_missing)
                    tracker.leave()
                raise
            finally:
                try:
                    trouble = tracker.close(ledger.tally.n_missing) if tracker is not None else None
                finally:
                    lost = copies.close() if copies is not None else None
        outcome = _outcome(ledger, queue.aborted, trouble, lost)
        ledger.close()
        return outcome


def _note_start(ledger: Ledger, say: Callable[[str], None]) -> None:
    """Record the environment of this run, and say in one line how it differs from that of the last run."""
    now = environment()
    changed = what_changed(next(reversed(ledger.environments), {}), now)
    ledger.record_driver(now)
    if changed and ledger.results:
        say(
            f"warning: since this study ran last, {', '.join(changed)}; new runs may differ from old ones in more than "
            "their seeds. To be sure they do not, stop, go back to what it ran on, and run it again"
        )


def _reopen(
    config: StudyConfig, ledger: Ledger, storage: Storage, retry_failed: bool, say: Callable[[str], None]
) -> None:
    """Mark runs that must be trained again as missing: failures if requested, and teachers whose weights are gone."""
    if retry_failed:
        failed = _to_retry(ledger)
        ledger.reopen(failed)
        say(f"{len(failed)} failed runs are trained again")
    # A trial that has not been asked yet lacks all its seeds.
    teachers = {spec.teacher for spec in ledger.trials.unasked()}
    if ledger.tally.is_searching:
        teachers |= {arm.teacher for arm in config.arms if arm.is_searched}
    needed = {(teacher, seed) for teacher in teachers for seed in config.seed_list}
    needed |= {(trial.spec.teacher, seed) for trial in ledger.lacking() for seed in ledger.tally.missing_seeds(trial)}
    gone = []
    for result in ledger.results.values():
        arm = ledger.trials[result.trial].spec.arm
        if (arm, result.seed) not in needed or result.state != "complete":
            continue
        if result.weights is None or not storage.exists(result.weights):  # None if it became a teacher later
            say(f"arm {arm}, seed {result.seed}: its weights are not in {storage.shown}; it is trained again")
            gone.append(result)
    ledger.reopen(gone)


def _to_retry(ledger: Ledger) -> list[SeedResult]:
    """Failures that may succeed now: neither the seed nor its teacher diverged, and the trial is not stopped."""
    failed = {
        key: result
        for key, result in ledger.results.items()
        if result.state == "failed" and ledger.trials[result.trial].stop is None
    }
    retried = {key: result for key, result in failed.items() if result.failure_step is None}
    number_of = {trial.spec.arm: number for number, trial in reversed(ledger.trials.items())}
    for (number, seed), result in list(retried.items()):
        teacher = ledger.trials[number].spec.teacher
        of_teacher = (number_of[teacher], seed) if teacher is not None else None
        if of_teacher in failed and of_teacher not in retried:
            del retried[result.trial, seed]
    return list(retried.values())


def _execute(
    queue: Queue, progress: StudyProgress, executor: str, directory: StudyDirectory, address: str | None
) -> None:
    remove_leftovers(directory.path)
    first = queue.next_unit()  # a study that lacks nothing needs no Ray
    if isinstance(first, str) or first is None:
        return
    queue.put_back(first)
    with SilenceWatch(queue.in_flight, directory.reports_file, progress.on_silence):
        if executor == "inline":
            run_inline(queue, progress.on_evaluation)
            return
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        if address == "local":
            # Ray reads this variable on import. It is meant for systems with restrictive firewalls; its effect is that
            # Ray's processes listen only on 127.0.0.1.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        from study.scheduler.ray import run_on_ray  # the inline executor must work without Ray

        run_on_ray(queue, progress.on_evaluation, directory.path, address)


def sync(
    config: StudyConfig,
    directory: StudyDirectory,
    storage_url: str | None,
    tracking: str | None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Compare MLflow with the ledger, and write what is missing or different in MLflow; returns the number of trials.

    Raises:
        StudyError: MLflow cannot be reached, or does not take a trial; all other trials are still written.
    """
    with directory.locked(), hold_ledger(directory.ledger_url, config.name):
        storage = directory.storage(storage_url)
        corpus = known_corpus(config, directory, storage)
        ledger = open_ledger(config, corpus, directory)
        config = ledger.config
        uri = tracking or directory.tracking_uri() or DEFAULT_TRACKING_URI
        record = study_record(config, ledger, corpus)
        tracker = open_tracker(uri, directory, storage, record, say, is_thorough=True)
        directory.write(config, ledger.uuid, uri, storage.url)
        refused: dict[int, Exception] = {}
        for trial in ledger.trials.values():
            try:
                tracker.write(trial, ledger.on_record(trial), len(ledger.tally.seeds_of(trial)))
            except Exception as error:  # MLflow raises whatever its backend raises
                if not tracker.answers():
                    raise tracking_error(error, uri) from error
                refused[trial.number] = error
        if refused:
            number, error = next(iter(refused.items()))
            raise StudyError(f"MLflow lacks {len(refused)} trials; it did not take trial {number}: {first_line(error)}")
        try:
            tracker.settle(ledger.tally.n_missing)
        except Exception as error:  # MLflow raises whatever its backend raises
            raise tracking_error(error, uri) from error
        n_trials = len(ledger.trials)
        ledger.close()
        return n_trials


def known_corpus(config: StudyConfig, directory: StudyDirectory, storage: Storage) -> Corpus:
    """The corpus of a study that was run before: the one stored with its runs, or else the one its file names."""
    sha256 = read_ledger(directory.ledger_url, config.name).corpus_sha256
    try:
        return stored_corpus(storage, sha256, config.corpus.validation_fraction)
    except OSError:
        return study_corpus(config)


def _outcome(ledger: Ledger, aborted: str | None, trouble: str | None, lost: str | None) -> Outcome:
    states = [result.state for result in ledger.results.values()]
    trials = ledger.trials.values()
    return Outcome(
        n_trials=ledger.tally.n_trials,
        n_pruned=sum(trial.pruned is not None and trial.duplicate_of is None for trial in trials),
        n_stopped=sum(trial.stop is not None and trial.duplicate_of is None for trial in trials),
        search_ended=ledger.tally.search_ended,
        n_complete=states.count("complete"),
        n_failed=states.count("failed"),
        n_missing=ledger.tally.n_missing,
        aborted=aborted,
        tracking_trouble=trouble,
        backup_trouble=lost,
    )
