"""Documents are read from files, and split into text to calibrate and to evaluate on."""

from __future__ import annotations

import json

import pytest
import torch

from mpo_core.commands.texts import read_documents, split

LENGTH = 8


def tokenise(document):
    """Numbers to numbers."""
    return [int(word) for word in document.split()]


def made_up(n=20, size=50):
    """Token ids say which document: id // 1,000."""
    return [" ".join(str(1000 * i + k) for k in range(size)) for i in range(n)]


def cut(documents=None, **options):
    options = {"calibration_tokens": 100, "evaluation_tokens": 60, "length": LENGTH, "seed": 0, **options}
    return split(made_up() if documents is None else documents, tokenise, **options)


def owners(ids):
    return set((ids // 1000).flatten().tolist())


def n_tokens(evaluation):
    return sum(map(len, evaluation))


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_is_a_document_and_a_line_of_jsonl_is_one(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    lines = [{"text": "three\u2028four", "id": 1}, {"text": "  "}, {"text": "five"}, {"text": "one\n\ntwo"}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    (tmp_path / "b.jsonl").write_text(text, encoding="utf-8")
    documents = read_documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert documents == ["one\n\ntwo", "three\u2028four", "five"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"none\.txt cannot be read: No such file"),
        ("empty.txt", b" \n", r"there is no text in .*empty\.txt"),
        ("binary.txt", b"\xff\xfe\x00", r"binary\.txt is not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"texts": "y"}\n', r"a\.jsonl, line 2: each line must be a JSON object with"),
        ("b.jsonl", b"words\n", r"b\.jsonl, line 1: each line must be"),
        ("c.jsonl", b'{"text": 5}', r"c\.jsonl, line 1: each line must be"),
    ],
)
def test_files_without_text_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents([tmp_path / name])


# Splits ---------------------------------------------------------------------------------------------------------------


def test_calibration_is_sequences_of_consecutive_tokens():
    calibration = cut().calibration
    assert calibration.shape == (13, LENGTH)
    assert torch.equal(calibration.diff(dim=1), torch.ones(13, LENGTH - 1, dtype=torch.int64))
    assert len(owners(calibration)) == 13  # one from every document before a second from any


@pytest.mark.parametrize("n", [1, 2, 4, 5, 20])
def test_no_token_calibrates_and_evaluates(n):
    for seed in range(3):
        both = cut(made_up(n, 400 // n), calibration_tokens=150, seed=seed)
        evaluated = torch.cat(both.evaluation)
        assert not set(evaluated.tolist()) & set(both.calibration.flatten().tolist())
        assert len(evaluated.unique()) == len(evaluated)
        assert 60 <= len(evaluated) < 60 + LENGTH
        if n >= 5:
            assert both.evaluated == "documents"
            assert len(both.evaluation) == len(owners(evaluated)) == max(2, n // 5)
            assert not owners(evaluated) & owners(both.calibration)
        else:
            assert both.evaluated == "sequences"
            assert [len(owners(each)) for each in both.evaluation] == [1] * len(both.evaluation)
            assert owners(evaluated) <= set(range(n))


def test_the_last_part_of_the_only_document_is_evaluated():
    both = cut(made_up(1, 500))
    assert int(both.calibration.max()) < 400
    assert min(int(each.min()) for each in both.evaluation) >= 400
    assert int(cut(made_up(1, 500), evaluation_tokens=240).calibration.max()) < 260


def test_the_seed_draws_calibration_alone():
    one, again, other = cut(seed=1), cut(seed=1), cut(seed=2)
    assert torch.equal(one.calibration, again.calibration)
    assert not torch.equal(one.calibration, other.calibration)
    assert all(map(torch.equal, one.evaluation, other.evaluation))
    assert torch.equal(cut(made_up()[::-1], seed=1).calibration, one.calibration)


def test_fewer_calibration_tokens_are_the_beginning_of_more():
    assert torch.equal(cut(calibration_tokens=400).calibration[:13], cut().calibration)


def test_short_documents_are_joined_and_more_of_them_evaluated():
    documents = made_up(40, 3)
    both = cut(documents, calibration_tokens=30, between=-1)
    assert both.calibration.shape == (4, LENGTH)
    ids = both.calibration.flatten().tolist()
    assert [i for i, token in enumerate(ids) if token == -1] == list(range(3, 32, 4))
    assert n_tokens(both.evaluation) == 60
    assert len(both.evaluation) == 20


def test_a_first_token_begins_every_calibration_sequence():
    both = cut(first=-7)
    assert both.calibration.shape == (13, LENGTH)
    assert both.calibration[:, 0].tolist() == [-7] * 13
    assert -7 not in torch.cat(both.evaluation)
    assert len(owners(both.calibration[:, 1:])) == 13


@pytest.mark.parametrize(("n", "size", "there"), [(1, 100, (40, 60)), (20, 5, (40, 60)), (5, 20, (40, 60))])
def test_too_little_text_is_counted(n, size, there):
    message = f"100 tokens to calibrate and 60 to evaluate .* but the text has {there[0]} and {there[1]}: give more"
    with pytest.raises(ValueError, match=message):
        cut(made_up(n, size))
