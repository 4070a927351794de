"""Statistics of one block of a model after the other: at most one block's moments are in memory.

First the whole model runs over each batch, without the blocks' gradients. The inputs of all blocks are stored, and the
gradient of the loss at the output of the last block. Then, from the last block to the first, each block runs alone over
the stored inputs. Its backward pass begins with the stored gradient and gives that of the block before it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpo_core.calibration.block_calls import Call, hidden_states
from mpo_core.calibration.block_chain import ALL_AT_ONCE, Blocks
from mpo_core.calibration.collection_folder import CollectionFolder, digest_of
from mpo_core.calibration.moments import Part
from mpo_core.calibration.recording import NO_BATCHES, is_held_out, recorded
from mpo_core.calibration.statistics import Statistics


class BlockCollection:
    """A block-by-block collection.

    Args:
        run: called with a batch and a part; runs the model, and with gradients the backward pass of the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        folder: CollectionFolder,
        run: Callable[[Any, Part], None],
        with_gradients: bool,
        held_out: float,
        progress: Callable[[int], None],
    ) -> None:
        self.model, self.blocks, self.folder, self.run = model, blocks, folder, run
        self.with_gradients, self.held_out, self.progress = with_gradients, held_out, progress

    def collect(self, batches: Iterable[Any]) -> Statistics:
        with _without_caches(self.model):
            n_batches = self._run_model(batches)
            for done, block in enumerate(reversed(range(len(self.blocks.modules)))):
                if not self.folder.has_block(block):  # no name for its moments: they would stay during the next block
                    self.folder.put_block(block, self._run_block(block, n_batches, n_batches * (done + 1)))
                self.folder.drop(block)
        return self.folder.finish()

    def _run_model(self, batches: Iterable[Any]) -> int:
        n_batches = 0
        for index, batch in enumerate(batches):
            n_batches += 1
            digest = digest_of(batch)
            if self.folder.has_batch(index, digest):
                continue
            untouched = copy.deepcopy(batch) if index == 0 else None  # a model may write into its arguments
            part = self.folder.outside.part(held_out=is_held_out(index, self.held_out))
            with (
                self.blocks.observed(self.with_gradients, partial(self._put_input, index)) as chain,
                recorded(self.model, self.blocks.outside, part, self.with_gradients),
            ):
                self.run(batch, part)
            self.folder.put_calls(index, chain.calls)
            if self.with_gradients:
                assert chain.output is not None
                gradient = torch.zeros_like(chain.output) if chain.gradient is None else chain.gradient
                self.folder.put("gradient", len(self.blocks.modules) - 1, index, gradient)
            if index == 0:
                self._check(untouched, chain.last_output())
            self.folder.put_batch(digest)
            self.progress(n_batches)
        if n_batches == 0:
            raise ValueError(NO_BATCHES)
        self.folder.put_all_batches(n_batches)
        return n_batches

    def _put_input(self, batch: int, block: int, x: Tensor) -> None:
        self.folder.put("input", block, batch, x)

    def _run_block(self, block: int, n_batches: int, done: int) -> Statistics:
        statistics = Statistics(Part(), Part())
        for batch in range(n_batches):
            part = statistics.part(held_out=is_held_out(batch, self.held_out))
            with recorded(self.model, self.blocks.layers[block], part, self.with_gradients):
                _, gradient = self._run_alone(block, batch)
            if gradient is not None and block > 0:
                self.folder.put("gradient", block - 1, batch, gradient)
            self.progress(done + batch + 1)
        return statistics

    def _run_alone(self, block: int, batch: int, gradient: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Run one block over its stored input.

        Args:
            gradient: that at the block's output. Default: the stored one.
        Returns:
            Its output, and the gradient at its input.
        """
        call = self.folder.call(block, batch)
        if not self.with_gradients:
            return call.output(self.blocks.modules[block]), None
        x = call.x.requires_grad_()
        y = call.with_x(x.clone()).output(self.blocks.modules[block])  # it may write into its input
        if y.requires_grad:
            y.backward(self.folder.get("gradient", block, batch) if gradient is None else gradient)
        return y.detach(), torch.zeros_like(x) if x.grad is None else x.grad

    # Whether a block alone does what it does in the model -------------------------------------------------------------

    def _check(self, batch: Any, output: Tensor | None) -> None:
        """Compare the outputs and gradients of the blocks that run alone with the model's, for the first batch.

        This finds what hooks cannot see: a loss that reads the inside of a block, randomness, and a state that a block
        keeps. The whole model runs with a checkpoint at each block, so that it holds the activations of only one.

        Args:
            output: that of the last block, if it is known.
        Raises:
            ValueError: they differ.
        """
        gradient, following = None, output
        for block in reversed(range(len(self.blocks.modules))):
            y, gradient = self._run_alone(block, 0, gradient)
            if following is not None and _differ(y, following):
                raise ValueError(
                    f"{self.blocks.names[block]} gives another output when it is called alone (is it random, or has "
                    f"it a state?): {ALL_AT_ONCE}"
                )
            following = self.folder.get("input", block, 0)
        if gradient is None:
            return
        if _differ(gradient, self._whole_gradient(batch)):
            raise ValueError(
                f"block by block, the gradient at the input of {self.blocks.names[0]} is not that of the whole model "
                f"(does the loss read more of the blocks than the output of the last?): {ALL_AT_ONCE}"
            )

    def _whole_gradient(self, batch: Any) -> Tensor:
        """The gradient at the first block's input."""
        inputs: list[Tensor] = []

        def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            call = Call(args, kwargs)
            inputs.append(call.x.detach().requires_grad_())
            return call.with_x(inputs[0])

        def end(_module: nn.Module, _args: object, output: Any) -> Any:
            """The loss has a gradient, even if none comes through the blocks."""
            y = hidden_states(output)
            y = y if y.requires_grad else y.detach().requires_grad_().clone()
            return y if isinstance(output, Tensor) else (y, *output[1:])

        hooks = [
            self.blocks.modules[0].register_forward_pre_hook(begin, prepend=True, with_kwargs=True),
            self.blocks.modules[-1].register_forward_hook(end),
        ]
        try:
            with _checkpointed(self.blocks.modules):
                self.run(batch, Part())
        finally:
            for hook in hooks:
                hook.remove()
        [x] = inputs
        return torch.zeros_like(x) if x.grad is None else x.grad


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether by more than rounding. Values that are not finite are refused elsewhere, with the layer's name."""
    difference = float(torch.linalg.vector_norm(one.double() - other.double()))
    return difference > torch.finfo(other.dtype).eps ** 0.5 * float(torch.linalg.vector_norm(other.double()))


@contextmanager
def _checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, each block keeps no more than its input, and runs once more in the backward pass."""

    def keeping_input(forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs)

        def run(x: Tensor) -> Any:
            args, kwargs = call.with_x(x.clone())  # it may write into its input
            return forward(*args, **kwargs)

        return checkpoint(run, call.x, use_reentrant=False, preserve_rng_state=False)

    own = {block: vars(block).get("forward") for block in blocks}
    try:
        for block in own:
            block.forward = partial(keeping_input, block.forward)
        yield
    finally:
        for block, forward in own.items():
            if forward is not None:
                block.forward = forward
            else:
                vars(block).pop("forward", None)


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Models of Hugging Face make no cache of keys and values inside, unless they are told to."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
