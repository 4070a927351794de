"""One optimiser step of PicoGPT at the paper's sizes, 32 sequences of 256 tokens, in float32, and its parts.

The dense step is compared with a plain eager loop (`benchmarks.plain_gpt`) that trains the same model on the same
windows. Losses of the first steps must agree. It is also compared with this machine's own float32 matrix products. Its
rate is the FLOPs of the step's matrix products over its time; the rival is the rate of the fastest square product. A
backward pass counts as two forward passes; other operations than matrix products count no FLOPs. A step with MPO layers
is compared with the dense step. Steps with changing bonds, sweeps and deeper networks are compared with those of an MPO
of fixed bonds and about as many parameters, on the quick study's model: 50 steps together, in which bonds change
once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measurement import PAIRS, Row, paired, rate, run_alone, seconds_of
from benchmarks.plain_gpt import PlainTraining
from mpo_core.models.language_model import flops_per_token
from mpo_core.models.picogpt import PicoGPT
from study.spec.models import PicoGPTModel
from study.spec.protocol import Protocol
from study.spec.trial import TrialSpec
from study.training.corpus import Corpus
from study.training.loading import load_corpus
from study.training.train import Training

PLAIN = "PicoGPT training step against a plain eager loop"
RATE = "PicoGPT training step against the machine's matrix products"
MPO = "MPO training step against the dense one"
OTHERS = "Changing bonds, sweeps and deeper networks against an MPO of fixed bonds"
STEPS = 50
QUICK = {"d_model": 64, "n_heads": 4, "n_layers": 2, "context": 64}
SQUARES = (512, 1024, 2048)

SHARES = "where the dense step's time goes"
KINDS = {
    "aten::mm": "matrix products",
    "aten::addmm": "matrix products",
    "aten::bmm": "matrix products",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention, forward",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention, backward",
}
REST = "all else"
N_PROFILED = 5

LIMITS = {
    PLAIN: "The profile below shows the parts of our step's time. Most of it is in matrix products, which the plain "
    "loop has to compute as well. Attention is PyTorch's fused kernel.",
    RATE: "The profile below shows the rest. Attention's fused kernel has products with sides of 32, far from the rate "
    "of large ones. LayerNorm, ReLU, residual sums, cross-entropy and optimiser count no FLOPs.",
    MPO: "In each step every layer's W is formed, and its gradient is taken back to the cores. This time does not "
    "depend on the number of tokens and grows with χ.",
}


def rows() -> list[Row]:
    corpus = load_corpus()
    dense = training(corpus, family="dense")
    return [
        against_plain(corpus),
        *against_the_machine(dense),
        *shares(dense),
        *mpo_against_dense(corpus, dense),
        *others_against_fixed_bonds(corpus),
    ]


def training(corpus: Corpus, sizes: dict[str, int] | None = None, batch_size: int = 32, **family: object) -> Training:
    protocol, model = Protocol(steps=100_000, batch_size=batch_size), PicoGPTModel(**(sizes or {}))
    spec = TrialSpec.model_validate({"arm": "benchmark", "model": model, "protocol": protocol, **family})
    return Training(spec, 0, corpus)


def against_plain(corpus: Corpus) -> Row:
    ours = training(corpus, family="dense")
    plain = PlainTraining(ours)
    for _ in range(3):
        before = ours._loss_sum
        ours.optimiser_step()
        torch.testing.assert_close(ours._loss_sum - before, plain.optimiser_step(), rtol=1e-4, atol=1e-4)
    return paired(
        PLAIN,
        "dense step, 32 × 256 tokens",
        ours.optimiser_step,
        "plain eager step",
        plain.optimiser_step,
        target=1 / 1.7,
        note="1.7 times as fast",
    )


def against_the_machine(dense: Training) -> list[Row]:
    """The step's FLOPs per second, with only the causal half of attention, and with all of attention."""
    assert isinstance(dense.model, PicoGPT)
    config, batch_size = dense.model.config, dense.spec.protocol.batch_size
    matrices = {n: torch.ones(n, n) for n in SQUARES}
    size = fastest_size(matrices)
    A = matrices[size]
    full = flops_per_token(dense.model, config.context)
    # Token t attends to t + 1 tokens: on average, to half of the context plus 1/2.
    causal = full - 4 * config.n_layers * config.d_model * (config.context - (config.context + 1) / 2)
    n_tokens = batch_size * config.context
    step_seconds, product_rates = [], []

    def step() -> None:
        step_seconds.append(seconds_of(dense.optimiser_step))

    def product() -> None:
        begun, n = time.perf_counter(), 0
        while n < 3 or time.perf_counter() - begun < 0.2:
            torch.mm(A, A)
            n += 1
        product_rates.append(2 * size**3 * n / (time.perf_counter() - begun))

    dense.optimiser_step()
    for pair in range(PAIRS):
        for call in (step, product) if pair % 2 else (product, step):
            call()
    rival = f"{size}² × {size}² product"
    return [
        rate(
            RATE,
            f"dense step, {what}",
            [3 * flops * n_tokens / seconds for seconds in step_seconds],
            rival,
            product_rates,
            unit="FLOP/s",
            target=target,
            at_most=False,
            note=note,
        )
        for what, flops, target, note in (
            ("attention's causal half counted", causal, 0.55, "what is computed"),
            ("attention counted in full", full, None, "as `flops_per_token` counts"),
        )
    ]


def fastest_size(matrices: dict[int, torch.Tensor]) -> int:
    """The n whose (n, n) product has the highest rate."""
    seconds = {}
    for n, A in matrices.items():
        torch.mm(A, A)
        seconds[n] = min(seconds_of(lambda A=A: torch.mm(A, A)) for _ in range(5)) / n**3
    return min(seconds, key=lambda n: seconds[n])


def shares(dense: Training) -> list[Row]:
    """Seconds of each kind of operation in a step, against those of the step, by PyTorch's profiler."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(N_PROFILED):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            dense.optimiser_step()
        of_step = dict.fromkeys([*KINDS.values(), REST], 0.0)
        for operation in found.key_averages():
            of_step[KINDS.get(operation.key, REST)] += 1e-6 * operation.self_cpu_time_total
        for kind, own in of_step.items():
            seconds[kind].append(own)
    whole = [sum(own) for own in zip(*seconds.values(), strict=True)]
    return [rate(SHARES, kind, own, "the step, profiled", whole) for kind, own in seconds.items()]


def mpo_against_dense(corpus: Corpus, dense: Training) -> list[Row]:
    found = []
    for chi in (4, 8, 16, 32):
        mpo = training(corpus, family="mpo", chi=chi, factorisation="paper", init="variance")
        target = 1.1 if chi <= 16 else 1.2
        what = f"MPO step, χ={chi}"
        found.append(paired(MPO, what, mpo.optimiser_step, "dense step", dense.optimiser_step, target=target))
    return found


def others_against_fixed_bonds(corpus: Corpus) -> list[Row]:
    def steps(**family: object) -> Callable[[], None]:
        own = training(corpus, QUICK, 8, **{"factorisation": "balanced", "init": "variance", **family})

        def run() -> None:
            for _ in range(STEPS):
                own.optimiser_step()

        return run

    fixed = steps(family="mpo", chi=8)
    others: dict[str, dict[str, object]] = {
        f"bonds that change every {STEPS} steps": {"family": "mpo", "chi": 8, "bonds": {"every": STEPS}},
        "a sweep, ten steps for each core": {"family": "mpo", "chi": 8, "sweep": {"every": 10}},
        "MPO of four sites": {"family": "mpo", "chi": 8, "n_sites": 4},
        "tree of four sites": {"family": "tree", "as_chi": 8},
        "tree of six sites": {"family": "tree", "as_chi": 8, "options": '{"n_sites": 6}'},
        "block train of three sites": {"family": "block_train", "as_chi": 8},
    }
    return [paired(OTHERS, what, steps(**family), "MPO, χ=8", fixed) for what, family in others.items()]


if __name__ == "__main__":
    run_alone(rows)
