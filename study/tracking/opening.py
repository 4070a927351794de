"""Opens a writer for a study's experiment, wherever its MLflow is."""

from __future__ import annotations

from collections.abc import Callable

from study.ledger.directory import DEFAULT_TRACKING_URI, StudyDirectory
from study.ledger.ledger import Ledger
from study.ledger.urls import is_database
from study.spec.config import StudyConfig
from study.spec.study_file import dump_config
from study.tracking.connection import connect, move_artifacts, prepare_own_database, tracking_error
from study.tracking.content import StudyRecord
from study.tracking.tracker import Tracker
from study.training.corpus import Corpus
from study.training.storage import Storage


def study_record(config: StudyConfig, ledger: Ledger, corpus: Corpus) -> StudyRecord:
    """The content that MLflow gets about a study besides its runs, from the ledger's current state."""
    return StudyRecord(
        name=config.name,
        uuid=ledger.uuid,
        description=config.description,
        study_file=dump_config(ledger.config),
        claims=ledger.config.claims.model_dump_json(),
        growths=[
            {"by": each.command, "seeds": [each.seeds_before, each.seeds_after], "over": _n_over(ledger, each.made)}
            for each in ledger.growths
        ],
        environment=next(iter(ledger.environments), {}),
        n_missing=ledger.tally.n_missing,
        created=ledger.created,
        changed=ledger.changed,
        corpus_sha256=corpus.text_sha256,
        tokenizer=corpus.tokenizer,
        validation_fraction=config.corpus.validation_fraction,
        vocab_size=corpus.vocab_size,
        tuned_among={arm.name: arm.tuned_among for arm in ledger.config.arms},
        log_weights=config.execution.keep_weights,
    )


def _n_over(ledger: Ledger, time: str) -> int:
    """Number of results on record that had ended at a time."""
    return sum(result.ended <= time for result in ledger.results.values())


def open_tracker(
    uri: str,
    directory: StudyDirectory,
    storage: Storage,
    record: StudyRecord,
    say: Callable[[str], None] = lambda line: None,
    *,
    is_thorough: bool = False,
    on_sign: Callable[[], None] = lambda: None,
) -> Tracker:
    """A writer for this study's experiment; for the options see `Tracker`.

    Args:
        say: receives one line if the folder's own database had to be made again.

    Raises:
        TrackingAway: MLflow cannot be reached now.
        StudyError: the URI is not valid for MLflow, or MLflow refuses the experiment.
    """
    # A server has a place for artifacts; a database alone has none, and MLflow would use the working folder.
    artifacts = directory.artifacts if is_database(uri) else None
    resolved = directory.resolve_tracking_uri(uri)
    try:
        if uri == DEFAULT_TRACKING_URI:
            said = prepare_own_database(directory.mlflow_database, directory.artifacts)
            if said is not None:
                say(said)
        client = connect(resolved)
        if artifacts is not None:
            move_artifacts(resolved, record.name, artifacts, is_own=uri == DEFAULT_TRACKING_URI)
        return Tracker(client, artifacts, storage, record, is_thorough, on_sign)
    except Exception as error:  # MLflow raises whatever its backend raises
        raise tracking_error(error, resolved) from error
