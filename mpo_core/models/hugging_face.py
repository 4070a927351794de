"""Language models of Hugging Face, from a folder or by name. Needs the package transformers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

_LONGEST = 300
"""Most characters of another library's message."""


def load_language_model(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The causal language model of that folder or name, on the CPU, in evaluation mode; and its tokenizer.

    A name that is no folder is looked up in the cache of Hugging Face, and then in its hub. Code of the model's own is
    not run.

    Raises:
        ValueError: transformers is not installed; there is no such model or tokenizer; weights are missing; the model
            is compressed already; or its prediction of a token depends on later ones.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / "mpo_core.json").exists():
            raise ValueError(f"{name} holds a model that `mpo_core.save` wrote: give the dense model")
        if not (folder / "config.json").exists():
            raise ValueError(f"{name} holds no Hugging Face model: it has no config.json")
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{name} is no folder")
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install 'mpo-study[hf]'") from None
    what = f"{name} cannot be loaded" if folder.is_dir() else f"{name} is no folder, and cannot be loaded by name"
    with _quiet():
        config = _said(what, lambda: transformers.AutoConfig.from_pretrained(name))
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{name} is no causal language model, but of the type {config.model_type}")
        tokenizer = _said(
            f"the tokenizer of {name} cannot be loaded", lambda: transformers.AutoTokenizer.from_pretrained(name)
        )
        options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = _said(
            what,
            lambda: transformers.AutoModelForCausalLM.from_pretrained(name, config=config, **options),
        )
    lacking = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lacking:  # the library fills them with random values
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ValueError(f"{name} has no weights that fit {lacking[0]}{more}")
    _check_causal(name, model)
    return model.eval(), tokenizer


def context_of(model: Any) -> int | None:
    """The most tokens of a sequence, of a model of Hugging Face; None if it has no such limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def head_of(model: Any) -> str | None:
    """The name of the layer that makes logits, of a model of Hugging Face."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


@torch.no_grad()
def _check_causal(name: str, model: nn.Module) -> None:
    """An encoder such as BERT is also loaded as a causal language model."""
    one, other = (model(torch.tensor([[0, last]])).logits[0, 0] for last in (0, 1))
    if not torch.equal(one, other) and float((one - other).abs().max()) > 30 * torch.finfo(one.dtype).eps * float(
        one.abs().max()
    ):
        raise ValueError(f"{name} is no causal language model: its prediction of a token depends on later tokens")


def _said(what: str, load: Callable[[], Any]) -> Any:
    """What a function returns; an error in one line."""
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
