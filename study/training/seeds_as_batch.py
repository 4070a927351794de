"""Attention under `torch.func.vmap` with the kernel that is used without vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode


class SeedsAsBatch(TorchFunctionMode):
    """Mode in which scaled dot-product attention under vmap treats the seeds as part of its batch.

    Under vmap it has no fused kernel on a CPU, and perhaps none on other devices. But attention takes a batch, so the
    kernel that serves a single seed on a device serves the stack too.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and len(args) == 3 and given.keys() == {"is_causal"}:
            return _Attention.apply(*args, given["is_causal"])
        return func(*args, **given)


class _Attention(Function):
    """Attention of query, key and value with a rule for vmap; autograd records the operations inside that rule."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Save nothing: this function has no backward of its own."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        *qkv, is_causal = args
        flat = []
        for x, dim in zip(qkv, in_dims[:3], strict=True):
            assert dim is not None  # every seed has its own parameters
            flat.append(x.movedim(dim, 0).flatten(0, 1))  # (seeds · B, H, T, C / H)
        y = nn.functional.scaled_dot_product_attention(*flat, is_causal=is_causal)
        return y.unflatten(0, (info.batch_size, -1)), 0
