"""Language models of Hugging Face, from a folder or by name. Needs the package transformers."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

_LONGEST = 300
"""Most characters of another library's message."""
_NOT_SETTINGS = {
    *("architectures", "dtype", "model_type", "output_attentions", "output_hidden_states", "return_dict"),
    *("transformers_version", "use_cache", "vocab_size"),
}
"""Entries of a configuration that a user does not choose."""


def load_language_model(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The causal language model of that folder or name, on the CPU, in evaluation mode; and its tokenizer.

    A name that is no folder is looked up in the cache of Hugging Face, and then in its hub. Code of the model's own is
    not run.

    Raises:
        ValueError: transformers is not installed; there is no such model or tokenizer; weights are missing; or the
            model is compressed already.
    """
    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder)
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name} is no folder")
    transformers = _transformers()
    what = f"{name} cannot be loaded" if folder.is_dir() else f"{name} is no folder, and cannot be loaded by name"
    with _quiet():
        config = _config(name, what)
        tokenizer = _said(
            f"the tokenizer of {name} cannot be loaded", lambda: transformers.AutoTokenizer.from_pretrained(name)
        )
        model = _with_weights(name, config, dtype, what)
    return model.eval(), tokenizer


def build_pretrained(
    folder: str,
    *,
    vocab_size: int,
    context: int,
    device: torch.device | str | None = None,
    with_weights: bool = True,
) -> nn.Module:
    """The causal language model in a folder, without dropout, in float32.

    Args:
        vocab_size: number of tokens of the text, at most that of the model.
        context: length of the longest sequence of the text, at most that of the model.
        device: Default: the default device. "meta": only shapes.
        with_weights: whether it gets its pretrained weights; otherwise its values are not drawn yet.
    Raises:
        ValueError: transformers is not installed; no such model, or weights are missing; the text does not fit.
    """
    _check_folder(Path(folder))
    what = f"{folder} cannot be loaded"
    with _quiet():
        config = _config(folder, what)
        text = config.get_text_config()
        if vocab_size > text.vocab_size:
            raise ValueError(f"the corpus has {vocab_size:,} tokens, but the model only {text.vocab_size:,}")
        longest = getattr(text, "max_position_embeddings", None)
        if longest is not None and context > longest:
            raise ValueError(f"`context` must be at most {longest:,}, the model's, but got {context:,}")
        for name, value in text.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(text, name, 0.0)
        config.use_cache = False
        place = torch.device(device or torch.get_default_device())
        if with_weights and place.type != "meta":
            return _with_weights(folder, config, torch.float32, what).to(place).train()
        return _from_scratch(config, what, place, dtype=torch.float32)


@lru_cache(maxsize=8)
def hub_folder(name: str) -> str:
    """The folder of a model of the hub of Hugging Face, "OWNER/NAME", downloaded if it is not in the library's cache.

    Without a network, what the cache holds is taken.

    Raises:
        ValueError: transformers is not installed, or there is no such model.
    """
    _transformers()
    from huggingface_hub import snapshot_download

    with _quiet():
        kinds = ["*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken"]
        return _said(
            f"hub:{name} is neither in the hub of Hugging Face nor in its cache",
            lambda: snapshot_download(name, allow_patterns=kinds),
        )


def pretrained_sha256(folder: str) -> str:
    """SHA-256 of the configuration and the weights in a folder, which must be safetensors.

    Raises:
        ValueError: the folder holds no such model.
    """
    path = Path(folder)
    _check_folder(path)
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    if len(files) == 1:
        raise ValueError(f"{folder} has no weights in safetensors")
    return _sha256_of(tuple((str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files))


@lru_cache(maxsize=8)
def _sha256_of(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for file, size, _ in files:
        digest.update(f"{Path(file).name} {size}\n".encode())
        with Path(file).open("rb") as source:
            digest.update(hashlib.file_digest(source, "sha256").digest())
    return digest.hexdigest()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    if (folder / "mpo_core.json").exists():
        raise ValueError(f"{folder} holds a model that `mpo_core.save` wrote: give the dense model")
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no Hugging Face model: it has no config.json")


def _config(name: str, what: str) -> Any:
    transformers = _transformers()
    config = _said(what, lambda: transformers.AutoConfig.from_pretrained(name))
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{name} is no causal language model, but of the type {config.model_type}")
    return config


def _from_scratch(config: Any, what: str, device: torch.device | str, **options: Any) -> Any:
    make = _transformers().AutoModelForCausalLM.from_config
    # The library's constructor draws values from the global generator.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return _said(what, lambda: make(config, **options)).train()


def _with_weights(name: str, config: Any, dtype: torch.dtype, what: str) -> Any:
    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    load = _transformers().AutoModelForCausalLM.from_pretrained
    model, info = _said(what, lambda: load(name, config=config, **options))
    lacking = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lacking:  # the library fills them with random values
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ValueError(f"{name} has no weights that fit {lacking[0]}{more}")
    return model


def build_hugging_face(
    kind: str, settings: Mapping[str, Any], *, vocab_size: int, context: int, device: torch.device | str | None = None
) -> nn.Module:
    """A causal language model of that type, such as "llama", from scratch; its values are not drawn yet.

    Args:
        settings: settings of its configuration, by the library's names for this type.
        context: its longest sequence, if the configuration has such a setting.
    Raises:
        ValueError: transformers is not installed; an unknown type or setting, or one that does not fit the others.
    """
    transformers = _transformers()
    types = sorted(known.model_type for known in transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    if kind not in types:
        raise ValueError(f"config must be the type of a causal language model{_meant(kind, types)}, but got {kind!r}")
    with _quiet():
        default = _said(f"the configuration {kind} cannot be made", lambda: transformers.AutoConfig.for_model(kind))
        names = {*default.to_dict(), *type(default).attribute_map} - _NOT_SETTINGS
        length, aliases = "max_position_embeddings", type(default).attribute_map
        for name in settings:
            if name in _NOT_SETTINGS or aliases.get(name, name) == aliases.get(length, length) or name == "is_decoder":
                raise ValueError(f"{name} is not a setting: the study gives it")
            if name not in names:
                raise ValueError(f"{kind} has no setting {name}{_meant(name, sorted(names))}")
        given = {"vocab_size": vocab_size, "use_cache": False, **settings}
        if "is_decoder" in names:  # an encoder's own default is to see all tokens
            given["is_decoder"] = True
        if length in names:
            given[length] = context
        for name, value in default.to_dict().items():
            # The masks would come from the global generator.
            if "drop" in name and isinstance(value, float) and given.setdefault(name, 0.0):
                raise ValueError(f"{name} must be 0: a run is to repeat itself, and dropout would not")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # those of the library's own vocabulary
            given.setdefault(name, None)
        config = _said(f"{kind} cannot have these settings", lambda: transformers.AutoConfig.for_model(kind, **given))
        return _from_scratch(config, f"{kind} cannot have these settings", device or torch.get_default_device())


@torch.no_grad()
def draw_hugging_face(model: nn.Module, generator_for: Callable[[str], torch.Generator]) -> None:
    """Draw the library's own initial values again, for each module from a generator of its own name."""
    with torch.random.fork_rng(devices=[]):
        for name, module in reversed(list(model.named_modules())):  # what is inside a module comes first, as there
            torch.set_rng_state(generator_for(name).get_state())
            model._init_weights(module)  # type: ignore[operator]
    model.tie_weights()  # type: ignore[operator]


def config_of(model: nn.Module) -> Any:
    """The configuration of the language model, if the model is one of Hugging Face; else None."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    config: Any = model.config
    return config.get_text_config()


class HuggingFaceCache:
    """Keys and values of the tokens so far in a model of Hugging Face."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = _transformers().DynamicCache(config=model.config)

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return self.tensors.get_seq_length()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install 'mpo-study[hf]'") from None
    return transformers


def _meant(given: str, known: Sequence[str]) -> str:
    near = get_close_matches(given, known, n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _said(what: str, load: Callable[[], Any]) -> Any:
    """The value of a function; its error in one line."""
    try:
        return load()
    except Exception as error:  # the library raises many kinds
        line = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what}: {line if len(line) <= _LONGEST else line[:_LONGEST] + '…'}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors from Hugging Face's libraries; their bars of progress only on a terminal."""
    from transformers.utils import logging as transformers_logging

    hub = logging.getLogger("huggingface_hub")
    before, hub_before = transformers_logging.get_verbosity(), hub.level
    has_bars = transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.set_verbosity(logging.CRITICAL)
        hub.setLevel(logging.CRITICAL)
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        yield
    finally:
        transformers_logging.set_verbosity(before)
        hub.setLevel(hub_before)
        if has_bars:
            transformers_logging.enable_progress_bar()
