"""mpo-compress: compress a language model of Hugging Face, and measure what it cost."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpo_core.calibration.collecting import collect_statistics, next_token_losses
from mpo_core.calibration.statistics import Statistics
from mpo_core.commands.arguments import LENGTH, parser
from mpo_core.commands.kept_statistics import describe, files_of, keep, load_kept
from mpo_core.commands.progress import Progress
from mpo_core.commands.summary import Outcome, summary
from mpo_core.commands.texts import FEWEST, Split, read_documents, split
from mpo_core.compression.candidates import AUTO
from mpo_core.compression.compress import compress
from mpo_core.compression.counting import n_params
from mpo_core.compression.perplexity import Perplexity, perplexity
from mpo_core.compression.saving import INDEX, save
from mpo_core.layers.registry import kind_called
from mpo_core.models.dense_layers import replaceable_layers
from mpo_core.models.hugging_face import load_language_model
from mpo_core.models.language_model import check_causal, context_of, head_of

REPORT = "report.txt"
"""In OUT: the summary, and a line for each layer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 1 if a file cannot be written, 2 for a user's error, 130 if stopped.

    Args:
        arguments: Default: those of the process.
    """
    given = parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without ±
    progress, n_threads = Progress(sys.stderr), torch.get_num_threads()
    try:
        torch.set_num_threads(given.threads or n_threads)
        print(run(given, progress))
    except (ValueError, OSError, RuntimeError, KeyboardInterrupt) as error:  # torch raises RuntimeError: no memory left
        progress.clear()
        print(f"mpo-compress: {' '.join(str(error).split()) or 'stopped'}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1 if isinstance(error, OSError) else 2
    finally:
        torch.set_num_threads(n_threads)
    return 0


def run(given: argparse.Namespace, progress: Progress) -> str:
    """Compress, save and measure; return the summary.

    Raises:
        ValueError: the arguments, the model or the text do not fit.
        OSError: a file cannot be written.
    """
    begun = time.monotonic()
    options = _options(given)
    _check_writable(given)
    documents = read_documents(given.text)
    progress.say(f"loading {given.model}")
    model, tokenizer = load_language_model(given.model, getattr(torch, given.dtype))
    check_causal(model, given.model)
    if given.include is None:
        options["exclude"] = [*given.exclude, *filter(None, [head_of(model)])]
    names = _names(model, options["include"], options["exclude"])
    progress.say(f"{n_params(model):,} parameters; {len(names)} matrices to compress")
    text, first = _split(given, model, tokenizer, documents)
    n_evaluated = sum(map(len, text.evaluation))
    progress.say(
        f"text: {text.calibration.numel():,} tokens to calibrate, {n_evaluated:,} to evaluate, "
        f"of {len(text.evaluation)} {text.evaluated}"
    )
    if len(documents) < FEWEST:
        progress.say(f"fewer than {FEWEST} documents: the last part of each is for evaluation")

    def measured(one: nn.Module, when: str) -> Perplexity:
        window = text.calibration.shape[1] - (first is not None)
        shown = partial(progress, f"perplexity {when}")
        return perplexity(one, text.evaluation, window=window, first=first, progress=shown)

    before = measured(model, "before")
    statistics = _statistics(given, model, names, text.calibration, progress)
    with warnings.catch_warnings():
        for said in ("the predicted loss", "`narrow` found no hidden units"):  # the summary says it
            warnings.filterwarnings("ignore", said)
        small, report = compress(model, statistics=statistics, progress=progress, **options)
    save(small, given.out, tokenizer=tokenizer)
    outcome = Outcome(
        out=given.out,
        before=before,
        after=measured(small, "after"),
        evaluated=text.evaluated,
        report=report,
        n_bytes=(_n_bytes(model), _n_bytes(small)),
        seconds={**progress.seconds, "all": time.monotonic() - begun},
    )
    said = summary(outcome)
    (given.out / REPORT).write_text(f"{said}\n\n{report}\n", encoding="utf-8")
    return said


def _options(given: argparse.Namespace) -> dict[str, Any]:
    """Those of `compress`."""
    if given.metric == "weights" and given.statistics is not None:
        raise ValueError("--metric weights needs no --statistics: leave one of them out")
    if given.spread == "loss" and given.metric != "loss":
        raise ValueError(f"--spread loss needs --metric loss, but got --metric {given.metric}")
    by_loss = given.metric == "loss" and given.spread in (None, "loss")
    if given.narrow and not by_loss:
        raise ValueError("--narrow needs --metric loss and --spread loss")
    has_gauge = given.layer == AUTO or "gauge" in kind_called(given.layer).option_names()
    if given.gauge is not None and not has_gauge:
        raise ValueError(f"--layer {given.layer} has no gauge: leave --gauge out")
    return {
        "layer": given.layer,
        "keep": given.keep,
        "metric": given.metric,
        "spread": given.spread,
        # To remove single weights costs less than to remove units.
        "narrow": (by_loss and given.layer != "pruned") if given.narrow is None else given.narrow,
        "include": given.include or ["*"],
        "exclude": given.exclude,
        **({"gauge": given.gauge or "fixed"} if has_gauge else {}),
    }


def _check_writable(given: argparse.Namespace) -> None:
    """Before hours of work."""
    out: Path = given.out
    if (out / INDEX).exists():
        if not given.replace:
            raise ValueError(f"{out} holds an earlier result: choose another folder, or add --replace")
    elif out.is_dir() and any(_is_foreign(path, given.statistics) for path in out.iterdir()):
        raise ValueError(f"{out} is not empty, and holds no earlier result: choose another folder")
    for path, is_folder in ((out, True), (given.statistics, False)):
        if path is None:
            continue
        there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
        if there.is_dir() != (is_folder or there != path.absolute()):
            raise ValueError(f"{path} cannot be written: {there} is a {'folder' if there.is_dir() else 'file'}")
        if there.is_dir() and not os.access(there, os.W_OK):
            raise ValueError(f"{path} cannot be written: no permission for {there}")


def _is_foreign(path: Path, statistics: Path | None) -> bool:
    """Whether a file is neither hidden nor one of the statistics that an interrupted run has kept."""
    is_kept = statistics is not None and path.absolute() in map(Path.absolute, files_of(statistics))
    return not path.name.startswith(".") and not is_kept


def _names(model: nn.Module, include: list[str], exclude: list[str]) -> list[str]:
    """Layers that will be replaced."""
    return [name for dense in replaceable_layers(model, include, exclude) for name in (dense.name, *dense.sharers)]


def _split(given: argparse.Namespace, model: Any, tokenizer: Any, documents: list[str]) -> tuple[Split, int | None]:
    """Sequences of tokens, and the token that the tokenizer puts before a text, if it does."""
    longest = context_of(model)
    length = given.length or min(LENGTH, longest or LENGTH)
    if longest is not None and length > longest:
        raise ValueError(f"--length must be at most {longest}, the model's context, but got {length}")
    special = tokenizer("").input_ids
    first = int(special[0]) if special and special[0] == tokenizer.bos_token_id else None
    text = split(
        documents,
        lambda document: tokenizer(document, add_special_tokens=False, verbose=False).input_ids,
        calibration_tokens=given.tokens,
        evaluation_tokens=given.evaluation_tokens,
        length=length,
        seed=given.seed,
        first=first,
        between=tokenizer.eos_token_id,
    )
    largest = max(int(ids.max()) for ids in (text.calibration, *text.evaluation))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise ValueError(f"the tokenizer is not the model's: it has token {largest:,}, but the model {vocabulary:,}")
    return text, first


def _statistics(
    given: argparse.Namespace, model: nn.Module, names: list[str], calibration: Tensor, progress: Progress
) -> Statistics | None:
    if given.metric == "weights":
        return None
    loss = next_token_losses if given.metric == "loss" else None
    about = describe(model, calibration, names, has_loss=loss is not None)
    if given.statistics is not None:
        kept = load_kept(given.statistics, about)
        if kept is not None:
            progress.say(f"statistics: read from {given.statistics}")
            return kept
    batches = [ids[None] for ids in calibration]
    shown = partial(progress, "statistics")
    shown(0, len(batches))
    statistics = collect_statistics(
        model, batches, loss=loss, modules=names, progress=lambda done: shown(done, len(batches))
    )
    if given.statistics is not None:
        given.statistics.parent.mkdir(parents=True, exist_ok=True)
        keep(statistics, given.statistics, about)
        progress.say(f"statistics: kept in {given.statistics}")
    return statistics


def _n_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


if __name__ == "__main__":
    sys.exit(main())
