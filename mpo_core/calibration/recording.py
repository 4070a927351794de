"""Hooks that add what the layers of a model see in one batch to their second moments."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpo_core.calibration.moments import Moment, Part

NO_BATCHES = "calibration needs at least one batch, but got none"


def is_held_out(batch: int, share: float) -> bool:
    """Whether the batch of this index is held out: of ten and 0.2 the fifth and the tenth, and never the first."""
    return batch > 0 and int((batch + 1) * share + 1e-9) > int(batch * share + 1e-9)


def version_of(x: Tensor) -> int:
    """Another number after the tensor was written into; -1 if that is unknown, as in inference mode."""
    return -1 if x.is_inference() else x._version


@contextmanager
def recorded(model: nn.Module, names: Sequence[str], part: Part, with_gradients: bool) -> Iterator[None]:
    """Inside, the inputs of the named layers, and the gradients at their outputs, are added to the sums."""
    seen: list[tuple[weakref.ref[Tensor], int, list[str], Moment]] = []  # distinct inputs of this batch

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            version = version_of(x)
            for ref, known, names, _ in seen:
                if ref() is x and known == version >= 0 and name not in names:
                    names.append(name)
                    return
            moment = Moment()
            with _named(name, "input"):
                moment.add(x)
            seen.append((weakref.ref(x), version, [name], moment))

        return hook

    def after(name: str) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, _args: object, y: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():  # the model itself stops gradients here
                return None
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
        for _, _, names, moment in seen:
            known = part.inputs.setdefault(tuple(names), moment)
            if known is not moment:
                known.merge(moment)
    finally:
        for hook in hooks:
            hook.remove()


def backward(losses: Tensor, part: Part) -> None:
    if not isinstance(losses, Tensor) or losses.ndim == 0:
        raise ValueError("`loss` must return one loss per predicted token (reduction='none'), but got a single number")
    if not losses.requires_grad:
        raise ValueError("`loss` does not depend on the outputs of any of the layers")
    part.n_losses += losses.numel()
    losses.sum().backward()


def call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch)


@contextmanager
def _named(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise type(error)(f"{name}: of its calibration {what}s, {error}") from error
