"""A forward of a whole model that stores what each block gets, and refuses what cannot be done block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpo_core.calibration.block_calls import BatchCalls, Call, hidden_states
from mpo_core.calibration.recording import version_of

ALL_AT_ONCE = "collect without `blocks`"


class Blocks:
    """The blocks of a model, and the layers in each of them.

    Args:
        name: of the nn.ModuleList or nn.Sequential that holds the blocks.
        layers: names of the layers to be measured.
    Raises:
        ValueError: the model has no such module, or one that holds a block twice.
    """

    def __init__(self, model: nn.Module, name: str, layers: Sequence[str]) -> None:
        lists = {
            known: module
            for known, module in model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
        }
        if name not in lists:
            some = ", ".join(sorted(lists, key=lambda known: -len(lists[known]))[:5]) or "of which it has none"
            raise ValueError(
                f"`blocks` must name an nn.ModuleList or nn.Sequential of the model, such as {some}, but got {name!r}"
            )
        self.modules = list(lists[name])
        self.names = [f"{name}.{index}" if name else str(index) for index in range(len(self.modules))]
        if len({id(block) for block in self.modules}) < len(self.modules):
            raise ValueError(f"{name} holds a block more than once: {ALL_AT_ONCE}")
        members = [{id(module) for module in block.modules()} for block in self.modules]
        modules = {layer: model.get_submodule(layer) for layer in layers}
        self.layers = [[name for name, module in modules.items() if id(module) in inside] for inside in members]
        within = {name for names in self.layers for name in names}
        self.outside = [name for name in layers if name not in within]
        self._modules = modules
        self._within = within

    @contextmanager
    def observed(self, with_gradients: bool, put_input: Callable[[int, Tensor], None]) -> Iterator[Chain]:
        """Inside, the model runs once; each block without gradients, and all else with them if asked for.

        Args:
            put_input: called with the index of a block and its input.
        Raises:
            ValueError: the blocks are not called once each, in order, each with the former's output; an argument
                cannot be stored; a measured layer is called where it cannot be measured; or with gradients, some
                would be lost.
        """
        chain = Chain(self, with_gradients, put_input)
        hooks = []
        try:
            for index, block in enumerate(self.modules):
                # Before hooks of others, because they run again when the block is called alone.
                hook = chain.before(index)
                hooks.append(block.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
            for name, module in self._modules.items():
                hooks.append(module.register_forward_pre_hook(chain.layer_check(name, name in self._within)))
            for index, block in enumerate(self.modules):
                hooks.append(block.register_forward_hook(chain.after(index)))
            yield chain
        finally:
            for hook in hooks:
                hook.remove()
        if chain.n_called < len(self.modules):
            raise ValueError(f"{self.names[chain.n_called]} was not called in every batch: {ALL_AT_ONCE}")


class Chain:
    """The blocks, as one forward of the model and the backward pass of its loss show them."""

    def __init__(self, blocks: Blocks, with_gradients: bool, put_input: Callable[[int, Tensor], None]) -> None:
        self.blocks, self.with_gradients, self.put_input = blocks, with_gradients, put_input
        self.autocast = autocast_modes()
        self.calls = BatchCalls()
        self.n_called = 0
        self.is_inside = False
        self.had_gradients = False
        self.output: Tensor | None = None
        """Hidden states that the last called block gave."""
        self.version = 0
        """Theirs when it gave them."""
        self.gradient: Tensor | None = None
        """The gradient at the last block's output; None if the loss does not depend on it."""

    def before(self, index: int) -> Callable[..., None]:
        name = self.blocks.names[index]

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.is_inside or index != self.n_called:
                raise ValueError(f"{name} is called more than once, or not in its order: {ALL_AT_ONCE}")
            call = Call(args, kwargs)
            x = call.x
            if not isinstance(x, Tensor) or not x.is_floating_point():
                found = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise ValueError(f"{name}: its first argument must be the hidden states, but is {found}")
            if self.output is not None and (x is not self.output or version_of(x) != self.version):
                raise ValueError(
                    f"{name}: its first argument is not the output of the block before it, as it came: {ALL_AT_ONCE}"
                )
            if autocast_modes() != self.autocast:
                raise ValueError(
                    f"{name} runs under an autocast of the model or the loss: call collect_statistics in it"
                )
            if self.with_gradients:
                for which, value in call.others().items():
                    if _needs_gradient(value):
                        raise ValueError(f"{name}: its {which} needs a gradient, which would be lost: {ALL_AT_ONCE}")
            try:
                self.calls.add(call)
            except TypeError as error:
                hint = "; a model of Hugging Face passes no cache with use_cache=False" if "Cache" in str(error) else ""
                raise ValueError(f"{name}: {error}{hint}") from None
            self.put_input(index, x)
            self.is_inside, self.had_gradients = True, torch.is_grad_enabled()
            torch.set_grad_enabled(False)

        return hook

    def after(self, index: int) -> Callable[..., Any]:
        name = self.blocks.names[index]

        def hook(_module: nn.Module, _args: object, output: Any) -> Any:
            torch.set_grad_enabled(self.had_gradients)
            self.is_inside, self.n_called = False, index + 1
            try:
                first = hidden_states(output)
            except TypeError as error:
                raise ValueError(f"{name}: {error}") from None
            if self.with_gradients and self.had_gradients:
                first = _cut(first, last if self.n_called == len(self.blocks.modules) else lost)
                rest = output[1:] if isinstance(output, tuple) else ()
                rest = tuple(_cut(each, lost) if _is_real(each) else each for each in rest)
                output = (first, *rest) if isinstance(output, tuple) else first
            self.output, self.version = first, version_of(first)
            return output

        def last(gradient: Tensor) -> None:
            self.gradient = gradient

        def lost(_: Tensor) -> None:
            raise ValueError(f"{name}: the loss reads its output beside the next block, too: {ALL_AT_ONCE}")

        return hook

    def last_output(self) -> Tensor | None:
        """The output of the last block; None if the model has written into it."""
        assert self.output is not None
        return self.output.detach() if version_of(self.output) == self.version else None

    def layer_check(self, name: str, is_within: bool) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if is_within and not self.is_inside:
                raise ValueError(f"{name} is a layer of a block, but is also called outside the blocks: {ALL_AT_ONCE}")
            if not is_within and self.with_gradients and self.n_called < len(self.blocks.modules):
                raise ValueError(
                    f"{name} is called before {self.blocks.names[-1]} has ended, so its gradient would be lost: leave "
                    f"it out of `modules`, or {ALL_AT_ONCE}"
                )

        return hook


def autocast_modes() -> dict[str, str]:
    """By kind of device, the dtype of autocast, or "off"."""
    return {
        kind: str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off"
        for kind in ("cpu", "cuda")
    }


def _cut(y: Tensor, hook: Callable[[Tensor], None]) -> Tensor:
    """The values, whose gradient goes to the hook and no further."""
    y = y.detach().requires_grad_().clone()  # no leaf, because owners may write into it
    y.register_hook(hook)
    return y


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _needs_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, tuple | list):
        return any(map(_needs_gradient, value))
    return isinstance(value, dict) and any(map(_needs_gradient, value.values()))
