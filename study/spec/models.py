"""The model of a study: PicoGPT, one of Hugging Face, or a module of a user's own."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from study.spec.cache import in_cache
from study.spec.values import Name, PositiveInt, Strict, WideInt, Width

MAX_PARAMS = 1_000_000_000
"""Largest dense model from scratch, PicoGPT's without its vocabulary; with gradients and moments it takes 16 GB."""

HUB = "hub:"
"""Beginning of the name of a model in the hub of Hugging Face."""
_CONTEXT = "Context length in tokens."


class PicoGPTModel(Strict):
    """PicoGPT's sizes; the vocabulary comes from the corpus."""

    architecture: Literal["picogpt"] = Field(
        default="picogpt",
        description="The project's own small GPT.",
        exclude_if=lambda value: True,  # studies are recorded as they were before there were other models
    )
    d_model: Width = Field(default=128, description="Embedding dimension.")
    n_heads: PositiveInt = Field(default=4, description="Attention heads; must divide d_model.")
    n_layers: Annotated[int, Field(ge=1, le=1000)] = Field(default=4, description="Transformer blocks.")
    context: WideInt = Field(default=256, description=_CONTEXT)
    d_ff: WideInt | None = Field(default=None, description="Feed-forward dimension. Default: 4 × d_model.")

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `mpo_core.build_language_model` besides the context and the vocabulary."""
        return self.model_dump(exclude={"architecture", "context"})

    @property
    def recorded(self) -> dict[str, Any]:
        """Sizes under their names in `analysis.run_schema`."""
        return {**self.settings, "d_ff": self.d_ff or 4 * self.d_model, "context": self.context}

    @property
    def named(self) -> str:
        """The model without its settings."""
        return "PicoGPT"

    @property
    def width(self) -> int | None:
        """The size by which a dense arm is named, and may have its rates."""
        return self.d_model

    @model_validator(mode="after")
    def _heads_divide(self) -> PicoGPTModel:
        if self.d_model % self.n_heads:
            raise ValueError(f"`n_heads` must divide `d_model`, but got d_model={self.d_model}, n_heads={self.n_heads}")
        d_ff = self.d_ff or 4 * self.d_model
        n_params = self.n_layers * (4 * self.d_model**2 + 2 * self.d_model * d_ff) + self.context * self.d_model
        if n_params > MAX_PARAMS:
            raise ValueError(f"a dense model has at most {MAX_PARAMS:,} parameters, but this one has {n_params:,}")
        return self


class _OtherModel(Strict, ABC):
    """A model whose sizes are settings of its own, beside the keys that are declared here."""

    model_config = ConfigDict(extra="allow")

    context: WideInt = Field(default=256, description=_CONTEXT)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        default=None,
        description="Checksum of the pretrained weights and their configuration, or of the file that defines a module "
        "of your own. Default: that of the files as they are. A study that was begun with other files does not go on.",
    )

    @property
    def recorded(self) -> dict[str, Any]:
        """The values that `analysis.run_schema` has names for."""
        return {"model": self.shown, "model_sha256": self.sha256, "context": self.context}

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `mpo_core.build_language_model` besides the context and the vocabulary."""
        return self.extras

    @property
    def shown(self) -> str:
        """The model in one line."""
        settings = ", ".join(f"{key}={value}" for key, value in sorted(self.extras.items()))
        return f"{self.named} ({settings})" if settings else self.named

    @property
    @abstractmethod
    def named(self) -> str:
        """The model without its settings."""

    @property
    def width(self) -> int | None:
        """None: only PicoGPT has a size that dense arms may change."""
        return None

    @model_validator(mode="after")
    def _plain(self) -> _OtherModel:
        for key, value in self.extras.items():
            if not isinstance(value, bool | int | float | str | None):
                raise ValueError(f"`{key}` must be a number, a text, true, false or null, but got {json.dumps(value)}")
        return self

    @property
    def extras(self) -> dict[str, Any]:
        """The keys that are not declared here."""
        return dict(self.__pydantic_extra__ or {})


class HuggingFaceModel(_OtherModel):
    """A causal language model of Hugging Face. Needs the extra `hf`."""

    architecture: Literal["huggingface"] = Field(description="A model of the library transformers.")
    config: Name | None = Field(
        default=None,
        description="Type of a model from scratch, such as `gpt2`, `llama` or `qwen2`. All further keys are settings "
        "of its configuration, such as `hidden_size`; the vocabulary comes from the corpus.",
    )
    pretrained: str | None = Field(
        default=None,
        description="Folder of a pretrained model with weights in safetensors, relative to the study file; or "
        "`cache:NAME`, a folder in the cache folder; or `hub:OWNER/NAME`, a model of the hub of Hugging Face. "
        "Arms with `start: pretrained` begin from its weights. `corpus.tokenizer: model` is its tokenizer.",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> HuggingFaceModel:
        if (self.config is None) == (self.pretrained is None):
            raise ValueError("exactly one of `config` and `pretrained` must be given")
        if self.pretrained is not None and self.extras:
            raise ValueError(f"`{next(iter(self.extras))}` is not allowed beside `pretrained`")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `mpo_core.build_language_model` besides the context and the vocabulary."""
        return {"config": self.config, **super().settings} if self.config else {"pretrained": self.folder}

    @property
    def folder(self) -> str | None:
        """The folder of the pretrained model on this machine.

        Raises:
            ValueError: the hub has no such model.
        """
        given = self.pretrained or ""
        if given.startswith(HUB):
            from mpo_core import hub_folder  # imports torch, which is slow

            return hub_folder(given.removeprefix(HUB))
        return in_cache(given) or self.pretrained

    @property
    def named(self) -> str:
        return self.config or PurePath((self.pretrained or "").rpartition(":")[2]).name


class OwnModel(_OtherModel):
    """A module of a user's own, see docs/extending.md."""

    architecture: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] = Field(
        description="MODULE:CLASS, such as `my_models.gru:GRU`, which Python must be able to import on every machine. "
        "All further keys are arguments of the class."
    )

    @property
    def named(self) -> str:
        return self.architecture


def with_settings(model: Model, changes: Mapping[str, Any]) -> Model:
    """The model with some of its settings changed."""
    return type(model).model_validate(model.model_dump() | dict(changes))


def with_checksum(model: Model) -> Model:
    """The model with the checksum of its files, if it has any.

    Raises:
        ValueError: the files cannot be read, or are not those of the study.
    """
    folder = model.folder if isinstance(model, HuggingFaceModel) else None
    if isinstance(model, PicoGPTModel) or (isinstance(model, HuggingFaceModel) and folder is None):
        return model
    from mpo_core import code_of, pretrained_sha256  # imports torch, which is slow

    found = code_of(model.architecture) if folder is None else pretrained_sha256(folder)
    if model.sha256 not in (None, found):
        raise ValueError(f"the files of {model.named} have the checksum {found}, but the study has {model.sha256}")
    return model.model_copy(update={"sha256": found})


def _class_of(model: Any) -> str | None:
    given = model.get("architecture", "picogpt") if isinstance(model, dict) else getattr(model, "architecture", None)
    return given if given in ("picogpt", "huggingface") else "own" if ":" in str(given) else None


MODELS: dict[str, type[Strict]] = {"picogpt": PicoGPTModel, "huggingface": HuggingFaceModel, "own": OwnModel}
Model = Annotated[
    Annotated[PicoGPTModel, Tag("picogpt")]
    | Annotated[HuggingFaceModel, Tag("huggingface")]
    | Annotated[OwnModel, Tag("own")],
    Discriminator(_class_of),
]
