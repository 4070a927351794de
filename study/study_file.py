"""Reading a study file: strict YAML, overrides, and one line for each defect."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from study.arms import VALUE_FIELDS, ControlArm, DenseArm, MPOArm
from study.config import StudyConfig
from study.errors import StudyError
from study.search_space import check_trials
from study.values import VALUE_KINDS, Choices, Range

_TAG = "tag:yaml.org,2002:"


class _StrictLoader(yaml.SafeLoader):
    """YAML without its surprises: a repeated key is an error, `3e-4` is a number, `010` and `1:30` are none."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a single value", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_KINDS = tuple(f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))
_StrictLoader.yaml_constructors = {
    tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _KINDS
}
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{_TAG}null", f"{_TAG}bool", f"{_TAG}merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in {
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
}.items():
    _StrictLoader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^({_pattern})$"), list("-+.0123456789"))


class _StrictDumper(yaml.SafeDumper):
    """Puts in quotes what `_StrictLoader` would otherwise take for a number."""


_StrictDumper.yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers


class _SectionDumper(_StrictDumper):
    """Indents lists as the study files do."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


_ARMS: dict[str, type[BaseModel]] = {
    family: arm for arm in (DenseArm, MPOArm, ControlArm) for family in get_args(arm.model_fields["family"].annotation)
}


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML strictly; `where` names the source in errors."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise StudyError(f"{where}{position}: not valid YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise StudyError(f"{where}: not valid YAML: {error}") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study file and apply `key=value` overrides (dotted keys; an arm by its name: `arms.mpo.chi=8`).

    Raises:
        StudyError: the file cannot be read or is not a valid study; names file, key and what is allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise StudyError(f"{path}: cannot read the study file: {reason}") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise StudyError(f"{path}: a study file is a mapping of keys to values; it begins with `name:`")
    for override in overrides:
        _apply_override(data, override)
    config = validate(data, str(path))
    try:
        check_trials(config)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None
    if config.corpus.path is not None and not Path(config.corpus.path).is_absolute():
        absolute = str((path.parent / config.corpus.path).resolve())
        config = config.model_copy(update={"corpus": config.corpus.model_copy(update={"path": absolute})})
    return config


def validate(data: Any, where: str) -> StudyConfig:
    """Build the configuration; the first defect becomes a one-line error, with the number of others."""
    try:
        # By way of JSON, where strict mode still knows that an array may become a tuple.
        return StudyConfig.model_validate_json(json.dumps(data))
    except ValidationError as error:
        messages = [_describe(defect, data) for defect in _roots(error.errors())]
        more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
        raise StudyError(f"{where}: {messages[0]}{more}") from None
    except (ValueError, RecursionError):
        raise StudyError(f"{where}: an alias contains itself") from None


def dump_config(config: StudyConfig) -> str:
    """The resolved study file as YAML: every value that counts, defaults included."""
    data = config.model_dump(mode="json", exclude_none=True)
    return yaml.dump(data, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True)


def dump_sections(data: Mapping[str, Any]) -> str:
    """The content of a study file as YAML to be read: a blank line between sections and arms, the innermost lists and
    mappings in one line."""
    text = yaml.dump(
        dict(data), Dumper=_SectionDumper, default_flow_style=None, sort_keys=False, allow_unicode=True, width=110
    )
    return re.sub(r"\n(?=(?!description)\S|  - )", "\n\n", text).replace("\narms:\n\n", "\narms:\n")


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise StudyError(f"--set {override}: must have the form key=value, for example protocol.steps=100")
    keys, node = dotted.split("."), data
    for depth, key in enumerate(keys[:-1]):
        node = _child(node, key, ".".join(keys[: depth + 1]), override)
    value = parse_yaml(text, f"--set {override}")
    if isinstance(node, list):
        node[_index(node, keys[-1], dotted, override)] = value
    else:
        node[keys[-1]] = value


def _child(node: Any, key: str, path: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, path, override)]
    child = node.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise StudyError(f"--set {override}: {path} is a single value, it has no keys")
    return child


def _index(items: list[Any], key: str, path: str, override: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    known = ", ".join(str(name) for name in names if name is not None)
    raise StudyError(
        f"--set {override}: {path} is not there; allowed: {known or ', '.join(map(str, range(len(items))))}"
    )


# One line for each defect ---------------------------------------------------------------------------------------------


def _roots(defects: Sequence[Any]) -> list[Any]:
    """Without the lists that are too short merely because an item of theirs has a defect of its own."""
    locations = [defect["loc"] for defect in defects]

    def has_inner(location: tuple[int | str, ...]) -> bool:
        return any(other != location and other[: len(location)] == location for other in locations)

    return [defect for defect in defects if defect["type"] != "too_short" or not has_inner(defect["loc"])]


def _describe(defect: Any, data: Any) -> str:
    path = _path(defect["loc"], data)
    kind, context, got = defect["type"], defect.get("ctx", {}), _shorten(defect.get("input"))
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        allowed = ", ".join(_allowed_keys(defect["loc"]))
        return f"{path}: unknown key; allowed: {allowed}"
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
    if kind == "union_tag_invalid":
        return f"{path}.family: must be one of {context['expected_tags']}, but got {context['tag']!r}"
    if kind == "union_tag_not_found":
        return f"{path}.family: missing, must be one of {', '.join(map(repr, _ARMS))}"
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
    return f"{path}: must {message}, but got {got}"


def _path(location: tuple[int | str, ...], data: Any) -> str:
    """The defect's dotted key; list positions are shown by the arm's name where it has one."""
    parts, node = "", data
    for before, key in zip((None, *location), location, strict=False):
        if key in VALUE_KINDS and before in (*VALUE_FIELDS, "seeds"):
            continue  # a branch of our unions, not a key of the file
        if key in _ARMS and isinstance(before, int):
            continue
        node = _get(node, key)
        name = node.get("name") if isinstance(key, int) and isinstance(node, dict) else None
        parts += f"[{name if isinstance(name, str) else key}]" if isinstance(key, int) else f".{key}" if parts else key
    return parts


def _get(node: Any, key: int | str) -> Any:
    try:
        return node[key]
    except (KeyError, IndexError, TypeError):
        return None


def _allowed_keys(location: tuple[int | str, ...]) -> Iterator[str]:
    """The keys of the model in which an unknown key stood."""
    model: Any = StudyConfig
    for key in location[:-1]:
        if key in _ARMS:
            model = _ARMS[str(key)]
        elif key in ("choices", "range"):
            model = Choices if key == "choices" else Range
        elif isinstance(key, str) and key in model.__pydantic_fields__:
            annotation = model.__pydantic_fields__[key].annotation
            options = (annotation, *get_args(annotation))  # of an optional section, the section
            sections = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
            model = next(iter(sections), model)
    yield from model.__pydantic_fields__


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
