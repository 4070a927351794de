"""The reference of study files: `python -m study.spec.schema` writes the keys in docs/study.md and the JSON schema."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from analysis.report.places import fill_place
from mpo_core import kinds
from study.spec.arms import ARMS
from study.spec.config import StudyConfig
from study.spec.kinds import families_with_gauge, inits, own_options
from study.spec.models import MODELS
from study.spec.values import Choices, Range

SCHEMA, DOCUMENT = "study.schema.json", "study.md"

_PLACE = "keys"


def json_schema() -> str:
    """The JSON schema of a study file (draft 2020-12), as text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **StudyConfig.model_json_schema()}
    return json.dumps(_without_generated_names(schema), indent=1, ensure_ascii=False) + "\n"


def keys() -> str:
    """Markdown: every key of a study file, with its type, default and description."""
    lines = ["## Keys", "", *_table(StudyConfig)]
    for name, field in StudyConfig.model_fields.items():
        section = _section(field)
        if name == "model":
            lines += ["", "## `model`", "", "The keys depend on its `architecture`. Default: `picogpt`."]
            for architecture, model in MODELS.items():
                shown = "MODULE:CLASS" if architecture == "own" else architecture
                lines += ["", f"### `architecture: {shown}`", "", _summary(model), "", *_table(model, "model.")]
        elif section is not None:
            lines += ["", f"## `{name}`", "", _summary(section), "", *_table(section, f"{name}.")]
    lines += ["", "## `arms`", "", "A list; the keys of an item depend on its `family`, and on whether it has `keep`."]
    shipped = [name for name, kind in kinds().items() if kind.__module__.startswith("mpo_core.")]
    for name, arm in ARMS.items():
        families = [name] if name != "control" else [kind for kind in shipped if kind != "mpo"]
        heading = "Any family with `keep`" if name == "kept" else f"`family: {'`, `'.join(families)}`"
        lines += ["", f"### {heading}", "", _summary(arm), "", *_table(arm)]
    lines += [
        "",
        "### Inits, gauges and options",
        "",
        "| family | `init` of an arm from scratch | `gauge` | `options` |",
    ]
    lines.append("| --- | --- | --- | --- |")
    gauges = dict.fromkeys(families_with_gauge(), "`free`, `fixed`")
    lines += [
        f"| `{family}` | {_code(inits(family))} | {gauges.get(family, '–')} | {_code(own_options(family)) or '–'} |"
        for family in shipped
    ]
    return "\n".join(lines) + "\n"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def write(folder: str | Path) -> None:
    """Write the JSON schema to a folder, and the keys to the place for them in its study.md."""
    (Path(folder) / SCHEMA).write_text(json_schema(), encoding="utf-8")
    fill_place(Path(folder) / DOCUMENT, _PLACE, keys())


def main() -> None:
    parser = ArgumentParser(
        prog="python -m study.spec.schema", description=f"Write {SCHEMA}, and the keys in {DOCUMENT}."
    )
    parser.add_argument("folder", nargs="?", default="docs", help="Folder of both. Default: docs.")
    try:
        write(parser.parse_args().folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


# The document ---------------------------------------------------------------------------------------------------------


def _summary(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a key that holds further keys."""
    if get_origin(field.annotation) is tuple:
        return None
    options = (field.annotation, *get_args(field.annotation))
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def _item(field: FieldInfo) -> type[BaseModel] | None:
    """The model of the elements of a list."""
    item = next(iter(get_args(field.annotation)), None) if get_origin(field.annotation) is tuple else None
    return item if isinstance(item, type) and issubclass(item, BaseModel) else None


def _table(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    yield from _rows(model, prefix)


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    shapes = _filled_in(model.model_json_schema())["properties"]
    for name, field in model.model_fields.items():
        section, item = _section(field), _item(field)
        if section is not None and model is not StudyConfig:  # has no heading of its own
            if field.description:
                yield f"| `{prefix}{name}` | section | – | {field.description} |"
            yield from _rows(section, f"{prefix}{name}.")
            continue
        if section is not None:
            kind = f"[section](#{name})"
        elif name == "arms":
            kind = "[list](#arms)"
        elif name == "model":
            kind = "[section](#model)"
        else:
            kind = _kind(shapes[name]) if item is None else "list of {" + ", ".join(item.model_fields) + "}"
        said = field.description or (_summary(section) if section is not None else "")
        yield f"| `{prefix}{name}` | {kind} | {_default(field, section is not None or name == 'model')} | {said} |"
        if item is not None:
            yield from _rows(item, f"{prefix}{name}[].")


def _default(field: FieldInfo, is_section: bool) -> str:
    if field.is_required():
        return "**required**"
    default = field.get_default(call_default_factory=True)
    return "–" if default is None or is_section else f"`{json.dumps(default)}`"


def _kind(schema: dict[str, Any]) -> str:
    """A type in words."""
    options = [option for option in _options(schema) if option.get("type") != "null"]
    if [option.get("type") for option in options] == ["object"] and "additionalProperties" in options[0]:
        is_of_numbers = options[0]["additionalProperties"] not in (True, False)
        return "mapping of whole numbers to numbers" if is_of_numbers else "mapping of names to values"
    single = [option for option in options if option.get("type") != "object"]
    if len(single) < len(options):  # those objects are {choices: ...} and {low: ..., high: ...}
        single = [option for option in single if option["type"] != "array"]
    words = " or ".join(map(_words, single))
    return words if len(single) == len(options) else f"{words}; *open*"


def _options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    inner = schema.get("anyOf", schema.get("oneOf"))
    return [schema] if inner is None else [one for option in inner for one in _options(option)]


def _filled_in(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its references replaced by what they refer to."""

    def fill(node: Any) -> Any:
        if isinstance(node, list):
            return [fill(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return fill(schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
        return {key: fill(value) for key, value in node.items() if key != "$defs"}

    return fill(schema)


def _words(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        items = schema.get("items") or schema["prefixItems"][0]
        fixed = "minItems" in schema and schema["minItems"] == schema.get("maxItems")
        count = f"{schema['minItems']} × " if fixed else ""
        return f"list of {count}{_words(items)}"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    marks = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{mark} {schema[key]:,}".replace(",", " ") for key, mark in marks.items() if key in schema]
    return " ".join([names[schema["type"]], ", ".join(limits)]).strip()


# The schema -----------------------------------------------------------------------------------------------------------


def _without_generated_names(schema: dict[str, Any]) -> dict[str, Any]:
    """Short names for the generic parts, which are otherwise named by their whole type, and no titles but these."""
    names: dict[str, str] = {}
    for name in schema["$defs"]:
        stem = next((one.__name__ for one in (Choices, Range) if name.startswith(f"{one.__name__}_")), None)
        number = sum(short.startswith(stem) for short in names.values()) + 1 if stem else 0
        names[name] = f"{stem}{number}" if stem else name

    def renamed(node: Any) -> Any:
        if isinstance(node, list):
            return [renamed(item) for item in node]
        if isinstance(node, dict):
            return {
                key: renamed(value) for key, value in node.items() if not (key == "title" and isinstance(value, str))
            }
        if isinstance(node, str) and node.startswith("#/$defs/"):
            return f"#/$defs/{names[node.removeprefix('#/$defs/')]}"
        return node

    return renamed(schema | {"$defs": {names[name]: content for name, content in schema["$defs"].items()}})


if __name__ == "__main__":
    main()
