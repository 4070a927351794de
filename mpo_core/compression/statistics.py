"""Second moments of a model's layers over calibration batches, of their inputs and output gradients."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpo_core.fitting.metric import EXTREME, Metric

METRICS = ("weights", "outputs", "loss")
"""Metrics in which a layer can be fitted: ‖W − Ŵ‖, the change of its outputs, or the predicted rise of the loss."""

RIDGE = 1e-4
"""Share of the mean of G's diagonal that is added to the diagonal: the inputs may span a subspace."""
DAMPING = 1e-2
"""Share of the mean of S's diagonal that is added to the diagonal: gradients are noisier than inputs."""

_LARGEST = {torch.float64: 1e140, torch.float32: 1e15}
"""Entries must not be larger, because sums of their squares are formed."""


class Moment:
    """The second moment of vectors, E[v vᵀ], summed batch by batch.

    Products and sums are float32, or float64 for float64 vectors. A sum of n products is then exact to about √n · 6e-8,
    entry by entry, far below the ridge.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.n_samples = 0

    @property
    def has_values(self) -> bool:
        """Whether there are samples, and not only zeros."""
        return self.total is not None and bool(self.total.diagonal().any())

    @torch.no_grad()
    def add(self, vectors: Tensor) -> None:
        """Add vectors (..., size); all leading axes count as samples.

        Raises:
            ValueError: an entry is infinite, NaN or too large to be squared, or the size is another than before.
        """
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        if vectors.ndim == 0 or (self.total is not None and vectors.shape[-1] != len(self.total)):
            size = "size" if self.total is None else len(self.total)
            raise ValueError(f"vectors must have shape (..., {size}), but got {tuple(vectors.shape)}")
        samples = vectors.reshape(-1, vectors.shape[-1]).to(dtype)
        if not torch.isfinite(samples).all():
            raise ValueError(f"values must be finite, but {int((~torch.isfinite(samples)).sum())} are not")
        largest = float(samples.abs().amax()) if samples.numel() else 0.0
        if largest > _LARGEST[dtype]:
            raise ValueError(f"values must be at most {_LARGEST[dtype]:g}, but got one of {largest:.3g}")
        if self.total is None:
            self.total = torch.zeros(samples.shape[1], samples.shape[1], dtype=dtype, device=samples.device)
        self.total.addmm_(samples.T, samples)
        self.n_samples += len(samples)

    def merge(self, other: Moment) -> None:
        """Add the vectors of another moment of the same size."""
        if other.total is not None:
            self.total = other.total if self.total is None else self.total + other.total
            self.n_samples += other.n_samples

    def mean(self, ridge: float = 0.0) -> Tensor:
        """E[v vᵀ] + ridge · (mean of its diagonal) · 1, float64.

        Raises:
            ValueError: no samples, or only zeros or values too small to be squared.
        """
        if self.total is None or self.n_samples == 0:
            raise ValueError("there are no samples")
        if not self.total.diagonal().any():
            raise ValueError(f"all {self.n_samples} samples are zero, or too small to be squared")
        matrix = self.total.double() / self.n_samples
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

    def inputs_of(self, name: str) -> Moment:
        """The moment of one layer's inputs."""
        found = [moment for names, moment in self.inputs.items() if name in names]
        if len(found) == 1:
            return found[0]
        summed = Moment()
        for moment in found:
            summed.merge(moment)
        return summed

    def holders(self, names: Sequence[str], with_gradients: bool) -> list[str]:
        """Those of the layers that got inputs and, if asked for, whose outputs changed a loss."""
        return [
            name
            for name in names
            if self.inputs_of(name).has_values
            and (not with_gradients or (name in self.gradients and self.gradients[name].has_values))
        ]


class Statistics:
    """The second moments that `collect_statistics` collects."""

    def __init__(self, fitted: Part, held_out: Part) -> None:
        self._parts = {False: fitted, True: held_out}

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
        return self._parts[held_out].inputs_of(name).n_samples

    def why_not(self, names: Sequence[str], metric: str, *, held_out: bool = False) -> str | None:
        """Why there is no metric of a weight that these layers hold; None if there is one."""
        part, which = self._parts[held_out], "held-out" if held_out else "calibration"
        if metric == "weights" or part.holders(names, metric == "loss"):
            return None
        if all(part.inputs_of(name).n_samples == 0 for name in names):
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
        gram = torch.stack([part.inputs_of(name).mean(ridge) for name in held]).sum(0)
        if metric == "outputs":
            return _metric_of(gram)
        gradients = [part.gradients[name] for name in held]
        per_token = [moment.mean(damping) * (moment.n_samples / part.n_losses) for moment in gradients]
        return _metric_of(gram, torch.stack(per_token).mean(0))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        counts: list[Any] = []
        for which, part in self._parts.items():
            named = [(list(names), moment) for names, moment in part.inputs.items()]
            rows = [("inputs", *each) for each in named]
            rows += [("gradients", [name], moment) for name, moment in part.gradients.items()]
            for kind, names, moment in rows:
                if moment.total is not None:
                    tensors[str(len(counts))] = moment.total
                    counts.append([which, kind, names, moment.n_samples])
            counts.append([which, "losses", [], part.n_losses])
        save_file(tensors, path, metadata={"statistics": json.dumps(counts)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read a file that `save` wrote.

        Raises:
            ValueError: it is not such a file.
        """
        from safetensors import SafetensorError, safe_open

        parts = {False: Part(), True: Part()}
        try:
            with safe_open(path, "pt") as file:
                for index, (which, kind, names, n) in enumerate(json.loads(file.metadata()["statistics"])):
                    if kind == "losses":
                        parts[which].n_losses = n
                        continue
                    moment = Moment()
                    moment.total, moment.n_samples = file.get_tensor(str(index)), n
                    if kind == "inputs":
                        parts[which].inputs[tuple(names)] = moment
                    else:
                        parts[which].gradients[names[0]] = moment
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)} is not a file of statistics: {error}") from error
        return cls(parts[False], parts[True])


def _metric_of(*moments: Tensor) -> Metric:
    """Without the checks, which take as long as a fit, unless the products of the moments would be out of range."""
    is_in_range = all(EXTREME[0] < float(moment.diagonal().max()) < EXTREME[1] for moment in moments)
    return Metric.of_checked(*moments, *[None] * (2 - len(moments))) if is_in_range else Metric(*moments)
