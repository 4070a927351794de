"""A model of any kind is loaded as it was saved, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from own_kinds import OWN_KINDS
from saved_models import assert_same, change, fill, linear, make_net, make_odd, normal, round_trip, shrink
from torch import nn
from torch.nn.utils import parametrizations, prune

import mpo_core

kinds = pytest.mark.parametrize("kind", OWN_KINDS)


# Kinds of layers ------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_kind_in_every_dtype(tmp_path, kind, dtype):
    model = make_net(dtype)
    small = shrink(model, kind)
    x = normal(5, 8, seed=9, dtype=dtype)
    for like in (model, lambda: make_net(torch.float32), small, mpo_core.decompress(small)):
        before = copy.deepcopy(like) if isinstance(like, nn.Module) else None
        loaded = round_trip(small, tmp_path / "small", like)
        assert torch.equal(loaded(x), small(x))
        assert [str(layer) for layer in loaded] == [str(layer) for layer in small]
        if before is not None:
            assert_same(like, before)
    for one in (loaded, small):
        one(x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(loaded.parameters(), small.parameters(), strict=True))


@kinds
def test_every_kind_is_copied_moved_and_made_again(kind):
    model = make_net()
    for layer, fresh in zip(shrink(model, kind)[::2], shrink(model, kind)[::2], strict=True):
        x = normal(3, layer.in_features)
        again = type(layer)(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta", **layer.options()
        ).to_empty(device="cpu")
        again.load_state_dict(layer.state_dict())
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            next(fresh.parameters()).zero_()
        fresh.load_state_dict(layer.state_dict())
        for other in (again, twin, fresh, copy.deepcopy(layer).double().float()):
            assert str(other) == str(layer)
            assert torch.equal(other(x), layer(x))
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert not torch.equal(twin(x), layer(x))
        assert layer.to(torch.bfloat16)(x.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        {"chi": 1000},
        {"chi": 3, "n_sites": 3, "padding": True},
        {"chi": 16, "n_sites": 1},
        {"bonds": (1, 2, 90, 1), "d_out": (2, 2, 3), "d_in": (2, 2, 2)},
        {"bonds": (1, 5, 1, 1), "d_out": (2, 2, 3), "d_in": (2, 2, 2)},
        {"max_params": 70},
    ],
)
@pytest.mark.parametrize("mode", mpo_core.FORWARD_MODES)
def test_a_chain_of_any_sizes_is_loaded_alone(tmp_path, options, mode):
    layer = mpo_core.MPOLinear(8, 12, generator=torch.Generator().manual_seed(0), forward=mode, **options).eval()
    loaded = round_trip(layer, tmp_path)
    assert (str(loaded), loaded.chi, loaded.forward_mode) == (str(layer), layer.chi, mode)
    if mode != "auto":  # which may choose otherwise on another day
        assert torch.equal(loaded(normal(3, 8)), layer(normal(3, 8)))


class Scaled(mpo_core.LowRankLinear):
    """A kind of a user's own, with a buffer and an option more."""

    def __init__(self, in_features, out_features, *, scale, **options):
        super().__init__(in_features, out_features, **options)
        self.scale = scale
        self.register_buffer("seen", torch.zeros(3, device=options.get("device")))

    def options(self):
        return {**super().options(), "scale": self.scale}

    def forward(self, x):
        return self.scale * super().forward(x)


def make_scaled():
    generator = torch.Generator().manual_seed(0)
    return nn.Sequential(Scaled(8, 4, rank=2, scale=3.0, generator=generator), nn.ReLU())


def test_a_kind_that_a_user_defines(tmp_path):
    model = make_scaled()
    assert (mpo_core.MPOLinear.kind, Scaled.kind) == ("mpo", "Scaled")
    like = fill(nn.Sequential(linear(8, 4), nn.ReLU()))
    assert torch.equal(round_trip(model, tmp_path, like)(normal(2, 8)), model(normal(2, 8)))
    change(tmp_path, lambda content: content["layers"][0].update(kind="unheard_of"))
    with pytest.raises(ValueError, match="no kind of layer is called 'unheard_of'"):
        mpo_core.load(tmp_path, like)


def test_two_kinds_of_one_name_are_not_confused(tmp_path):
    class Twice(Scaled):
        pass

    layer = Twice(8, 4, rank=2, scale=3.0, generator=torch.Generator().manual_seed(0))
    round_trip(layer, tmp_path)
    other = type("Twice", (Scaled,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match=r"more than one .*elsewhere\.Twice"):
        mpo_core.load(tmp_path)
    assert other.kind == Twice.kind == "Twice"


def test_a_kind_that_does_not_make_itself_again_is_not_saved(tmp_path):
    class Bare(mpo_core.StructuredLinear):
        def __init__(self, in_features, out_features, bias=True, device=None):
            super().__init__(in_features, out_features, bias, device, None)

    class Forgetful(Scaled):
        def options(self):
            return {"rank": 1, "scale": self.scale}

    class Wrong(Scaled):
        def options(self):
            return {"rank": self.rank}

    generator = torch.Generator().manual_seed(0)
    for layer, message in (
        (Bare(8, 4), "0: Bare cannot be saved, since it does not define `options`"),
        (Forgetful(8, 4, rank=2, scale=1.0, generator=generator), r"`options` .*'rank': 1.* lead to"),
        (Wrong(8, 4, rank=2, scale=1.0, generator=generator), "0: Wrong with .* argument: 'scale'"),
        (
            parametrizations.weight_norm(mpo_core.LowRankLinear(8, 4, rank=2, generator=generator), "A"),
            "0: its parameters are parametrized",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            mpo_core.save(nn.Sequential(layer), tmp_path / "small")
    assert not (tmp_path / "small").exists()


# Models ---------------------------------------------------------------------------------------------------------------


@kinds
def test_a_model_of_ties_buffers_and_shared_modules(tmp_path, kind):
    model = make_odd().eval()
    model.rnn.train()
    for frozen in (model.gain, model.first.weight, model.block["a b/é"].bias):
        frozen.requires_grad_(False)
    model.block.bfloat16()
    small = shrink(model, kind, exclude=["head"])
    small.block["weight"].float()
    assert small.first is small.again
    assert small.first is not small.second
    like = make_odd()
    loaded = round_trip(small, tmp_path, like)
    assert loaded.first is loaded.again
    assert loaded.block is loaded.same_block
    assert loaded.head.weight is loaded.embedding.weight
    assert loaded.alias is loaded.hidden
    assert loaded.norm.num_batches_tracked == 7
    loaded.block.float()
    small.block.float()
    tokens = torch.arange(10).reshape(2, 5)
    assert torch.equal(loaded(tokens), small(tokens))
    assert_same(like, make_odd())


def test_a_dense_model_and_one_compressed_in_part(tmp_path):
    model = make_net()
    round_trip(model, tmp_path / "dense", make_net)
    round_trip(model, tmp_path / "dense", shrink(model))
    mixed = nn.Sequential(shrink(model, "mpo")[0], nn.Tanh(), shrink(model, "pruned")[2])
    round_trip(mixed, tmp_path / "mixed", make_net)
    round_trip(shrink(model, include=["2"]), tmp_path / "part", make_net)
    round_trip(model[0], tmp_path / "linear")


def test_the_layout_in_memory_is_kept_since_the_last_bits_depend_on_it(tmp_path):
    layer = fill(linear(64, 64, bias=False))
    layer.weight.data = normal(64, 64).T
    x = normal(1, 64, seed=1)
    loaded = round_trip(layer, tmp_path)
    assert loaded.weight.stride() == layer.weight.stride()
    assert torch.equal(loaded(x), layer(x))
    conv = fill(nn.Sequential(nn.Conv2d(4, 8, 3, device="meta"))).to(memory_format=torch.channels_last)
    loaded = round_trip(conv, tmp_path, conv)
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_values_that_lie_in_memory_in_other_ways(tmp_path):
    model = nn.Module()
    whole = normal(6, 6)
    model.register_buffer("part", whole[1:3, ::2])
    model.register_buffer("expanded", torch.ones(1).expand(4))
    model.register_buffer("conjugate", torch.complex(whole, whole).conj())
    model.register_buffer("flag", torch.tensor(True))
    model.register_buffer("float8", whole.to(torch.float8_e4m3fn))
    mpo_core.save(model, tmp_path)
    loaded = mpo_core.load(tmp_path, model)
    for name, buffer in model.named_buffers():
        assert loaded.get_buffer(name).dtype == buffer.dtype
        assert loaded.get_buffer(name).float().equal(buffer.float()) if name != "conjugate" else True
    assert torch.equal(loaded.conjugate, model.conjugate)
    model.register_buffer("z", whole.to(torch.complex128))
    with pytest.raises(ValueError, match=r"z is of torch\.complex128, which safetensors"):
        mpo_core.save(model, tmp_path)


def test_picogpt_is_loaded_alone(tmp_path):
    config = mpo_core.GPTConfig(vocab_size=11, d_model=8, n_heads=2, n_layers=2, context=6)
    model = mpo_core.PicoGPT(config)
    model.init_parameters(lambda name: torch.Generator().manual_seed(len(name)))
    small = shrink(model.double()).eval()  # positions in double precision are not those cast from single
    tokens = torch.arange(6)[None]
    for like in (None, lambda: mpo_core.PicoGPT(config)):
        assert torch.equal(round_trip(small, tmp_path, like)(tokens), small(tokens))
    other = mpo_core.GPTConfig(vocab_size=11, d_model=8, n_heads=4, n_layers=2, context=6)
    with pytest.raises(ValueError, match=r"has n_heads=2, but the model .* has n_heads=4"):
        mpo_core.load(tmp_path, mpo_core.PicoGPT(other))


def test_a_model_that_torch_compiles_is_saved_as_itself(tmp_path):
    small = shrink(make_net())
    mpo_core.save(torch.compile(small, backend="eager"), tmp_path)
    assert_same(mpo_core.load(tmp_path, make_net), small)


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    ],
)
def test_a_dense_layer_whose_weight_is_formed_at_each_call(tmp_path, wrap):
    def make(seed):
        model = make_net()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrap(model[0])
        return model

    model, x = make(0), normal(3, 8)
    model(x).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.eval()
    assert torch.equal(round_trip(model, tmp_path, lambda: make(1))(x), model(x))
    with pytest.raises(ValueError, match=r"ParametrizedLinear in the saved|none of that name"):
        mpo_core.load(tmp_path, make_net)
