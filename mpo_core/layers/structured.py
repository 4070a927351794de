"""The common base of all linear layers with a structured weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mpo_core.layers.computed_weights import why_computed
from mpo_core.tensor_train.bonds import check_fraction, check_whole
from mpo_core.tensor_train.contraction import Product, cost
from mpo_core.values import check_dtype


class StructuredLinear(nn.Module):
    """y = x Wᵀ + b with x (..., in_features), y (..., out_features) and W (out_features, in_features) structured.

    A subclass is a kind of layer. Its name in files is the class argument `kind`; default: the name of the class.
    """

    kind: ClassVar[str]
    bias: nn.Parameter | None

    def __init_subclass__(cls, kind: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind or cls.__name__  # never inherited: a subclass may be made from other options

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_whole(in_features=in_features, out_features=out_features)
        check_dtype("`dtype`", dtype or torch.get_default_dtype())
        if in_features < 1 or out_features < 1:
            raise ValueError(
                "`in_features` and `out_features` must be at least 1, "
                f"but got in_features={in_features}, out_features={out_features}"
            )
        self.in_features = int(in_features)
        self.out_features = int(out_features)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @abstractmethod
    def to_matrix(self) -> Tensor:
        """W (out_features, in_features), differentiable, in the dtype of the parameters even under autocast."""
        raise NotImplementedError

    @abstractmethod
    def products(self, n_tokens: int) -> list[Product]:
        """The matrix products of a forward pass over n_tokens tokens, in evaluation mode without gradients."""
        raise NotImplementedError

    @abstractmethod
    def structure(self) -> str:
        """Short description of what fixes the shape of the parameters."""
        raise NotImplementedError

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Arguments of the constructor that make a layer with parameters of the same shapes, applied in the same way.

        Only values that JSON supports. in_features, out_features, bias and device are passed separately.
        """
        raise NotImplementedError

    @abstractmethod
    def draw(self, init: str, generator_for: Callable[[str], torch.Generator]) -> None:
        """Draw new values for the parameters of W, each from the generator of its name within this layer."""
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def from_matrix(cls, W: Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """The layer nearest to W (out_features, in_features), in W's dtype and on its device."""
        raise NotImplementedError

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Self:
        """`from_matrix` of linear.weight; bias, dtype, device, requires_grad and training mode are carried over.

        Raises:
            ValueError: as `from_matrix`; `linear` is not an nn.Linear; its weight has no values (meta device); or its
                weight is computed from other parameters.
        """
        _check_linear(linear)
        weight, bias = linear.weight, linear.bias
        layer = cls.from_matrix(weight.detach(), None if bias is None else bias.detach(), **options)
        return layer._like(linear)

    @classmethod
    def empty_like(cls, linear: nn.Linear, **options: Any) -> Self:
        """Return a layer to replace `linear`; the parameters of W are not filled yet, all else is carried over.

        Options are those of the constructor except bias, init, generator, device and dtype.

        Raises:
            ValueError: as the constructor; or `linear` is not an nn.Linear.
        """
        _check_linear(linear)
        weight, bias = linear.weight, linear.bias
        return cls._empty(weight, bias, **options)._like(linear)

    @property
    def n_params_matrix(self) -> int:
        """Number of parameters of W: all but the bias."""
        return sum(parameter.numel() for name, parameter in self.named_parameters() if name != "bias")

    def flops(self, n_tokens: int) -> int:
        """Floating-point operations of `products`, a multiply-add counted as two; the bias is left out."""
        return cost(self.products(n_tokens), 1).flops

    def bytes(self, n_tokens: int) -> int:
        """Bytes that `products` read and write, each operand once per use, copies included."""
        return cost(self.products(n_tokens), next(self.parameters()).element_size()).bytes

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self.structure()}, bias={self.bias is not None}"

    @classmethod
    def _empty(cls, W: Tensor, bias: Tensor | None, **options: Any) -> Self:
        """Return a layer of W's shape, dtype and device with this bias; the parameters of W are not filled yet."""
        options = {"bias": bias is not None, "device": "meta", "dtype": W.dtype, **options}
        layer = cls(W.shape[1], W.shape[0], **options).to_empty(device=W.device)
        if layer.bias is not None and bias is not None:
            if bias.shape != layer.bias.shape:
                raise ValueError(f"`bias` must have shape ({layer.out_features},), but got {tuple(bias.shape)}")
            layer.bias.data.copy_(bias)
        return layer

    def _draw_unless_meta(self, init: str, generator: torch.Generator | None) -> None:
        if next(self.parameters()).is_meta:
            return
        source = torch.default_generator if generator is None else generator
        self.draw(init, lambda _: source)

    @staticmethod
    def _no_autocast(parameter: Tensor) -> AbstractContextManager[object]:
        device_type = parameter.device.type
        if device_type == "meta" or not torch.is_autocast_enabled(device_type):
            return nullcontext()
        return torch.autocast(device_type, enabled=False)

    def _like(self, linear: nn.Linear) -> Self:
        if self.bias is not None and self.bias.dtype != linear.bias.dtype:
            self.bias = nn.Parameter(linear.bias.detach().clone())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_((linear.bias if name == "bias" else linear.weight).requires_grad)
        return self.train(linear.training)


def kind_called(name: str) -> type[StructuredLinear]:
    """Return the kind of layer of that name, among those that are defined so far.

    Raises:
        ValueError: there is none, or more than one.
    """
    # A class that is defined again, as in a notebook, replaces the first one.
    found = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _subclasses(StructuredLinear)}
    found = {where: kind for where, kind in found.items() if kind.kind == name}
    if not found:
        raise ValueError(f"no StructuredLinear of kind {name!r} is defined: import the module that defines it")
    if len(found) > 1:
        raise ValueError(f"more than one StructuredLinear is of kind {name!r}: {', '.join(sorted(found))}")
    return next(iter(found.values()))


def _subclasses(kind: type[StructuredLinear]) -> Iterator[type[StructuredLinear]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _check_linear(linear: object) -> None:
    # The weight of a Conv1D is the transpose; a square one could not be distinguished.
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"`linear` must be an nn.Linear, but got {type(linear).__name__}; `compress` takes a Conv1D too"
        )
    computed = why_computed(linear)
    if computed is not None:
        raise ValueError(f"`linear` cannot be decomposed: {computed}")


def check_one_cap(**caps: object) -> None:
    """Raise ValueError unless exactly one of the arguments is given."""
    if sum(cap is not None for cap in caps.values()) != 1:
        *first, last = [f"`{name}`" for name in caps]
        given = ", ".join(f"{name}={value}" for name, value in caps.items())
        raise ValueError(f"exactly one of {', '.join(first)} and {last} must be given, but got {given}")


def rank_within(rank: int | None, max_params: int | None, per_rank: int, largest: int) -> int:
    check_one_cap(rank=rank, max_params=max_params)
    if max_params is not None:
        check_whole(max_params=max_params)
        rank = max_params // per_rank
        if rank < 1:
            raise ValueError(f"rank 1 needs {per_rank} parameters, but got max_params={max_params}")
    assert rank is not None
    check_whole(rank=rank)
    if rank < 1:
        raise ValueError(f"`rank >= 1` must hold, but got rank={rank}")
    return min(int(rank), largest)


def n_needed(squares: Tensor, rel_error: float, negligible: float = 0.0) -> int:
    """Return how many of these squared parts, in descending order, to keep for at most that relative error.

    A part that is smaller than `negligible`, relative to all parts, counts as rounding and is not needed.
    """
    beyond = squares.flip(0).cumsum(0).flip(0)  # entry n: squared error of keeping n
    return int(((beyond > rel_error**2 * beyond[0]) & (squares > negligible**2 * beyond[0])).sum())


def rounding(W: Tensor) -> float:
    """Bound, relative to W's norm, below which singular values of W are zero up to rounding, as in `tt_svd`."""
    return 16 * max(W.shape) ** 0.5 * torch.finfo(torch.promote_types(W.dtype, torch.float32)).eps


def check_error(rel_error: float | None, gram: Tensor | None) -> None:
    if rel_error is not None and gram is not None:
        raise ValueError("`rel_error` is an error of W, not of outputs: give it without `gram`")
    if rel_error is not None:
        check_fraction(rel_error=rel_error)


def check_init(layer: StructuredLinear, init: str, *others: str) -> None:
    allowed = ("variance", *others)
    if init not in allowed:
        shown = " or ".join(map(repr, allowed))
        raise ValueError(f"`init` of a fresh {type(layer).__name__} must be {shown}, but got {init!r}")
