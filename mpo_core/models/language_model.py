"""The interface of a causal language model: its logits, its parameters by role, and its FLOPs.

A model is a PicoGPT, one of Hugging Face, or a module of a user's own. A module of a user's own has a `forward` from
tokens (B, T) to logits (B, T, V), `init_parameters(generator_for)`, and `other_flops_per_token(context)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mpo_core.layers.mpo import MPOLinear
from mpo_core.layers.structured import StructuredLinear
from mpo_core.models.dense_layers import is_dense, shape_of
from mpo_core.models.hugging_face import HuggingFaceCache, config_of, draw_hugging_face
from mpo_core.models.picogpt import KeyValueCache, PicoGPT
from mpo_core.tensor_train.bonds import contraction_order

ROLES = ("embeddings", "matrices", "head", "rest")
_N_TRIED = 8
"""Tokens on which a model is tried."""

Cache = KeyValueCache | HuggingFaceCache
"""Keys and values of the tokens so far; `length` is their number."""


def logits_of(model: Callable[..., Any], tokens: Tensor, cache: Cache | None = None) -> Tensor:
    """Logits (B, T, V) of the token that follows each of the tokens (B, T).

    Args:
        cache: keys and values of the tokens before these, from `cache_of`. Those of the given tokens are added to it.
    """
    if isinstance(cache, HuggingFaceCache):
        return model(tokens, past_key_values=cache.tensors, use_cache=True).logits
    output = model(tokens) if cache is None else model(tokens, cache)
    return output if isinstance(output, Tensor) else output.logits


def cache_of(model: nn.Module, batch: int) -> Cache | None:
    """An empty cache for decoding; None for a module of a user's own, which has none."""
    if isinstance(model, PicoGPT):
        return KeyValueCache(model, batch)
    return None if config_of(model) is None else HuggingFaceCache(model)


def context_of(model: nn.Module) -> int | None:
    """The length of the longest sequence; None if there is no limit. A module of a user's own has it as `context`."""
    if isinstance(model, PicoGPT):
        return model.config.context
    config = config_of(model)
    return getattr(model, "context", None) if config is None else getattr(config, "max_position_embeddings", None)


def head_of(model: nn.Module) -> str | None:
    """The name of the layer that makes the logits: `lm_head`, or that of Hugging Face's output embeddings."""
    if config_of(model) is None:
        return "lm_head" if isinstance(getattr(model, "lm_head", None), nn.Module) else None
    hugging_face: Any = model
    head = hugging_face.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def parameters_by_role(model: nn.Module) -> dict[str, list[str]]:
    """Names of all parameters, by role.

    "embeddings": of every nn.Embedding. "matrices": weights of linear layers, and factors of structured ones, except
    the head. "head": the weight and bias of the layer that makes the logits; a tied weight is an embedding's. "rest":
    norms, biases and all else.
    """
    roles: dict[str, list[str]] = {role: [] for role in ROLES}
    role_of: dict[int, str] = {}
    head = head_of(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            role_of[id(module.weight)] = "embeddings"
    for name, module in model.named_modules():
        role = "head" if name == head else "matrices"
        if isinstance(module, StructuredLinear):
            factors = list(module.factors())
        elif is_dense(module):
            factors = [module.weight]
        else:
            continue
        bias = module.bias if role == "head" else None
        for parameter in [*factors, *([] if bias is None else [bias])]:
            role_of.setdefault(id(parameter), role)
    for name, parameter in model.named_parameters():
        roles[role_of.get(id(parameter), "rest")].append(name)
    return roles


def other_flops_per_token(model: nn.Module, context: int) -> int:
    """FLOPs per token outside linear layers: attention scores, and weights times values, of all pairs of tokens.

    Raises:
        ValueError: a model of Hugging Face that has other matrices, such as experts; a module of a user's own that
            does not say.
    """
    config = config_of(model)
    if config is None:
        own = getattr(model, "other_flops_per_token", None)
        if own is None:
            raise ValueError(f"{type(model).__name__} has no method `other_flops_per_token(context)`")
        return int(own(context))
    others = [name for name in parameters_by_role(model)["rest"] if model.get_parameter(name).ndim > 1]
    heads = getattr(config, "num_attention_heads", None)
    if others or not isinstance(heads, int):
        what = others[0] if others else "layers without attention heads"
        raise ValueError(f"FLOPs of {type(model).__name__} are not known: it has {what}, outside linear layers")
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 4 * context * heads * size * config.num_hidden_layers


def flops_per_token(model: nn.Module, context: int) -> int:
    """Forward FLOPs per token at sequence length `context`, one multiply-add counted as two.

    Every linear map counts 2 · out_features · in_features. This includes MPO layers, because they apply their
    reconstructed W. Other structured layers count as they are applied to one token. `other_flops_per_token` is added.
    Embedding, norms, softmax, activations and biases are left out. So is reconstruction, which does not depend on the
    number of tokens: see `reconstruct_flops`.
    """
    linear = 0
    for module in model.modules():
        if isinstance(module, MPOLinear):
            linear += 2 * module.out_features * module.in_features
        elif isinstance(module, StructuredLinear):
            linear += module.flops(1) - module.flops(0)
        elif is_dense(module):
            linear += 2 * math.prod(shape_of(module))
    return linear + other_flops_per_token(model, context)


def reconstruct_flops(model: nn.Module) -> int:
    """FLOPs per forward, for any batch, to reconstruct W of every MPOLinear in the order that `contract` uses.

    Other structured layers count what they form before they are applied, such as the halves of a tree.
    """
    return sum(
        2 * contraction_order(layer.bonds, layer.d_out, layer.d_in)[1]
        if isinstance(layer, MPOLinear)
        else layer.flops(0)
        for layer in model.modules()
        if isinstance(layer, StructuredLinear)
    )


def draw_parameters(model: nn.Module, generator_for: Callable[[str], torch.Generator], init: str | None = None) -> None:
    """Draw the initial values of a dense model, each parameter or module from a generator of its own.

    Args:
        generator_for: gives the generator for a name. The name is that of a parameter in a PicoGPT, and that of a
            module in a model of Hugging Face.
        init: see `PicoGPT.init_parameters`. Default: "paper" for a PicoGPT. Other models have only their own.
    Raises:
        ValueError: an init for a model that has only its own; a module of a user's own without `init_parameters`; a
            parameter gets no value.
    """
    own = getattr(model, "init_parameters", None)
    is_hugging_face = config_of(model) is not None
    if is_hugging_face and init is not None:
        raise ValueError(f"a model of Hugging Face has an init of its own, but got init {init!r}")
    if not is_hugging_face and own is None:
        raise ValueError(f"{type(model).__name__} has no method `init_parameters(generator_for)`")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    if is_hugging_face:
        draw_hugging_face(model, generator_for)
    else:
        assert own is not None
        own(generator_for, *(() if init is None else (init,)))
    for name, parameter in model.named_parameters():
        if bool(parameter.isnan().any()):
            raise ValueError(f"the init of {type(model).__name__} gives {name} no value")


@torch.no_grad()
def check_causal(model: nn.Module, name: str) -> None:
    """Raise ValueError if the model's prediction of a token depends on later ones, as an encoder's does."""
    device, was_training = next(model.parameters()).device, model.training
    n_tokens = min(_N_TRIED, context_of(model) or _N_TRIED)
    tokens = torch.zeros(2, n_tokens, dtype=torch.int64, device=device)
    tokens[1, -1] = 1
    try:
        one, other = logits_of(model.eval(), tokens)[:, :-1]
    finally:
        model.train(was_training)
    largest = float(one.abs().max()) if one.numel() else 0.0
    if one.numel() and float((one - other).abs().max()) > 30 * torch.finfo(one.dtype).eps * largest:
        raise ValueError(f"{name} is no causal language model: its prediction of a token depends on later tokens")


def check_trainable(model: nn.Module, name: str) -> None:
    """Raise ValueError if the model cannot be trained: its output is random, not causal, or some weights are unused.

    The gradients of its parameters are removed.
    """
    device = next(model.parameters()).device
    n_tokens = min(_N_TRIED, context_of(model) or _N_TRIED)
    tokens = torch.arange(n_tokens, device=device)[None] % 2
    logits = logits_of(model, tokens)
    with torch.no_grad():
        if not torch.equal(logits, logits_of(model, tokens)):
            raise ValueError(f"{name} gives another output at each call, for example by dropout")
    check_causal(model, name)
    logits.square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        is_used = parameter.grad is not None
        parameter.grad = None
        if parameter.requires_grad and not is_used:
            raise ValueError(f"{name} never uses its parameter {parameter_name}")


def check_flops(model: nn.Module, name: str) -> None:
    """Raise ValueError if `flops_per_token` is not what PyTorch counts; only a model of Hugging Face can be counted.

    The attention of the model is then the library's plain one, so it should not be used any more.
    """
    if config_of(model) is None:
        return
    hugging_face: Any = model
    hugging_face.set_attn_implementation("eager")  # PyTorch has no count for the fused product on a CPU
    n_tokens = min(_N_TRIED, context_of(model) or _N_TRIED)
    tokens = torch.zeros(1, n_tokens, dtype=torch.int64, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits_of(model, tokens)
    ours, theirs = n_tokens * flops_per_token(model, n_tokens), counter.get_total_flops()
    if abs(ours - theirs) > 0.01 * theirs:
        raise ValueError(f"FLOPs of {name} are not known: they would be counted as {ours:,}, but are {theirs:,}")
