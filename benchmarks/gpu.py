"""Studies on a GPU: stacked seeds, captured steps, number formats, large layers, and the time of the `paper` study.

It runs if PyTorch finds a CUDA device, and needs no Ray, MLflow or Optuna: `python -m benchmarks gpu`. Every timing
ends when the device has finished. Steps are those of the paper's model and batch, stacked or alone. They are captured
as CUDA graphs unless the row says otherwise. The text has random characters and the length of Tiny Shakespeare. If two
methods train the same seeds, the losses of the first steps must agree. Layers are in bfloat16, weights included,
without a graph. The `paper` study is not run. Its time is the number of steps and evaluations of each trial, times the
time of one of them here. Start-up, checkpoints and relative errors are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.functional import linear

from benchmarks.measurement import Call, Row, call_of, paired, rate, run_alone, seconds_of
from mpo_core.layers.mpo import MPOLinear
from study.spec.models import PicoGPTModel
from study.spec.protocol import Protocol, evaluation_steps
from study.spec.trial import TrialSpec
from study.training.captured import WARM_UP
from study.training.corpus import CharacterCorpus, Corpus
from study.training.precision import products_in
from study.training.stacked import StackedTraining
from study.training.train import Training

STACKED = "8 seeds stacked against 8 one after another"
CAPTURED = "Training step captured against eager"
PRECISION = "Training step of 8 stacked seeds against float32"
LAYER = "Chain against dense in bfloat16: forward+backward"
PAPER = "The whole paper study"

N_SEEDS = 8
CHARACTERS, VOCABULARY = 1_115_394, 65
"""Numbers of Tiny Shakespeare."""
PAPER_FILE = Path(__file__).parents[1] / "study/configs/paper.yaml"
PAPER_ROUNDS = 5

LIMITS: dict[str, str] = {}


@products_in("float32")
def rows() -> list[Row]:
    corpus, device = random_corpus(CHARACTERS), torch.device("cuda")
    protocol = Protocol(steps=100_000)
    families = {"dense": {"family": "dense"}} | {f"MPO χ={chi}": mpo(chi) for chi in (4, 8, 32)}
    specs = {name: spec_of(family, PicoGPTModel(), protocol) for name, family in families.items()}
    found = [stacked(name, spec, corpus, device) for name, spec in specs.items()]
    found += [row for name, spec in specs.items() for row in captured(name, spec, corpus, device)]
    found += [row for name, spec in specs.items() for row in precisions(name, spec, corpus, device)]
    for width in (4096, 8192):
        for n_tokens in (256, 4096):
            found += [layer(width, n_tokens, chi, device) for chi in (4, 8, 16, 32)]
    return [*found, paper(yaml.safe_load(PAPER_FILE.read_text(encoding="utf-8")), corpus, device)]


def random_corpus(n_characters: int) -> Corpus:
    codes = torch.randint(VOCABULARY, (n_characters,), generator=torch.Generator().manual_seed(0))
    return CharacterCorpus("".join(chr(ord("0") + code) for code in codes.tolist()), "")


def mpo(chi: int, **changes: object) -> dict[str, object]:
    return {"family": "mpo", "chi": chi, "factorisation": "paper", "init": "variance"} | changes


def spec_of(family: dict[str, object], model: PicoGPTModel, protocol: Protocol) -> TrialSpec:
    return TrialSpec.model_validate({"arm": "benchmark", "model": model, "protocol": protocol, **family})


# Steps ----------------------------------------------------------------------------------------------------------------


def stack_of(spec: TrialSpec, n_seeds: int, corpus: Corpus, device: torch.device, **options: Any) -> StackedTraining:
    members = {seed: Training(spec, seed, corpus) for seed in range(n_seeds)}
    return StackedTraining(members, device, {}, **options)


def alone(spec: TrialSpec, n_seeds: int, corpus: Corpus, device: torch.device, **options: Any) -> list[Training]:
    return [Training(spec, seed, corpus, device=device, **options) for seed in range(n_seeds)]


def steps_of(trainings: Iterable[Training | StackedTraining], spec: TrialSpec, device: torch.device) -> Call:
    """One step of each, until the device has finished; the extra work of a first step is done before."""
    trainings = list(trainings)

    def steps() -> None:
        with products_in(spec.protocol.precision):
            for training in trainings:
                training.optimiser_step()
            wait(device)

    for _ in range(WARM_UP + 1):
        steps()
    return steps


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def losses_of(training: Training | StackedTraining) -> list[float]:
    """Each seed's mean training loss since the last call."""
    trainings = [training] if isinstance(training, Training) else training._trainings.values()
    return [each.row((0.0, 0.0), (0.0, 0.0))["train_loss"] for each in trainings]


def check(ours: Sequence[float], theirs: Sequence[float], tolerance: float = 1e-3) -> None:
    """Raise an error if losses of the same seeds differ by more than rounding."""
    for seed, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not abs(a - b) <= tolerance:
            raise ValueError(f"seed {seed}: the two methods train differently: losses {a:.6g} and {b:.6g}")


def stacked(name: str, spec: TrialSpec, corpus: Corpus, device: torch.device, n_seeds: int = N_SEEDS) -> Row:
    stack, each = stack_of(spec, n_seeds, corpus, device), alone(spec, n_seeds, corpus, device)
    steps = [steps_of(trainings, spec, device) for trainings in ([stack], each)]
    check(losses_of(stack), [loss for training in each for loss in losses_of(training)])
    return paired(
        STACKED,
        f"{name}, a step of all",
        steps[0],
        "one after another",
        steps[1],
        target=1 / 4,
        note="4 times as fast",
    )


def captured(name: str, spec: TrialSpec, corpus: Corpus, device: torch.device, n_seeds: int = N_SEEDS) -> list[Row]:
    def both(make: Callable[..., Training | StackedTraining], what: str) -> Row:
        ours, rival = make(capture=True), make(capture=False)
        steps = [steps_of([training], spec, device) for training in (ours, rival)]
        check(losses_of(ours), losses_of(rival))
        return paired(CAPTURED, f"{name}, {what}", steps[0], "eager", steps[1])

    return [
        both(lambda **options: alone(spec, 1, corpus, device, **options)[0], "one seed"),
        both(lambda **options: stack_of(spec, n_seeds, corpus, device, **options), f"{n_seeds} stacked seeds"),
    ]


def precisions(name: str, spec: TrialSpec, corpus: Corpus, device: torch.device, n_seeds: int = N_SEEDS) -> list[Row]:
    def steps(precision: str) -> Call:
        own = spec.model_copy(update={"protocol": spec.protocol.model_copy(update={"precision": precision})})
        return steps_of([stack_of(own, n_seeds, corpus, device)], own, device)

    float32 = steps("float32")
    return [
        paired(PRECISION, f"{name}, {precision}", steps(precision), "float32", float32)
        for precision in ("tf32", "bfloat16")
    ]


# Layers ---------------------------------------------------------------------------------------------------------------


def layer(width: int, n_tokens: int, chi: int, device: torch.device) -> Row:
    """Two balanced sites; gradients of the input and of the weight or the cores."""
    generator = torch.Generator().manual_seed(0)
    kind = {"device": device, "dtype": torch.bfloat16}
    x, dy = (torch.randn(n_tokens, width, generator=generator).to(**kind) for _ in range(2))
    x.requires_grad_()
    chain = MPOLinear(width, width, chi=chi, n_sites=2, bias=False, generator=generator, forward="chain").to(**kind)
    W = chain.to_matrix().detach().requires_grad_()

    def waited(call: Call) -> Call:
        def until_done() -> None:
            call()
            wait(device)

        return until_done

    ours = waited(call_of(chain, x, list(chain.cores), dy))
    dense = waited(call_of(lambda x: linear(x, W), x, [W], dy))
    sizes = {"width": width, "tokens": n_tokens, "χ": chi}
    return paired(LAYER, f"{width}², {n_tokens} tokens, χ={chi}", ours, "dense", dense, sizes=sizes)


# The paper study ------------------------------------------------------------------------------------------------------


def paper(study: dict[str, Any], corpus: Corpus, device: torch.device, rounds: int = PAPER_ROUNDS) -> Row:
    """Seconds of all its trials: seeds stacked and captured, against seeds one after another and eager.

    Args:
        study: the content of the study file; its arms are a dense one and an MPO one with several χ.
    """
    model, protocol = PicoGPTModel(**study["model"]), Protocol(**study["protocol"])
    n_seeds, [_, arm] = study["seeds"], study["arms"]
    families = [{"family": "dense"}, *(mpo(chi, init=arm["init"]) for chi in arm["chi"])]
    n_evaluations = len(evaluation_steps(protocol))
    ours, theirs = [0.0] * rounds, [0.0] * rounds
    for family in families:
        spec = spec_of(family, model, protocol)
        stack = stack_of(spec, n_seeds, corpus, device)
        [single] = alone(spec, 1, corpus, device, capture=False)
        # The model is evaluated untrained, at step 0, because it is evaluated only at planned steps.
        evaluations = [
            [seconds_of(call) for _ in range(rounds + 1)][1:]
            for call in (lambda stack=stack: stack._evaluate(lambda seed, row: None), single._evaluation)
        ]
        steps = [steps_of([training], spec, device) for training in (stack, single)]
        for n in range(rounds):
            for total, per_trial, step, evaluation in zip(
                (ours, theirs), (1, n_seeds), steps, evaluations, strict=True
            ):
                total[n] += per_trial * (protocol.steps * seconds_of(step) + n_evaluations * evaluation[n])
    return rate(
        PAPER,
        f"{len(families)} trials of {n_seeds} seeds, stacked and captured",
        ours,
        "one seed after another, eager",
        theirs,
        note="steps and evaluations, from the time of one",
    )


if __name__ == "__main__":
    run_alone(rows)
