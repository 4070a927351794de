"""Statistics of a model's layers over calibration batches: the second moments of their inputs and output gradients."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpo_core.compression.dense_layers import is_dense
from mpo_core.evaluating import evaluating
from mpo_core.fitting.metric import Metric

METRICS = ("weights", "outputs", "loss")
"""Metrics in which a layer can be fitted: ‖W − Ŵ‖, the change of its outputs, or the predicted rise of the loss."""

RIDGE = 1e-4
"""Share of the mean of G's diagonal that is added to the diagonal: the inputs may span a subspace."""
DAMPING = 1e-2
"""Share of the mean of S's diagonal that is added to the diagonal: gradients are noisier than inputs."""

_RANGE = {torch.float64: (1e-140, 1e140), torch.float32: (1e-15, 1e15)}
"""The largest entry has to be between these, because sums of squares are formed."""


class Moment:
    """The second moment of vectors, E[v vᵀ], summed batch by batch.

    Products and sums are float32, or float64 for float64 vectors. A sum of n products is then exact to about √n · 6e-8,
    entry by entry, far below the ridge.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.n_samples = 0
        self._largest = 0.0

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
        if samples.numel():
            self._largest = max(self._largest, float(samples.abs().amax()))
        if self._largest > _RANGE[dtype][1]:
            raise ValueError(f"values must be at most {_RANGE[dtype][1]:g}, but got one of {self._largest:.3g}")
        if self.total is None:
            self.total = torch.zeros(samples.shape[1], samples.shape[1], dtype=dtype, device=samples.device)
        self.total.addmm_(samples.T, samples)
        self.n_samples += len(samples)

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
    """Sums over one part of the batches: of the inputs, and of the gradients at the outputs, by layer."""

    def __init__(self) -> None:
        self.inputs: dict[str, Moment] = {}
        """By layer; layers that are called with the same tensors, such as query, key and value, share one moment."""
        self.gradients: dict[str, Moment] = {}
        self.first_with: dict[str, str] = {}
        """The layer in whose moment the inputs of a layer are summed: itself, or the first that got the same."""
        self.n_inputs: dict[str, int] = {}
        self.n_losses = 0
        """Number of losses, one for each predicted token."""


class Statistics:
    """What `collect_statistics` returns."""

    def __init__(self, fitted: Part, held_out: Part) -> None:
        self._parts = {False: fitted, True: held_out}

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return list(self._parts[False].inputs)

    @property
    def has_loss(self) -> bool:
        """Whether gradients of a loss were collected, as the metric "loss" needs."""
        return bool(self._parts[False].gradients)

    @property
    def has_held_out(self) -> bool:
        return bool(self._parts[True].inputs)

    def n_samples(self, name: str, *, held_out: bool = False) -> int:
        """Number of inputs of a layer, usually tokens."""
        part = self._parts[held_out]
        return part.inputs[name].n_samples if name in part.inputs else 0

    def metric(self, names: str | Sequence[str], metric: str, *, held_out: bool = False) -> Metric:
        """The metric of a weight; `names` are the layers that hold it.

        G gets a ridge of `RIDGE`, S a damping of `DAMPING`, but neither for the held-out part, which only measures
        errors. S is per predicted token, so that ‖E‖² / 2 is in nats per token.

        Raises:
            ValueError: the layer got no inputs, or only zeros; its output never changed the loss; or an unknown metric.
        """
        names = [names] if isinstance(names, str) else names
        if metric not in METRICS:
            raise ValueError(f"`metric` must be one of {', '.join(METRICS)}, but got {metric!r}")
        if metric == "weights":
            return Metric()
        part = self._parts[held_out]
        ridge, damping = (0.0, 0.0) if held_out else (RIDGE, DAMPING)
        held = [name for name in names if name in part.inputs]
        if not held:
            which = "held-out" if held_out else "calibration"
            raise ValueError(f"{names[0]}: no {which} batch reached it")
        try:
            # The changes of the outputs of layers that share a weight add up.
            gram = torch.stack([part.inputs[name].mean(ridge) for name in held]).sum(0)
        except ValueError as error:
            raise ValueError(f"{held[0]}: its calibration inputs give no metric: {error}") from error
        if metric == "outputs":
            return Metric(gram)
        try:
            per_token = [part.gradients[name].n_samples / part.n_losses for name in held]
            grads = [part.gradients[name].mean(damping) * share for name, share in zip(held, per_token, strict=True)]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{held[0]}: its output does not change the loss: {error}") from error
        return Metric(gram, torch.stack(grads).mean(0))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        counts: dict[str, str] = {}
        for which, part in (("fitted", self._parts[False]), ("held_out", self._parts[True])):
            counts[f"{which}.n_losses"] = str(part.n_losses)
            for kind, moments in (("inputs", part.inputs), ("gradients", part.gradients)):
                leaders: dict[int, str] = {}
                for name, moment in moments.items():
                    leader = leaders.setdefault(id(moment), name)
                    counts[f"{which}.{kind}.{name}"] = f"{moment.n_samples} {leader}"
                    if leader == name and moment.total is not None:
                        tensors[f"{which}.{kind}.{name}"] = moment.total
        save_file(tensors, path, metadata=counts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read a file that `save` wrote.

        Raises:
            ValueError: it is not such a file.
        """
        from safetensors import SafetensorError, safe_open

        parts = {"fitted": Part(), "held_out": Part()}
        try:
            with safe_open(path, "pt") as file:
                for key, value in (file.metadata() or {}).items():
                    which, kind, *name = key.split(".", 2)
                    if not name:
                        parts[which].n_losses = int(value)
                        continue
                    moments = getattr(parts[which], kind)
                    n_samples, leader = value.split(" ", 1)
                    if leader == name[0]:
                        moments[leader] = Moment()
                        moments[leader].n_samples, moments[leader].total = int(n_samples), file.get_tensor(key)
                    else:
                        moments[name[0]] = leader
        except (SafetensorError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"{os.fspath(path)} is not a file of statistics: {error}") from error
        for part in parts.values():
            for moments in (part.inputs, part.gradients):
                moments.update({name: moments[other] for name, other in moments.items() if isinstance(other, str)})
        return cls(parts["fitted"], parts["held_out"])


def next_token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats of every next token, (B, T - 1), for tokens (B, T).

    The model returns logits (B, T, V), or an object with the attribute `logits` as those of Hugging Face do.
    """
    outputs = model(tokens)
    logits = getattr(outputs, "logits", outputs)[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.reshape(tokens.shape[0], -1)


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    modules: Sequence[str] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    held_out: float = 0.2,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Run the model over the batches and sum, for each layer, the second moments that the metrics need.

    The model runs in evaluation mode, and is put back as it was. Padding tokens count like any other, unless a
    `forward` leaves them out.

    Args:
        batches: per call of the model, a tensor or sequence of arguments, or a mapping of keyword arguments.
        loss: called as loss(model, batch) instead of the model; returns one loss per predicted token, of any shape,
            such as `next_token_losses`. Its gradients at the outputs of the layers give S. Default: G alone.
        modules: names of modules that are called with one tensor (..., in_features) as their first argument. Default:
            every nn.Linear and Conv1D.
        forward: called as forward(model, batch) instead of the model itself, if there is no loss.
        held_out: share of the batches that no layer is fitted to, and on which errors are measured as well. Every k-th
            batch is one. At least one batch is fitted to.
        progress: called after each batch with the number of batches that are done.
    Raises:
        ValueError: no batches; inputs or gradients that are not finite, with the layer's name; a loss that is not one
            tensor of losses; or `held_out` is not from 0 to below 1.
        AttributeError: a name that the model does not have.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"`0 <= held_out < 1` must hold, but got held_out={held_out}")
    if isinstance(batches, Tensor):
        raise ValueError("`batches` must be a sequence of batches, but got one tensor; put it in a list")
    names = list(_every_dense(model)) if modules is None else list(modules)
    parts = Part(), Part()
    n_batches = 0
    with evaluating(model), torch.set_grad_enabled(loss is not None), _without_gradients(model):
        for batch in batches:
            is_held_out = int((n_batches + 1) * held_out + 1e-9) > int(n_batches * held_out + 1e-9)
            part = parts[is_held_out]
            with _recorded(model, names, part, loss is not None):
                if loss is None:
                    (forward or _call)(model, batch)
                else:
                    _backward(loss(model, batch), part)
            n_batches += 1
            if progress is not None:
                progress(n_batches)
    for part in parts:
        for name, n_inputs in part.n_inputs.items():
            if n_inputs != part.inputs[name].n_samples:
                raise ValueError(f"{name} got only some of the inputs that {part.first_with[name]} got: see `modules`")
    if n_batches == 0:
        raise ValueError("calibration needs at least one batch, but got none")
    return Statistics(*parts)


def _backward(losses: Tensor, part: Part) -> None:
    if not isinstance(losses, Tensor) or losses.ndim == 0:
        raise ValueError("`loss` must return one loss per predicted token (reduction='none'), but got a single number")
    if not losses.requires_grad:
        raise ValueError("`loss` does not depend on the outputs of any of the layers")
    part.n_losses += losses.numel()
    losses.sum().backward()


@contextmanager
def _recorded(model: nn.Module, names: Sequence[str], part: Part, with_gradients: bool) -> Iterator[None]:
    """Inside, the inputs of the named layers, and the gradients at their outputs, are added to the sums."""
    seen: list[tuple[weakref.ref[Tensor], str]] = []  # inputs of this batch, and the layer whose moment they are in

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            same = next((first for ref, first in seen if ref() is x), name)
            first = part.first_with.setdefault(name, same)
            if first != same:
                raise ValueError(
                    f"{name} and {first if first != name else same} share their inputs in some batches only: collect "
                    "their statistics in two calls, each with one of them in `modules`"
                )
            part.n_inputs[name] = part.n_inputs.get(name, 0) + x.numel() // x.shape[-1]
            if same == name:
                seen.append((weakref.ref(x), name))
                with _named(name, "input"):
                    part.inputs.setdefault(name, Moment()).add(x)
            else:
                part.inputs[name] = part.inputs[same]

        return hook

    def after(name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _args: object, y: Tensor) -> Tensor:
            if not y.requires_grad:
                y = y.detach().requires_grad_().clone()  # no leaf, because owners may write into it

            def add(g: Tensor) -> None:
                with _named(name, "gradient"):
                    part.gradients.setdefault(name, Moment()).add(g)

            y.register_hook(add)
            return y

        return hook

    hooks = []
    try:
        for name in names:
            module = model.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            if with_gradients:
                hooks.append(module.register_forward_hook(after(name)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: of its calibration {what}s, {error}") from error


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient inside: only those at the outputs of layers are needed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _every_dense(model: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if name and is_dense(module))


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch)
