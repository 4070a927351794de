"""Seeds trained as one model: each gets the result it has alone, whatever happens to the others."""

from __future__ import annotations

import math

import pytest
import torch

from study.training.checkpoints import Checkpoints
from study.training.seed_run import train_seed, train_seeds
from study.training.stacked import StackedTraining, clip_grads_
from study.training.storage import Storage
from study.training.train import Training
from study.training.windows import StackedWindows, Windows

SEEDS = (0, 1, 5)

ARMS = {
    "dense": {},
    "mpo": {"chi": 3},
    "paper-init": {"chi": 4, "init": "paper"},
    "mup": {"chi": 8, "n_sites": 3, "factorisation": "balanced", "lr_rule": "mup", "decay": "matrix"},
    "embeddings-rate": {"chi": 3, "protocol": {"embedding_learning_rate": 0.05}},
    "one-site": {"chi": 1, "n_sites": 1, "factorisation": "balanced"},
    "chi-1": {"chi": 1},
    "fine-tune": {"chi": 2, "start": "dense"},
    "als": {"chi": 3, "start": "dense", "refinement": "als"},
    "fixed-gauge": {"chi": 8, "n_sites": 3, "gauge": "fixed", "lr_rule": "mup", "decay": "matrix"},
    "fixed-gauge-chain": {"chi": 3, "gauge": "fixed", "forward": "chain"},
    "fixed-gauge-als": {"chi": 3, "gauge": "fixed", "start": "dense", "refinement": "als"},
    "low-rank": {"family": "low_rank", "as_chi": 2, "lr_rule": "mup"},
    "low-rank-fixed-gauge": {"family": "low_rank", "as_chi": 4, "gauge": "fixed", "decay": "matrix"},
    "monarch": {"family": "monarch", "as_chi": 4},
    "pruned": {"family": "pruned", "as_chi": 2},
    "pruned-fine-tune": {"family": "pruned", "as_chi": 2, "start": "dense", "refinement": "outputs"},
}
LOW = {"d_model": 4, "n_heads": 1, "n_layers": 1, "context": 1, "d_ff": 1}

FLOAT32 = 1e-5
"""How far a float32 loss or weight may be from the one that its seed has alone, after the few steps trained here.

Not where a gradient is zero but for rounding, which Adam scales up to steps of full size (as of an attention's output
bias with two dimensions, of which LayerNorm leaves the sign alone; of the queries and keys of a single position).
"""


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def tolerance(request):
    """Train in that dtype, and say how near a result has to come."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield 1e-9 if request.param == torch.float64 else FLOAT32
    torch.set_default_dtype(before)


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def assert_near(one, other, tolerance):
    """Two results with their weights are the same but for times, to a tolerance; of failed ones no weights are kept."""
    (result, weights), (expected, expected_weights) = one, other
    for name in ("trial", "seed", "state", "failure", "failure_step"):
        assert getattr(result, name) == getattr(expected, name)
    final, expected_final = (
        {key: value for key, value in each.final.items() if key != "train_seconds"} for each in (result, expected)
    )
    near = {"rel": tolerance, "abs": tolerance}
    assert final == pytest.approx(expected_final, **near)
    assert result.rel_errors == pytest.approx(expected.rel_errors, **near)
    assert len(result.curve) == len(expected.curve)
    for row, expected_row in zip(result.curve, expected.curve, strict=True):
        assert row == pytest.approx(expected_row, **near)
    if result.state == "complete":
        torch.testing.assert_close(weights, expected_weights, rtol=tolerance, atol=tolerance)


def assert_same(some, others):
    """Results with their weights are bit-identical but for times."""
    for (result, weights), (expected, expected_weights) in zip(some, others, strict=True):
        assert_near((result, {}), (expected, {}), 0.0) if result.state == "failed" else None
        assert result.curve == expected.curve
        assert {**result.final, "train_seconds": 0} == {**expected.final, "train_seconds": 0} or not result.final
        if result.state == "complete":
            assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


def starts_of(spec_of, corpus, seeds=SEEDS, **options):
    return {seed: train_seed(spec_of(**options), seed, corpus)[1] for seed in seeds}


# What a seed gets -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_each_seed_gets_the_result_it_has_alone(spec_of, corpus, tolerance, arm):
    spec = spec_of(**arm)
    starts = starts_of(spec_of, corpus) if "start" in arm else None
    rows = []
    stacked = train_seeds(
        spec,
        SEEDS,
        corpus,
        trial=3,
        start_weights=starts,
        start_tokens=7,
        rel_error_chis=(2,),
        on_evaluation=lambda seed, row: rows.append((seed, row)),
    )
    for seed, one in zip(SEEDS, stacked, strict=True):
        start = starts[seed] if starts is not None else None
        alone = train_seed(spec, seed, corpus, trial=3, start_weights=start, start_tokens=7, rel_error_chis=(2,))
        assert_near(one, alone, tolerance)
        assert [row for of, row in rows if of == seed] == one[0].curve
        assert one[0].ran_on == alone[0].ran_on | {"mpo.stacked": "3"}
        assert alone[0].ran_on["mpo.stacked"] == "1"
    assert len({one[0].final["final/val_loss"] for one in stacked}) == len(SEEDS)


@pytest.mark.parametrize("arm", [{}, {"chi": 1}, {"chi": 2, "start": "dense"}], ids=["dense", "mpo", "fine-tune"])
def test_lowest_shapes_get_what_they_have_alone(spec_of, corpus, tolerance, arm):
    options = {"protocol": {"batch_size": 1, "sampled_eval_batch_size": 1}, "model": LOW}
    spec = spec_of(**options, **arm)
    starts = starts_of(spec_of, corpus, **options) if "start" in arm else None
    for seed, one in zip(SEEDS, train_seeds(spec, SEEDS, corpus, start_weights=starts), strict=True):
        start = starts[seed] if starts is not None else None
        alone = train_seed(spec, seed, corpus, start_weights=start)
        if tolerance == FLOAT32:  # whatever its query and key, a single position attends to itself: see FLOAT32
            one, alone = ((result, without_queries_and_keys(weights)) for result, weights in (one, alone))
        assert_near(one, alone, tolerance)


def without_queries_and_keys(weights):
    return {name: weight for name, weight in weights.items() if ".query." not in name and ".key." not in name}


@pytest.mark.slow
def test_a_longer_training_that_clips_stays_near_the_single_one(spec_of, corpus, float64):
    spec = spec_of({"steps": 100, "grad_clip": 0.05, "weight_decay": 0.3, "eval_every": 25}, {"n_layers": 2}, chi=4)
    for seed, one in zip((3, 4), train_seeds(spec, (3, 4), corpus), strict=True):
        assert_near(one, train_seed(spec, seed, corpus), 1e-9)


def test_a_stack_of_one_is_a_seed_alone(spec_of, corpus, float64):
    [one] = train_seeds(spec_of(chi=3), (4,), corpus)
    assert_near(one, train_seed(spec_of(chi=3), 4, corpus), 1e-9)


def test_clip_grads_clips_each_seed_by_its_own_norm():
    generator = torch.Generator().manual_seed(0)
    shapes, scales = ((3, 4), (5,), (2, 1, 3)), torch.tensor([0.01, 1.0, 100.0])
    stacked = [torch.zeros(3, *shape, requires_grad=True) for shape in shapes]
    alone = [[torch.zeros(shape, requires_grad=True) for shape in shapes] for _ in scales]
    for index, parameter in enumerate(stacked):
        grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad = grad * scales.view(-1, *[1] * (grad.ndim - 1))
        for seed, own in enumerate(alone):
            own[index].grad = parameter.grad[seed].clone()
    norms = clip_grads_(stacked, 1.0)
    expected = torch.stack([torch.nn.utils.clip_grad_norm_(own, 1.0) for own in alone])
    assert norms.tolist() == pytest.approx(expected.tolist())
    assert expected[0] < 1.0 < expected[1] < expected[2]
    for index, parameter in enumerate(stacked):
        assert parameter.grad is not None
        for seed, own in enumerate(alone):
            torch.testing.assert_close(parameter.grad[seed], own[index].grad)


def test_stacked_windows_are_the_windows_side_by_side(corpus):
    every = [Windows(corpus.train, 5, 4, 8, seed, "data") for seed in SEEDS]
    stacked = StackedWindows(every, "cpu")
    for index in range(5):
        for part, batches in zip(
            stacked.batch(index), zip(*(one.batch(index) for one in every), strict=True), strict=True
        ):
            assert torch.equal(part, torch.stack(batches))


# Divergence -----------------------------------------------------------------------------------------------------------


def prepared(spec, corpus, folder, step, poisoned=(), starts=None):
    """Checkpoints of every seed at a step; some have weights whose loss or gradient is beyond all numbers."""
    checkpoints = {seed: Checkpoints(Storage(str(folder)), f"seed{seed}") for seed in SEEDS}
    for seed in SEEDS:
        training = Training(spec, seed, corpus, start_weights=starts and starts[seed])
        while training.step < step:
            if training.step in (0, 4, 8):
                training.curve.append(training._evaluation())
            training.optimiser_step()
        if seed in poisoned:
            with torch.no_grad():
                training.model.get_parameter("final_norm.weight").mul_(1e200 if spec.chi is None else math.inf)
        checkpoints[seed].save(step, *training.state())
    return checkpoints


@pytest.mark.parametrize("arm", [{}, {"chi": 3}, {"chi": 3, "start": "dense"}], ids=["dense", "mpo", "fine-tune"])
@pytest.mark.parametrize("step", [4, 7])  # with an evaluation to come, and within the training
@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_that_diverges_fails_alone(spec_of, corpus, tmp_path, float64, arm, step, seed):
    spec = spec_of(**arm)
    starts = starts_of(spec_of, corpus) if "start" in arm else None
    options = {"spec": spec, "corpus": corpus, "step": step, "poisoned": [seed], "starts": starts}
    stacked = train_seeds(
        spec, SEEDS, corpus, start_weights=starts, checkpoints=prepared(**options, folder=tmp_path / "stacked")
    )
    alone = prepared(**options, folder=tmp_path / "alone")
    for of, one in zip(SEEDS, stacked, strict=True):
        expected = train_seed(spec, of, corpus, start_weights=starts and starts[of], checkpoints=alone[of])
        assert_near(one, expected, 1e-9)
        assert (one[0].state, one[0].failure_step) == (("failed", step) if of == seed else ("complete", None))


def test_a_stack_whose_seeds_all_diverge_ends(spec_of, corpus):
    results = [result for result, _ in train_seeds(spec_of({"learning_rate": 1e4, "eval_every": 1}), SEEDS, corpus)]
    for result in results:
        assert result.state == "failed"
        assert result.failure == f"diverged: {result.failure.split(': ')[1]}"
        assert 0 < result.failure_step <= 12
        assert len(result.curve) in (result.failure_step, result.failure_step + 1)
        assert all(math.isfinite(value) for row in result.curve for value in row.values())


# Interruption ---------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class Ending(Checkpoints):
    """Checkpoints of a process that ends when it would write one too many."""

    left = 0

    def save(self, *arguments):
        if Ending.left == 0:
            raise Interrupted
        Ending.left -= 1
        super().save(*arguments)


def checkpoints_in(folder, kind=Checkpoints):
    return {seed: kind(Storage(str(folder)), f"seed{seed}") for seed in SEEDS}


def end_after(n_saved, spec, corpus, folder, **options):
    """Train until that many checkpoints are written, where the process is taken to end."""
    Ending.left = n_saved
    with pytest.raises(Interrupted):
        train_seeds(spec, SEEDS, corpus, checkpoints=checkpoints_in(folder, Ending), checkpoint_seconds=0, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arm",
    [{}, {"chi": 3}, {"chi": 3, "start": "dense"}, {"chi": 8, "n_sites": 3, "start": "dense", "gauge": "fixed"}],
    ids=["dense", "mpo", "fine-tune", "fixed-gauge"],
)
def test_stack_interrupted_at_any_checkpoint_ends_bit_identical(spec_of, corpus, tmp_path, arm):
    spec = spec_of(**arm)
    options = {"start_weights": starts_of(spec_of, corpus) if "start" in arm else None}
    expected = train_seeds(spec, SEEDS, corpus, **options)
    for n_saved in (*range(8), 16, 23, 35):  # also where some seeds have theirs of a step, and others not
        folder = tmp_path / str(n_saved)
        end_after(n_saved, spec, corpus, folder, **options)
        rows = []
        results = train_seeds(
            spec,
            SEEDS,
            corpus,
            checkpoints=checkpoints_in(folder),
            on_evaluation=lambda seed, row: rows.append(row["step"]),  # noqa: B023 (called here and now)
            **options,
        )
        assert_same(results, expected)
        assert {result.ran_on["mpo.stacked"] for result, _ in results} == {"3"}
        whole = n_saved // len(SEEDS) - 1  # the newest step that all have
        assert min(rows) > whole if whole >= 0 else min(rows) == 0  # it did go on from there


def test_stack_interrupted_again_and_again_ends_bit_identical(spec_of, corpus, tmp_path):
    spec = spec_of(chi=3)
    for n_saved in (4, 7, 5, 10):
        end_after(n_saved, spec, corpus, tmp_path)
    assert_same(
        train_seeds(spec, SEEDS, corpus, checkpoints=checkpoints_in(tmp_path)), train_seeds(spec, SEEDS, corpus)
    )


@pytest.mark.parametrize("step", [4, 7])
def test_stack_with_a_diverged_seed_interrupted_ends_as_undisturbed(spec_of, corpus, tmp_path, step):
    spec = spec_of()
    undisturbed = prepared(spec, corpus, tmp_path / "undisturbed", step, poisoned=[1])
    expected = train_seeds(spec, SEEDS, corpus, checkpoints=undisturbed)
    assert [result.state for result, _ in expected] == ["complete", "failed", "complete"]
    for n_saved in range(1, 10):
        folder = tmp_path / str(n_saved)
        prepared(spec, corpus, folder, step, poisoned=[1])
        end_after(n_saved, spec, corpus, folder)
        rows = []
        results = train_seeds(
            spec,
            SEEDS,
            corpus,
            checkpoints=checkpoints_in(folder),
            on_evaluation=lambda seed, row: rows.append(seed),  # noqa: B023
        )
        assert_same(results, expected)
        assert results[1][0].failure == expected[1][0].failure
        if n_saved > 7:
            assert set(rows) == {0, 5}  # what has diverged is not trained again


def test_stack_that_a_seed_leaves_is_kept_as_it_then_is(spec_of, corpus, tmp_path):
    spec = spec_of()
    undisturbed = prepared(spec, corpus, tmp_path / "undisturbed", 5, poisoned=[1])
    expected = train_seeds(spec, SEEDS, corpus, checkpoints=undisturbed)
    checkpoints = prepared(spec, corpus, tmp_path, 5, poisoned=[1])

    def end(seed, row):
        raise Interrupted

    with pytest.raises(Interrupted):
        train_seeds(spec, SEEDS, corpus, checkpoints=checkpoints, on_evaluation=end)  # no time for other checkpoints
    assert [each.steps() for each in checkpoints.values()] == [[5, 6], [5], [5, 6]]
    assert_same(train_seeds(spec, SEEDS, corpus, checkpoints=checkpoints), expected)


def test_stack_passes_over_a_damaged_checkpoint(spec_of, corpus, tmp_path):
    spec = spec_of(chi=3)
    end_after(3 * 8, spec, corpus, tmp_path)
    storage = Storage(str(tmp_path))
    newest = storage.keys("seed1")[-1]
    storage.write(newest, storage.read(newest)[:-1])
    results = train_seeds(spec, SEEDS, corpus, checkpoints=checkpoints_in(tmp_path))
    assert_same(results, train_seeds(spec, SEEDS, corpus))
    assert {result.ran_on["mpo.stacked"] for result, _ in results} == {"3"}


# One block size, then another -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arm",
    [{}, {"chi": 3, "lr_rule": "mup"}, {"family": "low_rank", "as_chi": 4, "gauge": "fixed"}],
    ids=["dense", "mpo", "fixed-gauge"],
)
def test_seeds_begun_stacked_can_be_finished_alone(spec_of, corpus, tmp_path, float64, arm):
    spec = spec_of(**arm)
    end_after(3 * 6 + 1, spec, corpus, tmp_path)
    checkpoints = checkpoints_in(tmp_path)
    assert [each.load()[1]["step"] for each in checkpoints.values()] == [6, 5, 5]
    for seed in SEEDS:
        rows = []
        one = train_seed(spec, seed, corpus, checkpoints=checkpoints[seed], on_evaluation=rows.append)
        assert_near(one, train_seed(spec, seed, corpus), 1e-9)
        assert rows[0]["step"] == 8


def begin_alone(spec, seed, corpus, checkpoints, step):
    """Train one seed in a process that ends at that step."""
    training = Training(spec, seed, corpus)

    def end(model, arguments):
        if torch.is_grad_enabled() and training.step == step:
            raise Interrupted

    training.model.register_forward_pre_hook(end)
    with pytest.raises(Interrupted):
        training.run(checkpoints, checkpoint_seconds=0)


@pytest.mark.parametrize(
    ("steps", "stacked", "first_rows"),
    [
        ((6, 6, 6), "333", {8}),
        ((6, 7, 6), "333", {8}),  # all had a checkpoint at step 6
        ((9, 9, 5), "221", {12, 8}),
        ((9, 5, 1), "111", {12, 8, 4}),
        ((0, 0, 0), "333", {4}),
    ],
)
def test_seeds_begun_alone_can_be_finished_stacked(spec_of, corpus, tmp_path, float64, steps, stacked, first_rows):
    spec, checkpoints = spec_of(chi=3), checkpoints_in(tmp_path)
    for seed, step in zip(SEEDS, steps, strict=True):
        begin_alone(spec, seed, corpus, checkpoints[seed], step)
        while len(checkpoints[seed].steps()) < 2 and step > 0:  # one that has gone on for longer has two
            checkpoints[seed].save(step - 1, {"nothing": torch.zeros(1)}, {})
    first: dict[int, int] = {}
    results = train_seeds(
        spec,
        SEEDS,
        corpus,
        checkpoints=checkpoints,
        on_evaluation=lambda seed, row: first.setdefault(seed, row["step"]),
    )
    for seed, one in zip(SEEDS, results, strict=True):
        assert_near(one, train_seed(spec, seed, corpus), 1e-9)
    assert "".join(result.ran_on["mpo.stacked"] for result, _ in results) == stacked
    assert set(first.values()) == first_rows


def test_seconds_are_shared_among_the_stack_and_add_up(spec_of, corpus, tmp_path):
    spec = spec_of()
    end_after(3 * 11, spec, corpus, tmp_path)
    checkpoints = checkpoints_in(tmp_path)
    before = [each.load()[1]["seconds"] for each in checkpoints.values()]
    results = [result for result, _ in train_seeds(spec, SEEDS, corpus, checkpoints=checkpoints)]
    assert 0 < before[0] < results[0].final["train_seconds"] < 60
    assert len({result.final["train_seconds"] for result in results}) == 1


def test_a_stack_trains_in_one_forward_for_all_its_seeds(spec_of, corpus):
    spec = spec_of()
    trainings = {seed: Training(spec, seed, corpus) for seed in SEEDS}
    stack = StackedTraining(trainings, "cpu", {})
    calls = []
    stack._model.register_forward_pre_hook(lambda model, arguments: calls.append(torch.is_grad_enabled()))
    stack.run(math.inf, lambda seed, row: None)
    assert sum(calls) == spec.protocol.steps
