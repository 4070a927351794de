"""The folder of a block-by-block collection: statistics of the blocks that are done, and what the others need."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpo_core.calibration.block_calls import BatchCalls, Call, unpacked
from mpo_core.calibration.moments import Part
from mpo_core.calibration.statistics import INDEX, UNFINISHED, Statistics, described
from mpo_core.calibration.tensor_files import PARTIAL, make_final, write_whole

_OUTSIDE = "outside.safetensors"


class CollectionFolder:
    """Begins a folder, or goes on with one of the same arguments.

    - `statistics.json`: the arguments, and the names of the statistics' files.
    - `block-000.safetensors` and so on: the statistics of each block that is done.
    - `outside.safetensors`: those of the layers outside the blocks, and digests of the batches. As long as batches are
      added, it is in `unfinished/`.
    - `unfinished/`: for each batch and block the input, the other arguments and the gradient at the output.

    Args:
        arguments: by name; JSON.
    Raises:
        ValueError: the folder was begun with other arguments, or holds other files.
    """

    def __init__(self, path: Path, arguments: Mapping[str, Any], n_blocks: int) -> None:
        self.path, self._unfinished = path, path / UNFINISHED
        self._blocks = [path / f"block-{block:03}.safetensors" for block in range(n_blocks)]
        self._outside = path / _OUTSIDE
        path.mkdir(parents=True, exist_ok=True)
        index, files = path / INDEX, [*self._blocks, self._outside]
        if not index.exists() and (found := [file.name for file in path.iterdir() if file.suffix != PARTIAL]):
            raise ValueError(f"{path} holds other files, such as {found[0]}: choose another folder")
        self._lock, self._descriptor = path / ("lock" + PARTIAL), -1
        if self._unfinished.exists() or not all(file.exists() for file in (index, *files)):
            self._descriptor = _locked(self._lock)
        try:
            self._digests, self.outside = self._begun(arguments, index, files)
        except BaseException:
            self.release()
            raise

    def _begun(self, arguments: Mapping[str, Any], index: Path, files: list[Path]) -> tuple[list[str], Statistics]:
        """Digests of the batches that are done, and the statistics of the layers outside the blocks."""
        known = [file for file in (self._outside, self._unfinished / _OUTSIDE) if file.exists()]
        if index.exists():
            self._check(index, arguments, bool(known))
        if not known:
            for block in self._blocks:  # of batches that are not known any more
                block.unlink(missing_ok=True)
            partial = index.with_name(INDEX + PARTIAL)
            content = {"files": [file.name for file in files], "arguments": arguments}
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
            make_final(partial, index)
        if not all(file.exists() for file in files):
            self._unfinished.mkdir(exist_ok=True)
        outside = Statistics(Part(), Part())
        if known and not self.has_all_batches:
            outside = Statistics.load(known[0])
            outside.read()
        return described(known[0])["batches"] if known else [], outside

    def _check(self, index: Path, arguments: Mapping[str, Any], is_begun: bool) -> None:
        try:
            known = json.loads(index.read_bytes())["arguments"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} does not describe statistics: {error}") from error
        for name, value in json.loads(json.dumps(arguments)).items():
            if is_begun and known.get(name) != value:
                raise ValueError(
                    f"{self.path} was begun with another `{name}`: choose another folder, or delete this one"
                )

    # Batches ----------------------------------------------------------------------------------------------------------

    @property
    def n_batches(self) -> int:
        """Number of batches that are done."""
        return len(self._digests)

    @property
    def has_all_batches(self) -> bool:
        return self._outside.exists()

    def has_batch(self, batch: int, digest: str) -> bool:
        """Whether the batch of this index and digest is done already.

        Raises:
            ValueError: another batch was done in its place.
        """
        if batch >= self.n_batches:
            if self.has_all_batches:
                raise ValueError(f"{self.path} was begun with {self.n_batches} batches, but now there are more")
            return False
        if self._digests[batch] != digest:
            raise ValueError(f"{self.path} was begun with other batches: batch {batch} differs")
        return True

    def put_batch(self, digest: str) -> None:
        """The next batch is done: what its blocks need is there, and `outside` counts it."""
        self._digests.append(digest)
        self.outside.write(self._unfinished / _OUTSIDE, {"batches": self._digests})

    def put_all_batches(self, n_batches: int) -> None:
        """There are no more batches than these.

        Raises:
            ValueError: there were more before.
        """
        if n_batches < self.n_batches:
            raise ValueError(f"{self.path} was begun with {self.n_batches} batches or more, but now has {n_batches}")
        if not self.has_all_batches:
            os.replace(self._unfinished / _OUTSIDE, self._outside)

    # Blocks -----------------------------------------------------------------------------------------------------------

    def has_block(self, block: int) -> bool:
        return self._blocks[block].exists()

    def put_block(self, block: int, statistics: Statistics) -> None:
        """The block is done."""
        statistics.write(self._blocks[block], {})

    def drop(self, block: int) -> None:
        """Delete what a block that is done needed."""
        for kind in ("input", "gradient"):
            for file in self._unfinished.glob(f"{kind}-{block}-*"):
                file.unlink()

    def finish(self) -> Statistics:
        """All blocks are done: only the statistics remain."""
        if self._unfinished.exists():
            shutil.rmtree(self._unfinished)
        self._lock.unlink(missing_ok=True)
        return Statistics.load(self.path)

    def release(self) -> None:
        """Let another process go on with the folder."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    # What is stored for a while ---------------------------------------------------------------------------------------

    def put(self, kind: str, block: int, batch: int, tensor: Tensor) -> None:
        """Store the "input" of a block, or the "gradient" at its output."""
        write_whole(self._file(kind, block, batch), {"": tensor}, {"device": str(tensor.device)})

    def get(self, kind: str, block: int, batch: int) -> Tensor:
        """The tensor that `put` stored, on its device."""
        with self._opened(self._file(kind, block, batch)) as file:
            return file.get_tensor("").to(file.metadata()["device"])

    def put_calls(self, batch: int, calls: BatchCalls) -> None:
        """Store the other arguments of all blocks."""
        write_whole(self._file("arguments", batch), calls.tensors, calls.metadata())

    def call(self, block: int, batch: int) -> Call:
        """The call of a block, with its input."""
        with self._opened(self._file("arguments", batch)) as file:
            return unpacked(file.metadata(), block, file.get_tensor, self.get("input", block, batch))

    def _opened(self, path: Path) -> Any:
        """The file, for reading.

        Raises:
            ValueError: it is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}): delete {self.path} and begin again") from error

    def _file(self, kind: str, *numbers: int) -> Path:
        return self._unfinished / f"{'-'.join((kind, *map(str, numbers)))}.safetensors"


def _locked(path: Path) -> int:
    """A descriptor of the file, which nobody else can have until it is closed.

    Raises:
        ValueError: somebody else has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ValueError(f"{path} cannot be locked; another process may be collecting there: {error}") from error
    return descriptor


def digest_of(value: Any) -> str:
    """SHA-256 of tensors, and of mappings and sequences of them; of the pickled bytes of anything else."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)} {value.device}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update((torch.view_as_real(flat) if flat.is_complex() else flat).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"{len(value)} items".encode())
            for item in value.items():
                feed(item)
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            digest.update(f"{len(value)} values".encode())
            for item in value:
                feed(item)
        else:
            try:
                digest.update(pickle.dumps(value))
            except Exception as error:  # an object's own code may raise anything
                raise ValueError(f"a {type(value).__name__} in a batch cannot be told from another: {error}") from error

    feed(value)
    return digest.hexdigest()


def digest_of_model(model: nn.Module) -> str:
    """SHA-256 of its structure and of all parameters and buffers."""
    return digest_of([str(model), dict(model.named_parameters()), dict(model.named_buffers())])
