"""Several kinds of layer to choose from: "auto", lists, and choices by pattern."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpo_core import LowRankLinear, MonarchLinear, MPOLinear, collect_statistics, compress
from mpo_core.layers.registry import kinds
from mpo_core.tensor_train.splitting import splits_to_try

WIDE = {"d_out": (8, 1), "d_in": (2, 16)}


def draws(seed):
    return torch.Generator().manual_seed(seed)


def layer_of(W):
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data = W.clone()
    return linear


def chain_of_halves(seed):
    """(8, 32) with one row space for both halves of the inputs: an MPO of bond 3, and of no low rank."""
    generator = draws(seed)
    A, B = torch.randn(2, 8, 3, generator=generator), torch.randn(3, 16, generator=generator)
    return torch.cat([A[0] @ B, A[1] @ B], dim=1)


def product(seed):
    generator = draws(seed)
    return torch.randn(8, 2, generator=generator) @ torch.randn(2, 32, generator=generator)


def example():
    """Two matrices: one that is a chain of halves, one of rank 2; and statistics of a loss."""
    model = nn.ModuleDict({"chain": layer_of(chain_of_halves(0)), "product": layer_of(product(1))})
    batches = [torch.randn(32, 32, generator=draws(seed)) for seed in range(5)]

    def losses(model, x):
        return (model["chain"](x) + model["product"](x)).square().sum(-1)

    return model, collect_statistics(model, batches, loss=losses, modules=["chain", "product"])


@pytest.mark.parametrize("gauge", ["free", "fixed"])
@pytest.mark.parametrize("spread", ["loss", "even"])
def test_each_matrix_takes_the_kind_that_holds_it_exactly(spread, gauge):
    model, statistics = example()
    small, report = compress(model, keep=0.5, layer="auto", gauge=gauge, statistics=statistics, spread=spread)
    rows = {row.name: row for row in report.rows}
    assert rows["chain"].kind == "mpo"
    assert rows["product"].kind == "low_rank"
    assert small["chain"].gauge == small["product"].gauge == gauge
    assert small["chain"].forward_mode == "chain"
    assert report.kept <= 0.5
    for row in report.rows:
        assert row.error < 1e-3
        assert row.predicted_loss < 1e-3


def test_an_option_of_all_kinds_counts_more_than_what_a_kind_tries():
    model, statistics = example()
    small, _ = compress(model, keep=0.5, layer="auto", statistics=statistics, forward="cached")
    assert small["chain"].forward_mode == "cached"


def test_auto_is_never_worse_than_low_rank():
    """In predicted loss on the fitted batches, at equal parameters."""
    generator = draws(3)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 12))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    batches = [torch.randn(64, 24, generator=draws(seed)) for seed in range(4)]
    statistics = collect_statistics(model, batches, loss=lambda model, x: model(x).square().sum(-1))

    def predicted(**options):
        report = compress(model, keep=0.5, statistics=statistics, **options)[1]
        assert report.kept <= 0.5
        return sum(row.predicted_loss for row in report.rows)

    assert predicted(layer="auto") <= 1.02 * predicted(layer="low_rank")
    assert predicted(layer=["low_rank", "mpo"]) <= 1.02 * predicted(layer="low_rank")


def test_a_list_takes_options_of_its_own_and_shared_ones():
    model, statistics = example()
    choices = [("mpo", WIDE), ("low_rank", {"gauge": "free"}), "monarch"]
    small, _ = compress(model, keep=0.5, layer=choices, gauge="fixed", statistics=statistics)
    assert (small["chain"].d_out, small["chain"].gauge) == ((8, 1), "fixed")
    assert isinstance(small["product"], LowRankLinear)
    assert small["product"].gauge == "free"


def test_a_mapping_chooses_by_pattern_and_the_first_counts():
    model, statistics = example()
    layer = {"ch*": ("mpo", WIDE), "chain": "low_rank"}
    small, report = compress(model, keep=0.5, layer=layer, statistics=statistics)
    assert isinstance(small["chain"], MPOLinear)
    rows = {row.name: row for row in report.rows}
    assert rows["product"].reason == "no pattern of `layer` matches it"
    assert type(small["product"]) is nn.Linear
    small, _ = compress(model, chi=2, layer={"ch*": ("mpo", WIDE), "*": "monarch"})
    assert isinstance(small["chain"], MPOLinear)
    assert isinstance(small["product"], MonarchLinear)


def test_a_choice_that_does_not_fit_a_shape_is_not_tried_there():
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 6))
    for parameter in model.parameters():
        parameter.data.normal_(generator=draws(0))
    _, report = compress(model, max_params={"0": 150, "1": 35}, layer=[("mpo", WIDE), "low_rank"])
    assert report.rows[1].kind == "low_rank"
    with pytest.raises(ValueError, match=r"^1: .*`prod\(d_out\) == out_features` must hold"):
        compress(model, max_params={"0": 150, "1": 35}, layer=[("mpo", WIDE), ("mpo", WIDE | {"gauge": "fixed"})])


def test_a_choice_that_fits_no_layer_is_refused():
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 6))
    unfit = ("mpo", {"d_out": (4, 4), "d_in": (4, 8)})
    for layer in ([unfit, "low_rank"], {"0": "low_rank", "*": ["low_rank", unfit]}):
        with pytest.raises(ValueError, match=r"^\('mpo', .*\) in `layer` fits no layer; for example \d: .* must hold"):
            compress(model, keep=0.5, layer=layer)
    compress(model, keep=0.5, layer=["low_rank", ("mpo", WIDE)])


def test_every_split_to_try_fits_and_keeps_one_side_whole():
    for m, n in ((8, 32), (32, 8), (12, 12), (7, 9)):
        splits = splits_to_try(m, n)
        assert bool(splits) == ((m, n) != (7, 9))
        for d_out, d_in in splits:
            assert (d_out[0] * d_out[1], d_in[0] * d_in[1]) == (m, n)
            assert 1 in (*d_out, *d_in)


class NeedsMore(LowRankLinear, kind="needs_more"):
    def __init__(self, *features, more, **options):
        super().__init__(*features, **options)


def test_auto_leaves_out_a_subclass_that_does_not_say_how_it_is_tried():
    model, statistics = example()
    compress(model, keep=0.5, layer="auto", statistics=statistics, spread="even")


def test_kinds_say_how_auto_tries_them():
    tried = {name for name, kind in kinds().items() if kind.options_to_try(8, 32)}
    assert tried >= {"mpo", "low_rank", "monarch"}
    assert "pruned" not in tried


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": ["mpo", "low_rank"], "chi": 2}, "with several kinds in `layer`, the size must be `keep` or"),
        ({"layer": "auto", "rel_error": 0.1}, "with several kinds in `layer`, the size must be `keep` or"),
        ({"layer": "auto", "keep": 0.5, "chi": None, "n_tiles": 2}, "`layer` .* no option `n_tiles`|'auto' has no opt"),
        ({"layer": ["mpo", ("low_rank", {"n_sites": 2})], "keep": 0.5}, "layer='low_rank' has no option `n_sites`"),
        ({"layer": ("auto", {"gauge": "fixed"}), "keep": 0.5}, "layer='auto' chooses by errors"),
        ({"layer": "auto", "init": "variance", "max_params": {"0": 9}}, "layer='auto' chooses by errors"),
        ({"layer": ["mpo", 3], "keep": 0.5}, r"`layer` must be a kind such as 'mpo', or \('mpo', options\), but got 3"),
        ({"layer": [("mpo", 3)], "keep": 0.5}, r"`layer` must be a kind such as 'mpo'.*but got \('mpo', 3\)"),
        ({"layer": 3, "keep": 0.5}, r"`layer` must be a kind such as 'mpo'.*but got 3"),
        ({"layer": [], "keep": 0.5}, "`layer` must name at least one kind, but got none"),
        ({"layer": {}, "keep": 0.5}, "`layer` must name at least one kind, but got none"),
        ({"layer": {"x*": "mpo"}, "keep": 0.5}, r"`layer` has the pattern 'x\*', but it matches none of the layers"),
        ({"layer": "best", "keep": 0.5}, "no kind of layer is called 'best'"),
        ({"layer": "auto", "keep": 0.5, "gauge": "fix"}, "^layer '(mpo|low_rank)' cannot have gauge='fix'"),
        ({"layer": "auto", "keep": 0.5, "forward": "kept"}, "^layer 'mpo' cannot have forward='kept': "),
        ({"layer": "auto", "keep": 0.5, "n_blocks": 5}, "^layer 'monarch' cannot have n_blocks=5: "),
        ({"layer": "auto", "keep": 0.5, "method": "lbfgs "}, "^`method` must be one of tt_svd, whitened, lbfgs, but"),
        ({"layer": "auto", "keep": 0.5, "max_steps": -1}, "`max_steps` and `tolerance` must not be negative"),
        ({"layer": ["low_rank", ("mpo", {"max_steps": 2.5})], "keep": 0.5}, "`max_steps` must be a whole number"),
        (
            {"layer": LowRankLinear, "keep": 0.5},
            "`layer` must be the name of a kind, such as 'low_rank', but got",
        ),
        ({"keep": 0.5, "statistics": "file"}, "`statistics` must be from collect_statistics or Statistics.load, but"),
        ({"layer": "low_rank", "keep": 0.01}, "^keep=0.01 of 64 parameters is too small: the smallest sizes of all la"),
    ],
)
def test_choices_that_are_refused(options, message):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=message):
        compress(model, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spread", ["errors", "even"])
@pytest.mark.parametrize("layer", ["auto", "low_rank", ["low_rank", "pruned"]], ids=str)
def test_a_weight_that_is_not_finite_is_named(layer, spread, value):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16))
    model[1].weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"^1: `W` must be finite to be decomposed, but 1 entries are not"):
        compress(model, keep=0.5, layer=layer, spread=spread)


def test_a_list_works_where_one_of_its_kinds_does():
    """Another may not fit the shape, or be larger than an equal share, which layers need not have."""
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 48), nn.Linear(48, 2))
    for parameter in model.parameters():
        parameter.data.normal_(generator=draws(0))
    wide = {"d_out": (64, 1), "d_in": (2, 16)}
    for layer in ("auto", ["low_rank", ("mpo", wide)], [("mpo", wide), "mpo", ("mpo", {"n_sites": 3})]):
        _, report = compress(model, keep=0.12, layer=layer)
        assert report.kept <= 0.12
