"""Small models with values of their own, and what must be equal after they were saved and loaded."""

from __future__ import annotations

import json

import torch
from torch import nn

import mpo_core
from mpo_core.compression import saving


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fill(model, dtype=torch.float32):
    """Every value drawn from a generator of its own place; modules are made on the meta device."""
    for index, parameter in enumerate(model.to_empty(device="cpu").parameters()):
        parameter.data = normal(*parameter.shape, seed=index) / 3
    return model.to(dtype)


def linear(in_features, out_features, bias=True):
    return nn.Linear(in_features, out_features, bias=bias, device="meta")


def make_net(dtype=torch.float32, width=12):
    return fill(nn.Sequential(linear(8, width), nn.Tanh(), linear(width, 6, bias=False)), dtype)


def shrink(model, kind="mpo", **options):
    """The model with layers of one kind in the place of all that `compress` replaces."""
    if kind == "pruned":  # whose sizes `compress` measures one by one
        options["layer"] = lambda _, linear: mpo_core.PrunedLinear.from_linear(linear, sparsity=0.5)
    else:
        options |= {"layer": kind, "chi": 2, "allow_growth": True}
    return mpo_core.compress(model, **options)[0]


def state(model):
    """All tensors under all their names, which of them are one, dtypes, frozen ones, buffers and modes."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    modules = model.named_modules(remove_duplicate=False)
    first = {}
    return [
        [(name, first.setdefault(id(tensor), name), tensor.dtype, tensor.requires_grad) for name, tensor in tensors],
        list(dict(model.named_buffers())),
        list(model.state_dict()),
        [(name, type(module).__name__, module.training) for name, module in modules],
    ]


def assert_same(loaded, model):
    assert state(loaded) == state(model)
    ours, theirs = ({**dict(one.named_parameters()), **dict(one.named_buffers())} for one in (loaded, model))
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
        assert ours[name].data_ptr() != theirs[name].data_ptr() or not theirs[name].numel()


def round_trip(model, folder, like=None):
    mpo_core.save(model, folder)
    loaded = mpo_core.load(folder, like)
    assert_same(loaded, model)
    return loaded


def change(folder, edit):
    """Edit what the index says, and give it the right checksum."""
    path = folder / saving.INDEX
    index = json.loads(path.read_text())
    edit(index["content"])
    path.write_text(json.dumps({**index, "sha256": saving._digest(index["content"])}))


class Odd(nn.Module):
    """Ties, shared modules, buffers of all sorts, strange names, what is no linear layer, a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.again = self.first
        self.block = nn.ModuleDict({"a b/é": nn.Linear(8, 8), "weight": nn.LayerNorm(8)})
        self.same_block = self.block
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.gain = nn.Parameter(torch.ones(()))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("kept", torch.arange(8))
        self.register_buffer("hidden", torch.full((8,), 0.5), persistent=False)
        self.register_buffer("alias", self.hidden, persistent=False)
        self.register_buffer("none", None)

    def forward(self, tokens):
        x, _ = self.rnn(self.embedding(tokens) * self.hidden + self.kept)
        x = self.again(self.second(self.first(x))) + self.same_block["a b/é"](self.block["weight"](x))
        return self.head(self.norm(x.mT).mT * self.gain)


def make_odd():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Odd()
        for buffer in (model.hidden, model.norm.running_mean, model.norm.running_var):
            buffer.uniform_(1, 2)
    model.norm.num_batches_tracked.fill_(7)
    return model
