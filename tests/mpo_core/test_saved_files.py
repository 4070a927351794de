"""What cannot be saved or loaded again as it was is refused in one line; a folder holds a whole model or none."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from saved_models import assert_same, change, fill, linear, make_net, make_odd, round_trip, shrink
from torch import nn

import mpo_core
from mpo_core.compression import saving


class WithState(nn.Linear):
    def get_extra_state(self):
        return torch.ones(3)


def two_in_one_memory():
    model = make_net()
    model[2].weight.data = model[0].weight.data[:6]
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(linear(2, 2)), r"0\.weight is on the meta device"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), r"0\.weight has no shape yet"),
        (lambda: nn.Sequential(fill(WithState(2, 2, device="meta"))), r"0\._extra_state is in the model's state_dict"),
        (two_in_one_memory, r"0\.weight and 2\.weight are two parameters in the same memory"),
        (lambda: nn.ParameterList([torch.eye(3).to_sparse()]), r"0 is a Parameter \(torch\.sparse_coo\)"),
    ],
)
def test_what_would_be_lost_is_not_saved(tmp_path, make, message):
    mpo_core.save(make_net(), tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        mpo_core.save(make(), tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert_same(mpo_core.load(tmp_path, make_net), make_net())


class Net(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (None, "Sequential cannot be built from a configuration alone: give `like`"),
        (3, "`like` must be a model or a function that makes one, but got int"),
        (
            lambda: make_net(width=16),
            "0 goes from 8 to 12 features in the saved model, but the model .* has Linear from 8 to 16",
        ),
        (lambda: fill(nn.Sequential(linear(8, 12), nn.ReLU(), linear(12, 6, bias=False))), "1 is Tanh in .* ReLU in"),
        (lambda: make_net()[:2], "2 is a layer of the saved model, but the model"),
        (lambda: nn.Sequential(*make_net(), nn.Tanh()), "3 is missing in the saved model, but Tanh"),
        (lambda: Net(*make_net()), "the saved model is a Sequential, but `like` is a Net"),
        (lambda: nn.Sequential(nn.ReLU(), *make_net()[1:]), "0 goes from 8 to 12 .* has ReLU there"),
    ],
)
def test_another_model_as_like_is_refused(tmp_path, like, message):
    mpo_core.save(shrink(make_net()), tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        mpo_core.load(tmp_path, like)
    assert str(error.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(error.value)


def test_other_tensors_in_like_are_refused(tmp_path):
    mpo_core.save(make_odd(), tmp_path)
    for edit, message in (
        (lambda model: setattr(model, "gain", nn.Parameter(torch.ones(2))), r"gain has shape \(\) in .* \(2,\)"),
        (lambda model: delattr(model, "gain"), "gain is a parameter, but the model that it is loaded into has none"),
        (lambda model: setattr(model, "more", nn.Parameter(torch.ones(2))), "more is a parameter, but the saved model"),
        (lambda model: delattr(model, "kept"), "kept is a buffer, but the model that"),
        (lambda model: setattr(model, "plain", torch.ones(2, device="meta")), "plain holds a tensor without values"),
    ):
        like = make_odd()
        edit(like)
        with pytest.raises(ValueError, match=message):
            mpo_core.load(tmp_path, like)


def test_a_like_that_shares_more_than_the_saved_model_is_refused(tmp_path):
    two, one = (fill(nn.Sequential(*[nn.Sequential(linear(8, 8)) for _ in range(2)])) for _ in range(2))
    one[1] = one[0]
    for model in (two, shrink(two)):
        mpo_core.save(model, tmp_path)
        with pytest.raises(ValueError, match=r"0\.0\.\S+ is tied to another tensor"):
            mpo_core.load(tmp_path, one)
    mpo_core.save(shrink(one), tmp_path)
    loaded = mpo_core.load(tmp_path, two)
    assert loaded[0][0] is loaded[1][0]


def test_a_builder_that_fails_says_so_itself(tmp_path):
    mpo_core.save(make_net(), tmp_path)
    with pytest.raises(ZeroDivisionError):
        mpo_core.load(tmp_path, lambda: 1 // 0)


# Files ----------------------------------------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("size", [True, "300", 2.5])
def test_a_size_of_shards_that_is_no_whole_number_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match="`shard_bytes` must be a whole number, but got"):
        mpo_core.save(make_net(), tmp_path, shard_bytes=size)


def test_a_like_that_keeps_its_outputs_is_taken(tmp_path):
    model, like = shrink(make_net()), make_net()
    mpo_core.save(model, tmp_path)
    like.outputs = [like(torch.ones(2, 8))]
    loaded = mpo_core.load(tmp_path, like)
    assert torch.equal(loaded(torch.ones(2, 8)), model(torch.ones(2, 8)))


def test_shards_hold_at_most_so_many_bytes_and_old_ones_go(tmp_path):
    large, small = make_net(), shrink(make_net(), "low_rank")
    mpo_core.save(large, tmp_path, shard_bytes=300)
    assert len(shards(tmp_path)) == 3  # 384, 48 and 288 bytes of values
    assert_same(mpo_core.load(tmp_path, large), large)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".mpo_core-partial-of-a-killed-one").mkdir()
    mpo_core.save(small, tmp_path)
    assert_same(mpo_core.load(tmp_path, large), small)
    assert names(tmp_path) == sorted(["mpo_core.json", "notes.txt", shards(tmp_path)[0].name])
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    mpo_core.save(mpo_core.load(tmp_path, large), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_a_model_without_tensors(tmp_path):
    round_trip(nn.Sequential(nn.ReLU()), tmp_path, nn.Sequential(nn.ReLU()))


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_bytes(b""), Path.unlink])
def test_a_damaged_file_is_recognised(tmp_path, damage):
    for path in (lambda: shards(tmp_path)[1], lambda: tmp_path / saving.INDEX):
        mpo_core.save(make_net(), tmp_path, shard_bytes=300)
        damage(path())
        with pytest.raises((ValueError, FileNotFoundError), match=r"is damaged|is missing") as error:
            mpo_core.load(tmp_path, make_net)
        assert path().name in str(error.value) or damage is Path.unlink


def test_a_flipped_digit_of_the_index_is_recognised(tmp_path):
    mpo_core.save(shrink(make_net()), tmp_path)
    path = tmp_path / saving.INDEX
    path.write_text(path.read_text().replace('"training": true', '"training": false'))
    with pytest.raises(ValueError, match="checksum"):
        mpo_core.load(tmp_path, make_net)


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["layers"].append(3),
        lambda content: content["layers"][0].pop("kind"),
        lambda content: content["origin"].pop("config"),
        lambda content: content["buffers"].append({}),
        lambda content: next(iter(content["files"].values())).pop("sha256"),
    ],
)
def test_an_index_of_other_content_is_refused(tmp_path, edit):
    mpo_core.save(shrink(make_net()), tmp_path)
    change(tmp_path, edit)
    with pytest.raises(ValueError, match=r"mpo_core\.json does not describe a model: [A-Z]\w+Error: .+") as error:
        mpo_core.load(tmp_path, make_net)
    assert "\n" not in str(error.value)


def test_an_unknown_version_is_refused(tmp_path):
    mpo_core.save(make_net(), tmp_path)
    path = tmp_path / saving.INDEX
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="version 2"):
        mpo_core.load(tmp_path, make_net)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "model.safetensors", "mpo_core-.safetensors"])
def test_an_index_reads_no_file_but_those_that_save_writes(tmp_path, name):
    mpo_core.save(make_net(), tmp_path)
    change(tmp_path, lambda content: content.update(files={name: next(iter(content["files"].values()))}))
    with pytest.raises(ValueError, match="names a file that `save` does not write"):
        mpo_core.load(tmp_path, make_net)


def test_missing_and_additional_tensors_of_a_file_are_recognised(tmp_path):
    mpo_core.save(make_net(), tmp_path)
    change(tmp_path, lambda content: next(iter(content["files"].values()))["tensors"].pop())
    with pytest.raises(ValueError, match=r"holds other tensors than mpo_core\.json says"):
        mpo_core.load(tmp_path, make_net)


def test_a_folder_without_a_model_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "none", tmp_path / "file" / "in"):
        (tmp_path / "file").touch()
        with pytest.raises(FileNotFoundError, match=f"{folder} holds no model that"):
            mpo_core.load(folder)


@pytest.mark.fault
def test_a_save_that_is_killed_leaves_what_was_there(tmp_path):
    """Killed before each file that it moves into place, the process ends at once."""
    script = textwrap.dedent(
        """
        import os, signal, sys, torch, mpo_core
        from torch import nn

        folder, replace = sys.argv[1], os.replace
        def net(value):
            model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.Linear(4, 4, device="meta")).to_empty(device="cpu")
            for parameter in model.parameters():
                nn.init.constant_(parameter, value)
            return model

        def value():
            try:
                return {float(p.mean()) for p in mpo_core.load(folder, net(0.0)).parameters()}
            except FileNotFoundError:
                return set()

        for old in (None, 1.0):
            if old:
                mpo_core.save(net(old), folder, shard_bytes=64)
            n_killed = 0
            while True:
                child = os.fork()
                if not child:
                    moved = []
                    def killing(source, target):
                        if len(moved) == n_killed:
                            os.kill(os.getpid(), signal.SIGKILL)
                        moved.append(target)
                        replace(source, target)
                    os.replace = killing
                    mpo_core.save(net(2.0), folder, shard_bytes=64)
                    os._exit(0)
                _, status = os.waitpid(child, 0)
                if status == 0:
                    break
                assert status == signal.SIGKILL
                n_killed += 1
                print(value())
            print(value(), len(os.listdir(folder)))
            os.remove(f"{folder}/mpo_core.json")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m")], capture_output=True, text=True, check=True
    )
    # Four shards and the index; the fork of a process with threads may warn.
    assert done.stdout.split("\n") == [*["set()"] * 5, "{2.0} 5", *["{1.0}"] * 5, "{2.0} 5", ""]
