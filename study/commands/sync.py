"""Repair of a study's runs in MLflow."""

from __future__ import annotations

from collections.abc import Callable

from study.commands.opening import known_corpus, open_ledger
from study.errors import StudyError
from study.ledger.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.ledger.lock import hold_ledger
from study.spec.config import StudyConfig
from study.tracking.connection import first_line, tracking_error
from study.tracking.opening import open_tracker, study_record


def sync(
    config: StudyConfig,
    directory: StudyDirectory,
    storage_url: str | None,
    tracking: str | None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Compare MLflow with the ledger, and write what is missing or different in MLflow; returns the number of trials.

    Raises:
        StudyError: MLflow cannot be reached, or refuses a trial; all other trials are still written.
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
            raise StudyError(
                f"MLflow refused {len(refused)} trial{'s' * (len(refused) != 1)}; "
                f"the first is trial {number}: {first_line(error)}"
            )
        try:
            tracker.end_unfinished()
            tracker.settle(ledger.tally.n_missing)
        except Exception as error:  # MLflow raises whatever its backend raises
            raise tracking_error(error, uri) from error
        n_trials = len(ledger.trials)
        ledger.close()
        return n_trials
