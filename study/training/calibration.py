"""Calibration: the batches that a compression is fitted to, and the layers' statistics over them.

Statistics of a large model take minutes, and depend on the seed and not on the arm. So the trials of a seed share them:
the first one on a machine collects them into the cache, and the others read them there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

import mpo_core
from study.spec.cache import cache_folder
from study.spec.models import Model, with_checksum
from study.spec.trial import TrialSpec, json_hash
from study.training.corpus import Corpus
from study.training.precision import device_name
from study.training.program import this_program
from study.training.windows import Windows

HELD_OUT = 0.2
"""Share of the batches to which no layer is fitted; errors are measured on them as well."""
DAYS_KEPT = 7
"""Days without use after which statistics are removed."""


def calibration_batches(spec: TrialSpec, seed: int, corpus: Corpus) -> list[Tensor]:
    """Batches of training tokens, each (batch_size, context), drawn by the seed; none for a trial without a fit."""
    if spec.metric not in ("outputs", "loss") and spec.refinement not in ("whitened", "als", "outputs"):
        return []
    protocol = spec.protocol
    n, size, context = protocol.calibration_batches, protocol.batch_size, spec.model.context
    windows = Windows(corpus.train, n, size, context, seed, "calibration")
    return [windows.batch(index)[0] for index in range(n)]


def shared_statistics(
    sizes: Model, model: nn.Module, names: Sequence[str], batches: Sequence[Tensor], device: torch.device | str
) -> mpo_core.Statistics:
    """Statistics of the named layers, with the loss, from the cache; collected on `device` if they are not there.

    The file is bound to the model's code, configuration and weights, the layers, the batches, the program, and the
    conditions of rounding.

    Args:
        sizes: of the model; its checksum covers the configuration of a pretrained model, or the code of a user's own.
    """
    own = with_checksum(sizes).model_dump(mode="json", exclude={"pretrained"})
    library = getattr(sys.modules.get("transformers"), "__version__", None)
    conditions = [device_name(device), torch.get_num_threads(), this_program()["fingerprint"], library]
    inputs = [own, mpo_core.digest_of_model(model), list(names), mpo_core.digest_of(batches), HELD_OUT]
    key = json_hash([inputs, conditions])
    folder = cache_folder() / "statistics"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.safetensors"
    with FileLock(folder / f"{key}.lock"):
        if not path.exists():
            _remove_old(folder)
            collected = mpo_core.collect_statistics(
                model.to(device),
                [tokens.to(device) for tokens in batches],
                loss=mpo_core.next_token_losses,
                modules=names,
                held_out=HELD_OUT,
            )
            model.to("cpu")
            collected.save(path)
        # Its time of writing stays as it is: a process that reads the file knows it by that.
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    return mpo_core.Statistics.load(path)


def _remove_old(folder: Path) -> None:
    oldest = time.time() - DAYS_KEPT * 86_400
    for path in folder.iterdir():
        with suppress(OSError):  # another process may remove it too
            if max(path.stat().st_atime, path.stat().st_mtime) < oldest:
                path.unlink()
