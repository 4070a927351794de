"""The bigram baseline: the counts by hand, and the documents say what the command prints."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from study.training.bigram import bigram_scores
from study.training.corpus import CharacterCorpus

ROOT = Path(__file__).parents[2]


def test_scores_are_those_of_counts_by_hand():
    text = "abacabad" * 5 + "abcdab"
    corpus = CharacterCorpus(text, "", validation_fraction=6 / 46)
    train, validation = text[:40], text[40:]
    pairs, alphabet = list(pairwise(train)), sorted(set(text))
    losses, hits = [], []
    for before, after in pairwise(validation):
        counts = {b: pairs.count((before, b)) + 1 for b in alphabet}
        losses.append(-math.log(counts[after] / sum(counts.values())))
        hits.append(max(alphabet, key=counts.__getitem__) == after)
    assert bigram_scores(corpus) == pytest.approx((sum(losses) / 5, sum(hits) / 5))


@pytest.mark.slow
@pytest.mark.parametrize("document", ["docs/findings.md", "docs/results/README.md"])
def test_documents_say_what_the_command_prints(document):
    command = [sys.executable, "-m", "study.training.bigram"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    assert f"({printed}; `python -m study.training.bigram`)" in " ".join(
        (ROOT / document).read_text(encoding="utf-8").split()
    )


def test_text_that_is_not_there_is_one_line(tmp_path):
    command = [sys.executable, "-m", "study.training.bigram", str(tmp_path / "none.txt")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
