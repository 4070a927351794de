"""MPOLinear: a drop-in for nn.Linear whose weight is a chain of cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mpo_core.fitting.descent import MAX_STEPS, TOLERANCE
from mpo_core.fitting.fit import fit_cores
from mpo_core.fitting.ladders import Rung, chain_ladder
from mpo_core.fitting.metric import Metric
from mpo_core.fitting.shared_space import STEPS, SharedSpace
from mpo_core.layers.cached_matrix import CachedMatrix
from mpo_core.layers.cost_model import choose, rates_of
from mpo_core.layers.structured import StructuredLinear, check_error, check_one_cap
from mpo_core.tensor_train.algebra import bonds_and_sizes, contract, tt_svd
from mpo_core.tensor_train.bonds import check_whole, clip_bonds
from mpo_core.tensor_train.chain_steps import is_traced
from mpo_core.tensor_train.contraction import Product, chain, cheapest_direction, pad_features, products
from mpo_core.tensor_train.factorisation import why_not
from mpo_core.tensor_train.few_rows import chain_of_few_rows, few_rows
from mpo_core.tensor_train.gauge import check_gauge, fix_cores, free_cores, n_fixed_bits
from mpo_core.tensor_train.initialisation import INITS, init_cores_
from mpo_core.tensor_train.splitting import chi_within, smaller_shapes, splits_to_try, splitter
from mpo_core.values import check_matrix

FORWARD_MODES = ("reconstruct", "chain", "cached", "auto")
_CACHED_OR_CHAIN, _RECONSTRUCT_OR_CHAIN = ("cached", "chain"), ("reconstruct", "chain")


STEP = 1.05
"""Smallest ratio between the sizes at which a chain is fitted to meet an output error, because each fit takes time."""


class MPOLinear(StructuredLinear, kind="mpo", label="MPO"):
    """y = x Wᵀ + b with W the contraction of `cores` (paper, Eq. 6 and 7).

    Args:
        chi, bonds, max_params: exactly one of them. One cap for all bonds; one for each, (1, χ_1, …, 1); or the most
            parameters that the cores may have, which gives the largest χ. The attribute `bonds` holds the actual bonds,
            clipped to the largest useful ones. The attribute `chi` holds the cap, which is the largest of the requested
            bonds.
        d_out, d_in: local sizes, one per site. Default: chosen by `factorise` with the method `factorisation` and
            n_sites.
        padding: whether prod(d_out) and prod(d_in) may exceed the features: W is then the upper left part of what the
            cores contract to.
        init: one of `mpo_core.tensor_train.initialisation.INITS`; the bias starts at zero.
        generator: source of the random cores, one after the other. Default: torch's own, as for nn.Linear.
        forward: how W is applied. "reconstruct": W is formed in every forward. "chain": W is never formed
            (`contraction.chain`). "cached": in evaluation mode W is formed once and kept, while no gradient of it is
            needed and no core changes; otherwise as "reconstruct". "auto": the fastest of these for the number of
            tokens, by a cost model with rates measured on the device (`cost_model.choose`). It keeps a dense W only if
            that is fastest. Under torch.compile and torch.func transforms "cached" and "auto" are "reconstruct". On an
            accelerator, writing to a core through `.data` does not drop the kept W: call `drop_cached_matrix`
            afterwards.
        gauge: "free", or "fixed": each core but the last, taken as a matrix with bonds[l+1] columns, has the rows of
            the identity among its own. Only the other rows are parameters, and the buffers `order_l` say where each
            belongs (`tensor_train.gauge`). This saves χ² numbers for each bond, but no FLOPs.
    Shapes:
        x: (..., in_features); y: (..., out_features).
        cores[l]: (bonds[l], d_out[l], d_in[l], bonds[l+1]); bias: (out_features,) or None.
    Raises:
        ValueError: not exactly one cap, a cap below 1, sizes that do not multiply to the features, an unknown init,
            factorisation, forward mode or gauge, or max_params that χ = 1 exceeds.
    """

    size, other_sizes = "chi", ("bonds",)
    inits = INITS

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        chi: int | None = None,
        bonds: Sequence[int] | None = None,
        max_params: int | None = None,
        n_sites: int | None = None,
        d_out: Sequence[int] | None = None,
        d_in: Sequence[int] | None = None,
        factorisation: str = "balanced",
        padding: bool = False,
        bias: bool = True,
        init: str = "variance",
        generator: torch.Generator | None = None,
        forward: str = "reconstruct",
        gauge: str = "free",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if forward not in FORWARD_MODES:
            raise ValueError(f"`forward` must be one of {', '.join(FORWARD_MODES)}, but got {forward!r}")
        check_one_cap(chi=chi, bonds=bonds, max_params=max_params)
        check_gauge(gauge)

        how = {"d_out": d_out, "d_in": d_in, "n_sites": n_sites, "factorisation": factorisation, "padding": padding}
        split = splitter(out_features, in_features, **how)
        if bonds is not None:
            if not isinstance(bonds, Sequence):
                raise ValueError(f"`bonds` must be a sequence of whole numbers, but got {bonds!r}")
            check_whole(**{f"bonds[{place}]": bond for place, bond in enumerate(bonds)})
            chi = max(bonds, default=1)
        elif max_params is not None:
            check_whole(max_params=max_params)
            chi = chi_within(max_params, split, 2 * math.isqrt(in_features * out_features), gauge)
        check_whole(chi=chi)
        assert chi is not None
        self.chi = int(chi)
        self.d_out, self.d_in = split(self.chi)
        self.n_sites = len(self.d_out)
        self.bonds = clip_bonds(chi if bonds is None else bonds, self.d_out, self.d_in)
        self.forward_mode = forward
        self._direction = cheapest_direction(self.bonds, self.d_out, self.d_in)
        self._is_exact = math.prod(self.d_out) == out_features and math.prod(self.d_in) == in_features
        self._cache: CachedMatrix | None = None
        self._held: Tensor | None = None
        self.gauge = gauge
        self.shapes = list(zip(self.bonds[:-1], self.d_out, self.d_in, self.bonds[1:], strict=True))
        self._few = few_rows(self.shapes, self._direction, gauge)
        stored: list[tuple[int, ...]] = list(self.shapes)
        if gauge == "fixed":
            for site, shape in enumerate(self.shapes[:-1]):
                rows = math.prod(shape[:3])
                stored[site] = rows - shape[3], shape[3]
                self.register_buffer(f"order_{site}", torch.arange(rows, device=device))
        self.cores = nn.ParameterList([torch.empty(shape, device=device, dtype=dtype) for shape in stored])
        self.draw_unless_meta(init, generator)

    # Making -----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_matrix(
        cls,
        W: Tensor,
        bias: Tensor | None = None,
        *,
        chi: int | None = None,
        bonds: Sequence[int] | None = None,
        rel_error: float | None = None,
        max_params: int | None = None,
        metric: Metric | None = None,
        method: str | None = None,
        max_steps: int = MAX_STEPS,
        **options: Any,
    ) -> Self:
        """Return the layer whose cores approximate W (out_features, in_features) as well as `method` can.

        Args:
            chi, bonds, max_params: as the constructor; chi may also cap the bonds that `rel_error` leads to.
            rel_error: the largest ‖W − Ŵ‖_F / ‖W‖_F allowed; the bonds follow from W.
            metric, method, max_steps: see `fitting.fit.fit_cores`. Default method: "lbfgs" in a metric, else "tt_svd".
            options: n_sites, d_out, d_in, factorisation, padding, forward and gauge, as the constructor.
        Raises:
            ValueError: as the constructor and `fit_cores`; `rel_error` together with a metric.
        """
        check_matrix(W)
        if rel_error is None:
            layer = cls.empty_for(W, bias, chi=chi, bonds=bonds, max_params=max_params, **options)
            how = {"metric": metric, "method": method, "max_steps": max_steps}
            cores = fit_cores(W, layer.d_out, layer.d_in, bonds=layer.bonds, **how)
        else:
            check_error(rel_error, metric)
            if method not in (None, "tt_svd"):
                raise ValueError(f"`rel_error` goes with the method 'tt_svd' alone, but got method={method!r}")
            if bonds is not None or max_params is not None:
                raise ValueError("`rel_error` allows no other cap than `chi`; the bonds follow from W")
            at = chi
            if at is None and options.get("factorisation") == "min_params":
                # This split counts parameters at a cap: the smallest one that is enough by the singular values.
                split = splitter(*W.shape, **_splitting(options))
                ladder = chain_ladder(W, Metric(), split, options.get("gauge", "free"))
                at = next((chi for chi, rung in enumerate(ladder, 1) if rung.error <= rel_error**2), None)
            cap = cls(W.shape[1], W.shape[0], chi=at or min(W.shape), device="meta", **options)
            cores = tt_svd(cap.pad_matrix(W), cap.d_out, cap.d_in, chi, rel_error=rel_error)
            sizes = {"bonds": bonds_and_sizes(cores)[0], "d_out": cap.d_out, "d_in": cap.d_in}
            layer = cls.empty_for(W, bias, **{**options, **sizes})
        layer._fill(cores)
        return layer

    @classmethod
    def sizes(cls, W: Tensor, **options: Any) -> list[int]:
        """The parameters of the caps χ = 1, 2, … with fewer than W, in steps of at least `STEP`."""
        sizes: list[int] = []
        for shape in smaller_shapes(W.numel(), splitter(*W.shape, **_splitting(options)), options.get("gauge", "free")):
            if not sizes or shape.n_params >= STEP * sizes[-1]:
                sizes.append(shape.n_params)
        return sizes

    @classmethod
    def rungs(cls, W: Tensor, metric: Metric | None = None, **options: Any) -> list[Rung]:
        """`chain_ladder`: a bound on the error at every cap; in a metric `corrected` by fits at some of them."""
        split = splitter(*W.shape, **_splitting(options))
        ladder = chain_ladder(W, metric or Metric(), split, options.get("gauge", "free"))
        return cls.corrected_rungs(W, metric, ladder, options)

    @classmethod
    def fit_error(cls, W: Tensor, max_params: int, metric: Metric | None = None, **options: Any) -> float:
        """Without making the cores, where a `SharedSpace` is fitted."""
        shape = cls(W.shape[1], W.shape[0], max_params=max_params, device="meta", **cls.of_constructor(options))
        is_steps = metric is not None and not metric.is_plain and options.get("method") in (None, "lbfgs")
        if metric is None or not (is_steps and shape._is_exact and SharedSpace.is_for(shape.d_out, shape.d_in)):
            return super().fit_error(W, max_params, metric, **options)
        fit = SharedSpace.of(W, metric.on(W), shape.d_out, shape.d_in)
        return fit.error(shape.bonds[1], -(-options.get("max_steps", MAX_STEPS) // STEPS), TOLERANCE)

    @classmethod
    def options_to_try(cls, out_features: int, in_features: int) -> list[dict[str, Any]]:
        """`splits_to_try`, as chains: their FLOPs then fall with their parameters, and W is never formed."""
        splits = splits_to_try(out_features, in_features)
        return [{"d_out": d_out, "d_in": d_in, "forward": "chain"} for d_out, d_in in splits]

    def why_no_smaller(self) -> str | None:
        """Why the chain has no fewer parameters than W, and which cap χ would have fewer (`why_not`)."""
        if self.gauge == "fixed":
            return super().why_no_smaller()
        return why_not(self.out_features, self.in_features, self.d_out, self.d_in, self.bonds)

    def draw(self, init: str, generator_for: Callable[[str], torch.Generator]) -> None:
        """`init_cores` with core l drawn from generator_for("cores.l")."""
        self.init_cores(init, [generator_for(f"cores.{site}") for site in range(self.n_sites)])

    def init_cores(self, init: str, generators: Sequence[torch.Generator]) -> None:
        """Draw new cores, core l from generators[l]; `init` is one of `initialisation.INITS`."""
        cores = [self.cores[0].new_empty(shape) for shape in self.shapes]
        init_cores_(
            cores,
            init,
            generators,
            in_features=self.in_features,
            out_features=self.out_features,
            chi=self.chi,
        )
        self._fill(cores)

    def pad_matrix(self, W: Tensor) -> Tensor:
        """Pad W (out_features, in_features) with zeros below and to the right, to (prod(d_out), prod(d_in))."""
        rows = math.prod(self.d_out) - self.out_features
        return pad_features(nn.functional.pad(W, (0, 0, 0, rows)), math.prod(self.d_in))

    # Applying ---------------------------------------------------------------------------------------------------------

    def to_matrix(self) -> Tensor:
        """W (out_features, in_features), differentiable, in the dtype of the cores even under autocast."""
        return self._matrix(list(self.cores))

    def _matrix(self, cores: Sequence[Tensor]) -> Tensor:
        with self.no_autocast(cores[0]):
            W = contract(self._whole(cores))
        return W if self._is_exact else W[: self.out_features, : self.in_features]

    @property
    def weight(self) -> Tensor:
        """`to_matrix()`, computed again at each access, for owners that read the weight of an nn.Linear."""
        return self.to_matrix()

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if self._held is not None:
            return nn.functional.linear(x, self._held, self.bias)
        cores = list(self.cores)  # reading a ParameterList takes microseconds
        n_tokens = x.numel() // self.in_features
        mode = self._mode(cores, n_tokens, x.requires_grad)
        if mode != "chain":
            W = self._kept_matrix(cores) if mode == "cached" else self._matrix(cores)
            return nn.functional.linear(x, W, self.bias)
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"`x.shape[-1] == in_features` must hold, but got x of shape {tuple(x.shape)}, "
                f"in_features={self.in_features}"
            )
        padded = pad_features(x, math.prod(self.d_in))
        if 0 < n_tokens <= self._few:
            y = chain_of_few_rows(cores, self._orders(), self.shapes, padded, self._direction)
        else:
            y = chain(self._whole(cores), padded, self._direction)
        y = y if self._is_exact else y[..., : self.out_features]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def products(self, n_tokens: int) -> list[Product]:
        mode = self.forward_mode
        if mode == "auto":
            # On the meta device there is nothing to measure.
            core = self.cores[0]
            mode = "reconstruct" if core.is_meta else self._fastest(core, n_tokens, False, _CACHED_OR_CHAIN)
        return products(
            mode,
            self.bonds,
            self.d_out,
            self.d_in,
            n_tokens,
            out_features=self.out_features,
            in_features=self.in_features,
            gauge=self.gauge,
        )

    def structure(self) -> str:
        """The cap, the local sizes and the bonds."""
        shape = f"chi={self.chi}, d_out={list(self.d_out)}, d_in={list(self.d_in)}, bonds={list(self.bonds)}"
        return shape if self.gauge == "free" else f"{shape}, gauge={self.gauge}"

    def options(self) -> dict[str, Any]:
        """The cap, the local sizes, padding, the forward mode and the gauge."""
        # Bonds given one by one may have been clipped. The cap then takes the place of one of them.
        caps = [(*self.bonds[:site], self.chi, *self.bonds[site + 1 :]) for site in range(1, self.n_sites)]
        fitting = (cap for cap in (self.chi, *caps) if clip_bonds(cap, self.d_out, self.d_in) == self.bonds)
        cap = next(fitting, self.bonds)
        size = {"bonds": list(cap)} if isinstance(cap, tuple) else {"chi": cap}
        sizes = {"d_out": list(self.d_out), "d_in": list(self.d_in), "padding": not self._is_exact}
        return {**size, **sizes, "forward": self.forward_mode, "gauge": self.gauge}

    @property
    def n_index_bits(self) -> int:
        """In the fixed gauge, a row number for each row of the identity."""
        return n_fixed_bits(self.bonds, self.d_out, self.d_in) if self.gauge == "fixed" else 0

    def with_gauge(self, gauge: str) -> Self:
        """A layer of the same matrix, up to rounding, in that gauge."""
        options = {**self.options(), "gauge": gauge, "bias": self.bias is not None, "dtype": self.cores[0].dtype}
        layer = type(self)(self.in_features, self.out_features, device="meta", **options)
        layer = layer.to_empty(device=self.cores[0].device)
        if not self.cores[0].is_meta:
            layer._fill([core.detach() for core in self._whole(list(self.cores))])
        return layer.taking_over(self)

    def _orders(self) -> list[Tensor]:
        if self.gauge == "free":
            return []
        return [getattr(self, f"order_{site}") for site in range(self.n_sites - 1)]

    def _fill(self, cores: Sequence[Tensor]) -> None:
        """Take over cores in the free gauge."""
        if self.gauge == "fixed":
            cores, orders = fix_cores([core.double() for core in cores])
            for ours, order in zip(self._orders(), orders, strict=True):
                ours.copy_(order)
        for core, value in zip(self.cores, cores, strict=True):
            core.data.copy_(value)

    def _whole(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """The cores in the shapes that a chain has, from what is stored."""
        return list(stored) if self.gauge == "free" else free_cores(stored, self._orders(), self.shapes)

    def fan_ins(self) -> dict[str, int]:
        """Core l sums over its left bond and its inputs, bonds[l] · d_in[l]."""
        return {f"cores.{site}": self.bonds[site] * self.d_in[site] for site in range(self.n_sites)}

    def matrix_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Core l is the matrix (bonds[l] · d_out[l], d_in[l] · bonds[l+1]).

        In the fixed gauge, a core without its rows of the identity is the matrix that is stored: its other rows, with
        bonds[l+1] columns.
        """
        shapes = {
            f"cores.{site}": (1, left * d_out, d_in * right)
            for site, (left, d_out, d_in, right) in enumerate(self.shapes)
        }
        return shapes | super().matrix_shapes()

    def proportional_to(self) -> list[str]:
        """All cores; in the fixed gauge the last one alone."""
        first = 0 if self.gauge == "free" else self.n_sites - 1
        return [f"cores.{site}" for site in range(first, self.n_sites)]

    def _mode(self, cores: Sequence[Tensor], n_tokens: int, x_has_grad: bool) -> str:
        """The mode of this call: "reconstruct", "chain" or "cached"."""
        if self.forward_mode not in FORWARD_MODES:
            raise ValueError(f"`forward` must be one of {', '.join(FORWARD_MODES)}, but got {self.forward_mode!r}")
        if self.forward_mode in ("reconstruct", "chain"):
            return self.forward_mode
        if is_traced() or cores[0].is_meta:
            return "reconstruct"  # nothing can be kept or measured while being traced or transformed
        with_grad = torch.is_grad_enabled()
        trains = with_grad and any(core.requires_grad for core in cores)
        keeps = not trains and not self.training
        if self.forward_mode == "cached":
            return "cached" if keeps else "reconstruct"
        training = trains or (with_grad and x_has_grad)
        return self._fastest(cores[0], n_tokens, training, _CACHED_OR_CHAIN if keeps else _RECONSTRUCT_OR_CHAIN)

    def _fastest(self, core: Tensor, n_tokens: int, training: bool, modes: Sequence[str]) -> str:
        rates = rates_of(core.device, _compute_dtype(core))
        how = {"training": training, "rates": rates, "modes": modes, "gauge": self.gauge}
        return choose(self.bonds, self.d_out, self.d_in, n_tokens, **how)

    # Keeping W --------------------------------------------------------------------------------------------------------

    def hold_matrix(self) -> None:
        """Form W, and apply it in every forward until `drop_cached_matrix`, or a change of mode, device or dtype.

        This holds in all forward modes. The cores get no gradient, and no call checks whether they changed, unlike in
        the mode "cached".
        """
        self._cache = None
        with torch.inference_mode(False), torch.no_grad():  # see `_kept_matrix`
            self._held = self.to_matrix().to(_compute_dtype(self.cores[0]))

    def drop_cached_matrix(self) -> None:
        """Free the W that `hold_matrix` and the modes "cached" and "auto" keep; it is formed again when needed."""
        self._cache = self._held = None

    def _kept_matrix(self, cores: Sequence[Tensor]) -> Tensor:
        dtype = _compute_dtype(cores[0])
        orders = self._orders()
        if self._cache is None or not self._cache.holds_for([*cores, *orders], dtype):
            self._cache = None
            # Outside inference mode, so that W can be used with an input that needs a gradient.
            with torch.inference_mode(False), torch.no_grad():
                self._cache = CachedMatrix([*cores, *orders], self._matrix(cores).to(dtype))
        return self._cache.W

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.drop_cached_matrix()
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        self.drop_cached_matrix()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.drop_cached_matrix()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_held": None}  # a copy forms its own W


def _compute_dtype(core: Tensor) -> torch.dtype:
    # Autocast leaves float64 as it is.
    dtype = core.dtype
    if dtype is not torch.float64:
        kind = core.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    return dtype


_NOT_SPLITTING = ("forward", "method", "max_steps", "gauge")


def _splitting(options: dict[str, Any]) -> dict[str, Any]:
    """The options that choose how the weight splits over sites."""
    return {name: option for name, option in options.items() if name not in _NOT_SPLITTING}
