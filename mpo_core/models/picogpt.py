"""PicoGPT: the paper's character-level language model (section 3.1, Table 1), dense.

Shapes in comments: B sequences, T tokens, C = d_model, H = n_heads, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpo_core.layers.mpo import MPOLinear
from mpo_core.tensor_train.initialisation import normal_

INIT_STD = 0.02
DENSE_INITS = ("paper", "variance")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The sizes of a PicoGPT; the defaults are the paper's.

    Raises:
        ValueError: a size that is not a positive integer, or heads that do not divide d_model.
    """

    vocab_size: int = 65
    d_model: int = 128
    n_heads: int = 4
    n_layers: int = 4
    context: int = 256
    """Longest sequence, in tokens."""
    d_ff: int | None = None
    """Width of the feed-forward layer. Default: 4 * d_model."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (field.name == "d_ff" and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"`{field.name}` must be a positive integer, but got {value!r}")
        if self.d_model % self.n_heads:
            raise ValueError(f"`n_heads` must divide `d_model`, but got n_heads={self.n_heads}, d_model={self.d_model}")
        if self.d_ff is None:
            object.__setattr__(self, "d_ff", 4 * self.d_model)


class Attention(nn.Module):
    """Causal multi-head self-attention; only the output projection has a bias."""

    def __init__(self, config: GPTConfig, device: torch.device | str, dtype: torch.dtype | None) -> None:
        super().__init__()
        C = config.d_model
        self.n_heads = config.n_heads
        self.query = _linear(C, C, bias=False, device=device, dtype=dtype)
        self.key = _linear(C, C, bias=False, device=device, dtype=dtype)
        self.value = _linear(C, C, bias=False, device=device, dtype=dtype)
        self.output = _linear(C, C, bias=True, device=device, dtype=dtype)

    def forward(self, x: Tensor, past: LayerCache | None = None) -> Tensor:
        B, T, C = x.shape
        split = (B, T, self.n_heads, C // self.n_heads)
        q = self.query(x).view(split).transpose(1, 2)  # (B, H, T, C / H)
        k = self.key(x).view(split).transpose(1, 2)
        v = self.value(x).view(split).transpose(1, 2)
        if past is None:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, C / H)
        else:
            k, v = past.append(k, v)  # (B, H, P + T, C / H), P tokens of them from before
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=_seen(T, k.shape[2], x.device))
        return self.output(y.transpose(1, 2).reshape(B, T, C))


def _seen(T: int, length: int, device: torch.device) -> Tensor | None:
    """(T, length) bool: which of `length` tokens each of the last T attends to; None for T = 1, which sees all."""
    return None if T == 1 else torch.ones(T, length, dtype=torch.bool, device=device).tril(length - T)


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig, device: torch.device | str, dtype: torch.dtype | None) -> None:
        super().__init__()
        assert config.d_ff is not None
        self.up = _linear(config.d_model, config.d_ff, bias=True, device=device, dtype=dtype)
        self.down = _linear(config.d_ff, config.d_model, bias=True, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.down(nn.functional.relu(self.up(x)))


class Block(nn.Module):
    """Pre-norm: each branch sees a normalised input and is added to the residual stream."""

    def __init__(self, config: GPTConfig, device: torch.device | str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, device=device, dtype=dtype)
        self.attention = Attention(config, device, dtype)
        self.feed_forward_norm = nn.LayerNorm(config.d_model, device=device, dtype=dtype)
        self.feed_forward = FeedForward(config, device, dtype)

    def forward(self, x: Tensor, past: LayerCache | None = None) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.attention(self.attention_norm(x), past)
        return x + self.feed_forward(self.feed_forward_norm(x))


class PicoGPT(nn.Module):
    """A GPT with sinusoidal positions, ReLU and no LM-head bias; 808,448 parameters at the default sizes.

    Construction draws no random numbers: linear and embedding weights are zero until `init_parameters` or
    `load_state_dict` gives them values. With `checkpoint_options`, which `recompute_blocks` sets, the backward pass
    computes every block again.
    """

    positions: Tensor

    def __init__(
        self,
        config: GPTConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_options: dict[str, Any] | None = None
        device = torch.get_default_device() if device is None else device
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, device="meta", dtype=dtype)
        _zero(self.embedding, device)
        positions = sinusoidal_positions(config.context, config.d_model).to(self.embedding.weight)
        self.register_buffer("positions", positions, persistent=False)  # (context, C)
        self.blocks = nn.ModuleList([Block(config, device, dtype) for _ in range(config.n_layers)])
        self.final_norm = nn.LayerNorm(config.d_model, device=device, dtype=dtype)
        self.lm_head = _linear(config.d_model, config.vocab_size, bias=False, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (B, T, V) of the token that follows each of the tokens (B, T), which are int64.

        Args:
            cache: keys and values of the tokens before these; those of the given tokens are added to it.
        Raises:
            ValueError: T plus the length of the cache exceeds the context.
        """
        first = 0 if cache is None else cache.length
        length = first + tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"`T <= context` must hold, but got T={length}, context={self.config.context}")
        x = self.embedding(tokens) + self.positions[first:length]  # (B, T, C)
        for index, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, cache.layers[index])
            elif self.checkpoint_options is not None and torch.is_grad_enabled():
                x = checkpoint(block, x, **self.checkpoint_options)
            else:
                x = block(x)
        return self.lm_head(self.final_norm(x))  # (B, T, V)

    def other_flops_per_token(self, context: int) -> int:
        """Scores, and weights times values: 4 · context · d_model for each block, without halving for causality."""
        return 4 * context * self.config.d_model * self.config.n_layers

    def init_parameters(self, generator_for: Callable[[str], torch.Generator], init: str = "paper") -> None:
        """Draw a dense init: normal weights, zero biases, LayerNorm weights 1; embeddings have std 0.02.

        Args:
            init: std of the linear weights. "paper": 0.02. "variance": 1 / √in_features, which is also what the MPO
                init of that name gives, so that a dense and an MPO model start at the same scale.
            generator_for: function from a parameter's name, such as "blocks.0.attention.query.weight", to its
                generator. A fresh generator per name makes a parameter's values independent of the sizes of all the
                others.
        Raises:
            ValueError: an unknown init; or a layer has been replaced (`compress` draws its cores itself).
        """
        if init not in DENSE_INITS:
            raise ValueError(f"`init` of a dense model must be one of {', '.join(DENSE_INITS)}, but got {init!r}")
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = INIT_STD
                if init == "variance" and isinstance(module, nn.Linear):
                    std = float(module.in_features) ** -0.5
                normal_(module.weight, std, generator_for(f"{name}.weight"))
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, MPOLinear):
                raise ValueError(f"only a dense PicoGPT can be drawn, but {name} is an MPOLinear")


class LayerCache:
    """Keys and values (B, H, context, C / H) of one attention layer, of which the first `length` are filled."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of T more tokens (B, H, T, C / H); return all so far."""
        first, self.length = self.length, self.length + k.shape[2]
        self._keys[:, :, first : self.length] = k
        self._values[:, :, first : self.length] = v
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]


class KeyValueCache:
    """Keys and values of the tokens so far in a PicoGPT's attention layers, for decoding without gradients."""

    def __init__(self, model: PicoGPT, batch: int) -> None:
        config, like = model.config, model.embedding.weight
        shape = (batch, config.n_heads, config.context, config.d_model // config.n_heads)
        self.layers = [LayerCache(like.new_empty(shape), like.new_empty(shape)) for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return self.layers[0].length


def sinusoidal_positions(context: int, d_model: int) -> Tensor:
    """(context, d_model) float64: sin(t / 10000^(c / d_model)) at even c, the cosine of the same angle at c + 1.

    Source: Vaswani et al. 2017, section 3.5.
    """
    t = torch.arange(context, dtype=torch.float64)[:, None]
    even = torch.arange(0, d_model, 2, dtype=torch.float64)
    angles = t / 10000 ** (even / d_model)  # (context, ceil(d_model / 2))
    positions = torch.empty(context, d_model, dtype=torch.float64)
    positions[:, 0::2] = angles.sin()
    positions[:, 1::2] = angles[:, : d_model // 2].cos()
    return positions


def _linear(
    in_features: int, out_features: int, *, bias: bool, device: torch.device | str, dtype: torch.dtype | None
) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta", dtype=dtype)
    _zero(layer, device)
    return layer


def _zero(layer: nn.Module, device: torch.device | str) -> None:
    # Layers are made on the meta device because their constructors would draw from the global generator.
    layer.to_empty(device=device)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
