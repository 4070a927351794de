"""Second moments of a model's layers over calibration batches, of their inputs and output gradients."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpo_core.calibration.tensor_files import StoredTensor, stamp_of, write_whole
from mpo_core.fitting.metric import EXTREME, Metric

METRICS = ("weights", "outputs", "loss")
"""Metrics in which a layer can be fitted: ‖W − Ŵ‖, the change of its outputs, or the predicted rise of the loss."""

RIDGE = 1e-4
"""Share of the mean of G's diagonal that is added to the diagonal: the inputs may span a subspace."""
DAMPING = 1e-2
"""Share of the mean of S's diagonal that is added to the diagonal: gradients are noisier than inputs."""

_LARGEST = {torch.float64: 1e140, torch.float32: 1e15}
"""Entries must not be larger, because sums of their squares are formed."""


_ROWS = 512
"""Samples, and rows of a moment, that are multiplied at a time."""


class Moment:
    """The second moment of vectors, E[v vᵀ], summed batch by batch.

    Products and sums are float32, or float64 for float64 vectors. A sum of n products is then exact to about √n · 6e-8,
    entry by entry, far below the ridge.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._stored: list[StoredTensor] = []
        """Tensors whose sum is the total, if it is not in memory."""
        self._stored_has_values = False
        self.n_samples = 0

    @property
    def total(self) -> Tensor | None:
        """Σ v vᵀ (size, size). If it is stored in files, each call reads it, and does not keep it."""
        if self._stored:
            return _sum(stored.read() for stored in self._stored)
        return self._total

    @total.setter
    def total(self, total: Tensor | None) -> None:
        self._total, self._stored = total, []

    @property
    def has_values(self) -> bool:
        """Whether there are samples, and not only zeros."""
        if self._stored:
            return self._stored_has_values
        return self._total is not None and bool(self._total.diagonal().any())

    def add_stored(self, stored: StoredTensor, n_samples: int, has_values: bool) -> None:
        """Add a sum that stays in its file; it is not possible after `add` or `merge`."""
        assert self._total is None
        self._stored.append(stored)
        self._stored_has_values |= has_values
        self.n_samples += n_samples

    @torch.no_grad()
    def add(self, vectors: Tensor) -> None:
        """Add vectors (..., size); all leading axes count as samples.

        Raises:
            ValueError: an entry is infinite, NaN or too large to be squared, or the size is another than before.
        """
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        total = self.total
        if vectors.ndim == 0 or (total is not None and vectors.shape[-1] != len(total)):
            size = "size" if total is None else len(total)
            raise ValueError(f"vectors must have shape (..., {size}), but got {tuple(vectors.shape)}")
        samples = vectors.reshape(-1, vectors.shape[-1]).to(dtype)
        if not torch.isfinite(samples).all():
            raise ValueError(f"values must be finite, but {int((~torch.isfinite(samples)).sum())} are not")
        largest = float(samples.abs().amax()) if samples.numel() else 0.0
        if largest > _LARGEST[dtype]:
            raise ValueError(f"values must be at most {_LARGEST[dtype]:g}, but got one of {largest:.3g}")
        if total is None:
            total = torch.zeros(samples.shape[1], samples.shape[1], dtype=dtype, device=samples.device)
        self.total = total = total.to(samples.device)
        # A product that is added to a total inside the kernel is rounded at every sample, ten times worse than here.
        for part in samples.split(_ROWS):
            for row in range(0, len(total), _ROWS):
                total[row : row + _ROWS] += part[:, row : row + _ROWS].T @ part
        self.n_samples += len(samples)

    def merge(self, other: Moment) -> None:
        """Add the vectors of another moment of the same size."""
        total, more = self.total, other.total
        if more is not None:
            self.total = more.clone() if total is None else total.to(more.device).add_(more)
            self.n_samples += other.n_samples

    def mean(self, ridge: float = 0.0) -> Tensor:
        """E[v vᵀ] + ridge · (mean of its diagonal) · 1, float64.

        Raises:
            ValueError: no samples, or only zeros or values too small to be squared.
        """
        total = self.total
        if total is None or self.n_samples == 0:
            raise ValueError("there are no samples")
        if not total.diagonal().any():
            raise ValueError(f"all {self.n_samples} samples are zero, or too small to be squared")
        matrix = total.double() / self.n_samples
        matrix.diagonal().add_(ridge * float(matrix.diagonal().mean()))
        return matrix


class Part:
    """The moments over one part of the batches."""

    def __init__(self) -> None:
        self.inputs: dict[tuple[str, ...], Moment] = {}
        """By the names of the layers that got the same tensors, such as query, key and value of a block."""
        self.gradients: dict[str, Moment] = {}
        """By layer."""
        self.n_losses = 0
        """Number of losses, one for each predicted token."""

    def moments_of(self, name: str) -> list[Moment]:
        """The moments whose sum is that of one layer's inputs."""
        return [moment for names, moment in self.inputs.items() if name in names]

    def inputs_of(self, name: str) -> Moment:
        """The moment of one layer's inputs."""
        found = self.moments_of(name)
        if len(found) == 1:
            return found[0]
        summed = Moment()
        for moment in found:
            summed.merge(moment)
        return summed

    def n_inputs(self, name: str) -> int:
        """Number of one layer's inputs."""
        return sum(moment.n_samples for moment in self.moments_of(name))

    def holders(self, names: Sequence[str], with_gradients: bool) -> list[str]:
        """Those of the layers that got inputs and, if asked for, whose outputs changed a loss."""
        return [
            name
            for name in names
            if any(moment.has_values for moment in self.moments_of(name))
            and (not with_gradients or (name in self.gradients and self.gradients[name].has_values))
        ]


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
        gram = _sum(part.inputs_of(name).mean(ridge) for name in held)
        if metric == "outputs":
            return _metric_of(gram)
        gradients = [part.gradients[name] for name in held]
        per_token = (moment.mean(damping) * (moment.n_samples / part.n_losses) for moment in gradients)
        return _metric_of(gram, _sum(per_token) / len(held))

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
    """What a file of statistics says about its moments, and whatever else was written.

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


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    first, *others = tensors
    return sum(others, start=first)


def _metric_of(*moments: Tensor) -> Metric:
    """Without the checks, which take as long as a fit, unless the products of the moments would be out of range."""
    is_in_range = all(EXTREME[0] < float(moment.diagonal().max()) < EXTREME[1] for moment in moments)
    return Metric.of_checked(*moments, *[None] * (2 - len(moments))) if is_in_range else Metric(*moments)
