"""A recorded step trains as the step itself does, bit for bit; on a CPU with a stand-in for CUDA's graphs."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from study.training import captured, precision
from study.training.captured import WARM_UP, DeviceStep
from study.training.seed_run import train_seed, train_seeds
from study.training.stacked import StackedTraining
from study.training.train import Diverged, Training


class Recording(TorchDispatchMode):
    """The operations of a function, with the very tensors they had: what a CUDA graph holds.

    As there, recording leaves everything as it was, a replay writes to the memory that the recording had, and what
    waits for a device cannot be recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self._before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default):
            raise RuntimeError(f"{func} cannot be recorded")
        if func._schema.is_mutable:
            for tensor in tensors_of((args, kwargs)):
                self._before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    def leave_as_it_was(self) -> None:
        with torch.no_grad():
            for tensor, value in self._before.values():
                tensor.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self.operations:
            for old, new in zip(tensors_of(recorded), tensors_of(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.detach().copy_(new)


def tensors_of(tree):
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


@contextmanager
def recorded():
    """Within it every training records its steps; gives the recordings made."""
    made = []

    def record(body):
        with Recording() as recording:
            result = body()
        recording.leave_as_it_was()
        if isinstance(result, torch.Tensor):
            result.fill_(math.nan)
        made.append(recording)
        return recording.replay, result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "record", record)
        patch.setattr(captured, "beside", lambda body: body())
        for module in ("train", "stacked"):
            patch.setattr(f"study.training.{module}.DeviceStep", lambda is_captured: DeviceStep(True))
        yield made


ARMS = {
    "dense": {},
    "mpo": {"chi": 3, "lr_rule": "mup"},
    "chain": {"chi": 3, "forward": "chain"},
    "fixed-gauge": {"chi": 8, "n_sites": 3, "gauge": "fixed", "decay": "matrix"},
    "fixed-gauge-chain": {"chi": 3, "forward": "chain", "gauge": "fixed"},
    "low-rank": {"family": "low_rank", "as_chi": 2},
    "low-rank-fixed-gauge": {"family": "low_rank", "as_chi": 4, "gauge": "fixed"},
    "monarch": {"family": "monarch", "as_chi": 4},
    "pruned": {"family": "pruned", "as_chi": 2},
}


def as_told(trained):
    result, weights = trained
    return result.state, result.curve, {**result.final, "train_seconds": 0}, {k: v.tolist() for k, v in weights.items()}


@pytest.mark.parametrize("of", ["float32", "bfloat16"])
@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_recorded_step_trains_as_the_step_itself(spec_of, corpus, arm, of):
    spec = spec_of({"grad_clip": 0.3, "precision": of}, **arm)
    for way in (lambda: [train_seed(spec, 0, corpus)], lambda: train_seeds(spec, (0, 1), corpus)):
        expected = way()
        with recorded() as recordings:
            assert [as_told(one) for one in way()] == [as_told(one) for one in expected]
        assert len(recordings) == 2  # gradients and update


def test_recorded_stack_goes_on_without_the_seed_that_diverges(spec_of, corpus):
    def train():
        stack = StackedTraining({seed: Training(spec_of(chi=3), seed, corpus) for seed in (0, 1, 2)}, "cpu", {})
        everyone = stack._trainings
        for step in range(12):
            if step == WARM_UP + 2:
                with torch.no_grad():
                    stack._parameters["final_norm.weight"][1] = math.inf
            stack.optimiser_step()
        for row, training in enumerate(stack._trainings.values()):
            stack._write_back(row, training)
        assert everyone[1].failure is not None
        assert list(stack._trainings) == [0, 2]
        return {seed: training.state() for seed, training in stack._trainings.items()}

    expected = train()
    with recorded() as recordings:
        assert_same(train(), expected)
    assert len(recordings) == 4  # of three seeds, and of two


def test_recorded_step_that_diverges_leaves_the_parameters(spec_of, corpus):
    training = Training(spec_of(), 0, corpus)
    with recorded() as recordings:
        training._device_step = DeviceStep(True)
        trained(training, WARM_UP + 2)
        with torch.no_grad():
            training.model.get_parameter("final_norm.weight")[0] = math.inf
        before = [parameter.tolist() for parameter in training.parameters]
        with pytest.raises(Diverged, match="the training loss is not finite at step 5"):
            training.optimiser_step()
    assert [parameter.tolist() for parameter in training.parameters] == before
    assert len(recordings) == 2


def trained(training, steps):
    for _ in range(steps):
        training.optimiser_step()
    return training


def continued(training, state, steps=6):
    training.restore(*copy.deepcopy(state))
    return {0: trained(training, steps).state()}


def test_checkpoints_pass_between_recorded_and_plain_trainings(spec_of, corpus):
    plain = partial(Training, spec_of(chi=2), 0, corpus)
    expected = {0: trained(plain(), 12).state()}
    from_plain = trained(plain(), 6).state()
    with recorded() as recordings:
        from_recorded = trained(plain(), 6).state()
        assert_same(continued(plain(), from_plain), expected)
        used = trained(plain(), 6)  # what it has recorded is of tensors that it has no longer once it is restored
        assert_same(continued(used, from_plain), expected)
        assert len(recordings) == 8
    assert_same(continued(plain(), from_recorded), expected)


def assert_same(states, others):
    assert states.keys() == others.keys()
    for seed, (tensors, content) in states.items():
        expected, expected_content = others[seed]
        assert {**content, "seconds": 0} == {**expected_content, "seconds": 0}
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("of", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_cuda_graphs_train_as_the_step_itself(spec_of, corpus, arm, of):
    spec = spec_of({"precision": of}, **arm)
    for train in (
        lambda capture: [train_seed(spec, 0, corpus, device="cuda", capture=capture)],
        lambda capture: train_seeds(spec, (0, 1), corpus, device="cuda", capture=capture),
    ):
        for (one, weights), (other, other_weights) in zip(train(True), train(False), strict=True):
            assert one.final["final/val_loss"] == pytest.approx(other.final["final/val_loss"], rel=1e-4)
            torch.testing.assert_close(weights, other_weights, rtol=1e-3, atol=1e-3)


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["float32", "tf32", "bfloat16"])
def test_products_are_in_what_was_declared_whatever_was_switched_on(asked):
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        switched = cuda.fp32_precision, cpu.fp32_precision, cuda.allow_bf16_reduced_precision_reduction
        assert switched == ("tf32", "bf16", True)
        with precision.products_in(asked):
            assert cuda.fp32_precision == ("tf32" if asked == "tf32" else "ieee")
            with precision.products_in("float32"):
                assert (cuda.fp32_precision, cpu.fp32_precision) == ("ieee", "ieee")
            assert cuda.fp32_precision == ("tf32" if asked == "tf32" else "ieee")
            assert not cuda.allow_bf16_reduced_precision_reduction
        assert (cuda.fp32_precision, cpu.fp32_precision, cuda.allow_bf16_reduced_precision_reduction) == switched
    finally:
        torch.set_float32_matmul_precision(before)


def test_bfloat16_is_of_the_forward_pass_alone_in_training_and_evaluation(spec_of, corpus):
    spec = spec_of({"precision": "bfloat16"}, chi=3)
    seen = set()

    def look(model):
        model.lm_head.register_forward_hook(lambda layer, inputs, y: seen.add((torch.is_grad_enabled(), y.dtype)))

    alone, stack = Training(spec, 0, corpus), StackedTraining({1: Training(spec, 1, corpus)}, "cpu", {})
    for model, evaluate in ((alone.model, alone._evaluation), (stack._model, partial(stack._evaluate, print))):
        look(model)
        evaluate()
        trained(alone if model is alone.model else stack, 1)
        assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
        seen.clear()
    tensors, _ = alone.state()
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in alone.parameters} == {torch.float32}


@pytest.mark.parametrize("arm", [{}, {"chi": 3}, {"chi": 3, "forward": "chain"}], ids=["dense", "mpo", "chain"])
def test_bfloat16_ends_near_float32_alone_and_stacked(spec_of, corpus, arm):
    specs = [spec_of({"precision": of}, **arm) for of in ("float32", "bfloat16")]
    losses = [train_seed(spec, 0, corpus)[0].final["final/val_loss"] for spec in specs]
    stacked = train_seeds(specs[1], (0, 1), corpus)[0][0].final["final/val_loss"]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert stacked == pytest.approx(losses[1], rel=5e-3)
    assert train_seed(specs[1], 0, corpus, rel_error_chis=(2,))[0].rel_errors == pytest.approx(
        train_seed(specs[0], 0, corpus, rel_error_chis=(2,))[0].rel_errors, rel=0.05
    )
