"""Optimisers of a training, by name; to add one, add an entry to `OPTIMISERS` and its name to `study.spec.values`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import mpo_core
from study.spec.trial import TrialSpec

Group = dict[str, Any]
"""A group of parameters, as torch.optim has them, with "lr_mult": its rate divided by the schedule's rate."""


class Optimiser(Protocol):
    """The part of torch.optim.Optimizer that a training uses."""

    @property
    def param_groups(self) -> list[Group]:
        """The groups, with their current rates."""
        ...

    def step(self) -> Any:
        """Update the parameters from their gradients."""

    def zero_grad(self) -> None:
        """Remove the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """ "state": tensors by the number of a parameter; "param_groups": the groups, with those numbers."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


@dataclass(frozen=True)
class OptimiserKind:
    """groups: the parameters of a model in groups, each with its rate and decay. make: the optimiser of such groups.

    is_elementwise: each entry of a parameter is updated from its own gradients alone, by operations that a CUDA graph
    can hold. Only then can seeds be trained as one model (`study.training.stacked`, which calls `make` with stacked
    parameters) and steps be recorded (`study.training.captured`).
    """

    groups: Callable[[nn.Module, TrialSpec], list[Group]]
    make: Callable[[Iterable[Group], torch.device | str], Any]
    is_elementwise: bool


def kind_of_optimiser(spec: TrialSpec) -> OptimiserKind:
    """The kind of optimiser that trains this spec."""
    return OPTIMISERS[spec.protocol.optimiser]


def why_alone(spec: TrialSpec) -> str | None:
    """Why seeds of this spec cannot be trained as one model, nor steps be recorded; None if they can."""
    if not kind_of_optimiser(spec).is_elementwise:
        return f"optimiser {spec.protocol.optimiser}"
    if spec.keep is not None:
        return "`keep`, which gives each seed layers of its own sizes"
    if spec.bonds is not None:
        return "`bonds`, which change the layers of each seed in its own way"
    if spec.sweep is not None:
        return "`sweep`, which trains some of the cores at a time"
    if spec.protocol.recompute:
        return "protocol.recompute"
    if spec.protocol.ema is not None:
        return "protocol.ema"
    if spec.heal is not None and spec.heal.loss == "distillation":  # every seed has a teacher of its own
        return "heal.loss distillation"
    return None if spec.model.architecture == "picogpt" else f"model {spec.model.named}"


def set_learning_rate(optimiser: Optimiser, learning_rate: float) -> None:
    """Give every group this rate times its `lr_mult`."""
    for group in optimiser.param_groups:
        rate = group["lr_mult"] * learning_rate
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


# AdamW ----------------------------------------------------------------------------------------------------------------


def adamw_groups(model: nn.Module, spec: TrialSpec) -> list[Group]:
    """`mpo_core.param_groups` of all parameters, with the embeddings' own rate."""
    return _groups(model, spec, spec.protocol.embedding_learning_rate)


def adamw(groups: Iterable[Group], device: torch.device | str) -> torch.optim.AdamW:
    """A fused AdamW whose learning rates are tensors on the device; `set_learning_rate` changes them."""
    is_cuda = torch.device(device).type == "cuda"
    # The CUDA kernel takes a float32 rate; the CPU kernel converts it to float64, as it does with a plain number.
    dtype = torch.float32 if is_cuda else torch.float64

    def on_device(group: Group) -> Group:
        rate = torch.tensor(float(group["lr"]), dtype=dtype, device=device)
        return group | {"lr": rate, "fused": True, "capturable": is_cuda}

    return torch.optim.AdamW([on_device(group) for group in groups], fused=True, capturable=is_cuda)


def _groups(model: nn.Module, spec: TrialSpec, embedding_lr: float | None) -> list[Group]:
    protocol = spec.protocol
    groups = mpo_core.param_groups(
        model,
        protocol.learning_rate,
        rule=spec.lr_rule or "uniform",
        weight_decay=protocol.weight_decay,
        # In a sweep the core whose turn it is has all of W's decay: the others, being isometries, have none.
        decay="parameter" if spec.sweep is not None else spec.decay or "parameter",
        embedding_lr=embedding_lr,
        matrix_scale=_matrix_scale(spec),
    )
    return [group | {"betas": protocol.betas} for group in groups]


def _matrix_scale(spec: TrialSpec) -> float:
    """By how much the rates of matrices differ from those that the study file gives."""
    if spec.protocol.rate_width is None:
        return 1.0
    assert spec.model.width is not None  # the study file's check
    return spec.protocol.rate_width / spec.model.width


# Muon -----------------------------------------------------------------------------------------------------------------


def muon_groups(model: nn.Module, spec: TrialSpec) -> list[Group]:
    """Groups of the matrices, except the head's, with "shapes" (see `MuonAndAdamW`), and groups of the rest.

    The rates of the matrices are `learning_rate`, those of the rest `embedding_learning_rate`, each times the
    multiplier of the `lr_rule`. The rest: embeddings, norms, biases and the language-model head.
    """
    protocol, shapes = spec.protocol, matrices_of(model)
    ratio = (protocol.embedding_learning_rate or protocol.learning_rate) / protocol.learning_rate
    groups: list[Group] = []
    for group in _groups(model, spec, None):
        matrices = [parameter for parameter in group["params"] if parameter in shapes]
        rest = [parameter for parameter in group["params"] if parameter not in shapes]
        if matrices:
            groups.append(group | {"params": matrices, "shapes": [shapes[parameter] for parameter in matrices]})
        if rest:
            rates = {key: ratio * group[key] for key in ("lr", "lr_mult")}
            groups.append(group | {"params": rest} | rates)
    return groups


def matrices_of(model: nn.Module) -> dict[Tensor, tuple[int, int, int]]:
    """(number of matrices, rows, columns) of each parameter that consists of matrices, without the head's.

    That is the weight of a linear layer, a low-rank or pruned layer's factor as it is, a core as the matrix
    (left bond · outputs, inputs · right bond), and each diagonal block of a Monarch factor
    (`StructuredLinear.matrix_shapes`). A pruned weight's masked entries change, too, but they never reach the output.
    """
    found: dict[Tensor, tuple[int, int, int]] = {}
    in_role = {model.get_parameter(name) for name in mpo_core.parameters_by_role(model)["matrices"]}
    for layer in model.modules():
        if isinstance(layer, mpo_core.StructuredLinear):
            shapes = {layer.get_parameter(name): shape for name, shape in layer.matrix_shapes().items()}
            found |= {factor: shape for factor, shape in shapes.items() if factor in in_role}
            in_role -= set(layer.factors())  # a kind may leave a factor out
    return found | {matrix: (1, matrix.shape[0], matrix.shape[1]) for matrix in in_role}


class MuonAndAdamW:
    """PyTorch's Muon for the groups with "shapes", and `adamw` for the others, as one optimiser.

    torch.optim.Muon takes parameters of two dimensions. It gets matrices that share the memory of the parameters, and
    before each step of the gradients. Its updates have the size of AdamW's, so that one learning rate and one weight
    decay suit both ("match_rms_adamw").

    Args:
        groups: "shapes" holds (n, rows, columns) for each parameter of the group, which is n matrices one after
            another in its memory.
    Raises:
        ValueError: no group has "shapes".
    Source: Jordan et al. 2024, Muon; Liu et al. 2025, Muon is Scalable for LLM Training (the size of its updates).
    """

    def __init__(self, groups: Iterable[Group], device: torch.device | str) -> None:
        groups = list(groups)
        rest = [group for group in groups if "shapes" not in group]
        if groups and not rest:  # a model whose other parameters are frozen; AdamW takes an empty group, but not none
            rest = [groups[0] | {"params": []}]
        self._matrices: list[tuple[Tensor, tuple[int, int, int], Sequence[Tensor]]] = []
        of_muon = [self._as_matrices(group) for group in groups if "shapes" in group]
        self._muon = torch.optim.Muon(of_muon, adjust_lr_fn="match_rms_adamw")
        self._adamw = adamw(rest, device)
        self._n_matrices = sum(len(matrices) for _, _, matrices in self._matrices)

    def _as_matrices(self, group: Group) -> Group:
        params: list[Tensor] = []
        for parameter, shape in zip(group["params"], group["shapes"], strict=True):
            matrices = parameter.detach().view(shape).unbind()
            self._matrices.append((parameter, shape, matrices))
            params += matrices
        return {"params": params} | {key: group[key] for key in ("lr", "lr_mult", "weight_decay")}

    @property
    def param_groups(self) -> list[Group]:
        """Those of Muon, then those of AdamW."""
        return [*self._muon.param_groups, *self._adamw.param_groups]

    def zero_grad(self) -> None:
        """Remove the gradients of all parameters."""
        for parameter, _, _ in self._matrices:
            parameter.grad = None
        self._adamw.zero_grad()

    def step(self) -> None:
        """Update all parameters from their gradients."""
        for parameter, shape, matrices in self._matrices:
            grad = None if parameter.grad is None else parameter.grad.view(shape)
            for number, matrix in enumerate(matrices):
                matrix.grad = None if grad is None else grad[number]
        self._muon.step()
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """As that of one optimiser: the numbers of AdamW's parameters continue those of the matrices."""
        one, other = self._muon.state_dict(), self._adamw.state_dict()
        return {
            "state": one["state"] | {self._n_matrices + at: moments for at, moments in other["state"].items()},
            "param_groups": one["param_groups"] + _renumbered(other["param_groups"], self._n_matrices),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        state, first = state_dict["state"], self._n_matrices
        n_groups = len(self._muon.param_groups)
        of_muon, of_adamw = state_dict["param_groups"][:n_groups], state_dict["param_groups"][n_groups:]
        self._muon.load_state_dict(
            {"state": {at: moments for at, moments in state.items() if at < first}, "param_groups": of_muon}
        )
        self._adamw.load_state_dict(
            {
                "state": {at - first: moments for at, moments in state.items() if at >= first},
                "param_groups": _renumbered(of_adamw, -first),
            }
        )


def _renumbered(groups: Iterable[Group], by: int) -> list[Group]:
    return [group | {"params": [number + by for number in group["params"]]} for group in groups]


OPTIMISERS: dict[str, OptimiserKind] = {
    "adamw": OptimiserKind(adamw_groups, adamw, is_elementwise=True),
    "muon": OptimiserKind(muon_groups, MuonAndAdamW, is_elementwise=False),
}
