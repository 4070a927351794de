"""Models that can be built from only their class and configuration: those of Hugging Face, and PicoGPT."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from mpo_core.models.picogpt import GPTConfig, PicoGPT

LOADED_INTO = "the model that it is loaded into"

_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
_BOOKKEEPING = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")
"""Entries of a Hugging Face configuration that do not change what a model computes."""


def origin_of(model: nn.Module) -> dict[str, Any]:
    """The library, class and configuration of a model; `library` is None if these are not enough to build it."""
    origin: dict[str, Any] = {"library": None, "class": type(model).__name__, "config": None}
    if type(model) is PicoGPT:
        return {**origin, "library": "mpo_core", "config": asdict(model.config)}
    hugging = _as_hugging_face(model)
    if hugging is None:
        return origin
    config, kind, generation = hugging.config, type(hugging), getattr(hugging, "generation_config", None)
    transformers = sys.modules["transformers"]
    known = getattr(transformers, kind.__name__, None) is kind and type(config) is kind.config_class
    return {
        **origin,
        "library": "transformers" if known else None,
        "config": config.to_dict(),
        "implementations": {key: _implementations(config, key) for key in _IMPLEMENTATIONS},
        "generation_config": None if generation is None else generation.to_dict(),
    }


def config_json(model: nn.Module) -> str | None:
    """Content of Hugging Face's config.json; None for other models."""
    hugging = _as_hugging_face(model)
    return None if hugging is None else hugging.config.to_json_string()


def build(origin: Mapping[str, Any]) -> nn.Module:
    """The model that `origin_of` described, dense, with all parameters and buffers on the meta device.

    Nothing is downloaded, and only code of the installed library is run.

    Raises:
        ValueError: the description is not enough to build it; or the library is not installed, or does not know the
            model.
    """
    library, name = origin["library"], origin["class"]
    try:
        if library == "mpo_core" and name == "PicoGPT":
            return PicoGPT(GPTConfig(**origin["config"]), device="meta")
        if library == "transformers":
            return _build_hugging_face(origin)
    except Exception as error:  # a library's constructor may raise anything
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} cannot be built: {said}; give `like`, the dense model") from error
    raise ValueError(
        f"{name} cannot be built from a configuration alone: give `like`, the dense model or a function that makes it"
    )


def check_same_settings(origin: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise ValueError if both have a configuration and a setting differs."""
    ours, theirs = dict(_settings(origin["config"])), dict(_settings(other["config"]))
    for key in ours:
        if key in theirs and ours[key] != theirs[key]:
            raise ValueError(f"the saved model has {key}={ours[key]!r}, but {LOADED_INTO} has {key}={theirs[key]!r}")


def _as_hugging_face(model: nn.Module) -> Any:
    """The model if it is a PreTrainedModel of transformers, which is then imported already; else None."""
    transformers = sys.modules.get("transformers")
    return model if transformers is not None and isinstance(model, transformers.PreTrainedModel) else None


def _build_hugging_face(origin: Mapping[str, Any]) -> nn.Module:
    import transformers

    found = getattr(transformers, origin["class"], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"transformers {transformers.__version__} has no such model")
    kind: Any = found
    config = kind.config_class.from_dict(dict(origin["config"]))
    for key, chosen in origin["implementations"].items():
        # A name with a slash is a kernel to be downloaded.
        if key not in _IMPLEMENTATIONS or any("/" in str(value) for value in chosen.values()):
            raise ValueError(f"{key}={chosen} is code that would be downloaded")
        setattr(config, key, chosen)
    with torch.device("meta"):
        model = kind(config)
    if origin["generation_config"] is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(dict(origin["generation_config"]))
    return model


def _implementations(config: Any, key: str) -> dict[str, Any]:
    """Choices of a configuration and of those inside it, in the form that its setter takes."""
    inside = {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: getattr(one, key, None) for name, one in {"": config, **inside}.items() if one is not None}


def _settings(config: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Paths and values of the leaves, without bookkeeping."""
    if not isinstance(config, Mapping):
        yield path, config
        return
    for key, value in config.items():
        if key not in _BOOKKEEPING:
            yield from _settings(value, f"{path}.{key}" if path else str(key))
