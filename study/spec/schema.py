"""The study file explained from its models: `python -m study.spec.schema` writes docs/study.md and its JSON schema."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from study.spec.arms import ControlArm, DenseArm, MPOArm
from study.spec.config import StudyConfig
from study.spec.values import Choices, Range

SCHEMA, DOCUMENT = "study.schema.json", "study.md"

_HEAD = """\
# The study file

<!-- Written by `python -m study.spec.schema` from the descriptions in study/spec/config.py; a test compares. -->

One YAML file says what a study is. Unknown keys, wrong types and values that do not go together are refused in one
line each, with the key and what is allowed, before anything is trained; `mpo-study plan FILE` shows what a file will
cost. A file is UTF-8 text of at most 4,000,000 bytes, 200,000 keys and values (those that aliases repeat included) and
20 nested levels; a study has at most 100,000 listed trials, 10,000,000 runs and 1,000,000,000 parameters in a model.
The smallest one:

```yaml
# yaml-language-server: $schema=study.schema.json
name: first
arms:
  - {name: dense, family: dense}
  - {name: mpo, family: mpo, chi: [4, 8, 16, 32]}
```

The first line is for editors: with it, and the path of [study.schema.json](study.schema.json) as seen from the file,
those that know YAML schemas complete keys and show their descriptions. The schema knows shapes; what depends on more
than one key (a teacher that exists, a sampler that can search these arms) `mpo-study` checks itself.

`claims` says beforehand what the study is to decide:

```yaml
claims:
  margins: {val_loss: 0.02, val_acc: 0.005}
  contrasts:
    - {arm: mpo, against: dense}
    - {arm: mpo, against: low-rank}
```

`--set KEY=VALUE` overrides any key by its dotted path: `protocol.steps=100`, `arms.mpo.chi=[2, 4]`. A study that was
begun keeps its file: later runs may change `description`, `execution`, `budget.max_repeats` and where the corpus lies.
It can grow, by searched trials, seeds and listed values (`run --trials +N`, `--seeds +N`, `--extend`; `refine`), and
nothing else of it may change.

## Values of an arm

A value marked *open* below can be given in several ways:

| written | means |
| --- | --- |
| `chi: 8` | fixed |
| `chi: [4, 8]` | listed: one trial for each element, whatever the sampler |
| `chi: {choices: [4, 8]}` | searched: the sampler chooses |
| `chi: {low: 2, high: 48, log: true}` | searched: a number from `low` to `high`; with `log`, uniform in the logarithm |
| `learning_rate: {8: 3e-3, 16: 1e-3}` | fixed, by the trial's size: `chi`, `as_chi`, or `d_model` of a dense arm |

An arm has listed or searched values beside its fixed ones, not both. Words (`init`, `factorisation`) have no range. A
learning rate by size names every size of the arm and no other, and stands beside no searched value.

## Searching

A search has `budget.trials` trials. Some of them need no training: one whose configuration another already has, judged
after its bonds are clipped, is answered by that one's results; one beyond `budget.max_params` or below
`budget.min_params` is pruned. Of both, and of trials whose training diverged, the sampler learns: a pruned or diverged
trial is told as infeasible, by how far it breaks the limit or by the share of its seeds that diverged, and samplers
rank what is infeasible below all else. Neither is on the report's frontier.

Before anything is trained, `mpo-study plan` draws 64 trials from the space of each searched arm, as the random sampler
would, and shows the smallest, the median and the largest, the time that the whole budget takes, and which share of the
space has more parameters than dense or is beyond the limits of the budget. `plan`, the first `run` and `winners` also
say what the analysis will not compare: arms whose values were chosen among different numbers of trials, or whose steps
differ, are compared only where `claims.contrasts` declares it. So a search of MPO beside a fixed dense arm needs a
contrast.

With `early_stopping` the study depends on the order in which its trials ended, which the report then says. Each
decision is kept in the ledger with the seeds it rests on, and holds when the study is resumed.

## Tuning

What a study selects was selected for its luck, too, so that it counts on other seeds alone. (Other seeds are no other
text: what suits this validation split by luck still does.) Tune in a study of its own,
on seeds from 100 on, every arm over the same values; let `winners` write the study of what it selected; run that:

```yaml
name: tuning
seeds: [100, 101, 102]
arms:
  - {name: dense, family: dense, learning_rate: [3e-4, 1e-3, 3e-3]}
  - {name: mpo, family: mpo, chi: [8, 16], learning_rate: [3e-4, 1e-3, 3e-3]}
```

```
mpo-study run tuning.yaml
mpo-study winners results/tuning final.yaml     # arms of fixed values, on the seeds 0 to 4
mpo-study run final.yaml
```

Tuned are `init`, both learning rates, `lr_rule` and `decay` where an arm lists them: for each size, and each
combination of what else it lists, those with the best mean of the final validation loss win. Of a search, every trial
on the frontier of parameters and that mean becomes an arm; so does the best one of each arm that has none on it, lest
what MPO is compared with goes missing. A trial of which a seed failed is not selected. Where the best learning rate is
the lowest or the highest that was listed, the command says so. Contrasts go on as declared: with the rivals that share
a χ, or else the nearest in parameters; for what a search found always with the nearest. `tuned_among` says among how
many trials an arm's values were chosen, so that arms tuned alike, wherever, are of one budget. The written file says
from which study and seeds it comes, and is yours to read and change before it runs. A study that lacks runs is refused.
The new study has the first seeds that the old one did not use, or those of `--seeds 100,101,102`; a seed that chose is
refused.
"""


def json_schema() -> str:
    """The JSON schema of a study file (draft 2020-12), as text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **StudyConfig.model_json_schema()}
    return json.dumps(_without_generated_names(schema), indent=1, ensure_ascii=False) + "\n"


def document() -> str:
    """docs/study.md: every key of the study file, with its type, default and description."""
    lines = [_HEAD, "## Keys", "", *_table(StudyConfig)]
    for name, field in StudyConfig.model_fields.items():
        section = _section(field)
        if section is not None:
            lines += ["", f"## `{name}`", "", _summary(section), "", *_table(section, f"{name}.")]
    lines += ["", "## `arms`", "", "A list; the keys of an item depend on its `family`."]
    for arm in (DenseArm, MPOArm, ControlArm):
        families = "`, `".join(get_args(arm.model_fields["family"].annotation))
        lines += ["", f"### `family: {families}`", "", _summary(arm), "", *_table(arm)]
    return "\n".join(lines) + "\n"


def write(folder: str | Path) -> None:
    """Write both files to a folder."""
    for name, text in ((SCHEMA, json_schema()), (DOCUMENT, document())):
        (Path(folder) / name).write_text(text, encoding="utf-8")


def main() -> None:
    parser = ArgumentParser(prog="python -m study.spec.schema", description=f"Write {DOCUMENT} and {SCHEMA} anew.")
    parser.add_argument("folder", nargs="?", default="docs", help="where they go; Default: docs")
    try:
        write(parser.parse_args().folder)
    except OSError as error:
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
        if prefix and section is not None:  # has no heading of its own
            yield from _rows(section, f"{prefix}{name}.")
            continue
        if section is not None:
            kind = f"[section](#{name})"
        elif name == "arms":
            kind = "[list](#arms)"
        else:
            kind = _kind(shapes[name]) if item is None else "list of {" + ", ".join(item.model_fields) + "}"
        said = field.description or (_summary(section) if section is not None else "")
        yield f"| `{prefix}{name}` | {kind} | {_default(field, section is not None)} | {said} |"
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
