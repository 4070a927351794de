"""Text drawn from a trained model of a study."""

from __future__ import annotations

import mpo_core
from study.errors import StudyError
from study.ledger.directory import StudyDirectory
from study.ledger.snapshot import Snapshot, read_ledger
from study.spec.trial import SeedResult
from study.training.checkpoints import Damaged, unpack_tensors
from study.training.corpus_storage import stored_corpus
from study.training.model import build_model
from study.training.randomness import generator
from study.training.storage import Storage
from study.training.weights import load_weights


def sample(
    directory: StudyDirectory,
    *,
    prompt: str,
    n_new: int,
    trial: int | None = None,
    seed: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    draw: int = 0,
) -> tuple[SeedResult, str]:
    """Continue a prompt with the trained model of one run.

    Args:
        prompt: a text of at least one token.
        n_new: tokens to add.
        trial, seed: the run. Default: the run with the lowest final loss among those whose weights are kept.
        temperature, top_k: see `mpo_core.generate`.
        draw: seed of the random numbers; equal values give equal text.
    Returns:
        The run, and the prompt with its continuation.
    Raises:
        StudyError: there is no study, no such run with kept weights, or the prompt cannot be encoded.
    """
    config = directory.load_config()
    snapshot = read_ledger(directory.ledger_url, config.name)
    run = _choose(snapshot, trial, seed)
    spec = next(trial.spec for trial in snapshot.trials if trial.number == run.trial)
    storage = Storage(directory.storage_url())
    try:
        corpus = stored_corpus(storage, snapshot.corpus_sha256, config.corpus.validation_fraction)
        weights, _ = unpack_tensors(storage.read(run.weights or ""))
    except (OSError, Damaged) as error:
        raise StudyError(f"the weights of trial {run.trial} seed {run.seed} cannot be read: {error}") from None
    if not prompt:
        raise StudyError("--prompt: must have at least one character")
    tokens = corpus.encode(prompt)[None]
    if not tokens.numel():
        raise StudyError("--prompt: the tokenizer makes no token of it; give another text")
    model, _ = build_model(spec, corpus.vocab_size, lambda name: generator(run.seed, "init", name))
    load_weights(model, weights, bonds_differ=spec.bonds is not None)
    drawn = mpo_core.generate(
        model, tokens, n_new, generator=generator(draw, "sample"), temperature=temperature, top_k=top_k
    )
    return run, corpus.decode(drawn[0])


def _choose(snapshot: Snapshot, trial: int | None, seed: int | None) -> SeedResult:
    kept = [
        result
        for result in snapshot.results
        if result.weights is not None and trial in (None, result.trial) and seed in (None, result.seed)
    ]
    if not kept:
        with_weights = sorted({(r.trial, r.seed) for r in snapshot.results if r.weights is not None})
        raise StudyError(
            "no such run has its weights kept; those that have: "
            + (", ".join(f"trial {number} seed {of}" for number, of in with_weights) or "none")
            + " (execution.keep_weights: true keeps all)"
        )
    return min(kept, key=lambda result: (result.final["final/val_loss"], result.trial, result.seed))
