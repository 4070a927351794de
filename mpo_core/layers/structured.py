"""The common base of all linear layers with a structured weight."""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mpo_core.fitting.ladders import QUICK_ABOVE, QUICK_STEPS, Rung, corrected
from mpo_core.fitting.metric import Metric
from mpo_core.layers.computed_weights import why_computed
from mpo_core.tensor_train.algebra import rel_error
from mpo_core.tensor_train.bonds import check_fraction, check_whole
from mpo_core.tensor_train.contraction import Product, cost
from mpo_core.values import check_dtype

_RESERVED = ("dense", "linear")


class StructuredLinear(nn.Module):
    """y = x Wᵀ + b with x (..., in_features), y (..., out_features) and W (out_features, in_features) structured.

    A subclass is a kind of layer. It holds everything that compression, optimisers, studies and reports need to know
    about the kind, so a new kind is one file: see docs/extending.md. The class arguments `kind` and `label` are its
    name in files and its name in figures. Defaults: the name of the class, and `kind` with spaces for underscores.
    """

    kind: ClassVar[str]
    label: ClassVar[str]
    size: ClassVar[str | None] = None
    """Name of the constructor's argument that `compress(chi=…)` sets; None if the kind has no such size."""
    other_sizes: ClassVar[tuple[str, ...]] = ()
    """Names of the constructor's other arguments that give a size."""
    inits: ClassVar[tuple[str, ...]] = ("variance",)
    """Inits that `draw` takes."""
    n_sizes: ClassVar[int] = 16
    """Number of equal steps from nothing to the dense size in which the default `sizes` tries layers."""
    compared_steps: ClassVar[int] = 8
    """Most steps of the fits of a large matrix by which this kind is compared with others, if it is fitted by steps."""
    bias: nn.Parameter | None

    def __init_subclass__(cls, kind: str | None = None, label: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if kind in _RESERVED:
            raise ValueError(f"a kind of layer cannot be called {kind!r}, the name of layers without structure")
        cls.kind = kind or cls.__name__  # never inherited: a subclass may be made from other options
        cls.label = label or cls.kind.replace("_", " ")

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

    @abstractmethod
    def fan_ins(self) -> dict[str, int]:
        """Number of inputs that an output of each factor sums over, by the name of the factor's parameter.

        `param_groups` derives learning rates and weight decay from it.
        """
        raise NotImplementedError

    def proportional_to(self) -> list[str]:
        """Names of the parameters of W to each of which W is proportional. Default: all factors in `fan_ins`.

        `param_groups` spreads the weight decay of W over them.
        """
        return list(self.fan_ins())

    def matrix_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(number of matrices, rows, columns) as which an optimiser of matrices, such as Muon, sees a factor.

        By the name of the factor's parameter, which `view` splits so. Default: each factor with two dimensions is one
        matrix. A factor that is left out is no matrix.
        """
        return {
            name: (1, parameter.shape[0], parameter.shape[1])
            for name, parameter in self.named_parameters()
            if name != "bias" and parameter.ndim == 2
        }

    @classmethod
    @abstractmethod
    def from_matrix(cls, W: Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """The layer nearest to W (out_features, in_features), in W's dtype and on its device.

        Options: exactly one of `max_params`, `rel_error` and the kind's own size; `metric`, in which it is nearest
        (default: the Frobenius norm); and the kind's own.
        """
        raise NotImplementedError

    # How large a layer can be -----------------------------------------------------------------------------------------

    @classmethod
    def sizes(cls, W: Tensor, **options: Any) -> list[int]:
        """Numbers of parameters below W's that a layer can have, ascending: enough of them to choose from."""
        shape, options = torch.empty_like(W, device="meta"), cls.of_constructor(options)
        cls.empty_for(shape, None, max_params=2 * W.numel(), **options)  # refuses options that no size makes good
        sizes: set[int] = set()
        for step in range(1, cls.n_sizes):
            with suppress(ValueError):  # even the smallest layer has more
                sizes.add(
                    cls.empty_for(shape, None, max_params=W.numel() * step // cls.n_sizes, **options).n_params_matrix
                )
        return sorted(size for size in sizes if size < W.numel())

    @classmethod
    def rungs(cls, W: Tensor, metric: Metric | None = None, **options: Any) -> list[Rung]:
        """The squared relative error in the metric at each size, for `allocate`. Default: measured."""
        fitted = (cls.from_matrix(W, max_params=size, metric=metric, **options) for size in cls.sizes(W, **options))
        return [Rung(layer.n_params_matrix, layer.error(W, metric) ** 2, layer.n_index_bits) for layer in fitted]

    @classmethod
    def corrected_rungs(
        cls, W: Tensor, metric: Metric | None, ladder: list[Rung], options: dict[str, Any]
    ) -> list[Rung]:
        """In a metric, the ladder `corrected` by fits at some sizes; for a kind that is fitted by steps."""
        if metric is None:
            return ladder

        is_quick = W.numel() > QUICK_ABOVE
        quick = {"max_steps": QUICK_STEPS} if is_quick else {}

        def measure(max_params: int) -> float:
            return cls.fit_error(W, max_params, metric, **{**quick, **options}) ** 2

        return corrected(ladder, measure, is_quick)

    @classmethod
    def fit_error(cls, W: Tensor, max_params: int, metric: Metric | None = None, **options: Any) -> float:
        """The relative error in the metric of the layer that `from_matrix` makes, up to rounding to W's dtype.

        A kind overrides this if it knows the error without making the layer.
        """
        return cls.from_matrix(W, max_params=max_params, metric=metric, **options).error(W, metric)

    def error(self, W: Tensor, metric: Metric | None = None) -> float:
        """‖W − Ŵ‖ / ‖W‖ in the metric. Default: the Frobenius norm."""
        W_hat = self.to_matrix()
        return rel_error(W, W_hat) if metric is None else metric.error(W, W_hat)

    def why_no_smaller(self) -> str | None:
        """Why the layer has no fewer parameters than a dense one, in one line; None if it has fewer."""
        dense = self.out_features * self.in_features
        if self.n_params_matrix < dense:
            return None
        return f"{self.structure()} has {self.n_params_matrix:,} parameters, the dense matrix {dense:,}"

    @classmethod
    def options_to_try(cls, out_features: int, in_features: int) -> list[dict[str, Any]]:
        """Options with which `compress(layer="auto")` tries this kind on a matrix of that shape. Default: none."""
        return []

    @classmethod
    def option_names(cls) -> set[str]:
        """Options of this kind in `compress`, in addition to those that every kind has."""
        return (_keywords(cls.__init__) | _keywords(cls.from_matrix)) - {*_OF_COMPRESS, *cls.other_sizes, cls.size}

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> None:
        """Raise ValueError if an option that only `from_matrix` takes has a value that it refuses. Default: none."""

    @classmethod
    def of_constructor(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options that the constructor takes; only `from_matrix` takes the others."""
        taken = _keywords(cls.__init__)
        return {name: option for name, option in options.items() if name in taken}

    # Making -----------------------------------------------------------------------------------------------------------

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
        return cls.empty_for(weight, bias, **options)._like(linear)

    @property
    def n_params_matrix(self) -> int:
        """Number of parameters of W: all but the bias."""
        return sum(parameter.numel() for parameter in self.factors())

    @property
    def n_index_bits(self) -> int:
        """Bits that say where the parameters of W belong, such as a mask; they count in a budget."""
        return 0

    def factors(self) -> list[nn.Parameter]:
        """The parameters of W: all but the bias."""
        return [parameter for name, parameter in self.named_parameters() if name != "bias"]

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
    def empty_for(cls, W: Tensor, bias: Tensor | None, **options: Any) -> Self:
        """Return a layer of W's shape, dtype and device with this bias; the parameters of W are not filled yet."""
        options = {"bias": bias is not None, "device": "meta", "dtype": W.dtype, **options}
        layer = cls(W.shape[1], W.shape[0], **options).to_empty(device=W.device)
        if layer.bias is not None and bias is not None:
            if bias.shape != layer.bias.shape:
                raise ValueError(f"`bias` must have shape ({layer.out_features},), but got {tuple(bias.shape)}")
            layer.bias.data.copy_(bias)
        return layer

    def taking_over(self, other: StructuredLinear) -> Self:
        """This layer, with the bias, requires_grad and training mode of a layer with as many factors."""
        self.bias = copy.deepcopy(other.bias)
        for ours, theirs in zip(self.factors(), other.factors(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        return self.train(other.training)

    def draw_unless_meta(self, init: str, generator: torch.Generator | None) -> None:
        if next(self.parameters()).is_meta:
            return
        source = torch.default_generator if generator is None else generator
        self.draw(init, lambda _: source)

    @staticmethod
    def no_autocast(parameter: Tensor) -> AbstractContextManager[object]:
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


_OF_COMPRESS = {"bias", "init", "generator", "device", "dtype", "metric", "max_params", "rel_error"}


def _keywords(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


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


def size_within(
    name: str, size: int | None, max_params: int | None, n_params: Callable[[int], int], largest: int
) -> int:
    """The size of that name, which is given or follows from max_params, at most `largest`.

    Args:
        n_params: function from a size to the parameters of the layer, which rise with it.
    """
    check_one_cap(**{name: size, "max_params": max_params})
    if max_params is not None:
        check_whole(max_params=max_params)
        size = bisect_right(range(1, largest + 1), max_params, key=n_params)
        if size < 1:
            raise ValueError(f"{name} 1 needs {n_params(1)} parameters, but got max_params={max_params}")
    assert size is not None
    check_whole(**{name: size})
    if size < 1:
        raise ValueError(f"`{name} >= 1` must hold, but got {name}={size}")
    return min(int(size), largest)


def n_needed(squares: Tensor, rel_error: float, negligible: float = 0.0) -> int:
    """Return how many of these squared parts, in descending order, to keep for at most that relative error.

    A part that is smaller than `negligible`, relative to all parts, counts as rounding and is not needed.
    """
    beyond = squares.flip(0).cumsum(0).flip(0)  # entry n: squared error of keeping n
    return int(((beyond > rel_error**2 * beyond[0]) & (squares > negligible**2 * beyond[0])).sum())


def rounding(W: Tensor) -> float:
    """Bound, relative to W's norm, below which singular values of W are zero up to rounding, as in `tt_svd`."""
    return 16 * max(W.shape) ** 0.5 * torch.finfo(torch.promote_types(W.dtype, torch.float32)).eps


def check_error(rel_error: float | None, metric: Metric | None) -> None:
    if rel_error is not None and metric is not None:
        raise ValueError("`rel_error` is an error in the Frobenius norm: give it without `metric`")
    if rel_error is not None:
        check_fraction(rel_error=rel_error)


def check_init(layer: StructuredLinear, init: str) -> None:
    if init not in layer.inits:
        shown = " or ".join(map(repr, layer.inits))
        raise ValueError(f"`init` of a fresh {type(layer).__name__} must be {shown}, but got {init!r}")
