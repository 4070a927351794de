"""Build a dense causal language model by the name of its architecture, from scratch."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mpo_core.models.hugging_face import build_hugging_face, build_pretrained
from mpo_core.models.picogpt import GPTConfig, PicoGPT


def build_language_model(
    architecture: str,
    settings: Mapping[str, Any],
    *,
    vocab_size: int,
    context: int,
    device: torch.device | str | None = None,
    with_weights: bool = False,
) -> nn.Module:
    """The dense model; its values are not drawn yet (see `draw_parameters`), unless it has pretrained weights.

    Args:
        architecture: "picogpt"; "huggingface", whose settings include `config`, the type of the model, or consist of
            `pretrained`, its folder; or "MODULE:CLASS", a module of a user's own. The class is called with vocab_size,
            context and the settings.
        settings: sizes, by the names that the architecture has for them.
        vocab_size, context: number of tokens, and length of the longest sequence.
        device: Default: the default device. "meta": only shapes.
        with_weights: whether a pretrained model gets its weights.
    Raises:
        ValueError: an unknown architecture or setting; settings that do not go together.
    """
    if architecture == "picogpt":
        return PicoGPT(GPTConfig(vocab_size=vocab_size, context=context, **settings), device=device)
    if architecture == "huggingface":
        own = dict(settings)
        sizes = {"vocab_size": vocab_size, "context": context, "device": device}
        if "pretrained" in own:
            return build_pretrained(own["pretrained"], **sizes, with_weights=with_weights)
        kind = own.pop("config")
        return build_hugging_face(kind, own, **sizes)
    found = own_class(architecture)
    arguments = {"vocab_size": vocab_size, "context": context, **settings}
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{architecture}: {error}") from None
    # A user's constructor may draw values.
    with torch.random.fork_rng(devices=[]), torch.device(device or torch.get_default_device()):
        try:
            model = found(**arguments)
        except Exception as error:  # a user's code may raise anything
            raise ValueError(f"{architecture} cannot be made: {_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{architecture} must make an nn.Module, but made a {type(model).__name__}")
    return model


def own_class(architecture: str) -> Any:
    """The class that "MODULE:CLASS" names.

    Raises:
        ValueError: Python cannot import it.
    """
    module, separator, name = architecture.partition(":")
    if not separator:
        raise ValueError(f"`architecture` must be picogpt, huggingface or MODULE:CLASS, but got {architecture!r}")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a user's code may raise anything
        raise ValueError(f"{architecture}: {_line(error)}; Python must be able to import {module}") from error
    if found is None:
        raise ValueError(f"{architecture}: the module {module} has no {name}")
    if not isinstance(found, type):
        raise ValueError(f"{architecture} is not a class")
    return found


def code_of(architecture: str) -> str:
    """SHA-256 of the code that defines the class "MODULE:CLASS", when it was first asked for.

    It is that of the class's file; in a package, of all Python files of the package. Line ends do not count.

    Raises:
        ValueError: as `own_class`, or the class has no source file.
    """
    return _code_of(sys.modules[own_class(architecture).__module__], architecture)


@cache
def _code_of(module: ModuleType, architecture: str) -> str:
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py"):
        raise ValueError(f"{architecture} has no source file, so a study cannot record its code")
    top = sys.modules.get(module.__name__.partition(".")[0])
    folder = Path(top.__file__).parent if top is not None and top is not module and top.__file__ else None
    if folder is None:
        return _sha256(Path(file))
    files = [path for path in folder.rglob("*.py") if not path.name.startswith(".")]  # for example an editor's lock
    sources = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    return hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
