"""Defects in the content of a study file: one line for each, with its key and what is allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from study.errors import did_you_mean
from study.spec.arms import ARMS, VALUE_FIELDS
from study.spec.config import StudyConfig
from study.spec.kinds import why_no_family
from study.spec.models import MODELS
from study.spec.values import VALUE_KINDS, Choices, Range


def defects(error: ValidationError, data: Any) -> Iterator[str]:
    """One line for each defect that pydantic found in the content of a study file."""
    unknown: set[str] = set()
    for defect in _roots(error.errors()):
        problem = _unknown_family(defect["loc"], data)
        if problem is None:
            yield from _describe(defect, data).split("\n")
        elif problem not in unknown:  # what else such an arm lacks depends on its family
            unknown.add(problem)
            yield problem


def _unknown_family(location: tuple[int | str, ...], data: Any) -> str | None:
    """The line about the unknown family of the arm that has a defect; None if its family is known."""
    if location[:1] != ("arms",) or location[2:3] != ("control",):
        return None
    family = _get(_get(_get(data, "arms"), location[1]), "family")
    problem = why_no_family(family) if isinstance(family, str) else None
    return None if problem is None else f"{_path(location[:3], data)}.family: {problem}"


def _roots(defects: Sequence[Any]) -> list[Any]:
    """Drop "list too short" defects whose only cause is a defect in one of the list's items."""
    locations = [defect["loc"] for defect in defects]

    def has_inner(location: tuple[int | str, ...]) -> bool:
        return any(other != location and other[: len(location)] == location for other in locations)

    return [defect for defect in defects if defect["type"] != "too_short" or not has_inner(defect["loc"])]


def _describe(defect: Any, data: Any) -> str:
    path = _path(defect["loc"], data)
    kind, context, got = defect["type"], defect.get("ctx", {}), _shorten(defect.get("input"))
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        key, allowed = defect["loc"][-1], list(_allowed_keys(defect["loc"]))
        of_section = [f"{name}.{key}" for name in allowed if key in _allowed_keys((name, key))]
        if path == key and of_section:
            meant = f" (did you mean {of_section[0]}?)"
        elif path != key and key in StudyConfig.model_fields:
            meant = f" (did you mean {key}, outside {defect['loc'][0]}?)"
        else:
            meant = did_you_mean(key, allowed)
        return f"{path}: unknown key{meant}; allowed: {', '.join(allowed)}"
    if kind == "missing":
        return f"{path}: missing, must be given"
    if kind == "value_error":
        text = str(context["error"])
        return f"{path}: {text}" if path else text
    if kind == "union_tag_invalid" and context["tag"] in VALUE_KINDS:
        shapes = {
            "fixed": "a value",
            "listed": "a list",
            "choices": "{choices: [...]}",
            "range": "{low: ..., high: ...}",
            "by_size": "{SIZE: ...}",
        }
        expected = [shapes[tag.strip(" '")] for tag in context["expected_tags"].split(",")]
        return f"{path}: must be {' or '.join(expected)}, but got {got}"
    if kind in ("union_tag_not_found", "union_tag_invalid") and path == "model":
        if not isinstance(_get(data, "model"), dict):
            return f"{path}: must be a mapping of keys to values, but got {got}"
        given = _get(_get(data, "model"), "architecture")
        meant = did_you_mean(given, [*MODELS][:2])
        return f"{path}.architecture: must be picogpt, huggingface or MODULE:CLASS, but got {_shorten(given)}{meant}"
    if kind == "union_tag_not_found":
        return f"{path}.family: missing, must be 'dense', 'mpo' or another kind of layer"
    if kind in ("too_short", "too_long"):
        limit = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"{path}: must have a length of {limit}, but got {context['actual_length']}"
    if kind == "json_invalid":
        return "holds a text that is not valid Unicode"
    message = {
        "string_pattern_mismatch": f"match {context.get('pattern')}",
        "tuple_type": "be a list",
        "model_type": "be a mapping of keys to values",
        "dict_type": "be a mapping of keys to values",
        "model_attributes_type": "be a mapping of keys to values",
    }.get(kind, defect["msg"].removeprefix("Input should "))
    meant = (
        did_you_mean(defect["input"], re.findall("'([^']*)'", context["expected"])) if kind == "literal_error" else ""
    )
    return f"{path}: must {message}, but got {got}{meant}"


def _path(location: tuple[int | str, ...], data: Any) -> str:
    """The defect's dotted key; list positions are shown as the arm's name if it has one."""
    parts, node = "", data
    for before, key in zip((None, *location), location, strict=False):
        if key in VALUE_KINDS and before in (*VALUE_FIELDS, "seeds", "path"):
            continue  # a branch of our unions, not a key of the file
        if (key in ARMS and isinstance(before, int)) or (key in MODELS and before == "model"):
            continue
        node = _get(node, key)
        name = node.get("name") if isinstance(key, int) and isinstance(node, dict) else None
        shown = name if isinstance(name, str) else key
        if not str(shown).isprintable() or len(str(shown)) > 60:
            shown = _shorten(shown)
        parts += f"[{shown}]" if isinstance(key, int) else f".{shown}" if parts else str(shown)
    return parts


def _get(node: Any, key: int | str) -> Any:
    try:
        return node[key]
    except (KeyError, IndexError, TypeError):
        return None


def _allowed_keys(location: tuple[int | str, ...]) -> Iterator[str]:
    """Allowed keys of the model that contains the unknown key."""
    model: Any = StudyConfig
    for key in location[:-1]:
        if key in ARMS or key in MODELS:
            model = {**ARMS, **MODELS}[str(key)]
        elif key in ("choices", "range"):
            model = Choices if key == "choices" else Range
        elif isinstance(key, str) and key in model.__pydantic_fields__:
            annotation = model.__pydantic_fields__[key].annotation
            options = (annotation, *get_args(annotation))  # unwrap an optional section
            sections = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
            model = next(iter(sections), model)
    yield from model.__pydantic_fields__


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isprintable():  # otherwise an escape code would reach the terminal
        text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
