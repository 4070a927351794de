"""The bigram baseline: the loss and accuracy of a model that knows only the last token.

python -m study.training.bigram [TEXT]     Default: Tiny Shakespeare
"""

from __future__ import annotations

from argparse import ArgumentParser

import torch

from study.errors import StudyError
from study.training.corpus import Corpus
from study.training.loading import load_corpus


def bigram_scores(corpus: Corpus) -> tuple[float, float]:
    """Loss (nats) and accuracy on the validation split of P(b | a) = (n_ab + 1) / (n_a + V), counted in training."""
    n_tokens = corpus.vocab_size
    train, validation = corpus.train.long(), corpus.validation.long()
    pairs = torch.bincount(train[:-1] * n_tokens + train[1:], minlength=n_tokens**2).view(n_tokens, n_tokens) + 1
    log_p = (pairs.double() / pairs.sum(1, keepdim=True)).log()
    before, after = validation[:-1], validation[1:]
    loss = -log_p[before, after].mean()
    accuracy = (log_p.argmax(1)[before] == after).double().mean()
    return float(loss), float(accuracy)


def main() -> None:
    parser = ArgumentParser(prog="python -m study.training.bigram", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", nargs="?", help="Text file. Default: Tiny Shakespeare.")
    try:
        loss, accuracy = bigram_scores(load_corpus(parser.parse_args().text))
    except StudyError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{loss:.4f} nats, {100 * accuracy:.2f} %")


if __name__ == "__main__":
    main()
