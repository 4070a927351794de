"""How a model that starts from trained weights is trained after its compression."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from study.spec.values import PositiveFloat, Strict


class Heal(Strict):
    """How a model is trained that starts from trained weights. Default: all layers, by cross-entropy."""

    layers: Literal["all", "structured"] = Field(
        default="all",
        description="Trained parameters: `all`, or those of the replaced layers (`structured`), their factors and "
        "biases. All others then keep the values of the start; so does a layer that stays dense after `narrow`.",
    )
    loss: Literal["cross_entropy", "distillation"] = Field(
        default="cross_entropy",
        description="Training loss: the text's `cross_entropy`; or `distillation`, the divergence from the "
        "predictions of the start, the teacher. `train_loss` is then this divergence; validation metrics stay those of "
        "the text.",
    )
    temperature: PositiveFloat = Field(
        default=1.0,
        description="Divides the logits of model and teacher in the loss of `distillation`, which is multiplied by its "
        "square. Not allowed with another loss.",
    )

    @model_validator(mode="after")
    def _temperature_of_distillation(self) -> Heal:
        # Compared by its value: the recorded form of a study file has the default, too.
        if self.loss != "distillation" and self.temperature != 1.0:
            raise ValueError(f"`temperature` has no meaning with `loss: {self.loss}`; it needs `loss: distillation`")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether this is how a model is trained without the key `heal`."""
        return self == Heal()

    @property
    def shown(self) -> str:
        """In words, such as "structured layers, distillation at temperature 2"."""
        loss = f"distillation at temperature {self.temperature:g}" if self.loss == "distillation" else "cross-entropy"
        return f"{self.layers} layers, {loss}"


def is_plain(heal: Heal | None) -> bool:
    """Whether a start is trained further as it was before there was a choice; a record then leaves `heal` out."""
    return heal is None or heal.is_plain
