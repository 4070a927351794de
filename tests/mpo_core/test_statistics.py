"""Second moments over calibration batches, and the metrics that they define."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from measured_models import Branches, assert_same_statistics, mean_square, with_ridge
from safetensors.torch import save_file
from structured_linear_case import make_linear, metric_of, normal, square_losses
from torch import nn

from mpo_core.calibration.collecting import collect_statistics
from mpo_core.calibration.moments import Moment
from mpo_core.calibration.statistics import Statistics
from mpo_core.calibration.tensor_files import StoredTensor
from mpo_core.compression.compress import compress
from mpo_core.fitting.metric import Metric
from mpo_core.layers.low_rank import LowRankLinear

# Moments --------------------------------------------------------------------------------------------------------------


def test_a_moment_is_the_mean_outer_product_over_all_batches():
    x, moment = normal(7, 5, 3), Moment()
    for part in (x[:2], x[2:3], x[3:]):
        moment.add(part)
    assert moment.n_samples == 35
    torch.testing.assert_close(moment.mean(), sum(torch.outer(row, row) for row in x.reshape(-1, 3)) / 35)
    torch.testing.assert_close(moment.mean(0.1), with_ridge(mean_square(x), 0.1))


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, 1e-6), (torch.float32, 1e-6), (torch.float64, 1e-14)]
)
def test_a_moment_of_many_batches_is_as_exact_as_its_dtype_allows(dtype, precision):
    x, moment = (100 * normal(4000, 6) + 30).to(dtype), Moment()
    for batch in x.split(8):
        moment.add(batch)
    torch.testing.assert_close(moment.mean(), mean_square(x.double()), rtol=precision, atol=1000 * precision)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(0, 2), "there are no samples"),
        (torch.zeros(4, 2), "all 4 samples are zero"),
        (torch.tensor([[1.0, math.nan]]), "values must be finite, but 1 are not"),
        (torch.tensor([[1e18, 1.0]]), r"at most 1e\+15, but got one of 1e\+18"),
        (torch.tensor(1.0), r"shape \(..., size\), but got \(\)"),
    ],
)
def test_a_moment_refuses(samples, message):
    moment = Moment()

    def mean():
        moment.add(samples)
        return moment.mean()

    with pytest.raises(ValueError, match=message):
        mean()


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        (
            [torch.zeros(2, 3).double()],
            square_losses,
            "its calibration inputs are all zero, or too small to be squared",
        ),
        ([{"x": normal(2, 3), "scale": 2.0}], None, "no calibration input reached it"),
        ([normal(2, 3)], lambda model, x: model(x).sum(-1) * 0, "its output does not change the loss of any"),
    ],
)
def test_a_layer_without_a_metric_is_named(batches, loss, message):
    model = Branches()
    statistics = collect_statistics(model, batches, loss=loss)
    assert statistics.why_not(["other"], "loss" if loss else "outputs").startswith(message)
    with pytest.raises(ValueError, match=f"measure no layer that can be replaced; for example other: {message}"):
        compress(model, layer="low_rank", keep=0.5, include=["other"], statistics=statistics)
    with pytest.raises(ValueError, match=f"^other: {message}"):
        statistics.metric("other", "loss" if loss else "outputs")


def test_held_out_batches_that_do_not_reach_a_layer_give_it_no_held_out_error():
    model, x = Branches(), normal(9, 3)
    batches = [{"x": x, "scale": scale} for scale in (1.0, 2.0)]
    statistics = collect_statistics(model, batches, held_out=0.5)
    _, report = compress(model, layer="low_rank", chi=1, statistics=statistics)
    assert {row.name: row.held_out_error is None for row in report.rows} == {"one": False, "other": True, "last": False}


def test_statistics_are_written_and_read_again(tmp_path):
    model = Branches()
    statistics = collect_statistics(model, list(normal(4, 9, 3)), loss=square_losses, held_out=0.25)
    statistics.save(tmp_path / "statistics.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    assert again.names == statistics.names
    assert_same_statistics(again, statistics)
    (tmp_path / "other").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="other is not a file of statistics"):
        Statistics.load(tmp_path / "other")
    save_file({"0": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="weights is not a file of statistics"):
        Statistics.load(tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match="missing"):
        Statistics.load(tmp_path / "missing")


def test_loaded_moments_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
    path, read = tmp_path / "statistics", []
    collect_statistics(Branches(), list(normal(4, 9, 3)), loss=square_losses, held_out=0.25).save(path)
    real = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", lambda self: read.append(self.key) or real(self))
    statistics = Statistics.load(path)
    assert statistics.has_loss
    assert [statistics.n_samples(name) for name in statistics.names] == [27] * 3
    assert statistics.why_not(statistics.names, "loss", held_out=True) is None
    assert read == []
    moments = [weakref.ref(moment) for moment in vars(statistics.metric("last", "loss")).values()]
    assert len(read) == len(moments) == 2
    assert all(moment() is None for moment in moments)
    statistics.metric("last", "loss")
    assert len(read) == 4


def test_a_file_of_loaded_statistics_may_be_written_by_themselves_but_not_by_others(tmp_path):
    path, other = tmp_path / "statistics", tmp_path / "other"
    statistics = collect_statistics(Branches(), [normal(9, 3)])
    statistics.save(path)
    loaded = Statistics.load(path)
    loaded.save(path)
    assert_same_statistics(Statistics.load(path), statistics)
    assert_same_statistics(loaded, statistics)
    loaded = Statistics.load(path)
    statistics.save(path)
    with pytest.raises(ValueError, match="statistics has been written again since it was loaded: load it again"):
        loaded.metric("last", "outputs")
    loaded = Statistics.load(path)
    loaded.read()
    collect_statistics(Branches(), [2 * normal(9, 3)]).save(other)
    other.replace(path)
    assert_same_statistics(loaded, statistics)
    path.unlink()
    assert_same_statistics(loaded, statistics)


def test_held_out_errors_are_reported_and_too_little_calibration_is_warned_of():
    model = nn.Sequential(make_linear(20, 30), nn.Tanh(), make_linear(4, 20))
    batches = list(normal(4, 8, 30))
    statistics = collect_statistics(model, batches, loss=square_losses, held_out=0.5)
    with pytest.warns(UserWarning, match="nats on held-out batches, but .* on the fitted ones: more calibration"):
        compressed, report = compress(model, layer="low_rank", keep=0.5, statistics=statistics)
    for row in report.rows:
        W, W_hat = (each.get_submodule(row.name).weight.detach() for each in (model, compressed))
        metric, held_out = (statistics.metric(row.name, "loss", held_out=each) for each in (False, True))
        assert row.error == pytest.approx(metric.error(W, W_hat))
        assert row.held_out_error == pytest.approx(held_out.error(W, W_hat))
        assert row.predicted_loss == pytest.approx(metric.norm(W - W_hat) ** 2 / 2)
        assert row.held_out_loss == pytest.approx(held_out.norm(W - W_hat) ** 2 / 2)


def test_totals_count_each_matrix_once_and_a_dense_one_loses_nothing():
    model = nn.Sequential(make_linear(16, 16), nn.Tanh(), make_linear(16, 16), nn.Tanh(), make_linear(8, 16))
    model[2].weight = model[0].weight
    statistics = collect_statistics(model, list(normal(10, 8, 16)), loss=square_losses)
    _, report = compress(model, layer="low_rank", keep=0.5, statistics=statistics)
    for field in ("predicted_loss", "held_out_loss"):
        assert report.total(field) == pytest.approx(sum(getattr(report.rows[index], field) for index in (0, 2)))
    few = collect_statistics(model, list(normal(10, 8, 16)), loss=square_losses, modules=["4"])
    _, report = compress(model, layer="low_rank", keep=0.5, statistics=few)
    dense, _, last = report.rows
    assert (dense.kind, dense.predicted_loss, dense.held_out_error) == ("dense", 0, 0)
    assert report.total("predicted_loss") == last.predicted_loss > 0


# Metrics --------------------------------------------------------------------------------------------------------------


def test_a_metric_is_the_trace_that_it_says():
    metric, E = metric_of(4, 6), normal(4, 6)
    G, S = metric.gram, metric.sensitivity
    assert metric.norm(E) ** 2 == pytest.approx(float(torch.trace(S @ E @ G @ E.T)))
    assert Metric().norm(E) == pytest.approx(float(torch.linalg.norm(E)))
    assert Metric(G).norm(E) ** 2 == pytest.approx(float(torch.trace(E @ G @ E.T)))
    torch.testing.assert_close(torch.linalg.norm(metric.weighted(E)), torch.tensor(metric.norm(E)).double())
    torch.testing.assert_close(metric.gradient(E), S @ E @ G)
    W = normal(4, 6, seed=3)
    assert metric.error(W, W - E) == pytest.approx(metric.norm(E) / metric.norm(W))
    assert (metric.error(W, W), metric.error(0 * W, W)) == (0, math.inf)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.eye(3)[:2], r"must be a square matrix, but got shape \(2, 3\)"),
        (torch.eye(3) / 0, "must be finite, but 9 entries are not"),
        (torch.zeros(3, 3), "must not be zero"),
        (torch.arange(9.0).reshape(3, 3), "must be symmetric"),
        (-torch.eye(3), "must be symmetric with no negative entry on its diagonal"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "must be positive semi-definite"),
    ],
)
def test_a_metric_refuses(moment, message):
    with pytest.raises(ValueError, match=f"`gram` {message}"):
        Metric(moment)
    with pytest.raises(ValueError, match=f"`sensitivity` {message}"):
        Metric(sensitivity=moment)


def test_a_metric_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"`sensitivity` must have shape \(4, 4\), but got \(3, 3\)"):
        Metric(sensitivity=torch.eye(3)).error(normal(4, 6), normal(4, 6))


@pytest.mark.parametrize("n_samples", [50, 3])
def test_low_rank_is_the_closed_form_optimum_under_both_moments(n_samples):
    """The oracle takes symmetric square roots; and gradient descent from the result would gain nothing.

    With 3 samples both moments are singular.
    """
    W, x, g = normal(5, 7), normal(n_samples, 7, seed=1), normal(n_samples, 5, seed=2)
    G, S = mean_square(x), mean_square(g)

    def half(M):
        values, vectors = torch.linalg.eigh(M)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    s = torch.linalg.svdvals(half(S) @ W @ half(G))
    metric = Metric(G, S)
    for rank in (1, 2):
        layer = LowRankLinear.from_matrix(W, rank=rank, metric=metric)
        expected = torch.linalg.norm(s[rank:]) / torch.linalg.norm(s)
        assert layer.error(W, metric) == pytest.approx(float(expected), abs=1e-8)
    A, B = layer.A.detach().clone().requires_grad_(), layer.B.detach().clone().requires_grad_()
    loss = torch.trace(S @ (W - A @ B) @ G @ (W - A @ B).T)
    for gradient in torch.autograd.grad(loss, (A, B)):
        assert gradient.abs().max() < 1e-8
