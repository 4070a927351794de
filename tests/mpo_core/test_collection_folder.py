"""The folder of a block-by-block collection: goes on after an interruption, and takes no other model's statistics."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from measured_models import Stack, assert_same_statistics
from structured_linear_case import normal, square_losses

from mpo_core.calibration.collecting import collect_statistics
from mpo_core.calibration.collection_folder import digest_of
from mpo_core.calibration.statistics import Statistics

N_BATCHES, N_BLOCKS = 4, 3
FILES = {*(f"block-00{block}.safetensors" for block in range(N_BLOCKS)), "outside.safetensors", "statistics.json"}


def batches():
    return list(normal(N_BATCHES, 7, 4))


def collect(folder, model=None, given=None, **options):
    options = {"loss": square_losses, "held_out": 0.5, "blocks": "blocks", **options}
    return collect_statistics(model or Stack(), given or batches(), folder=folder, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    collect(folder)
    return contents(folder)


class Interruption(Exception):
    """Stands for a key or a signal."""


def interrupt_after(count):
    """A function that raises at its call of this number."""
    done = []

    def step(*_):
        done.append(None)
        if len(done) == count:
            raise Interruption

    return step


def test_at_the_end_only_statistics_are_in_the_folder(undisturbed):
    assert undisturbed.keys() == FILES


@pytest.mark.parametrize("count", range(1, N_BATCHES * (N_BLOCKS + 1) + 1))
def test_an_interrupted_run_goes_on_to_the_same_files(count, undisturbed, tmp_path):
    with pytest.raises(Interruption):
        collect(tmp_path, progress=interrupt_after(count))
    with pytest.raises(ValueError, match=r"holds unfinished statistics: collect them .* to the end$"):
        Statistics.load(tmp_path)
    done = []
    collect(tmp_path, progress=done.append)
    assert contents(tmp_path) == undisturbed
    # A batch of the first pass is never run again, nor is a block that was done.
    begun = count if count <= N_BATCHES else (count - 1) // N_BATCHES * N_BATCHES
    assert done == list(range(begun + 1, N_BATCHES * (N_BLOCKS + 1) + 1))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 10])
def test_an_interruption_inside_a_batch(count, undisturbed, tmp_path):
    model = Stack()
    model.blocks[1].register_forward_hook(interrupt_after(count))
    with pytest.raises(Interruption):
        collect(tmp_path, model)
    collect(tmp_path)
    assert contents(tmp_path) == undisturbed


def test_a_batch_that_does_not_come(undisturbed, tmp_path):
    def some():
        yield from batches()[:2]
        raise Interruption

    with pytest.raises(Interruption):
        collect(tmp_path, given=some())
    collect(tmp_path, given=iter(batches()))
    assert contents(tmp_path) == undisturbed


def test_interrupted_again_and_again(undisturbed, tmp_path):
    for count in (2, 1, 3, 2, 5, 6, 1):
        with pytest.raises(Interruption):
            collect(tmp_path, progress=interrupt_after(count))
    collect(tmp_path)
    assert contents(tmp_path) == undisturbed


@pytest.mark.fault
@pytest.mark.parametrize("count", [2, N_BATCHES, N_BATCHES + 2, 3 * N_BATCHES])
def test_a_killed_run_goes_on(count, undisturbed, tmp_path):
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_collection_folder import collect

def kill(done):
    if done == {count}:
        os.kill(os.getpid(), signal.SIGKILL)

collect(Path({str(tmp_path)!r}), progress=kill)
"""
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert "unfinished" in contents_names(tmp_path)
    collect(tmp_path)
    assert contents(tmp_path) == undisturbed


def contents_names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_finished_folder_is_opened_again_without_a_run(undisturbed, tmp_path):
    first = collect(tmp_path)
    model = Stack()
    model.blocks[0].register_forward_hook(interrupt_after(1))
    assert_same_statistics(collect(tmp_path, model), first)
    assert contents(tmp_path) == undisturbed


def test_leftovers_of_a_kill_at_the_end_are_deleted(undisturbed, tmp_path):
    collect(tmp_path)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "input-0-0.safetensors").touch()
    collect(tmp_path)
    assert contents(tmp_path) == undisturbed


def another_model():
    model = Stack()
    model.blocks[2].a.weight.data[0, 0] += 1e-9
    return model


def other_losses(model, x):
    return square_losses(model, x)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (2, {"model": another_model()}, "was begun with another `model`: choose another folder, or delete this one"),
        (6, {"model": another_model()}, "was begun with another `model`"),
        (None, {"model": another_model()}, "was begun with another `model`"),
        (2, {"model": Stack().float(), "given": [x.float() for x in batches()]}, "another `model`"),
        (2, {"given": [batches()[0] * 2, *batches()[1:]]}, "was begun with other batches: batch 0 differs"),
        (None, {"given": [*batches()[:3], batches()[0]]}, "was begun with other batches: batch 3 differs"),
        (2, {"given": batches()[:1]}, "was begun with 2 batches or more, but now has 1"),
        (6, {"given": batches()[:1]}, "was begun with 4 batches or more, but now has 1"),
        (6, {"given": [*batches(), batches()[0]]}, "was begun with 4 batches, but now there are more"),
        (None, {"given": [*batches(), batches()[0]]}, "was begun with 4 batches, but now there are more"),
        (6, {"held_out": 0.2}, "was begun with another `held_out`"),
        (2, {"modules": ["blocks.0.a"]}, "was begun with another `modules`"),
        (6, {"loss": None}, "was begun with another `loss`"),
        (None, {"loss": other_losses}, "was begun with another `loss`"),
    ],
)
def test_a_folder_of_something_else_is_refused(count, options, message, undisturbed, tmp_path):
    if count is None:
        collect(tmp_path)
    else:
        with pytest.raises(Interruption):
            collect(tmp_path, progress=interrupt_after(count))
    with pytest.raises(ValueError, match=message) as caught:
        collect(tmp_path, **options)
    assert str(caught.value).startswith(str(tmp_path))
    collect(tmp_path)
    assert contents(tmp_path) == undisturbed


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other files, such as thesis\.tex: choose another folder"):
        collect(tmp_path)
    assert contents_names(tmp_path) == {"thesis.tex"}
    with pytest.raises(ValueError, match=r"is not a folder of statistics: it has no statistics\.json"):
        Statistics.load(tmp_path)


def test_a_damaged_folder_is_refused(tmp_path):
    collect(tmp_path)
    (tmp_path / "block-001.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"block-001\.safetensors is not a file of statistics"):
        Statistics.load(tmp_path)
    (tmp_path / "block-001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"block-001\.safetensors"):
        Statistics.load(tmp_path)
    (tmp_path / "statistics.json").write_text("[]")
    for act in (Statistics.load, collect):
        with pytest.raises(ValueError, match=r"statistics\.json does not describe statistics"):
            act(tmp_path)


def test_batches_of_every_form_are_told_apart():
    x = normal(3, 4)
    forms = [
        x,
        x.float(),
        x.reshape(4, 3),
        -x,
        (x,),
        (x, x),
        {"x": x},
        {"y": x},
        {"x": x, "scale": 1.0},
        {"x": x, "scale": 2.0},
        {"x": x, "scale": None},
        torch.zeros(()),
        torch.zeros(0),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.bool),
        x.bfloat16(),
        "text",
        b"text",
    ]
    digests = [digest_of(form) for form in forms]
    assert len(set(digests)) == len(forms)
    assert digest_of({"x": x.clone(), "scale": 1.0}) == digest_of(forms[8])
    assert digest_of(normal(4, 3).T) == digest_of(normal(4, 3).T.contiguous())


def test_a_missing_part_is_named(tmp_path):
    with pytest.raises(Interruption):
        collect(tmp_path, progress=interrupt_after(N_BATCHES + 1))
    lost = next((tmp_path / "unfinished").glob("input-0-*"))
    lost.unlink()
    with pytest.raises(ValueError, match=rf"{lost.name} is missing or damaged .*: delete .* and begin again"):
        collect(tmp_path)


def test_a_folder_is_for_one_process_at_a_time(tmp_path):
    holder = "import fcntl, sys; file = open(sys.argv[1], 'wb'); fcntl.flock(file, 2); print(flush=True); input()"
    command = [sys.executable, "-c", holder, str(tmp_path / "lock.partial")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="cannot be locked; another process may be collecting there"):
            collect(tmp_path)
        process.communicate(b"\n")
    collect(tmp_path)
    assert contents(tmp_path).keys() == FILES
