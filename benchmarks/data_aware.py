"""A PicoGPT is trained, then compressed without fine-tuning: plain, whitened and fitted chains against low rank.

    python -m benchmarks.data_aware [steps]    (writes its table into docs/mpo_core.md)

The model has the paper's widths. Default: 800 steps of 16 × 64 tokens, a minute or two. At every χ each layer of the
other methods has at most as many parameters as the chain of that χ. Calibration uses windows of the training split; the
loss is that of the validation split.
"""

from __future__ import annotations

import sys
from itertools import islice

import torch

from benchmarks.document import put_table
from mpo_core.calibration.collecting import collect_statistics
from mpo_core.compression.compress import compress
from mpo_core.layers.structured import StructuredLinear
from mpo_core.models.picogpt import PicoGPT
from study.spec.models import PicoGPTModel
from study.spec.protocol import Protocol
from study.spec.trial import TrialSpec
from study.training.corpus import Corpus
from study.training.loading import load_corpus
from study.training.train import Training, evaluate
from study.training.windows import consecutive_windows

CHIS = (8, 16, 32, 48)
CONTEXT, BATCH = 64, 16
N_CALIBRATION, N_VALIDATION = 64, 64
"""Batches of 16 windows: 65,536 tokens each."""


def main() -> None:
    corpus = load_corpus()
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 800
    model = train(corpus, steps)
    calibration = [inputs for inputs, _ in islice(consecutive_windows(corpus.train, CONTEXT, BATCH), N_CALIBRATION)]
    statistics = collect_statistics(model, calibration, held_out=0)

    def loss_of(model: PicoGPT) -> float:
        windows = consecutive_windows(corpus.validation, CONTEXT, BATCH)
        with torch.no_grad():
            return evaluate(model, islice(windows, N_VALIDATION))[0]

    rows = []
    for factorisation in ("paper", "min_params"):
        for chi in CHIS:
            size = {"chi": chi, "allow_growth": True}
            _, shape = compress(model, **size, factorisation=factorisation)
            # The smallest chains of three sites have fewer parameters than low rank with rank 1.
            budget = {row.name: row.n_params_after for row in shape.rows}
            smallest = {name: sum(model.get_parameter(f"{name}.weight").shape) for name in budget}
            ways = [
                (f"MPO, {method}", {**size, "factorisation": factorisation, "method": method})
                for method in ("tt_svd", "whitened", "lbfgs")
            ]
            if all(budget[name] >= smallest[name] for name in budget):
                each = {"layer": "low_rank", "max_params": budget}
                ways += [("low rank, SVD", {**each, "metric": "weights"}), ("low rank, whitened", each)]
            for way, options in ways:
                compressed, report = compress(model, **{"statistics": statistics, **options})
                after = sum(row.n_params_after for row in report.rows)
                before = sum(row.n_params_before for row in report.rows)
                errors = [
                    layer.error(model.get_parameter(f"{name}.weight"), statistics.metric(name, "outputs"))
                    for name, layer in compressed.named_modules()
                    if isinstance(layer, StructuredLinear)
                ]
                row = [str(chi), factorisation, way, f"{after:,}", f"{after / before:.3f}"]
                row += [f"{sum(errors) / len(errors):.4f}", f"{loss_of(compressed):.4f}"]
                print(*row, sep="  ", flush=True)
                rows.append(row)
    headings = ("χ", "factorisation", "method", "parameters", "of dense", "mean output error", "validation loss")
    caption = (
        f"`python -m benchmarks.data_aware {steps}`: one seed, no fine-tuning; the dense model's validation loss is "
        f"{loss_of(model):.4f} nats; PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    put_table("docs/mpo_core.md", "data_aware", caption, headings, rows)


def train(corpus: Corpus, steps: int) -> PicoGPT:
    protocol = {"steps": steps, "warmup_steps": steps // 10, "batch_size": BATCH, "learning_rate": 3e-3}
    spec = TrialSpec(
        arm="benchmark",
        family="dense",
        init="variance",
        model=PicoGPTModel(context=CONTEXT),
        protocol=Protocol(**protocol, eval_every=steps, sampled_eval_batches=1),
    )
    training = Training(spec, 0, corpus)
    for _ in range(steps):
        training.optimiser_step()
    return training.model.eval()


if __name__ == "__main__":
    main()
