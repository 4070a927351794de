"""Arguments of mpo-compress."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mpo_core.calibration.statistics import METRICS
from mpo_core.compression.sizing import SPREADS
from mpo_core.tensor_train.gauge import GAUGES

LENGTH = 512
"""Default number of tokens of a sequence, if the model's context is not shorter."""
DTYPES = ("float32", "bfloat16", "float16")

DESCRIPTION = """\
Compress a causal language model of Hugging Face, and measure what it cost.

One part of the text is run through the model, to find which changes of its
matrices raise its loss. Then smaller layers replace the matrices. The other
part of the text measures the perplexity before and after. Nothing is trained.
"""
EXAMPLE = """\
example: keep 60 % of the parameters, then 40 % with the same statistics
  mpo-compress SmolLM2-135M small --keep 0.6 --text *.txt --statistics stats
  mpo-compress SmolLM2-135M tiny --keep 0.4 --text *.txt --statistics stats

OUT then holds a model for `mpo_core.load`, and report.txt with every layer.
exit status: 0; 1 if a file cannot be written; 2 after any other error
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mpo-compress: {message} (see mpo-compress --help)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the command's arguments; a wrong one gives one line and exit status 2."""
    made = _Parser(
        "mpo-compress",
        usage="%(prog)s MODEL OUT --keep SHARE --text FILE [FILE ...] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("model", metavar="MODEL", help="folder of a Hugging Face model, or its name")
    made.add_argument("out", metavar="OUT", type=Path, help="folder for the compressed model")
    made.add_argument(
        "--keep",
        type=_share,
        required=True,
        metavar="SHARE",
        help="share of the parameters of the replaced matrices that is kept, such as 0.6",
    )
    made.add_argument(
        "--text",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help='UTF-8 text, one document a file; or .jsonl, with one document as "text" of each line',
    )

    layers = made.add_argument_group("layers")
    layers.add_argument(
        "--layer",
        default="low_rank",
        metavar="KIND",
        help="low_rank, mpo, monarch, pruned, or auto: the best for each matrix. Default: low_rank",
    )
    layers.add_argument(
        "--gauge", choices=GAUGES, help="fixed has fewer parameters. Default: fixed, if the kind has a gauge"
    )
    layers.add_argument("--metric", choices=METRICS, default="loss", help="error that is kept small. Default: loss")
    layers.add_argument(
        "--spread",
        choices=SPREADS,
        help="how the parameters are spread over the layers. Default: loss for the metric loss, else errors",
    )
    layers.add_argument(
        "--narrow",
        action=argparse.BooleanOptionalAction,
        help="whether MLPs also lose hidden units, where that costs less. Default: yes, if spread by the loss "
        "and not pruned",
    )
    layers.add_argument(
        "--include",
        nargs="+",
        metavar="PATTERN",
        help='layers to replace, such as "model.layers.*". Default: all linear layers but the head',
    )
    layers.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="layers that stay dense")

    text = made.add_argument_group("text")
    text.add_argument("--tokens", type=_whole(1), default=10_240, metavar="N", help="to calibrate. Default: 10240")
    text.add_argument(
        "--evaluation-tokens", type=_whole(1), default=10_000, metavar="N", help="to evaluate. Default: 10000"
    )
    text.add_argument(
        "--length",
        type=_whole(3),
        metavar="N",
        help=f"tokens of a sequence. Default: {LENGTH}, or the model's context if it is shorter",
    )
    text.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="draws the calibration text. Default: 0")

    other = made.add_argument_group("other")
    other.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="file for the model's statistics: written if it does not exist, else read",
    )
    other.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights. Default: float32")
    other.add_argument("--threads", type=_whole(1), metavar="N", help="of PyTorch. Default: its own choice")
    other.add_argument("--replace", action="store_true", help="replace an earlier result in OUT")
    return made


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, but got {text}")
    return share


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, but got {text}")
        return int(text)

    return parse
