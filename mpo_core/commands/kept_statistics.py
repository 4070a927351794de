"""Statistics in a file, with what they belong to beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpo_core.calibration.collection_folder import digest_of, digest_of_model
from mpo_core.calibration.statistics import Statistics


def load_kept(path: Path, about: dict[str, Any]) -> Statistics | None:
    """The statistics in a file that `keep` wrote; None if there is no file.

    Args:
        about: as returned by `describe`, for the statistics that are needed.
    Raises:
        ValueError: the file is damaged, or holds statistics of another model, text, metric or layers.
    """
    beside = _beside(path)
    if not path.exists():
        if beside.exists():
            raise ValueError(
                f"{path} would be kept with {beside}, which exists: choose another file, or remove that one"
            )
        return None
    try:
        kept = json.loads(beside.read_text(encoding="utf-8"))
        model, text, has_loss, layers = (kept[key] for key in about)
    except FileNotFoundError:
        raise ValueError(f"{path} is not a file of this command: {beside.name} is not beside it") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{beside} is damaged: remove it and {path.name}") from None
    lacking = [name for name in about["layers"] if name not in layers]
    for is_other, what in (
        (model != about["model"], "belongs to another model"),
        (text != about["text"], "belongs to other text, --tokens, --evaluation-tokens, --length or --seed"),
        (about["has_loss"] and not has_loss, "was collected with --metric outputs, without the loss"),
        (bool(lacking), f"has nothing about {lacking[0] if lacking else ''}: --include or --exclude was another"),
    ):
        if is_other:
            raise ValueError(f"{path} {what}: choose another file, or remove it")
    return Statistics.load(path)


def files_of(path: Path) -> list[Path]:
    """The files that `keep` writes, and that it may leave if it is interrupted."""
    return [path, _beside(path), _partial(path)]


def keep(statistics: Statistics, path: Path, about: dict[str, Any]) -> None:
    """Write the statistics to a file. It is complete or absent."""
    partial = _partial(path)
    statistics.save(partial)
    _beside(path).write_text(json.dumps(about), encoding="utf-8")
    os.replace(partial, path)


def describe(model: nn.Module, calibration: Tensor, names: list[str], has_loss: bool) -> dict[str, Any]:
    """Fingerprints of the model and of the tokens; whether the statistics have a loss, and of which layers they are."""
    return {
        "model": digest_of_model(model),
        "text": digest_of(calibration),
        "has_loss": has_loss,
        "layers": names,
    }


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".json")
