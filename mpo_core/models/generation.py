"""Sampling text from a language model, token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpo_core.layers.mpo import MPOLinear
from mpo_core.models.evaluating import evaluating
from mpo_core.models.language_model import cache_of, context_of, logits_of
from mpo_core.tensor_train.bonds import check_whole


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    n_new: int,
    *,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each row of tokens by `n_new` tokens; the model sees at most the last ones that fit its context.

    No core changes in the meantime, so MPO layers in the modes "reconstruct" and "cached" form W once and hold it.

    Args:
        tokens: (B, T) int64, T >= 1.
        generator: source of the random tokens, on its own device, so that a GPU draws what a CPU does. Needed unless
            temperature is 0.
        temperature: the logits are divided by it; 0 takes the most likely token, the first in a tie.
        top_k: draw only from the top_k most likely tokens, the first in a tie. Default: from all.
        use_cache: keep keys and values of the tokens so far. Once the context is full, every position moves with each
            token. The whole window is then computed again, with or without a cache.
    Returns:
        (B, T + n_new). Every module is left in the mode (training or evaluation) it was in, also after an error.
    Raises:
        ValueError: no tokens to continue, n_new < 0, temperature < 0, top_k < 1, or no generator to draw from.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"`tokens` must have shape (B, T) with T >= 1, but got {tuple(tokens.shape)}")
    check_whole(n_new=n_new, **({} if top_k is None else {"top_k": top_k}))
    if n_new < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            "`n_new >= 0`, `temperature >= 0` and `top_k >= 1` must hold, "
            f"but got n_new={n_new}, temperature={temperature}, top_k={top_k}"
        )
    if temperature > 0 and generator is None:
        raise ValueError("tokens are drawn from `generator`, but got None; pass a torch.Generator or temperature=0")
    cache = cache_of(model, tokens.shape[0]) if use_cache else None
    context = context_of(model) or tokens.shape[1] + n_new
    with evaluating(model):
        _hold_matrices(model)  # `evaluating` frees them, also after an error
        for _ in range(n_new):
            if cache is not None and cache.length < tokens.shape[1] <= context:
                logits = logits_of(model, tokens[:, cache.length :], cache)
            else:
                logits = logits_of(model, tokens[:, -context:])
            chosen = _choose(logits[:, -1], temperature, top_k, generator)
            tokens = torch.cat([tokens, chosen.to(tokens.device)], dim=1)
    return tokens


def _hold_matrices(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, MPOLinear) and module.forward_mode in ("reconstruct", "cached"):
            module.hold_matrix()


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """(B, V) logits to (B, 1) tokens."""
    if temperature == 0 or generator is None:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.to(generator.device, torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        # In a tie keep the first, on every device: a threshold would keep them all.
        beyond = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, top_k:]
        logits = logits.scatter(-1, beyond, float("-inf"))
    return torch.multinomial(nn.functional.softmax(logits, dim=-1), 1, generator=generator)
