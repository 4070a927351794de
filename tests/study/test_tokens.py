"""Corpora of bytes and of tokens: their splits, files, cache, storage and bits per byte."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import sys
import tracemalloc
from pathlib import Path
from shutil import copytree

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizer_folders import END, byte_pairs, words

from study.errors import StudyError
from study.spec.cache import CACHE_VARIABLE
from study.training import documents
from study.training.corpus import corpus_from_bytes
from study.training.corpus_storage import store_corpus, stored_corpus, token_key
from study.training.loading import load_corpus
from study.training.model import build_model
from study.training.seed_run import train_seed, train_seeds
from study.training.storage import Storage
from study.training.token_file import Damaged, read
from study.training.tokenizer import folder_identity, tokenizer_from_folder
from study.training.train import Training
from study.training.unit import checkpoints_of
from study.training.windows import StackedWindows, Windows, consecutive_windows

TEXT = "χ is the bond; the train of tensors is long.\nŵ = the core.\n" * 40
DOCUMENTS = [f"document {number} has χ = {number * number}" for number in range(30)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer of pairs of bytes."""
    return byte_pairs(tmp_path_factory.mktemp("tokenizers") / "pairs", TEXT)


@pytest.fixture(scope="module")
def without_end(tmp_path_factory):
    """A folder with a tokenizer that has no end-of-text token, and hardly any pairs."""
    return byte_pairs(tmp_path_factory.mktemp("tokenizers") / "endless", "e e", 257, has_end=False)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def lines(tmp_path):
    """A file of JSON lines, with an empty document and a blank line among them."""
    path = tmp_path / "text.jsonl"
    rows = [{"text": text, "id": number} for number, text in enumerate(DOCUMENTS)]
    rows.insert(3, {"text": "", "id": -1})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "folder"])
def test_one_text_is_split_where_its_characters_are(text_file, folder, kind):
    characters = load_corpus(text_file)
    corpus = load_corpus(text_file, tokenizer="bytes" if kind == "bytes" else str(folder))
    for split in ("train", "validation"):
        assert corpus.decode(getattr(corpus, split)) == characters.decode(getattr(characters, split))
    assert corpus.text_sha256 == characters.sha256 != corpus.sha256
    assert int(corpus.tokens.long().max()) < corpus.vocab_size
    assert corpus.tokens.dtype == torch.uint16
    assert corpus.unit == {"bytes": "bytes", "folder": "tokens"}[kind]
    assert (characters.tokenizer, corpus.tokenizer.split(" ")[0]) == ("characters", kind)


@pytest.mark.parametrize("kind", ["characters", "bytes", "folder", "without end"])
def test_documents_are_split_whole_with_the_end_between_them(lines, folder, without_end, kind):
    tokenizer = {"folder": str(folder), "without end": str(without_end)}.get(kind, kind)
    corpus = load_corpus(lines, tokenizer=tokenizer, validation_fraction=0.25)
    end = {"bytes": "\0", "folder": END}.get(kind, "")
    n_validation = next(n for n in range(30) if corpus.decode(corpus.validation) == end + end.join(DOCUMENTS[-n:]))
    assert corpus.decode(corpus.train) == end.join(DOCUMENTS[:-n_validation])
    sizes = [len(corpus.encode(text)) for text in DOCUMENTS]
    assert sum(sizes[-n_validation:]) >= 0.25 * sum(sizes) > sum(sizes[1 - n_validation :])
    first = len(corpus.decode(corpus.validation[:1]).encode()) if not end else 0
    assert corpus.n_predicted_bytes == sum(len(text.encode()) for text in DOCUMENTS[-n_validation:]) - first


def test_every_format_gives_the_same_corpus(tmp_path, lines):
    expected = load_corpus(lines, tokenizer="bytes")
    packed = tmp_path / "text.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    for number, kind in enumerate((pa.string(), pa.large_string())):
        table = pa.table({"body": pa.array([*DOCUMENTS[:5], None, *DOCUMENTS[5:]], kind)})
        parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=7)
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    several = [tmp_path / f"{number}.txt" for number in range(len(DOCUMENTS))]
    found = [
        load_corpus(packed, tokenizer="bytes"),
        load_corpus(tmp_path / "0.parquet", tokenizer="bytes", text_column="body"),
        load_corpus([tmp_path / "1.parquet"], tokenizer="bytes", text_column="body"),
        load_corpus(several, tokenizer="bytes"),
    ]
    assert {corpus.sha256 for corpus in found} == {expected.sha256}
    half = [tmp_path / "half.jsonl", *several[10:]]
    half[0].write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS[:10]))
    assert load_corpus(half, tokenizer="bytes").sha256 == expected.sha256
    assert load_corpus(several[:-1], tokenizer="bytes").sha256 != expected.sha256


def test_list_of_one_text_is_that_text(text_file):
    assert load_corpus([text_file]) == load_corpus(text_file)
    assert load_corpus([text_file], tokenizer="bytes").sha256 == load_corpus(text_file, tokenizer="bytes").sha256


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufeff"), min_size=4, max_size=80))
@pytest.mark.parametrize("size", [5, 7, 64])
def test_text_in_small_pieces_is_the_whole_text(tmp_path, monkeypatch, text, size):
    monkeypatch.setattr(documents, "PIECE_BYTES", size)
    path = tmp_path / "pieces.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    pieces = list(documents.Source((path,)).pieces())
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    characters, found = load_corpus(path, validation_fraction=0.5), load_corpus(path, None, 0.5, "bytes")
    assert found.text_sha256 == characters.sha256
    assert found.decode(found.validation) == characters.decode(characters.validation)


def test_first_bytes_of_a_token_are_exact(folder, without_end, tmp_path):
    for place in (folder, without_end):
        tokenizer = tokenizer_from_folder(place)
        for text in ("χ", "€uro", " ŵ", "the", f"{END} x", "a", "\n\n", "日本"):
            [(tokens, n_first)] = tokenizer.encode([text])
            rest = tokenizer.decode(tokens[1:].tolist()).encode()
            if "\ufffd" not in rest.decode():
                assert n_first == len(text.encode()) - len(rest), text
            assert END not in tokenizer.decode(tokens[:1].tolist())
    [(tokens, n_first)] = tokenizer_from_folder(without_end).encode(["€"])
    assert (len(tokens), n_first) == (3, 1)
    lower = tokenizer_from_folder(words(tmp_path / "words", ["the", "bond"]))
    assert [encoded.n_first_bytes for encoded in lower.encode(["the bond", " the"])] == [3, 4]


# Bits per byte --------------------------------------------------------------------------------------------------------


def bits_by_hand(model, corpus, context, n_bytes):
    """Bits per byte of a model, window by window, in float64."""
    nats, tokens = 0.0, corpus.validation.long()
    with torch.no_grad():
        for begin in range(0, len(tokens) - 1, context):
            window = tokens[begin : begin + context + 1]
            log_p = model(window[None, :-1])[0].double().log_softmax(-1)
            nats -= float(log_p.gather(1, window[1:, None]).sum())
    return nats / math.log(2) / n_bytes


@pytest.mark.parametrize("kind", ["characters", "bytes", "folder"])
@pytest.mark.parametrize("of", ["text", "documents"])
def test_bits_per_byte_are_those_of_a_hand_computation(text_file, lines, folder, spec_of, kind, of):
    path = text_file if of == "text" else lines
    corpus = load_corpus(path, tokenizer=str(folder) if kind == "folder" else kind)
    spec = spec_of()
    result, weights = train_seed(spec, 0, corpus)
    model, _ = build_model(spec, corpus.vocab_size, lambda name: torch.Generator())
    model.load_state_dict(weights)
    validation = corpus.decode(corpus.validation)
    first = 1 if kind == "bytes" else len(corpus.decode(corpus.validation[:1]).encode())
    if of == "documents" and kind != "characters":  # the first token is the end of the last training document
        validation, first = validation.replace(END, "").replace("\0", ""), 0
    n_bytes = len(validation.encode()) - first
    expected = bits_by_hand(model, corpus, spec.model.context, n_bytes)
    assert result.final["final/bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    rows = [row["bits_per_byte"] / row["val_loss"] for row in result.curve]
    assert rows == pytest.approx([rows[0]] * len(rows))
    assert result.final["best/bits_per_byte"] == min(row["bits_per_byte"] for row in result.curve)


def test_bytes_of_ascii_are_characters_up_to_their_numbers(small_text):
    characters, corpus = load_corpus(small_text), load_corpus(small_text, tokenizer="bytes")
    assert corpus.n_predicted_bytes == characters.n_predicted_bytes == len(characters.validation) - 1
    codes = torch.tensor([ord(character) for character in characters.vocabulary])
    assert torch.equal(codes[characters.train], corpus.train.long())
    assert torch.equal(codes[characters.validation], corpus.validation.long())
    # So a model that gives each byte the probability of its character has the same bits per byte.
    drawn = [Windows(one.train, 3, 4, 8, seed=0, purpose="data").batch(2)[0] for one in (characters, corpus)]
    assert torch.equal(codes[drawn[0]], drawn[1])


def test_untrained_model_of_equal_logits_needs_the_bits_of_its_vocabulary(small_text, spec_of, folder):
    for tokenizer in ("characters", "bytes", str(folder)):
        corpus = load_corpus(small_text, tokenizer=tokenizer)
        training = Training(spec_of(), 0, corpus)
        for parameter in training.parameters:
            torch.nn.init.zeros_(parameter)
        bits = training._evaluation()["bits_per_byte"]
        n_predicted = len(corpus.validation) - 1
        assert bits == pytest.approx(math.log2(corpus.vocab_size) * n_predicted / corpus.n_predicted_bytes)


# Windows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32])
def test_windows_of_small_integers_are_those_of_int64(dtype):
    tokens = torch.arange(65_400, 65_536)
    small = tokens.to(dtype)
    for one, other in zip(consecutive_windows(tokens, 7, 3), consecutive_windows(small, 7, 3), strict=True):
        assert all(torch.equal(*pair) and pair[1].dtype == torch.int64 for pair in zip(one, other, strict=True))
    both = [Windows(each, 4, 2, 5, seed=1, purpose="data") for each in (tokens, small)]
    stacked = [StackedWindows([one, one], "cpu") for one in both]
    for kind in (both, stacked):
        batches = [windows.batch(3) for windows in kind]
        assert all(torch.equal(*pair) and pair[1].dtype == torch.int64 for pair in zip(*batches, strict=True))


def test_stacked_seeds_and_resumed_ones_are_those_alone(lines, folder, spec_of, tmp_path):
    corpus, spec = load_corpus(lines, tokenizer=str(folder)), spec_of({"steps": 8})
    alone = train_seed(spec, 1, corpus)[0]
    stacked = train_seeds(spec, [0, 1], corpus)[1][0]
    assert stacked.final["final/bits_per_byte"] == pytest.approx(alone.final["final/bits_per_byte"], rel=1e-4)
    checkpoints = checkpoints_of(Storage(str(tmp_path / "storage")), "uuid", 0, 1, spec)
    options = {"checkpoints": checkpoints, "checkpoint_seconds": 0}

    def interrupt(row):
        if row["step"] >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_seed(spec, 1, corpus, on_evaluation=interrupt, **options)
    assert checkpoints.steps()
    assert train_seed(spec, 1, load_corpus(lines, tokenizer=str(folder)), **options)[0].curve == alone.curve


# Files ----------------------------------------------------------------------------------------------------------------


def test_tokens_are_made_once_and_mapped(lines, folder, cache, monkeypatch):
    first = load_corpus(lines, tokenizer=str(folder))
    [file] = cache.iterdir()
    written = file.stat().st_mtime_ns
    os.utime(file, ns=(written - 10**9, written - 10**9))
    again = load_corpus(lines, tokenizer=str(folder))
    assert again.sha256 == first.sha256
    assert [(path, path.stat().st_mtime_ns) for path in cache.iterdir()] == [(file, written - 10**9)]
    assert str(file) in Path("/proc/self/maps").read_text()
    assert load_corpus(lines, None, 0.3, str(folder)).sha256 != first.sha256


def test_damaged_cache_is_made_again(lines, cache):
    expected = load_corpus(lines, tokenizer="bytes").sha256
    [file] = cache.iterdir()
    whole = file.read_bytes()
    for data in (whole[:-2], whole[:-1] + bytes([whole[-1] ^ 1]), b"", whole[:100], bytes(5000)):
        file.unlink()
        file.write_bytes(data)
        with pytest.raises(Damaged):
            read(file)
        assert load_corpus(lines, tokenizer="bytes").sha256 == expected
        assert file.read_bytes() == whole


def test_identity_is_of_content_and_not_of_places(lines, folder, tmp_path):
    corpus = load_corpus(lines, tokenizer=str(folder))
    copy = copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"weights of a model beside it")
    assert load_corpus(lines, tokenizer=str(copy)).sha256 == corpus.sha256
    other = byte_pairs(tmp_path / "other", TEXT, 270)
    assert load_corpus(lines, tokenizer=str(other)).sha256 != corpus.sha256


def test_the_configuration_of_a_model_counts_if_it_names_the_class_of_the_tokenizer(folder):
    own = folder_identity(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert folder_identity(folder) == own  # tokenizer_config.json names the class
    (folder / "tokenizer_config.json").write_text("{}")
    first = folder_identity(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert folder_identity(folder) != first


@pytest.fixture(params=["path", "memory URL"])
def storage(request, tmp_path):
    if request.param == "path":
        yield Storage(str(tmp_path / "storage"))
    else:
        yield Storage(f"memory://{tmp_path.name}")
        fsspec.filesystem("memory").store.clear()


def test_workers_map_the_stored_tokens(storage, lines, folder, cache, tmp_path, monkeypatch):
    corpus = load_corpus(lines, tokenizer=str(folder))
    store_corpus(storage, corpus)
    store_corpus(storage, corpus)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "of another machine"))
    for _ in range(2):
        found = stored_corpus(storage, corpus.sha256, 0.1)
        assert (found.sha256, found.tokenizer, found.unit) == (corpus.sha256, corpus.tokenizer, "tokens")
        assert torch.equal(found.tokens.long(), corpus.tokens.long())
        assert found.decode(found.encode("the χ")) == "the χ"
    copies = list((tmp_path / "of another machine").glob("*"))
    assert [path.name for path in copies] == [f"{corpus.sha256}.safetensors"] * storage.is_remote
    data = bytearray(storage.read(token_key(corpus.sha256)))
    data[-1] ^= 1
    storage.write(token_key(corpus.sha256), bytes(data))
    for path in copies:
        path.unlink()
    with pytest.raises(OSError, match="is damaged: its checksum is wrong"):
        stored_corpus(storage, corpus.sha256, 0.1)
    if not storage.is_remote:
        store_corpus(storage, corpus)
        assert stored_corpus(storage, corpus.sha256, 0.1).sha256 == corpus.sha256


def test_token_file_is_a_corpus_that_must_fit(lines, folder, tmp_path):
    corpus = load_corpus(lines, tokenizer=str(folder))
    path, absent = corpus.path, str(tmp_path / "not on this machine")
    assert load_corpus(path, corpus.sha256, tokenizer=absent).sha256 == corpus.sha256
    assert load_corpus(path, corpus.text_sha256, tokenizer=str(folder)).sha256 == corpus.sha256
    another = byte_pairs(tmp_path / "another", TEXT, 270)
    for options, said in (
        ({"tokenizer": "bytes"}, "its tokens are those of folder"),
        ({"tokenizer": str(another)}, "its tokens are those of folder"),
        ({"tokenizer": str(folder), "validation_fraction": 0.2}, "split by corpus.validation_fraction=0.1"),
        ({"tokenizer": str(folder), "sha256": "0" * 64}, "wrong checksum"),
    ):
        with pytest.raises(StudyError, match=said):
            load_corpus(path, **options)


def test_memory_stays_bounded(tmp_path):
    path = tmp_path / "large.jsonl"
    line = json.dumps({"text": "tensor train " * 800})
    with path.open("w") as file:
        for _ in range(3000):
            file.write(line + "\n")
    tracemalloc.start()
    try:
        corpus = load_corpus(path, tokenizer="bytes")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(corpus.tokens) == 3000 * 10_400 + 2999
    assert peak < 40e6 < path.stat().st_size + 10e6


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ", line 2: is not JSON: "),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 3}\n', ", line 2: has no column `text`, only body, id; name"),
        ("a.jsonl", b'{"text": "a"}\n\n["b"]\n', ", line 3: must be a JSON object with the column `text`"),
        ("a.jsonl", b'{"text": 3}\n', ", line 1: the column `text` must be a text, but is 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ", line 2: is not UTF-8 text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', ", line 1: the column `text` is not valid Unicode"),
        ("a.jsonl", b"[" * 100_000, ", line 1: is not JSON: "),
        ("a.jsonl", b'{"text": ""}\n\n', ": the corpus is empty"),
        ("a.jsonl", b'{"text": "one"}\n', ": a split by documents needs at least 2 documents, but got 1"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9], ": cannot read the corpus: "),
        ("a.jsonl.gz", b"no gzip", ": cannot read the corpus: "),
        ("a.parquet", b"PAR1 and no more", ": is not a whole Parquet file: "),
        ("a.txt", b"abc\xffdef", ": a corpus is UTF-8 text, but byte 3 is not"),
        ("a.txt", "abcχ".encode()[:-1], ": a corpus is UTF-8 text, but byte 3 is not"),
        ("a.txt", b"", ": the corpus is empty"),
        ("a.txt", b"a", ": the corpus is too short to be split"),
        ("a.txt", b"ab", ": the corpus is too short: its validation split has one token"),
        ("a.safetensors", b"nothing", ": it is not a whole token file"),
    ],
)  # fmt: skip
def test_bad_text_is_one_line(tmp_path, name, data, said):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(StudyError) as caught:
        load_corpus(path, tokenizer="bytes")
    assert str(caught.value).startswith(f"{path}{said}")
    assert "\n" not in str(caught.value)


def test_bad_parquet_columns_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["a", "b"], "n": [1, 2]}), path)
    for column, said in (("text", "has no column `text`, only body, n;"), ("n", "must be a text, but is int64")):
        with pytest.raises(StudyError, match=said):
            load_corpus(path, tokenizer="bytes", text_column=column)


def test_missing_file_among_several_is_named(tmp_path, text_file):
    with pytest.raises(StudyError, match=r"absent.jsonl: cannot read the corpus: No such file"):
        load_corpus([text_file, tmp_path / "absent.jsonl"], tokenizer="bytes")


def test_documents_that_cannot_hold_the_fraction_are_refused(tmp_path):
    for number, text in enumerate(("a long one " * 50, "short")):
        (tmp_path / f"{number}.txt").write_text(text)
    paths = [tmp_path / "0.txt", tmp_path / "1.txt"]
    with pytest.raises(StudyError, match=r"0.txt and 1 more file: all documents but the first hold 0.009 of the"):
        load_corpus(paths, tokenizer="bytes")
    assert len(load_corpus(paths, None, 0.005, "bytes").validation) == 6
    with pytest.raises(StudyError, match="validation split has 6 bytes, but a context of 6 needs at least 7"):
        load_corpus(paths, None, 0.005, "bytes").check_context(6)


def test_checksum_of_the_file_the_text_or_the_corpus_will_do(lines, cache):
    corpus = load_corpus(lines, tokenizer="bytes")
    for known in (corpus.sha256, corpus.text_sha256, hashlib.sha256(lines.read_bytes()).hexdigest()):
        assert load_corpus(lines, known, tokenizer="bytes").sha256 == corpus.sha256
    with pytest.raises(StudyError, match=f"wrong checksum: expected SHA-256 {'0' * 64}, but got"):
        load_corpus(lines, "0" * 64, tokenizer="bytes")


def test_cache_that_cannot_be_written_is_named(lines, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(StudyError, match=f"cannot write the tokens of the corpus: .* {CACHE_VARIABLE} names another"):
        load_corpus(lines, tokenizer="bytes")


def test_bad_tokenizer_folder_is_one_line(lines, tmp_path, folder, monkeypatch):
    def said(place):
        with pytest.raises(StudyError) as caught:
            load_corpus(lines, tokenizer=str(place))
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"corpus.tokenizer: {place}: ")

    assert said(tmp_path / "absent") == "is not a folder; give `characters`, `bytes` or a folder with a tokenizer"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert said(tmp_path / "empty") == "has no tokenizer, for example no tokenizer.json"
    (tmp_path / "empty" / "tokenizer.json").write_text("{}")
    assert said(tmp_path / "empty").startswith("the tokenizer cannot be read: ")
    monkeypatch.setattr("study.training.tokenizer.MAX_VOCABULARY", 100)
    assert said(folder) == "a vocabulary has 1 to 100 tokens, but this one has 280"


def test_lacking_package_names_the_extra(lines, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # what an import finds if it is not installed
    with pytest.raises(StudyError, match=r"needs the package transformers, which is not installed: pip install 'mpo-s"):
        load_corpus(lines, tokenizer=str(folder))


def test_corpus_of_characters_is_as_before(small_text):
    corpus = corpus_from_bytes(small_text.read_bytes(), "here", None, 0.1)
    assert load_corpus(small_text) == corpus
    assert corpus.validation.dtype == corpus.train.dtype == torch.int64
    assert np.array_equal(corpus.train.numpy(), corpus.encode(corpus.text).numpy()[: len(corpus.train)])
