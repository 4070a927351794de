"""What cannot be measured block by block is refused in one line."""

from __future__ import annotations

import pytest
import torch
from measured_models import Residual, Stack
from structured_linear_case import make_linear, normal, square_losses
from test_huggingface import make_llama, make_tokens, seeded
from torch import nn
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

from mpo_core.calibration.collecting import collect_statistics, next_token_losses
from mpo_core.calibration.statistics import Statistics


def collect(model, folder, batches=None, **options):
    batches = list(normal(3, 7, 4)) if batches is None else batches
    return collect_statistics(model, batches, **{"loss": square_losses, "blocks": "blocks", **options}, folder=folder)


class Listed(Residual):
    def forward(self, x):
        return [super().forward(x)]


class Twice(Stack):
    def forward(self, x):
        return super().forward(self.blocks[0](x))


class Backwards(Stack):
    def forward(self, x):
        for block in reversed(self.blocks):
            x = block(x)
        return self.head(x)


class LeavesOut(Stack):
    def forward(self, x):
        return self.head(self.blocks[1](self.blocks[0](x)))


class Between(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = block(x) / 2
        return self.head(x)


class WritesBetween(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x *= 0.5
        return self.head(x)


class Skips(Stack):
    """As a U-net."""

    def forward(self, x):
        first = self.blocks[0](x)
        return self.head(self.blocks[2](self.blocks[1](first)) + first)


class WithMemory(Residual):
    def forward(self, x, memory=None):
        return super().forward(x) + (0 if memory is None else memory.mean())


class Crosses(Stack):
    """Attends to what a block before gave."""

    def __init__(self):
        super().__init__(WithMemory)

    def forward(self, x):
        first = self.blocks[0](x)
        return self.head(self.blocks[2](self.blocks[1](first), memory=first))


class TwoOutputs(Residual):
    def forward(self, x):
        h = self.a(x)
        return x + self.b(torch.tanh(h)), h


class ReadsSecondOutput(Stack):
    def __init__(self):
        super().__init__(TwoOutputs)

    def forward(self, x):
        more = 0
        for block in self.blocks:
            x, h = block(x)
            more = more + h.square().sum()
        return self.head(x) + more


class KeepsInside(Residual):
    """Keeps a tensor that the loss reads, as some mixtures of experts do."""

    def forward(self, x):
        self.inside = self.a(x)
        return x + self.b(torch.tanh(self.inside))


class Begins(Stack):
    """A layer before the blocks."""

    def __init__(self):
        super().__init__()
        self.first = make_linear(4, 4)

    def forward(self, x):
        return super().forward(self.first(x))


class UsesLayerOfABlock(Stack):
    def forward(self, x):
        return super().forward(x) + self.blocks[0].a(x).sum()


class Counts(Residual):
    n_calls = 0

    def forward(self, x):
        self.n_calls += 1
        return super().forward(x) * self.n_calls


class Autocast(Stack):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x.float())


class Integers(Stack):
    def __init__(self):
        super().__init__()
        self.blocks.insert(0, nn.Embedding(5, 4, dtype=torch.float64))


class Repeated(Stack):
    def __init__(self):
        super().__init__()
        self.blocks.append(self.blocks[0])


def inside_losses(model, x):
    return square_losses(model, x) + 0.1 * sum(block.inside.square().sum(-1) for block in model.blocks)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: Stack(Listed), {}, r"^blocks\.0: it returns a list, not a tensor or a tuple that begins with one"),
        (Twice, {}, r"^blocks\.0 is called more than once, or not in its order: collect without `blocks`"),
        (Backwards, {}, r"^blocks\.2 is called more than once, or not in its order"),
        (LeavesOut, {"loss": None}, r"^blocks\.2 was not called in every batch"),
        (Between, {}, r"^blocks\.1: its first argument is not the output of the block before it"),
        (WritesBetween, {}, r"^blocks\.1: its first argument is not the output of the block before it"),
        (Skips, {}, r"^blocks\.0: the loss reads its output beside the next block"),
        (Crosses, {}, r"^blocks\.2: its memory needs a gradient, which would be lost"),
        (ReadsSecondOutput, {}, r"^blocks\.\d: the loss reads its output beside the next block"),
        (
            lambda: Stack(KeepsInside),
            {"loss": inside_losses},
            r"the gradient at the input of blocks\.0 is not that of the whole model",
        ),
        (Begins, {}, r"^first is called before blocks\.2 has ended, so its gradient would be lost: leave it out"),
        (UsesLayerOfABlock, {}, r"^blocks\.0\.a is a layer of a block, but is also called outside the blocks"),
        (lambda: Stack(Counts), {}, r"^blocks\.2 gives another output when it is called alone"),
        (lambda: Stack(Counts), {"loss": None}, r"^blocks\.2 gives another output when it is called alone"),
        (lambda: Autocast().float(), {}, r"^blocks\.0 runs under an autocast of the model or the loss"),
        (
            Integers,
            {"batches": [torch.ones(3, 4, dtype=torch.int64)]},
            r"^blocks\.0: its first argument must be the hidden states, but is a tensor of torch\.int64",
        ),
        (Repeated, {}, "^blocks holds a block more than once"),
        (Stack, {"blocks": "block"}, "^`blocks` must name an nn.ModuleList .*, such as blocks, but got 'block'"),
        (Stack, {"blocks": None}, "^`blocks` and `folder` go together"),
        (Stack, {"batches": []}, "at least one batch, but got none"),
        (Stack, {"batches": [normal(2, 4) / 0]}, "^head: of its calibration inputs, values must be finite"),
        (Stack, {"loss": lambda model, x: model(x).detach()}, "does not depend on the outputs"),
        (Stack, {"batches": [(normal(2, 4), lambda: 0)]}, "^a function in a batch cannot be told from another"),
    ],
)
def test_it_says_what_cannot_be_done(make, options, message, tmp_path):
    model = make()
    with pytest.raises(ValueError, match=message) as caught:
        collect(model, tmp_path, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert torch.is_grad_enabled()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert collect(Stack(), tmp_path).has_loss  # no batch was done, so that the folder can be used


@pytest.mark.parametrize("make", [Skips, Crosses, ReadsSecondOutput, lambda: Stack(KeepsInside), Begins])
def test_without_a_loss_no_gradient_can_be_lost(make, tmp_path):
    assert collect(make(), tmp_path, loss=None).n_samples("blocks.1.b") == 21


def test_a_layer_before_the_blocks_can_be_left_out(tmp_path):
    statistics = collect(Begins(), tmp_path, modules=["blocks.0.a", "head"])
    assert statistics.names == ["blocks.0.a", "head"]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda model, tokens: model(tokens, past_key_values=DynamicCache(), use_cache=True).logits.sum(-1),
            r"^model\.layers\.0: its past_key_values holds a DynamicCache, which cannot be stored; .* use_cache=False",
        ),
        (
            lambda model, tokens: sum(h.sum(-1) for h in model(tokens, output_hidden_states=True).hidden_states),
            r"^model\.layers\.\d: the loss reads its output|^block by block, the gradient at the input of",
        ),
    ],
)
def test_models_of_hugging_face_that_read_more(loss, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        collect(make_llama(tie=True), tmp_path, [make_tokens(2, 9)], loss=loss, blocks="model.layers")


def test_encoder_and_decoder(tmp_path):
    """The first block of a T5 gives the others a bias, which might depend on what the block got."""
    config = T5Config(vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    with torch.random.fork_rng(devices=[]):
        model = seeded(T5ForConditionalGeneration(config))

    def losses(model, tokens):
        return model(tokens, decoder_input_ids=tokens).logits.square().sum(-1)

    options = {"loss": losses, "blocks": "decoder.block"}
    with pytest.raises(ValueError, match=r"^encoder\..* is called before decoder\.block\.1 has ended"):
        collect(model, tmp_path, [make_tokens(2, 9)], **options)
    decoder = [name for name, each in model.decoder.named_modules(prefix="decoder") if isinstance(each, nn.Linear)]
    with pytest.raises(ValueError, match=r"^decoder\.block\.1: its .* needs a gradient, which would be lost"):
        collect(model, tmp_path, [make_tokens(2, 9)], **options, modules=decoder)


def test_the_number_of_losses_is_that_of_all_predicted_tokens(tmp_path):
    statistics = collect(
        make_llama(tie=True), tmp_path, [make_tokens(2, 9)], loss=next_token_losses, blocks="model.layers"
    )
    assert statistics.part(held_out=False).n_losses == 16
    assert Statistics.load(tmp_path).part(held_out=False).n_losses == 16
