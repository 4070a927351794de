"""The memory that a unit needs, estimated from shapes alone: nothing is computed, and no tensor has values.

A step of the training runs on tensors without values (PyTorch's fake tensors), while the sizes of all tensors that live
at the same time are added. So activations are those of the model's own code, whatever its layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mpo_core
from study.spec.arms import PRETRAINED
from study.spec.trial import TrialSpec
from study.training.healing import freeze_unhealed, is_distilled, training_loss
from study.training.model import build_model
from study.training.optimisers import kind_of_optimiser
from study.training.train import evaluation_tokens

PROCESS_BYTES = 350_000_000
"""About what a process with PyTorch and this program takes before it has a model; PyTorch 2.13 took 310 MB."""
LIBRARY_BYTES = 150_000_000
"""The library transformers adds this."""
_HEAP, _HEAP_RECOMPUTED = 1.3, 2.0
"""Memory of activations, divided by their size, without and with `recompute`. The C library's allocator keeps places of
freed tensors that do not fit the next ones exactly. Fitted to eight peaks on Linux; the second is often too low."""
_FLOAT64 = 8
_FIT_MATRICES = 8
"""Matrices of the size of a weight, in float64, that a decomposition of it has at the same time."""


def unit_bytes(spec: TrialSpec, vocab_size: int, n_seeds: int = 1) -> int:
    """Bytes that a worker needs at its peak for seeds of a trial, estimated.

    The peak is the largest of these, each with the weights that are there at the time:

    - the start: the dense model, its weights as read, the statistics of the calibration, and a decomposition;
    - a step: gradients, the optimiser's moments, and the activations of one of the step's parts, or a copy of the state
      for a checkpoint;
    - a change of bonds: a dense model, its gradients twice, its statistics, and the moments again;
    - an evaluation: the logits of its batch.

    The text is left out. So is what libraries use besides tensors.

    Args:
        n_seeds: seeds that are trained together as one model.
    Raises:
        Exception: the model's code needs values, so it cannot run without them.
    """
    model, _ = build_model(spec, vocab_size, None)
    dense, _ = build_model(spec.model_copy(update={"family": "dense"}), vocab_size, None)
    freeze_unhealed(model, spec)
    if spec.protocol.recompute:
        mpo_core.recompute_blocks(model)
    own, whole = _n_bytes(model), _n_bytes(dense)
    held = whole * (spec.start_arm is not None) + whole * is_distilled(spec)  # the start's weights, and the teacher
    places = 8 * spec.protocol.steps * spec.protocol.batch_size  # of sequences in the text, drawn before training
    state, heap = held + own + places, _HEAP_RECOMPUTED if spec.protocol.recompute else _HEAP
    peaks = [_start_bytes(spec, model, dense) + places]
    if spec.protocol.steps:
        gradients = _n_bytes(model, trainable=True)
        moments = _moment_bytes(spec, model) + (gradients if spec.protocol.ema is not None else 0)
        step = _peak_of_a_step(spec, model, dense if is_distilled(spec) else None)
        # A checkpoint copies weights and moments.
        peaks += [state + moments + round(heap * step), state + gradients + moments + own + moments]
        state += gradients + moments
        if spec.bonds is not None:
            peaks.append(state + moments + _change_bytes(model, dense) + round(heap * step))
    peaks.append(state + round(heap * _peak_of_an_evaluation(spec, model, vocab_size)))
    process = PROCESS_BYTES + LIBRARY_BYTES * (spec.model.architecture == "huggingface")
    return process + n_seeds * max(peaks)


def _n_bytes(model: nn.Module, trainable: bool = False) -> int:
    """Bytes of all parameters and buffers, or of the parameters that are trained; shared ones count once."""
    tensors = [parameter for parameter in model.parameters() if parameter.requires_grad or not trainable]
    return sum(_size(tensor) for tensor in (*tensors, *(() if trainable else model.buffers())))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _moment_bytes(spec: TrialSpec, model: nn.Module) -> int:
    """Muon has one moment of a matrix, AdamW two of every parameter."""
    groups = kind_of_optimiser(spec).groups(model, spec)
    return sum(_size(each) * (1 if "shapes" in group else 2) for group in groups for each in group["params"])


def _change_bytes(model: nn.Module, dense: nn.Module) -> int:
    """Bytes of the tensors by which a change of bonds is measured, besides activations."""
    layers = [module for module in model.modules() if isinstance(module, mpo_core.MPOLinear)]
    moments = sum(layer.in_features**2 + layer.out_features**2 for layer in layers)
    return 3 * _n_bytes(dense) + _FLOAT64 * moments


def _start_bytes(spec: TrialSpec, model: nn.Module, dense: nn.Module) -> int:
    """Bytes while the model is made: both models, and what the compression of a start takes."""
    own, whole = _n_bytes(model), _n_bytes(dense)
    if spec.start is None:
        return own if spec.family == "dense" else own + whole
    read = whole if spec.start == PRETRAINED else 2 * whole  # the weights of an arm: a file, and its tensors
    layers = [module for module in model.modules() if isinstance(module, mpo_core.StructuredLinear)]
    if not layers:
        return whole + read
    largest = max(layer.in_features * layer.out_features for layer in layers)
    fit = _FLOAT64 * _FIT_MATRICES * largest
    if spec.refinement in ("whitened", "als", "outputs") or spec.metric in ("outputs", "loss"):
        fit += _FLOAT64 * sum(layer.in_features**2 for layer in layers)
    if spec.metric == "loss":
        fit += _FLOAT64 * sum(layer.out_features**2 for layer in layers)
    return whole + max(read, own + whole * (spec.start_arm is not None) + fit)


# Without values -------------------------------------------------------------------------------------------------------


class _LiveBytes(TorchDispatchMode):
    """Adds the bytes of the tensors that live at the same time; views share the bytes of what they show."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(returned):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return returned

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _peak_of_a_step(spec: TrialSpec, model: nn.Module, teacher: nn.Module | None) -> int:
    """Bytes of gradients and activations at the peak of a step, besides weights and moments."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # its first use takes seconds

    protocol = spec.protocol
    n_parts = protocol.gradient_accumulation
    with FakeTensorMode():
        _give_no_values(filter(None, (model, teacher)))
        model.train()
        with _LiveBytes() as live:
            tokens = torch.zeros(protocol.batch_size // n_parts, spec.model.context, dtype=torch.int64)
            for _ in range(min(n_parts, 2)):  # from the second part on, gradients are there from its beginning
                (training_loss(spec, model, teacher, tokens, tokens) / n_parts).backward()
    return live.peak


def _peak_of_an_evaluation(spec: TrialSpec, model: nn.Module, vocab_size: int) -> int:
    """Bytes of activations at the peak of an evaluation, besides weights, gradients and moments."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    context = spec.model.context
    n_sequences = max(1, evaluation_tokens(vocab_size) // context, spec.protocol.sampled_eval_batch_size)
    with FakeTensorMode(), torch.no_grad():
        _give_no_values([model])
        model.eval()
        with _LiveBytes() as live:
            tokens = torch.zeros(n_sequences, context, dtype=torch.int64)
            logits = mpo_core.logits_of(model, tokens)
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    return live.peak


def _give_no_values(models: Iterable[nn.Module]) -> None:
    """Move models from the meta device to the CPU, as shapes: on a CPU, PyTorch chooses other code for attention."""
    for model in models:
        moved: dict[int, Tensor] = {}
        for module in model.modules():
            for name, own in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if id(own) not in moved:
                    empty = torch.empty(own.shape, dtype=own.dtype, device="cpu")
                    moved[id(own)] = nn.Parameter(empty, own.requires_grad) if isinstance(own, nn.Parameter) else empty
                setattr(module, name, moved[id(own)])
