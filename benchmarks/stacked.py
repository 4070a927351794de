"""Train 8 seeds stacked as one model, against the same 8 one after another, on the GPU if there is one.

Every pair of timings is of a few optimiser steps of all seeds, one way and the other, in alternating order; a figure is
the ratio of the two, with the middle half of the pairs. How far apart the losses of the two ways are is printed too.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch

from study.config import Model, Protocol
from study.corpus import Corpus, load_corpus
from study.stacked import StackedTraining
from study.training import Training
from study.trial import TrialSpec

RESULTS = Path("results/stacked.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="optimiser steps of every seed in one timing")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--corpus", help="a UTF-8 text; Tiny Shakespeare unless given")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cuda = arguments.device.startswith("cuda")
    machine = {
        "processor": torch.cuda.get_device_name(arguments.device) if cuda else platform.machine(),
        "torch": torch.__version__,
        **vars(arguments),
    }
    print(machine)
    corpus = load_corpus(arguments.corpus)
    families = {"dense": {"family": "dense"}}
    for chi in (4, 32):
        families[f"MPO χ={chi}"] = {"family": "mpo", "chi": chi, "factorisation": "paper", "init": "variance"}
    rows = []
    for name, family in families.items():
        rows.append({"what": name, **measure(family, corpus, arguments)})
        print(
            "{what}: {n_seeds} seeds one after another {alone:.1f} ms, stacked {stacked:.1f} ms a step: "
            "{ratio:.2f} times as fast (middle half {lower:.2f} to {upper:.2f}); "
            "their training losses differ by at most {loss_difference:.1e}".format(**rows[-1])
        )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {RESULTS}")


def measure(family: dict[str, object], corpus: Corpus, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step of all seeds, both ways, and the ratio, above 1 where the stack is faster."""
    protocol = Protocol(steps=100_000, batch_size=arguments.batch_size)
    spec = TrialSpec.model_validate({"arm": "benchmark", "model": Model(), "protocol": protocol, **family})
    seeds, device = range(arguments.seeds), arguments.device
    alone = [Training(spec, seed, corpus, device=device) for seed in seeds]
    members = {seed: Training(spec, seed, corpus) for seed in seeds}
    stack = StackedTraining(members, device, {})

    def one_after_another() -> None:
        for training in alone:
            for _ in range(arguments.steps):
                training.optimiser_step()

    def stacked() -> None:
        for _ in range(arguments.steps):
            stack.optimiser_step()

    def seconds(call: Callable[[], None]) -> float:
        begun = time.perf_counter()
        call()  # every step ends with its loss on the CPU, so that nothing but the last update is left running
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    ways = (one_after_another, stacked)
    for way in ways:
        way()  # kernels are chosen and memory is mapped in the first
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(arguments.pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            times[which].append(seconds(ways[which]))
    ratios = [a / b for a, b in zip(*times, strict=True)]
    lower, _, upper = quantiles(ratios, n=4)
    # Both ways have come as far, over the same batches: their mean losses differ by rounding, or something is wrong.
    nothing = (0.0, 0.0)
    losses = [[each.row(nothing, nothing)["train_loss"] for each in way] for way in (alone, members.values())]
    a_step = 1e3 / arguments.steps
    return {
        "n_seeds": arguments.seeds,
        "alone": a_step * median(times[0]),
        "stacked": a_step * median(times[1]),
        "ratio": median(ratios),
        "lower": lower,
        "upper": upper,
        "loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }


if __name__ == "__main__":
    main()
