"""A first version of PicoGPT in eager PyTorch, as many would write it: the rival of `benchmarks.training_step`.

Attention is an explicit softmax of masked scores. Every parameter is updated by itself. A batch is collected window by
window in Python. Names and values of the parameters are those of `mpo_core.PicoGPT`, so that both train the same model
on the same windows. Shapes: B sequences, T tokens, C = d_model, H heads, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mpo_core.models.picogpt import GPTConfig, PicoGPT
from study.training.train import Training, learning_rate_at


class PlainAttention(nn.Module):
    mask: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.d_model
        self.n_heads = config.n_heads
        self.query, self.key, self.value = (_linear(C, C, False) for _ in range(3))
        self.output = _linear(C, C, True)
        self.register_buffer("mask", torch.ones(config.context, config.context).tril(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = (
            layer(x).view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.n_heads)  # (B, H, T, T)
        scores = scores.masked_fill(self.mask[:T, :T] == 0, float("-inf"))
        y = torch.softmax(scores, dim=-1) @ v  # (B, H, T, C / H)
        return self.output(y.transpose(1, 2).contiguous().view(B, T, C))


class PlainFeedForward(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.d_ff is not None
        self.up, self.down = _linear(config.d_model, config.d_ff, True), _linear(config.d_ff, config.d_model, True)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.down(torch.relu(self.up(x)))


class PlainBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.attention, self.feed_forward = PlainAttention(config), PlainFeedForward(config)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class PlainGPT(nn.Module):
    """A dense `PicoGPT` as a plain model with the same values."""

    positions: Tensor

    def __init__(self, like: PicoGPT) -> None:
        super().__init__()
        config = like.config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, device="meta").to_empty(device="cpu")
        self.register_buffer("positions", like.positions.clone(), persistent=False)  # (context, C)
        self.blocks = nn.ModuleList([PlainBlock(config) for _ in range(config.n_layers)])
        self.final_norm = nn.LayerNorm(config.d_model)
        self.lm_head = _linear(config.d_model, config.vocab_size, False)
        self.load_state_dict(like.state_dict())

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.final_norm(x))


class PlainTraining:
    """Steps of a plain loop, with the windows and the schedule of a dense `Training`."""

    def __init__(self, like: Training) -> None:
        assert isinstance(like.model, PicoGPT)
        self.protocol, self.context = like.spec.protocol, like.spec.model.context
        self.model = PlainGPT(like.model)
        self.tokens, self.starts = like.corpus.train, like.training_windows._starts
        # Parameters are updated one by one, neither fused nor in lists.
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), betas=self.protocol.betas, weight_decay=self.protocol.weight_decay, foreach=False
        )
        self.step = 0

    def optimiser_step(self) -> float:
        """One update; the loss in nats."""
        T, starts = self.context, self.starts[self.step].tolist()
        inputs = torch.stack([self.tokens[start : start + T] for start in starts])
        targets = torch.stack([self.tokens[start + 1 : start + T + 1] for start in starts])
        logits = self.model(inputs)
        loss = nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.protocol.grad_clip, foreach=False)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate_at(self.step, self.protocol)
        self.optimiser.step()
        self.step += 1
        return loss.item()


def _linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    # On the meta device first, because the constructor draws from the global generator.
    return nn.Linear(in_features, out_features, bias=bias, device="meta").to_empty(device="cpu")
