"""Whether a study's units fit into memory, told before anything runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpo_core
from study.spec.config import StudyConfig
from study.spec.search_space import extreme, listed_specs, searched_arms
from study.spec.trial import TrialSpec
from study.training.memory import unit_bytes
from study.training.model import build_model
from study.training.optimisers import why_alone
from study.training.train import evaluation_tokens

_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The memory that a container may use, on Linux; "max" without a limit."""
_SMALL = 0.05
"""A share of the machine's memory that is not worth an estimate."""


@dataclass(frozen=True)
class UnitMemory:
    """Bytes that the largest unit needs at its peak, estimated; which trial it is of; and the machine's memory."""

    n_bytes: int
    trial: str
    machine_bytes: int
    is_on_gpu: bool

    @property
    def shown(self) -> str:
        """In one line."""
        place = " on its GPU" if self.is_on_gpu else f"; this machine has {_gigabytes(self.machine_bytes)}"
        return f"memory: about {_gigabytes(self.n_bytes)} for each unit ({self.trial}){place}"

    def warning(self, is_cluster: bool) -> str | None:
        """One line if a unit may not fit.

        Args:
            is_cluster: whether units run on other machines, whose memory is not known here.
        """
        if self.n_bytes <= self.machine_bytes:
            return None
        elsewhere = "a GPU" if self.is_on_gpu else "a node of the cluster" if is_cluster else None
        need = f"a unit ({self.trial}) needs about {_gigabytes(self.n_bytes)} of memory"
        less = "a larger `protocol.gradient_accumulation`, or `protocol.recompute: true`, takes less"
        if elsewhere is not None:
            return f"warning: {need}, which {elsewhere} must have; {less}"
        return f"warning: {need}, but this machine has {_gigabytes(self.machine_bytes)}; {less}"


def unit_memory(config: StudyConfig, vocab_size: int, least: float = 0.0) -> UnitMemory | None:
    """Estimate the memory of the largest unit of a study.

    Trials that differ only in size are represented by the largest.

    Args:
        least: leave out trials that surely need less than this many bytes.
    Returns:
        None if no trial is left, or the models cannot run without values.
    """
    found: list[tuple[int, str]] = []
    for what, spec in _largest(config):
        try:
            n_together = _n_together(config, spec)
            if n_together * _at_most(spec, vocab_size) < least:
                continue
            found.append((unit_bytes(spec, vocab_size, n_together), what))
        except Exception:  # code of a library, or of the user; without an estimate the study runs all the same
            continue
    if not found:
        return None
    n_bytes, what = max(found)
    return UnitMemory(n_bytes, what, machine_bytes(), config.execution.gpus > 0)


def say_memory(say: Callable[[str], None], config: StudyConfig, vocab_size: int, is_cluster: bool) -> None:
    """Warn in one line if a unit may not fit into memory; it is only a warning, because an estimate can be wrong."""
    memory = unit_memory(config, vocab_size, least=_SMALL * machine_bytes())
    warning = None if memory is None else memory.warning(is_cluster)
    if warning is not None:
        say(warning)


def machine_bytes() -> int:
    """Memory of this machine, or of the container that this process runs in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):
        return physical


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2g} GB" if n_bytes < 10e9 else f"{n_bytes / 1e9:,.0f} GB"


def _n_together(config: StudyConfig, spec: TrialSpec) -> int:
    """Seeds of one unit, as `Queue` chooses them."""
    asked, n_seeds = config.execution.seeds_per_unit, len(config.seed_list)
    if why_alone(spec) is not None:
        return 1
    if asked == "auto":
        return n_seeds if config.execution.gpus else 1
    return min(asked, n_seeds)


def _at_most(spec: TrialSpec, vocab_size: int) -> float:
    """A coarse upper bound of the bytes of tensors: for each token, 12 for each parameter and each logit."""
    dense, _ = build_model(spec.model_copy(update={"family": "dense"}), vocab_size, None)
    n_tokens = max(spec.protocol.batch_size * spec.model.context, evaluation_tokens(vocab_size))
    return 12 * n_tokens * (mpo_core.n_params(dense) + vocab_size)


def _largest(config: StudyConfig) -> Iterator[tuple[str, TrialSpec]]:
    """The largest trial of each kind, with its name."""
    named = [(f"trial {number}, {spec.arm}", spec) for number, spec in enumerate(listed_specs(config))]
    named += [(f"largest of arm {arm.name}", extreme(config, arm, max)) for arm in searched_arms(config)]
    kinds: dict[Any, tuple[str, TrialSpec]] = {}
    for what, spec in named:
        how = (spec.refinement, spec.metric, spec.heal, spec.forward, spec.protocol.optimiser)
        how += (spec.options, spec.bonds is None)
        sizes = spec.model if spec.model.width is None else None  # whose largest is not known by one number
        kind = (spec.family, sizes, spec.start, spec.keep is None, *how)
        if kind not in kinds or _size(spec) > _size(kinds[kind][1]):
            kinds[kind] = (what, spec)
    yield from kinds.values()


def _size(spec: TrialSpec) -> tuple[float, ...]:
    return spec.model.width or 0, spec.chi or spec.as_chi or spec.keep or 0, spec.protocol.steps
