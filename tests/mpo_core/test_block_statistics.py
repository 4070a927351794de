"""Statistics that are collected block by block are those of the whole model at once."""

from __future__ import annotations

import pytest
import torch
from measured_models import Residual, Stack, assert_same_statistics
from structured_linear_case import make_linear, normal, square_losses
from test_huggingface import make_gpt2, make_llama, make_tokens, seeded
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from mpo_core.calibration.collecting import collect_statistics, next_token_losses
from mpo_core.calibration.statistics import Statistics
from mpo_core.compression.compress import compress
from mpo_core.models.picogpt import GPTConfig, PicoGPT

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def make_picogpt():
    model = PicoGPT(GPTConfig(vocab_size=11, context=8, d_model=8, n_layers=3, n_heads=2, d_ff=16))
    model.init_parameters(lambda name: torch.Generator().manual_seed(len(name)), "variance")
    return model.double()


def make_mixtral():
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    with torch.random.fork_rng(devices=[]):
        return seeded(MixtralForCausalLM(MixtralConfig(**sizes, **heads, experts_implementation="eager")))


def tokens_of(vocabulary):
    return [torch.randint(vocabulary, (2, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def both(model, batches, folder, blocks, **options):
    """The statistics of both ways."""
    plain = collect_statistics(model, batches, **options)
    return plain, collect_statistics(model, batches, blocks=blocks, folder=folder, **options)


@pytest.mark.parametrize("loss", [None, next_token_losses])
@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (make_picogpt, "blocks"),
        (lambda: make_llama(tie=True), "model.layers"),
        (lambda: make_llama(tie=False), "model.layers"),
        (make_gpt2, "transformer.h"),
        (make_mixtral, "model.layers"),
    ],
    ids=["picogpt", "llama-tied", "llama", "gpt2", "mixtral"],
)
def test_language_models_have_the_same_statistics(make, blocks, loss, tmp_path):
    model = make()
    plain, by_blocks = both(model, tokens_of(11), tmp_path, blocks, loss=loss, held_out=0.34)
    assert_same_statistics(plain, by_blocks, **TIGHT)
    assert_same_statistics(by_blocks, Statistics.load(tmp_path))
    assert by_blocks.n_samples(by_blocks.names[0], held_out=True) == 2 * 16


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_dtype_of_the_model_is_kept(dtype, precision, tmp_path):
    model = make_llama(tie=True, dtype=dtype)
    plain, by_blocks = both(model, tokens_of(50), tmp_path, "model.layers", loss=next_token_losses)
    largest = max(plain.metric(name, "loss").sensitivity.max() for name in plain.names)
    assert_same_statistics(plain, by_blocks, rtol=precision, atol=precision * float(largest))


@pytest.mark.parametrize("loss", [None, square_losses])
def test_a_sequential_is_a_list_of_blocks_and_a_layer_can_be_one(loss, tmp_path):
    model = nn.Sequential(make_linear(4, 3), nn.Tanh(), make_linear(5, 4), nn.Dropout(0.5), make_linear(2, 5))
    plain, by_blocks = both(model, list(normal(5, 7, 3)), tmp_path, "", loss=loss)
    assert by_blocks.names == ["0", "2", "4"]
    assert_same_statistics(plain, by_blocks, **TIGHT)


def test_the_model_is_left_as_it_was(tmp_path):
    model = make_llama(tie=True).train()
    for layer in model.model.layers:
        layer.gradient_checkpointing = True  # in training alone
    model.model.embed_tokens.weight.requires_grad_(False)
    before = [module.training for module in model.modules()]
    plain, by_blocks = both(model, tokens_of(50), tmp_path, "model.layers", loss=next_token_losses)
    assert_same_statistics(plain, by_blocks, **TIGHT)
    assert [module.training for module in model.modules()] == before
    assert model.config.use_cache
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["model.embed_tokens.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


class InPlace(Residual):
    def forward(self, x):
        x += self.b(torch.tanh(self.a(x)))
        return x


class WithMore(Residual):
    """Gets the hidden states by name and other arguments of every form; returns more than the hidden states."""

    def forward(self, *, scale, x, more):
        (shift, unused), factor = more["both"], more["factor"]
        assert unused is None
        return x + scale * self.b(torch.tanh(self.a(x))) * factor + shift, self.a.weight.sum()


class CallsWithMore(Stack):
    def forward(self, x):
        scale, shift = x.detach().abs().mean(), torch.ones(4, dtype=x.dtype)
        for block in self.blocks:
            shift *= 1.5  # another value for each block, in the same tensor
            x, _ = block(x=x, scale=scale, more={"both": (shift, None), "factor": [1, 0.5][1]})
        return self.head(x)


class PartlyWithoutGradients(Residual):
    def forward(self, x):
        with torch.no_grad():
            h = torch.tanh(self.a(x))
        return x + self.b(h)


class GradientsEnd(Residual):
    def forward(self, x):
        return super().forward(x.detach())


@pytest.mark.parametrize("loss", [None, square_losses])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Stack(InPlace),
        lambda: CallsWithMore(WithMore),
        lambda: Stack(PartlyWithoutGradients),
        lambda: Stack(GradientsEnd),
        lambda: Stack(n_blocks=1),
    ],
    ids=["in place", "arguments", "partly without gradients", "gradients end", "one block"],
)
def test_blocks_of_every_form(make, loss, tmp_path):
    batches = list(normal(4, 7, 4))
    # The plain way gets copies, because blocks that write in place write into the batch.
    plain = collect_statistics(make(), [x.clone() for x in batches], loss=loss)
    by_blocks = collect_statistics(make(), batches, loss=loss, blocks="blocks", folder=tmp_path)
    assert_same_statistics(plain, by_blocks, **TIGHT)


def test_hooks_of_others_run_once(tmp_path):
    model = Stack()
    model.blocks[1].register_forward_pre_hook(lambda _, args: (2 * args[0],))
    model.blocks[1].register_forward_hook(lambda _, __, y: y + 1)
    assert_same_statistics(*both(model, list(normal(4, 7, 4)), tmp_path, "blocks", loss=square_losses), **TIGHT)


@pytest.mark.filterwarnings("ignore:the predicted loss")
def test_blocks_may_share_weights_and_layers(tmp_path):
    model = Stack()
    model.blocks[1].a.weight = model.blocks[0].a.weight
    model.blocks[1].a.bias = model.blocks[0].a.bias
    model.blocks[2].b = model.blocks[0].b
    plain, by_blocks = both(model, list(normal(5, 7, 4)), tmp_path, "blocks", loss=square_losses)
    assert by_blocks.n_samples("blocks.0.b") == 2 * by_blocks.n_samples("blocks.1.b")
    assert_same_statistics(plain, by_blocks, **TIGHT)
    small, report = compress(model, layer="low_rank", keep=0.6, statistics=by_blocks)
    assert small.blocks[2].b is small.blocks[0].b
    assert {row.name: row.reason for row in report.rows}["blocks.1.a"] == "shares the parameters of blocks.0.a"


class Experts(nn.Module):
    """Each token goes to one of three experts, but to the last only if the block says so."""

    def __init__(self, index):
        super().__init__()
        self.experts = nn.ModuleList(Residual(index + expert) for expert in range(3))
        self.n_used = 2 + (index == 1)

    def forward(self, x):
        chosen = (x[..., 0] * 1e6).long() % self.n_used
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            if (chosen == index).any():
                y[chosen == index] = expert(x[chosen == index])
        return y


@pytest.mark.filterwarnings("ignore:the predicted loss")
def test_an_expert_without_tokens_stays_dense_in_one_line(tmp_path):
    model = Stack(Experts)
    batches = [normal(n, 4, seed=n) for n in (2, 9, 30, 40, 20)]  # the first reaches few experts
    plain, by_blocks = both(model, batches, tmp_path, "blocks", loss=square_losses)
    assert_same_statistics(plain, by_blocks, **TIGHT)
    _, report = compress(model, layer="low_rank", keep=0.7, statistics=by_blocks)
    reasons = {row.name: row.reason for row in report.rows}
    assert reasons["blocks.0.experts.2.a"] == "no calibration input reached it"
    assert reasons["blocks.1.experts.2.a"] != "no calibration input reached it"


@pytest.mark.filterwarnings("ignore:the predicted loss")
def test_compress_gives_the_same_with_either(tmp_path):
    model = make_llama(tie=True, dtype=torch.float32)
    plain, by_blocks = both(model, tokens_of(50), tmp_path / "blocks", "model.layers", loss=next_token_losses)
    plain.save(tmp_path / "file")
    options = {"layer": "low_rank", "keep": 0.6}
    (expected, report), *others = (
        compress(model, statistics=each, **options) for each in (plain, by_blocks, Statistics.load(tmp_path / "file"))
    )
    for small, other in others:
        assert other.rows == report.rows
        assert all(torch.equal(*pair) for pair in zip(small.parameters(), expected.parameters(), strict=True))


def test_progress_counts_each_batch_for_the_model_and_for_each_block(tmp_path):
    done = []
    collect_statistics(Stack(), list(normal(5, 7, 4)), blocks="blocks", folder=tmp_path, progress=done.append)
    assert done == list(range(1, 5 * (1 + 3) + 1))


def test_a_layer_of_chosen_names_outside_the_blocks_is_measured_with_the_whole_model(tmp_path):
    model = Stack()
    plain, by_blocks = both(
        model, list(normal(5, 7, 4)), tmp_path, "blocks", loss=square_losses, modules=["head", "blocks.1.b"]
    )
    assert sorted(by_blocks.names) == ["blocks.1.b", "head"]
    assert_same_statistics(plain, by_blocks, **TIGHT)


def test_of_a_mixture_of_experts_only_linear_layers_are_measured(tmp_path):
    """Hugging Face holds all experts of a block in one tensor, which no layer is: they stay, the rest is measured."""
    model = make_mixtral()
    statistics = collect_statistics(
        model, [make_tokens(2, 9)], loss=next_token_losses, blocks="model.layers", folder=tmp_path
    )
    assert {name.split(".")[-2] for name in statistics.names if name != "lm_head"} == {"self_attn"}
