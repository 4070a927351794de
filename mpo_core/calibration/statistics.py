"""Second moments of a model's layers over calibration batches, of their inputs and output gradients."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mpo_core.calibration.moments import Moment, Part, sum_of
from mpo_core.calibration.tensor_files import StoredTensor, stamp_of, write_whole
from mpo_core.fitting.metric import EXTREME, Metric

METRICS = ("weights", "outputs", "loss")
"""Metrics in which a layer can be fitted: ‖W − Ŵ‖, the change of its outputs, or the predicted rise of the loss."""

RIDGE = 1e-4
"""Share of the mean of G's diagonal that is added to the diagonal: the inputs may span a subspace."""
DAMPING = 1e-2
"""Share of the mean of S's diagonal that is added to the diagonal: gradients are noisier than inputs."""


class Statistics:
    """The second moments that `collect_statistics` collects."""

    def __init__(self, fitted: Part, held_out: Part) -> None:
        self._parts = {False: fitted, True: held_out}
        self._files: set[Path] = set()
        """Files that moments are read from when they are asked for."""

    def part(self, *, held_out: bool) -> Part:
        """The moments over the batches that are held out, or over the others."""
        return self._parts[held_out]

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return list(dict.fromkeys(name for names in self._parts[False].inputs for name in names))

    @property
    def has_loss(self) -> bool:
        """Whether gradients of a loss were collected, as the metric "loss" needs."""
        return bool(self._parts[False].gradients)

    def n_samples(self, name: str, *, held_out: bool = False) -> int:
        """Number of inputs of a layer, usually tokens."""
        return self._parts[held_out].n_inputs(name)

    def why_not(self, names: Sequence[str], metric: str, *, held_out: bool = False) -> str | None:
        """Why there is no metric of a weight that these layers hold; None if there is one."""
        part, which = self._parts[held_out], "held-out" if held_out else "calibration"
        if metric == "weights" or part.holders(names, metric == "loss"):
            return None
        if all(part.n_inputs(name) == 0 for name in names):
            return f"no {which} input reached it"
        if not part.holders(names, False):
            return f"its {which} inputs are all zero, or too small to be squared"
        return f"its output does not change the loss of any {which} batch"

    def metric(self, names: str | Sequence[str], metric: str, *, held_out: bool = False) -> Metric:
        """The metric of a weight; `names` are the layers that hold it.

        G gets a ridge of `RIDGE`, S a damping of `DAMPING`, but neither for the held-out part, which only measures
        errors. S is per predicted token, so that ‖E‖² / 2 is in nats per token.

        Raises:
            ValueError: there is none (`why_not`); or an unknown metric.
        """
        names = [names] if isinstance(names, str) else names
        if metric not in METRICS:
            raise ValueError(f"`metric` must be one of {', '.join(METRICS)}, but got {metric!r}")
        if metric == "weights":
            return Metric()
        part = self._parts[held_out]
        ridge, damping = (0.0, 0.0) if held_out else (RIDGE, DAMPING)
        held = part.holders(names, metric == "loss")
        if not held:
            raise ValueError(f"{names[0]}: {self.why_not(names, metric, held_out=held_out)}")
        # The changes of the outputs of layers that share a weight add up.
        gram = sum_of(part.inputs_of(name).mean(ridge) for name in held)
        if metric == "outputs":
            return _metric_of(gram)
        gradients = [part.gradients[name] for name in held]
        per_token = (moment.mean(damping) * (moment.n_samples / part.n_losses) for moment in gradients)
        return _metric_of(gram, sum_of(per_token) / len(held))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file; it may be the one that they were loaded from."""
        path = Path(path).resolve()
        if path in self._files:
            self.read()
        self.write(path, {})

    def write(self, path: Path, more: Mapping[str, Any]) -> None:
        """Write to one safetensors file, with more for `described`."""
        tensors: dict[str, Tensor] = {}
        rows: list[Any] = []
        for which, part in self._parts.items():
            moments = [("inputs", list(names), moment) for names, moment in part.inputs.items()]
            moments += [("gradients", [name], moment) for name, moment in part.gradients.items()]
            for kind, names, moment in moments:
                total = moment.total
                if total is not None:
                    tensors[str(len(rows))] = total
                    rows.append([which, kind, names, moment.n_samples, moment.has_values])
            rows.append([which, "losses", [], part.n_losses, False])
        # One entry, because safetensors writes several in any order.
        write_whole(path, tensors, {"statistics": json.dumps({"moments": rows, **more})})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Open a file that `save` wrote, or the folder of a block-by-block collection.

        Moments are read each time that they are asked for, and not kept, so the files must stay.

        Raises:
            FileNotFoundError: there is no such file or folder.
            ValueError: it is no file of statistics, or a folder whose collection has not come to its end.
        """
        path = Path(path)
        statistics = cls(Part(), Part())
        for file in _files_of(path) if path.is_dir() else [path]:
            statistics._open(file)
        return statistics

    def read(self) -> None:
        """Read all moments now, and keep them."""
        for part in self._parts.values():
            for moment in (*part.inputs.values(), *part.gradients.values()):
                moment.total = moment.total

    def _open(self, path: Path) -> None:
        """Add what a file holds."""
        path = path.resolve()
        self._files.add(path)
        stamp = stamp_of(path)
        try:
            for key, (which, kind, names, n, has_values) in enumerate(described(path)["moments"]):
                part = self._parts[which]
                if kind == "losses":
                    part.n_losses += n
                    continue
                if kind == "inputs":
                    moment = part.inputs.setdefault(tuple(names), Moment())
                else:
                    moment = part.gradients.setdefault(names[0], Moment())
                moment.add_stored(StoredTensor(str(path), str(key), stamp), n, has_values)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a file of statistics: {error}") from error


def described(path: Path) -> dict[str, Any]:
    """The description of the moments in a file of statistics, and all else that was written there.

    Raises:
        ValueError: it is not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["statistics"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


INDEX = "statistics.json"
"""File of a folder of statistics; `files` in it names the others."""
UNFINISHED = "unfinished"
"""Folder in it that is there as long as the collection has not come to its end."""


def _files_of(folder: Path) -> list[Path]:
    try:
        files = [folder / name for name in json.loads((folder / INDEX).read_bytes())["files"]]
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a folder of statistics: it has no {INDEX}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} does not describe statistics: {error}") from error
    if (folder / UNFINISHED).exists():
        raise ValueError(f"{folder} holds unfinished statistics: collect them with the same arguments to the end")
    return files


def _metric_of(*moments: Tensor) -> Metric:
    """Without the checks, which take as long as a fit, unless the products of the moments would be out of range."""
    is_in_range = all(EXTREME[0] < float(moment.diagonal().max()) < EXTREME[1] for moment in moments)
    return Metric.of_checked(*moments, *[None] * (2 - len(moments))) if is_in_range else Metric(*moments)
