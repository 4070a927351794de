"""Save a model, compressed or not, to a folder, and load it again: safetensors and JSON, nothing is unpickled.

Needs the package safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from mpo_core.compression.description import check_plain_tensors, describe, named_tensors, rebuild, set_modes
from mpo_core.compression.origin import LOADED_INTO, config_json
from mpo_core.tensor_train.bonds import check_whole

Model = TypeVar("Model", bound=nn.Module)

INDEX, VERSION = "mpo_core.json", 1
_SHARD = re.compile(r"mpo_core-[0-9a-f]{16}\.safetensors")
_PARTIAL = ".mpo_core-partial-"
_OF_OTHERS = ("model*.safetensors*", "pytorch_model*", "tf_model*", "flax_model*", "adapter_*")
_CONTENT = {
    "origin": dict,
    "modules": dict,
    "layers": list,
    "tied": dict,
    "buffers": list,
    "frozen": list,
    "orders": dict,
    "training": bool,
    "other_mode": list,
    "files": dict,
}


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None, shard_bytes: int = 2_000_000_000
) -> None:
    """Write the model to a folder, from which `load` makes it again.

    `save` keeps the values and dtypes of all parameters and buffers, including those that a state_dict leaves out; each
    tied tensor once. It keeps the kind, sizes and options of every structured layer, requires_grad, training modes, and
    the configuration of a Hugging Face model. It does not keep hooks, gradients, devices, or what modules hold beside
    their tensors.

    `mpo_core.json` is written last. An interrupted save therefore leaves the folder's previous model, or no model if
    there was none. Two processes must not save to one folder at the same time.

    Args:
        folder: created if missing. A model that was saved to it before is replaced; other files stay.
        tokenizer: any object with `save_pretrained(folder)`, to be written beside the model.
        shard_bytes: the most bytes of one file, unless one tensor is larger.
    Raises:
        ValueError: something would be lost: for example a layer whose class has no `options`, or a tensor without
            values, of a special class, or of a dtype that safetensors lacks. Or the folder holds weights of another
            library, which `from_pretrained` would take for this model's.
        OSError: the folder cannot be written.
    """
    check_whole(shard_bytes=shard_bytes)
    model = getattr(model, "_orig_mod", model)  # the model inside torch.compile's wrapper
    content = describe(model)
    tensors = {name: tensor for group in named_tensors(model) for name, tensor in group.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in content["tied"]}
    _check_dtypes(tensors)
    folder = Path(folder)
    others = sorted(path.name for pattern in _OF_OTHERS for path in folder.glob(pattern))
    if others:
        raise ValueError(f"{folder} holds {others[0]}, of another library: choose another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
    try:
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        config = config_json(model)
        if config is not None:  # for tokenizers and other tools: `load` reads only the index
            (partial / "config.json").write_text(config, encoding="utf-8")
        content["files"] = dict(_write_shard(partial, shard, content) for shard in _shards(tensors, shard_bytes))
        index = {"format": "mpo_core", "version": VERSION, "sha256": _digest(content), "content": content}
        (partial / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        _move(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for path in folder.iterdir():
        if _SHARD.fullmatch(path.name) and path.name not in content["files"]:
            path.unlink()
        elif path.name.startswith(_PARTIAL):  # left by a save that was killed
            shutil.rmtree(path, ignore_errors=True)


@overload
def load(folder: str | os.PathLike[str], like: None = None, *, device: torch.device | str = "cpu") -> nn.Module: ...
@overload
def load(
    folder: str | os.PathLike[str], like: Model | Callable[[], Model], *, device: torch.device | str = "cpu"
) -> Model: ...
def load(
    folder: str | os.PathLike[str],
    like: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Return the model that `save` wrote, with equal outputs, bit for bit on the same machine.

    Args:
        like: the dense model before compression, with any values; or a compressed model; or a function that makes one.
            It is copied without its values and never changed. Everything except tensors and linear layers comes from
            it. Not needed for a Hugging Face model whose class transformers has, a PicoGPT, or a single layer.
        device: where all parameters and buffers are put.
    Raises:
        FileNotFoundError: the folder holds no saved model.
        ValueError: a file is missing or damaged, of an unknown version, or does not fit `like`; `like` is needed; or
            the class of a structured layer is not defined in this program.
    """
    folder = Path(folder)
    content = _read_index(folder / INDEX)
    given = like() if callable(like) and not isinstance(like, nn.Module) else like
    try:
        model = rebuild(content, given)
        _fill(model, content, _checked_shards(folder, content["files"]), device)
        set_modes(model, content)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} does not describe a model: {type(error).__name__}: {error}") from error
    return model


def _fill(model: nn.Module, content: Mapping[str, Any], saved: dict[str, Path], device: torch.device | str) -> None:
    """Replace the model's tensors by the saved ones, read one at a time from the files that hold them."""
    tied, orders, frozen = content["tied"], content["orders"], set(content["frozen"])
    parameters, buffers = named_tensors(model)
    ours = {**parameters, **buffers}
    _check_names(list(parameters), list(buffers), {*saved, *tied}, set(content["buffers"]))
    placed: dict[str, Tensor] = {}
    for name, old in ours.items():
        source = tied.get(name, name)
        if source not in placed:
            new = _read(saved[source], source, device)
            if source in orders:
                new = new.permute([orders[source].index(dim) for dim in range(new.ndim)])
            placed[source] = nn.Parameter(new, source not in frozen) if source in parameters else new
        new = placed[source]
        if new.shape != old.shape:
            raise ValueError(
                f"{name} has shape {tuple(new.shape)} in the saved model, but {tuple(old.shape)} in {LOADED_INTO}"
            )
        owner, _, key = name.rpartition(".")
        if name in parameters:
            setattr(model.get_submodule(owner), key, new)
        else:
            model.get_submodule(owner)._buffers[key] = new
    for group in named_tensors(model):
        for name, tensor in group.items():
            if tensor is not placed[tied.get(name, name)]:
                raise ValueError(f"{name} is tied to another tensor in {LOADED_INTO}, but not in the saved model")
    check_plain_tensors(model)


def _check_names(parameters: list[str], buffers: list[str], saved: set[str], saved_buffers: set[str]) -> None:
    for kind, ours, theirs in (
        ("parameter", set(parameters), saved - saved_buffers),
        ("buffer", set(buffers), saved_buffers),
    ):
        for name in sorted(ours ^ theirs):
            where = f"{LOADED_INTO} has none" if name in theirs else "the saved model has none"
            raise ValueError(f"{name} is a {kind}, but {where} of that name")


# Files ----------------------------------------------------------------------------------------------------------------


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import load, save

    names = {tensor.dtype: name for name, tensor in tensors.items()}
    for dtype, name in names.items():
        try:
            load(save({"x": torch.empty(0, dtype=dtype)}))
        except KeyError:
            raise ValueError(f"{name} is of {dtype}, which safetensors does not store") from None


def _shards(tensors: Mapping[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in their order, in groups of at most `most` bytes."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _write_shard(folder: Path, shard: Mapping[str, Tensor], content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Write tensors to a file named after its content; return the name, the checksum and the names of the tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = folder / "shard"
    plain = {}
    for name, tensor in shard.items():
        plain[name] = tensor.detach().permute(content["orders"].get(name, list(range(tensor.ndim))))
        plain[name] = plain[name].resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:  # disk errors too
        raise OSError(f"{path.parent.parent}: {error}") from None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"mpo_core-{digest[:16]}.safetensors"
    path.rename(folder / name)
    return name, {"sha256": digest, "tensors": list(shard)}


def _move(partial: Path, folder: Path) -> None:
    """Move all files into the folder. The index comes last, because it makes them the model."""
    paths = [path for path in partial.rglob("*") if path.is_file()]
    for path in sorted(paths, key=lambda path: path.name == INDEX):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        target = folder / path.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
        version, content = index["version"], index["content"]
        if index["format"] != "mpo_core":
            raise KeyError("format")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path.parent} holds no model that `mpo_core.save` wrote: {path} is missing") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged, or not written by `mpo_core.save`") from None
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}, but this mpo_core reads version {VERSION}")
    if (
        not isinstance(content, dict)
        or index.get("sha256") != _digest(content)
        or {key: type(value) for key, value in content.items()} != _CONTENT
    ):
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    return content


def _checked_shards(folder: Path, files: Mapping[str, Any]) -> dict[str, Path]:
    """The file that holds each tensor, by the tensor's name; all files are complete and undamaged."""
    from safetensors import SafetensorError, safe_open

    places: dict[str, Path] = {}
    for name, expected in files.items():
        if not _SHARD.fullmatch(name):
            raise ValueError(f"{INDEX} names a file that `save` does not write: {name}")
        path = folder / name
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise ValueError(f"{name} is missing") from None
        if digest != expected["sha256"]:
            raise ValueError(f"{name} is damaged: its checksum is wrong")
        try:
            with safe_open(path, "pt") as file:
                held = file.keys()
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{name} is damaged: {error}") from None
        if set(held) != set(expected["tensors"]):
            raise ValueError(f"{name} holds other tensors than {INDEX} says")
        places |= dict.fromkeys(held, path)
    return places


def _read(path: Path, name: str, device: torch.device | str) -> Tensor:
    """One tensor of a file, which is mapped into memory only meanwhile: so no second copy of the model is held."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        # A copy has PyTorch's own memory layout, on which the last bit of a product may depend.
        return file.get_tensor(name).to(device, copy=True)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
