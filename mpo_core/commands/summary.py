"""The cost of a compression, for a terminal of 80 columns."""

from __future__ import annotations

import math
import resource
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpo_core.commands.progress import duration
from mpo_core.compression.measuring import PARTED
from mpo_core.compression.perplexity import Perplexity, paired_difference
from mpo_core.compression.report import CompressedLayer, CompressionReport


@dataclass(frozen=True)
class Outcome:
    """The results of a run of the command."""

    out: Path
    before: Perplexity
    after: Perplexity
    evaluated: str
    """The standard errors are over these: "documents" or "sequences"."""
    report: CompressionReport
    n_bytes: tuple[int, int]
    """Bytes of all weights, dense and compressed."""
    seconds: dict[str, float]
    """By stage, and of all."""


def summary(outcome: Outcome) -> str:
    """Sizes and losses before and after, time and memory, and how the result is loaded."""
    report, measured = outcome.report, (outcome.before, outcome.after)
    rows = [row for row in report.rows if row.n_params_before]
    difference, error = paired_difference(outcome.after, outcome.before)
    table = [
        ("", "dense", "compressed", ""),
        ("perplexity", *(f"{one.value:.2f}{_plus_minus(one.standard_error, 2)}" for one in measured), ""),
        (
            "loss, nats per token",
            *(f"{float(one.nats.sum() / one.n_tokens.sum()):.3f}" for one in measured),
            f"{difference:+.3f}{_plus_minus(error, 3)}",
        ),
        _counts(f"parameters of {len(rows)} matrices", *(sum(map(attribute, rows)) for attribute in _SIZES)),
        _counts("parameters of the model", report.n_params_before, report.n_params_after),
        _counts("bytes of the weights", *outcome.n_bytes),
    ]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in table]
    kinds = Counter(row.kind for row in rows)
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in outcome.seconds.items() if stage != "all")
    where = repr(str(outcome.out))
    explained = [
        f"± is one standard error over {len(outcome.before.nats)} {outcome.evaluated}, "
        f"{int(outcome.before.n_tokens.sum()):,} predicted tokens",
        f"layers: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}; with masks and "
        f"indices {report.kept:.1%} is kept",
        *_narrowed(rows),
        *_predicted(report),
        f"time: {duration(outcome.seconds['all'])} ({stages})",
        f"peak memory: {_peak_bytes() / 1e9:.1f} GB",
    ]
    lines += ["", *(textwrap.fill(line, 80, subsequent_indent="  ") for line in explained)]
    lines += ["", f"saved in {outcome.out}; to load it:"]
    lines += ["  from mpo_core import load; from transformers import AutoTokenizer"]
    lines += [f"  model, tokenizer = load({where}), AutoTokenizer.from_pretrained({where})"]
    return "\n".join(lines)


_SIZES = (lambda row: row.n_params_before, lambda row: row.n_params_after)


def _narrowed(rows: Sequence[CompressedLayer]) -> list[str]:
    n = sum(row.n_params_before > row.out_features * row.in_features for row in rows)
    return [f"{n} of these layers belong to MLPs that have fewer hidden units now"] if n else []


def _predicted(report: CompressionReport) -> list[str]:
    fitted, held_out = report.total("predicted_loss"), report.total("held_out_loss")
    if fitted is None:
        return []
    line = f"predicted rise of the loss: {fitted:.3f} nats on the text that layers are fitted to"
    if held_out is not None:
        line += f", {held_out:.3f} on calibration text held out"
        line += ": more --tokens would help" if held_out > PARTED * fitted else ""
    return [line]


def _counts(what: str, before: int, after: int) -> tuple[str, str, str, str]:
    return what, f"{before:,}", f"{after:,}", f"{after / before:.1%}"


def _plus_minus(error: float, digits: int) -> str:
    return f" ± {error:.{digits}f}" if math.isfinite(error) else ""


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
