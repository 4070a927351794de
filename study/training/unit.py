"""A unit of work: one trial × one block of the seeds it still lacks, and how a worker runs it."""

from __future__ import annotations

import hashlib
import math
import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Annotated

import torch
from pydantic import Field

from study.spec.trial import SeedResult, TrialSpec, milliseconds, now
from study.spec.values import Strict
from study.training.checkpoints import Checkpoints, Damaged, pack_tensors, unpack_tensors
from study.training.corpus import Corpus
from study.training.corpus_storage import stored_corpus
from study.training.freed_memory import return_freed_memory
from study.training.optimisers import why_alone
from study.training.seed_run import train_seed, train_seeds
from study.training.storage import Storage

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Errors that concern one unit on one machine: the study's other units may fit in memory."""


class Starts(Strict):
    """The trained dense models that a unit's seeds begin from: storage key by seed, and training tokens of each."""

    weights: dict[int, str]
    tokens: int


class Unit(Strict):
    """Everything that a worker needs to know, as plain data that can be sent to it."""

    trial: int
    seeds: tuple[int, ...]
    until: int | None
    """The step at which the seeds pause; None: they train to the end."""
    spec: TrialSpec
    storage: Annotated[str, Field(exclude=True)]  # its URL may hold a password: it is sent separately
    study_uuid: str
    corpus_sha256: str
    validation_fraction: float
    starts: Starts | None
    rel_error_chis: tuple[int, ...]
    keep_weights: bool
    cpus: float
    gpus: float
    checkpoint_seconds: float
    capture: bool
    timing: bool = False


def run_unit(
    unit: Unit, on_evaluation: Callable[[int, dict[str, float]], None], say: Callable[[str], None] = print
) -> list[SeedResult]:
    """Train the unit's seeds from their newest checkpoints; several seeds are stacked, if model and optimiser allow it.

    Args:
        on_evaluation: called with the seed and every row of its learning curve. The row also has "started", the time
            in milliseconds at which the run began.
        say: receives one line about things that the user should know but need not correct.
    Returns:
        One result per seed. An error in one seed gives a failed result, and the others continue. If a stack fails as a
        whole, its seeds are trained one after another, which shows the seeds that fail.

    Raises:
        OSError: storage, corpus or GPU is unavailable, for this unit and any other.
        MemoryError, torch.OutOfMemoryError: another try, elsewhere or later, may succeed.
    """
    torch.set_num_threads(max(1, int(unit.cpus)))
    storage = Storage(unit.storage)
    corpus = _corpus(unit.storage, unit.corpus_sha256, unit.validation_fraction)
    started = now()

    def note(seed: int, row: dict[str, float]) -> None:
        on_evaluation(seed, row | {"started": milliseconds(started)})

    if len(unit.seeds) > 1 and why_alone(unit.spec) is None:
        try:
            results = [_without_non_finite(result) for result in _run_stack(unit, storage, corpus, note, say)]
            return [replace(result, started=started) for result in results]
        except (OSError, *OUT_OF_MEMORY):
            raise
        except Exception:
            traceback.print_exc()
            say(f"trial {unit.trial}: its stack of seeds failed; they are trained one after another")
    results = []
    for seed in unit.seeds:
        started = now()
        return_freed_memory()  # that of the unit or the seed before
        try:
            result = _without_non_finite(_run_seed(unit, seed, storage, corpus, note, say))
            results.append(replace(result, started=started))
        except (OSError, *OUT_OF_MEMORY):
            raise
        except Exception as error:
            traceback.print_exc()
            reason = next(iter(f"{type(error).__name__}: {str(error).strip()}".splitlines()))
            results.append(SeedResult(unit.trial, seed, "failed", started=started, ended=now(), failure=reason))
    return results


def _without_non_finite(result: SeedResult) -> SeedResult:
    """The result, or a failed one if any of its numbers is infinite or NaN: no later step can use those."""
    curve = {f"{key} at step {row['step']:.0f}": value for row in result.curve for key, value in row.items()}
    bad = [key for key, value in (result.final | result.rel_errors | curve).items() if not math.isfinite(value)]
    if not bad:
        return result
    finite_rows = [row for row in result.curve if all(map(math.isfinite, row.values()))]
    reason = result.failure or f"diverged: {bad[0]} is not finite"
    step = result.failure_step if result.failure_step is not None else int(result.curve[-1]["step"])
    partly = replace(result, final={}, rel_errors={}, curve=finite_rows, weights=None)
    return replace(partly, state="failed", failure=reason, failure_step=step)


def _run_stack(
    unit: Unit,
    storage: Storage,
    corpus: Corpus,
    on_evaluation: Callable[[int, dict[str, float]], None],
    say: Callable[[str], None],
) -> list[SeedResult]:
    weights_of = unit.starts.weights if unit.starts is not None else {}
    trained = train_seeds(
        unit.spec,
        unit.seeds,
        corpus,
        trial=unit.trial,
        device=_device(unit),
        start_weights={seed: _start_weights(storage, key) for seed, key in weights_of.items()} or None,
        start_tokens=unit.starts.tokens if unit.starts is not None else 0,
        rel_error_chis=unit.rel_error_chis,
        checkpoints={
            seed: checkpoints_of(storage, unit.study_uuid, unit.trial, seed, unit.spec, say) for seed in unit.seeds
        },
        checkpoint_seconds=unit.checkpoint_seconds,
        capture=unit.capture,
        timing=unit.timing,
        on_evaluation=on_evaluation,
        until=unit.until,
    )
    return [_with_weights(unit, storage, result, weights) for result, weights in trained]


def _run_seed(
    unit: Unit,
    seed: int,
    storage: Storage,
    corpus: Corpus,
    on_evaluation: Callable[[int, dict[str, float]], None],
    say: Callable[[str], None],
) -> SeedResult:
    start_weights = _start_weights(storage, unit.starts.weights[seed]) if unit.starts is not None else None
    result, weights = train_seed(
        unit.spec,
        seed,
        corpus,
        trial=unit.trial,
        device=_device(unit),
        start_weights=start_weights,
        start_tokens=unit.starts.tokens if unit.starts is not None else 0,
        rel_error_chis=unit.rel_error_chis,
        checkpoints=checkpoints_of(storage, unit.study_uuid, unit.trial, seed, unit.spec, say),
        checkpoint_seconds=unit.checkpoint_seconds,
        capture=unit.capture,
        timing=unit.timing,
        on_evaluation=lambda row: on_evaluation(seed, row),
        until=unit.until,
    )
    return _with_weights(unit, storage, result, weights)


def _with_weights(unit: Unit, storage: Storage, result: SeedResult, weights: dict[str, torch.Tensor]) -> SeedResult:
    """Store the weights if the unit keeps them; returns the result with their key."""
    if not unit.keep_weights or result.state != "complete":
        return result
    key = f"{unit.study_uuid}/weights/trial{unit.trial}-seed{result.seed}.safetensors"
    storage.write(key, pack_tensors(weights, {"spec": unit.spec.model_dump(mode="json"), "seed": result.seed}))
    return replace(result, weights=key)


def _start_weights(storage: Storage, key: str) -> dict[str, torch.Tensor]:
    try:
        return unpack_tensors(storage.read(key))[0]
    except Damaged as damage:
        storage.delete(key)  # the next run of the study finds it missing, and trains that model again
        raise OSError(f"{storage.shown}/{key}: {damage}; it was removed and will be trained again") from None


def _device(unit: Unit) -> str:
    precision = unit.spec.protocol.precision
    if unit.gpus == 0:
        if precision == "tf32":
            raise OSError(
                "the study file asks for protocol.precision=tf32, which only GPUs have, but execution.gpus is 0"
            )
        return "cpu"
    if not torch.cuda.is_available():
        raise OSError(f"the study file asks for execution.gpus={unit.gpus:g}, but PyTorch finds no CUDA device")
    if precision == "tf32" and not torch.cuda.is_tf32_supported():
        name = torch.cuda.get_device_name()
        raise OSError(f"the study file asks for protocol.precision=tf32, which this GPU ({name}) does not have")
    return "cuda"


def checkpoints_of(
    storage: Storage,
    study_uuid: str,
    trial: int,
    seed: int,
    spec: TrialSpec | None = None,
    say: Callable[[str], None] = print,
) -> Checkpoints:
    """Checkpoints of one run, the same for every worker; only those of this spec are read."""
    of = "" if spec is None else hashlib.sha256(spec.model_dump_json().encode()).hexdigest()
    return Checkpoints(storage, f"{study_uuid}/checkpoints/trial{trial}-seed{seed}", of, say)


def checkpointed(storage: Storage, study_uuid: str) -> set[tuple[int, int]]:
    """The (trial, seed) of every run that has checkpoints in the storage."""
    folders = [PurePosixPath(key).name for key in storage.keys(f"{study_uuid}/checkpoints")]
    found = (_OF_RUN.fullmatch(folder) for folder in folders)
    return {(int(run[1]), int(run[2])) for run in found if run is not None}


_OF_RUN = re.compile(r"trial(\d+)-seed(\d+)")


@lru_cache(maxsize=2)
def _corpus(storage: str, sha256: str, validation_fraction: float) -> Corpus:
    return stored_corpus(Storage(storage), sha256, validation_fraction)
