"""The kinds of layer, with their options, that may replace each matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mpo_core.compression.sizing import Sizer
from mpo_core.layers.registry import kind_called, kinds
from mpo_core.layers.structured import StructuredLinear
from mpo_core.models.dense_layers import DenseLayer

AUTO = "auto"

Choice = str | tuple[str, Mapping[str, Any]]
"""The name of a kind, alone or with options of its own; "auto" stands for all kinds with the options that they try."""
Choices = Choice | Sequence[Choice]
Layer = Choices | Mapping[str, Choices] | Callable[[str, nn.Linear], StructuredLinear | None]
"""Choices for all matrices, or by pattern of module names, or a function that makes the layers."""


class Candidates:
    """The choices for each matrix.

    Args:
        layer, options: see `compress`.
        made: how layers are made: the fields of `Sizer` but the kind and its options.
    Raises:
        ValueError: an unknown kind, an option that no kind has, a choice that is none, or an init that a kind lacks.
    """

    def __init__(self, layer: Choices | Mapping[str, Choices], options: Mapping[str, Any], **made: Any) -> None:
        by_pattern = layer if isinstance(layer, Mapping) else {"*": layer}
        self._choices = {pattern: _listed(choices) for pattern, choices in by_pattern.items()}
        self._options, self._made = options, made
        named = [choice for choices in self._choices.values() for choice in choices]
        if not named:
            raise ValueError("`layer` must name at least one kind, but got none")
        for name, own in named:
            self._check_choice(name, own)
        every = [kind for name, _ in named for kind in (kinds().values() if name == AUTO else [kind_called(name)])]
        known = {name for kind in every for name in self._allowed(kind)}
        one = f"layer={named[0][0]!r} has", "it has"
        _check_options(one if len(named) == 1 else ("the kinds in `layer` have", "they have"), options, known)
        by_matrix = [[name for name, _ in choices] for choices in self._choices.values()]
        self.are_fixed = all(len(names) == 1 and names != [AUTO] for names in by_matrix)
        """Whether no matrix has several kinds or options to choose from."""

    def check_patterns(self, names: Sequence[str]) -> None:
        """Raise ValueError if a pattern matches none of the layers' names."""
        for pattern in self._choices:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"`layer` has the pattern {pattern!r}, but it matches none of the layers")

    def of(self, name: str, linear: nn.Linear) -> list[Sizer]:
        """Those of the first pattern that matches the layer's name; none if no pattern does."""
        pattern = self._pattern_of(name)
        choices = [] if pattern is None else self._choices[pattern]
        return [sizer for choice in choices for sizer in self._sizers(linear, *choice)]

    def check_fit(self, layers: Sequence[DenseLayer]) -> None:
        """Raise ValueError if a choice with options of its own, one of several, fits none of the layers; or if a kind
        fits some, but not with the options that are given for all."""
        self._check_shared(layers)
        for pattern, choices in self._choices.items():
            matched = [layer for layer in layers if self._pattern_of(layer.name) == pattern]
            for name, own in choices if len(choices) > 1 and matched else ():
                if name == AUTO or not own:
                    continue
                why = []
                for layer in matched:
                    (sizer,) = self._sizers(layer.linear, name, own)
                    why.append(sizer.why_not(layer.linear))
                    if why[-1] is None:
                        break
                else:
                    choice = name, dict(own)
                    raise ValueError(f"{choice} in `layer` fits no layer; for example {matched[0].name}: {why[0]}")

    def _check_shared(self, layers: Sequence[DenseLayer]) -> None:
        fitting: set[type[StructuredLinear]] = set()
        refused: dict[type[StructuredLinear], str] = {}
        shapes: set[tuple[str | None, int, int]] = set()
        for layer in layers if self._options and not self.are_fixed else ():
            linear = layer.linear
            shape = self._pattern_of(layer.name), linear.out_features, linear.in_features
            for sizer in self.of(layer.name, linear) if shape not in shapes else ():
                shared = self._shared(sizer.kind)
                why = sizer.why_not(linear)
                alone = {name: value for name, value in sizer.options.items() if name not in shared}
                if why is None:
                    fitting.add(sizer.kind)
                elif replace(sizer, options=alone).why_not(linear) is None:
                    given = ", ".join(f"{name}={value!r}" for name, value in shared.items())
                    refused.setdefault(sizer.kind, f"layer {sizer.kind.kind!r} cannot have {given}: {why}")
            shapes.add(shape)
        for kind, why in refused.items():
            if kind not in fitting:
                raise ValueError(why)

    def fit(self, name: str, linear: nn.Linear) -> bool:
        """Whether a layer of that name may have the shape of an nn.Linear on the meta device."""
        return any(sizer.why_not(linear) is None for sizer in self.of(name, linear))

    def _pattern_of(self, name: str) -> str | None:
        return next((pattern for pattern in self._choices if fnmatchcase(name, pattern)), None)

    def _sizers(self, linear: nn.Linear, name: str, own: Mapping[str, Any]) -> list[Sizer]:
        if name != AUTO:
            tried = [(kind_called(name), own)]
        else:
            shape = linear.out_features, linear.in_features
            # Not inherited: a subclass may need other options.
            trying = [kind for kind in kinds().values() if "options_to_try" in vars(kind)]
            every = [(kind, each) for kind in trying for each in kind.options_to_try(*shape)]
            tried = [(kind, {**each, **self._shared(kind)}) for kind, each in every]
        return [Sizer(kind, options={**self._shared(kind), **each}, **self._made) for kind, each in tried]

    def _shared(self, kind: type[StructuredLinear]) -> dict[str, Any]:
        allowed = self._allowed(kind)
        return {name: option for name, option in self._options.items() if name in allowed}

    def _allowed(self, kind: type[StructuredLinear]) -> set[str]:
        allowed = kind.option_names()
        # With an init nothing is fitted.
        return set(kind.of_constructor(dict.fromkeys(allowed))) if self._made["init"] else allowed

    def _check_choice(self, name: str, own: Mapping[str, Any]) -> None:
        if name == AUTO:
            if own or self._made["init"]:
                raise ValueError("layer='auto' chooses by errors: it takes no options of its own and no `init`")
            for kind in kinds().values():
                kind.check_options(self._shared(kind))
            return
        kind, init = kind_called(name), self._made["init"]
        if init is not None and init not in kind.inits:
            raise ValueError(f"`init` of layer={kind.kind!r} must be one of {', '.join(kind.inits)}, but got {init!r}")
        _check_options((f"layer={kind.kind!r} has", "it has"), own, self._allowed(kind))
        kind.check_options({**self._shared(kind), **own})


def _check_options(who: tuple[str, str], options: Mapping[str, Any], allowed: set[str]) -> None:
    for option in options:
        if option not in allowed:
            raise ValueError(f"{who[0]} no option `{option}`; {who[1]} {', '.join(sorted(allowed)) or 'none'}")


def _listed(choices: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Choices in one form: names with options."""
    if _is_choice(choices) or not isinstance(choices, list | tuple):
        choices = [choices]
    for choice in choices:
        if not _is_choice(choice):
            raise ValueError(f"`layer` must be a kind such as 'mpo', or ('mpo', options), but got {choice!r}")
    return [(choice, {}) if isinstance(choice, str) else choice for choice in choices]


def _is_choice(choice: Any) -> bool:
    if isinstance(choice, str):
        return True
    is_pair = isinstance(choice, tuple) and len(choice) == 2
    return is_pair and isinstance(choice[0], str) and isinstance(choice[1], Mapping)
