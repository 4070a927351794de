"""Opening the corpus and the ledger of a study in a folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.ledger.growth import NO_GROWTH, Growth, grow
from study.ledger.ledger import Ledger
from study.ledger.snapshot import read_ledger
from study.spec.config import StudyConfig
from study.spec.search_space import extreme, searched_arms
from study.spec.trial import TrialShape, TrialSpec
from study.training.corpus import Corpus
from study.training.corpus_storage import stored_corpus
from study.training.loading import load_corpus
from study.training.model import check_model, trial_shape
from study.training.storage import Storage


def study_corpus(config: StudyConfig) -> Corpus:
    """The study's corpus, long enough for its context; the study's model can be trained on it.

    The smallest model of each searched arm can be made, so that no trial is asked for in vain.
    """
    given = config.corpus
    tokenizer = given.tokenizer_folder or given.tokenizer
    corpus = load_corpus(given.paths or None, given.sha256, given.validation_fraction, tokenizer, given.text_column)
    corpus.check_context(config.model.context)
    check_model(config, corpus.vocab_size)
    for arm in searched_arms(config):
        _shape(extreme(config, arm, min), config, corpus)
    return corpus


def _shape(spec: TrialSpec, config: StudyConfig, corpus: Corpus) -> TrialShape:
    return trial_shape(spec, corpus.vocab_size, len(corpus.validation), config.model, config.bits)


def check_may_grow(directory: StudyDirectory, growth: Growth) -> None:
    """Raise a StudyError if the folder surely has no study that could grow."""
    if growth.command and directory.uuid() is None and not directory.has_ledger:
        raise StudyError(
            f"{directory.path}: no study here that could grow by {growth.command}; run it without that option first"
        )


def open_ledger(
    config: StudyConfig,
    corpus: Corpus,
    directory: StudyDirectory,
    growth: Growth = NO_GROWTH,
    say: Callable[[str], None] = lambda line: None,
) -> Ledger:
    """The ledger of a study folder; created if there is none.

    Args:
        growth: growth to apply first.
        say: receives one line about that growth.
    """
    shape_of = partial(_shape, config=config, corpus=corpus)
    uuid = directory.uuid()
    if uuid is not None:
        directory.check_ledger()
    check_may_grow(directory, growth)
    may_begin = not growth.command
    ledger = Ledger(
        directory.ledger_url, config, corpus.sha256, shape_of, uuid, may_begin=may_begin, extend=growth.extend
    )
    if grow(ledger, growth, say):
        ledger.close()
        ledger = Ledger(directory.ledger_url, ledger.config, corpus.sha256, shape_of, uuid)
    return ledger


def known_corpus(config: StudyConfig, directory: StudyDirectory, storage: Storage) -> Corpus:
    """The corpus of a study that was run before: the stored one, otherwise the one that the study file names."""
    sha256 = read_ledger(directory.ledger_url, config.name).corpus_sha256
    try:
        return stored_corpus(storage, sha256, config.corpus.validation_fraction)
    except OSError:
        return study_corpus(config)
