"""Blocks that are computed again in the backward pass: the same values and gradients with less memory."""

from __future__ import annotations

import copy

import language_models
import pytest
import torch
from torch import nn

from mpo_core import GPTConfig, PicoGPT, compress, draw_parameters, logits_of, recompute_blocks


def picogpt():
    model = PicoGPT(GPTConfig(vocab_size=30, d_model=16, n_heads=2, n_layers=3, context=16))
    generator = torch.Generator().manual_seed(0)
    draw_parameters(model, lambda name: generator, "variance")
    return model


def mpo():
    return compress(picogpt(), chi=3, init=None)[0]


def gpt2():
    model = language_models.gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def kept_bytes(model, tokens):
    """Bytes that a forward pass keeps for the backward pass, without those of parameters."""
    parameters, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = logits_of(model, tokens).square().mean()
    return loss, sum(size for at, size in kept.items() if at not in parameters)


@pytest.mark.parametrize("make", [picogpt, mpo, language_models.llama, gpt2])
def test_values_and_gradients_are_the_same_bit_for_bit_with_less_memory(make):
    plain = make().train()
    again = copy.deepcopy(plain)
    recompute_blocks(again)
    tokens = torch.randint(30, (4, 16), generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    (loss, kept), (other, kept_again) = kept_bytes(plain, tokens), kept_bytes(again, tokens)
    assert torch.equal(loss, other)
    assert kept_again < kept / 2
    loss.backward()
    other.backward()
    for (name, parameter), its in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, its.grad), name
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert torch.equal(logits_of(plain.eval(), tokens), logits_of(again.eval(), tokens))


def test_every_block_is_computed_twice():
    model, calls = picogpt(), []
    recompute_blocks(model)
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, arguments, number=number: calls.append(number))
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    assert calls == [0, 1, 2, 2, 1, 0]


def test_a_model_without_the_method_is_refused():
    with pytest.raises(ValueError, match=r"^Sequential cannot compute its activations again: it has no method `activ"):
        recompute_blocks(nn.Sequential(nn.Linear(2, 2)))
