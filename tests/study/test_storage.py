"""Objects are whole or recognised as damaged, and no key leads out of its storage."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest
import torch

from study.errors import StudyError
from study.training.checkpoints import Checkpoints, Damaged, pack_tensors, unpack_tensors
from study.training.storage import Storage


@pytest.fixture(params=["path", "file URL", "memory URL"])
def storage(request, tmp_path):
    if request.param == "memory URL":  # fsspec's own file system in memory: not a local one, as an object store is not
        yield Storage(f"memory://{tmp_path.name}")
        fsspec.filesystem("memory").store.clear()
    else:
        yield Storage(str(tmp_path / "objects") if request.param == "path" else f"file://{tmp_path}/objects")


def random_tensors(seed=0):
    made = torch.Generator().manual_seed(seed)
    return {"W": torch.randn(3, 2, generator=made), "step": torch.tensor(seed, dtype=torch.float32)}


# Objects --------------------------------------------------------------------------------------------------------------


def test_objects_are_read_as_written(storage):
    storage.write("a/b/one", b"1")
    storage.write("a/b/two", b"")
    storage.write("a/b/one", b"other")
    assert storage.read("a/b/one") == b"other"
    assert storage.read("a/b/two") == b""
    assert storage.keys("a/b") == ["a/b/one", "a/b/two"]
    assert (storage.exists("a/b/one"), storage.exists("a/b"), storage.exists("a/b/three")) == (True, False, False)
    storage.delete("a/b/one")
    storage.delete("a/b/one")
    assert storage.keys("a/b") == ["a/b/two"]


def test_files_are_stored_and_fetched_whole(storage, tmp_path):
    data = bytes(range(256)) * 50_000
    (tmp_path / "file").write_bytes(data)
    for _ in range(2):  # the second replaces the first
        storage.put("a/b/file", tmp_path / "file")
    storage.fetch("a/b/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == storage.read("a/b/file") == data
    assert storage.size("a/b/file") == len(data)
    assert storage.keys("a/b") == ["a/b/file"]
    path = storage.local_path("a/b/file")
    assert (path is None) is storage.is_remote
    assert path is None or path.read_bytes() == data
    for act in (storage.size, lambda key: storage.fetch(key, tmp_path / "copy")):
        with pytest.raises(FileNotFoundError):
            act("a/absent")


def test_absent_object_and_folder(storage):
    with pytest.raises(FileNotFoundError):
        storage.read("a/absent")
    assert storage.keys("absent") == []


@pytest.mark.parametrize("key", ["/etc/passwd", "../x", "a/../../x", "a/..", ".."])
def test_key_cannot_leave_its_storage(storage, key):
    for act in (storage.read, storage.delete, storage.exists, storage.keys, lambda key: storage.write(key, b"x")):
        with pytest.raises(ValueError, match="a key must stay inside its storage"):
            act(key)


def test_second_storage_sees_the_first_ones_objects(storage):
    storage.write("a", b"x")
    assert Storage(storage.url).read("a") == b"x"


def test_relative_path_is_the_same_place_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage("objects")
    storage.write("a", b"x")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert storage.read("a") == b"x"
    assert Storage(storage.url).read("a") == b"x"


@pytest.mark.parametrize("url", ["nonsense://bucket", "gs://bucket/folder"])
def test_url_that_cannot_be_opened_is_named(url):
    with pytest.raises(StudyError) as caught:
        Storage(url)
    assert str(caught.value).startswith(f"--storage {url}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_reader_sees_a_whole_object_while_it_is_replaced(tmp_path):
    storage = Storage(str(tmp_path))
    contents = [bytes([value]) * 300_000 for value in (1, 2)]
    storage.write("object", contents[0])
    over = threading.Event()

    def write():
        for turn in range(30):
            storage.write("object", contents[turn % 2])
        over.set()

    writer = threading.Thread(target=write)
    writer.start()
    n_reads = 0
    while not over.is_set():
        assert storage.read("object") in contents
        n_reads += 1
    writer.join()
    assert n_reads > 1
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


def test_writer_killed_half_way_leaves_the_old_object(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("folder/object", b"old")
    # The process ends where the new object would have taken the old one's place.
    script = (
        "import os; os.replace = lambda *paths: os._exit(9)\n"
        f"from study.training.storage import Storage; Storage({str(tmp_path)!r}).write('folder/object', b'new')"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == 9
    assert len(list((tmp_path / "folder").iterdir())) == 2  # the object, and what was being written
    assert storage.read("folder/object") == b"old"
    assert storage.keys("folder") == ["folder/object"]


def test_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "object").mkdir()
    with pytest.raises(OSError, match="object"):
        Storage(str(tmp_path)).write("object", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


# Tensors --------------------------------------------------------------------------------------------------------------


def test_tensors_and_content_come_back_exactly():
    tensors = {
        "float": torch.tensor([[1e-45, -0.0, torch.inf], [3.0, torch.nan, 1 / 3]]),
        "transposed": torch.arange(6.0, dtype=torch.float64).view(2, 3).T,
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
    }
    content = {"step": 3, "curve": [{"val_loss": 0.1 + 0.2, "n": 1}], "text": "χ", "none": None}
    read, read_content = unpack_tensors(pack_tensors(tensors, content))
    assert read_content == content
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert read[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


def test_every_flipped_bit_is_noticed():
    data = pack_tensors(random_tensors(), {"step": 5})
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(Damaged):
                unpack_tensors(bytes(flipped))


def test_every_shortened_object_is_noticed():
    data = pack_tensors(random_tensors(), {"step": 5})
    for length in range(len(data)):
        with pytest.raises(Damaged):
            unpack_tensors(data[:length])
    with pytest.raises(Damaged):
        unpack_tensors(data + b"\0")


def test_foreign_file_is_noticed():
    pickled = b"\x80\x04cos\nsystem\n(S'true'\ntR."  # would run a command if anything unpickled it
    for data in (pickled, b"", b"not a checkpoint at all", bytes(100)):
        with pytest.raises(Damaged):
            unpack_tensors(data)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def saved(storage, *steps):
    checkpoints = Checkpoints(storage, "study/checkpoints/trial0-seed0")
    for step in steps:
        checkpoints.save(step, random_tensors(step), {"step": step})
    return checkpoints


def step_of(checkpoints):
    loaded = checkpoints.load()
    if loaded is None:
        return None
    tensors, content = loaded
    assert all(torch.equal(tensors[name], value) for name, value in random_tensors(content["step"]).items())
    return content["step"]


def test_newest_wins_and_two_are_kept(storage):
    checkpoints = saved(storage, 0, 9, 10, 100)
    assert step_of(checkpoints) == 100
    names = [key.rpartition("/")[2] for key in storage.keys("study/checkpoints/trial0-seed0")]
    assert names == ["000000010.safetensors", "000000100.safetensors"]


def test_none_yet(storage):
    assert saved(storage).load() is None


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-1] + bytes([data[-1] ^ 4])],
    ids=["cut short", "empty", "bit flipped"],
)
def test_damaged_checkpoint_is_passed_over(storage, damage, capsys):
    checkpoints = saved(storage, 10, 20)
    newest = "study/checkpoints/trial0-seed0/000000020.safetensors"
    storage.write(newest, damage(storage.read(newest)))
    assert step_of(checkpoints) == 10
    assert not storage.exists(newest)  # or it would count as one of the two that are kept
    assert newest in capsys.readouterr().out
    checkpoints.save(15, random_tensors(15), {"step": 15})
    assert step_of(checkpoints) == 15


def test_all_damaged_is_none(storage):
    checkpoints = saved(storage, 10, 20)
    for key in storage.keys("study/checkpoints/trial0-seed0"):
        storage.write(key, b"damaged")
    assert checkpoints.load() is None


def test_runs_do_not_share_checkpoints(storage):
    saved(storage, 10)
    other = Checkpoints(storage, "study/checkpoints/trial0-seed01")
    assert other.load() is None
    other.save(3, random_tensors(3), {"step": 3})
    other.clear()
    assert other.load() is None
    assert step_of(saved(storage)) == 10
