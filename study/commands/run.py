"""Run a study: open all its parts, run the missing work, and write everything."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from rich.console import Console

from study.commands.backup import BackgroundBackup, Backup, open_backup
from study.commands.memory import say_memory
from study.commands.mirrors import Mirrors
from study.commands.opening import check_may_grow, open_ledger, study_corpus
from study.commands.progress import StudyProgress, say
from study.commands.show import say_not_compared
from study.errors import StudyError
from study.ledger.copies import Copies
from study.ledger.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.ledger.environment import environment, what_changed
from study.ledger.growth import NO_GROWTH, Growth
from study.ledger.ledger import Ledger
from study.ledger.lock import hold_ledger
from study.scheduler.inline import run_inline
from study.scheduler.private_folder import remove_leftovers
from study.scheduler.queue import Queue
from study.scheduler.reports import SilenceWatch
from study.spec.config import StudyConfig
from study.spec.trial import SeedResult
from study.tracking.background import BackgroundTracker
from study.tracking.opening import open_tracker, study_record
from study.training.corpus import Corpus
from study.training.corpus_storage import store_corpus
from study.training.storage import Storage
from study.training.unit import Unit

TRACKING_OFF = "off"

_OPENING_SECONDS = 60.0
"""Longest time that MLflow may delay a study's start; a very slow server may take hours to answer."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run of a study."""

    n_trials: int
    n_complete: int
    n_failed: int
    n_missing: int
    aborted: str | None
    tracking_trouble: str | None
    n_skipped: int = 0
    n_stopped: int = 0
    search_ended: str | None = None
    backup_trouble: str | None = None


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
        storage_url: path or URL of checkpoints and weights. Default: that of the last run, at first DIR/storage.
        address: address of a Ray cluster.
        tracking: an MLflow tracking URI or "off". Default: that of the last run, at first the folder's own database.
        retry_failed: train failed runs again, except for seeds that diverged, which would diverge again.
        growth: growth of the study.

    Raises:
        StudyError: the study cannot be opened, cannot grow in this way, or another driver has it.
    """
    corpus, tell = study_corpus(config), partial(say, console)
    with directory.locked(), hold_ledger(directory.ledger_url, config.name) as hold:
        directory.check_is_for(config)
        storage = directory.storage(storage_url)
        backup = _open_storage(storage, directory, config.name, corpus, growth, tell)
        ledger = open_ledger(config, corpus, directory, growth, tell)
        config = ledger.config
        _note_start(ledger, tell)
        if growth.extend or not ledger.results:
            address = _address(address) if executor == "ray" else "local"
            say_memory(tell, config, corpus.vocab_size, is_cluster=address != "local")
        uri = tracking or directory.tracking_uri() or DEFAULT_TRACKING_URI
        with StudyProgress(console, ledger) as progress:
            tracker = None
            if uri != TRACKING_OFF:
                record = study_record(config, ledger, corpus)
                tracker = BackgroundTracker(
                    lambda on_sign: open_tracker(uri, directory, storage, record, progress.say, on_sign=on_sign),
                    progress.say,
                    _OPENING_SECONDS,
                )
            directory.write(config, ledger.uuid, directory.tracking_uri() if uri == TRACKING_OFF else uri, storage.url)
            _reopen(config, ledger, storage, retry_failed, progress.say)
            copies = Copies(directory.ledger_url, progress.say)
            copies.keep()  # the whole ledger has just been read, so it is undamaged
            queue = Queue(config, ledger, storage, corpus.sha256, say=progress.say, hold=hold)
            if growth.extend or not ledger.results:
                say_not_compared(progress.say, config)
            running = _start_backup(backup, queue)
            mirrors = Mirrors(queue, progress, tracker, copies, running)
            queue.forget_leftovers()
            try:
                _execute(queue, progress, mirrors.on_evaluation, executor, directory, address)
                mirrors.complete()
            except KeyboardInterrupt:
                mirrors.leave()
                raise
            finally:
                trouble, lost = mirrors.close()
        outcome = _outcome(ledger, queue.aborted, trouble, lost)
        ledger.close()
        return outcome


def _open_storage(
    storage: Storage,
    directory: StudyDirectory,
    name: str,
    corpus: Corpus,
    growth: Growth,
    tell: Callable[[str], None],
) -> Backup | None:
    """Open the study's backup, see `open_backup`, and store the corpus unless the growth has to be refused."""
    try:
        backup = open_backup(storage, directory, name, tell)
        check_may_grow(directory, growth)
        store_corpus(storage, corpus)
        return backup
    except OSError as error:
        raise StudyError(f"--storage {storage.shown}: cannot write there: {error.strerror or error}") from None


def _start_backup(backup: Backup | None, queue: Queue) -> BackgroundBackup | None:
    if backup is None:
        return None
    return BackgroundBackup(
        backup, queue.config.execution.backup_seconds, queue.say, partial(setattr, queue, "aborted")
    )


def _note_start(ledger: Ledger, say: Callable[[str], None]) -> None:
    """Record the environment of this run, and say in one line how it differs from that of the last run."""
    now = environment()
    changed = what_changed(next(reversed(ledger.environments), {}), now)
    ledger.record_driver(now)
    if changed and ledger.results:
        say(
            f"warning: since the last run of this study, {', '.join(changed)}; this may change the results of new "
            "runs. To exclude that, stop, restore the former environment and run the study again"
        )


def _reopen(
    config: StudyConfig, ledger: Ledger, storage: Storage, retry_failed: bool, say: Callable[[str], None]
) -> None:
    """Mark runs that must be trained again as missing: failures if requested, and starts whose weights are missing."""
    if retry_failed:
        failed = _to_retry(ledger)
        ledger.reopen(failed)
        say(f"{len(failed)} failed runs will be trained again")
    # A trial that has not been asked yet lacks all its seeds.
    starts = {spec.start for spec in ledger.trials.unasked()}
    if ledger.tally.is_searching:
        starts |= {arm.start for arm in config.arms if arm.is_searched}
    needed = {(start, seed) for start in starts for seed in config.seed_list}
    needed |= {(trial.spec.start, seed) for trial in ledger.lacking() for seed in ledger.tally.missing_seeds(trial)}
    gone = []
    for result in ledger.results.values():
        arm = ledger.trials[result.trial].spec.arm
        if (arm, result.seed) not in needed or result.state != "complete":
            continue
        if result.weights is None or not storage.exists(result.weights):  # None if it became a start after its training
            say(f"arm {arm}, seed {result.seed}: its weights are not in {storage.shown}; it will be trained again")
            gone.append(result)
    ledger.reopen(gone)


def _to_retry(ledger: Ledger) -> list[SeedResult]:
    """Failures that may succeed now: neither the seed nor its start diverged, and the trial is not stopped."""
    failed = {
        key: result
        for key, result in ledger.results.items()
        if result.state == "failed" and ledger.trials[result.trial].stop is None
    }
    retried = {key: result for key, result in failed.items() if result.failure_step is None}
    number_of = {trial.spec.arm: number for number, trial in reversed(ledger.trials.items())}
    for (number, seed), result in list(retried.items()):
        start = ledger.trials[number].spec.start_arm
        of_start = (number_of[start], seed) if start is not None else None
        if of_start in failed and of_start not in retried:
            del retried[result.trial, seed]
    return list(retried.values())


def _execute(
    queue: Queue,
    progress: StudyProgress,
    on_evaluation: Callable[[Unit, int, dict[str, float]], None],
    executor: str,
    directory: StudyDirectory,
    address: str | None,
) -> None:
    remove_leftovers(directory.path)
    first = queue.next_unit()  # a complete study needs no Ray
    if isinstance(first, str) or first is None:
        return
    queue.put_back(first)
    with SilenceWatch(queue.in_flight, directory.reports_file, progress.on_silence):
        if executor == "inline":
            run_inline(queue, on_evaluation)
            return
        address = _address(address)
        if address == "local":
            # Ray reads this variable on import. It is meant for systems with restrictive firewalls; its effect is that
            # Ray's processes listen only on 127.0.0.1.
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        from study.scheduler.ray import run_on_ray  # the inline executor must work without Ray

        run_on_ray(queue, on_evaluation, directory.path, address)


def _address(given: str | None) -> str:
    """Address of the Ray cluster; "local": this machine alone."""
    return given or os.environ.get("RAY_ADDRESS") or "local"


def _outcome(ledger: Ledger, aborted: str | None, trouble: str | None, lost: str | None) -> Outcome:
    states = [result.state for result in ledger.results.values()]
    trials = ledger.trials.values()
    return Outcome(
        n_trials=ledger.tally.n_trials,
        n_skipped=sum(trial.skipped is not None and trial.duplicate_of is None for trial in trials),
        n_stopped=sum(trial.stop is not None and trial.duplicate_of is None for trial in trials),
        search_ended=ledger.tally.search_ended,
        n_complete=states.count("complete"),
        n_failed=states.count("failed"),
        n_missing=ledger.tally.n_missing,
        aborted=aborted,
        tracking_trouble=trouble,
        backup_trouble=lost,
    )
