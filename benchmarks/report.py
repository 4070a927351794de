"""Writes docs/performance.md from docs/performance.json: `python -m benchmarks.report`.

The prose comes from the benchmarks: their docstrings say what is measured, and their `LIMITS` why a target is missed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row, cells_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/performance.json"
DOCUMENT = ROOT / "docs/performance.md"
GROWTH = "growth over "
MOST_MISSED = 40

INTRODUCTION = """# Performance

`make bench` measures, and `python -m benchmarks.report` writes this page from the results: do not edit it by hand.

Two things are timed alternately in one run. A ratio is the median over the pairs, ours over the rival's; *middle half*
is the range of the middle half of the pairs. Below 1 ours takes less. If there is no rival, a fixed limit takes its
place."""


def main() -> None:
    if not RESULTS.exists():
        raise SystemExit(f"{RESULTS} does not exist: run `python -m benchmarks` first")
    DOCUMENT.write_text(render(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"written to {DOCUMENT}")


def render(entries: dict[str, dict[str, Any]]) -> str:
    """The document, from the entries that `python -m benchmarks` writes."""
    parts = [INTRODUCTION, summary(entries)]
    for name, entry in entries.items():
        rows = rows_of(entry)
        about = entry["about"].partition("\n\n")
        machine = entry["machine"]
        gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
        parts.append(f"## {about[0].rstrip('.')}\n\n{about[2]}".rstrip())
        parts.append(
            f"`python -m benchmarks {name}`, {entry['ended']}, {entry['took_seconds']:.0f} s: {machine['cpu']}{gpu}, "
            f"{machine['cores']} cores, {machine['threads']} threads, PyTorch {machine['torch']}"
        )
        for section in dict.fromkeys(row.section for row in rows):
            of_section = [row for row in rows if row.section == section]
            parts += section_parts(section, of_section)
            if any(row.is_met is False for row in of_section):
                parts.append(f"Why targets are missed: {entry['limits'].get(section, 'not known yet.')}")
    return "\n\n".join(parts) + "\n"


def rows_of(entry: dict[str, Any]) -> list[Row]:
    return [Row(**row) for row in entry["rows"]]


def summary(entries: dict[str, dict[str, Any]]) -> str:
    """One line per section that has targets."""
    lines = []
    for entry in entries.values():
        rows = [row for row in rows_of(entry) if row.is_met is not None]
        for section in dict.fromkeys(row.section for row in rows):
            of_section = [row for row in rows if row.section == section]
            n_met = sum(bool(row.is_met) for row in of_section)
            worst = furthest(of_section)
            cells = cells_of(worst)
            lines.append([section, f"{n_met} of {len(of_section)}", worst.what, cells[2], cells[3], cells[4]])
    headings = ("section", "targets met", "furthest from its target", "ratio", "middle half", "target")
    return table(headings, lines)


def furthest(rows: Iterable[Row]) -> Row:
    """The row that misses its target most, or else is nearest to missing it."""

    def excess(row: Row) -> float:
        assert row.target is not None
        return row.ratio / row.target if row.at_most else row.target / row.ratio

    return max(rows, key=lambda row: (row.is_met is False, excess(row)))


def section_parts(section: str, rows: Sequence[Row]) -> list[str]:
    """Heading and tables of a section, in the form for its rows."""
    heading = f"### {section[0].upper()}{section[1:]}"
    if section.startswith(GROWTH):
        return [heading, growth_table(rows), growth_exponents(rows)]
    if rows[0].sizes is not None and len(rows[0].sizes) > 2:
        parts = [heading, grid(rows)]
        missed = sorted((row for row in rows if row.is_met is False), key=lambda row: -row.ratio)
        if missed:
            shown = missed[:MOST_MISSED]
            parts += [f"Furthest from their targets ({len(shown)} of {len(missed)} missed):", flat(shown)]
        return parts
    return [heading, flat(rows)]


def flat(rows: Sequence[Row]) -> str:
    headings = ["what", "against", "median", "rival", "ratio", "middle half", "target", "met"]
    lines = [[row.what, row.against, *cells_of(row)] for row in rows]
    if any(row.note for row in rows):
        headings.append("note")
        lines = [[*line, row.note] for line, row in zip(lines, rows, strict=True)]
    return table(headings, lines)


def grid(rows: Sequence[Row]) -> str:
    """Ratios over three sizes, the last one in the columns. A missed target is bold."""
    *outer, inner = rows[0].sizes or {}
    columns = sorted({row.sizes[inner] for row in rows if row.sizes})
    by_place = {tuple((row.sizes or {}).values()): row for row in rows}
    lines = []
    for place in dict.fromkeys(place[:-1] for place in by_place):
        line = [f"{size:,}" for size in place]
        for column in columns:
            row = by_place.get((*place, column))
            text = "" if row is None else f"{row.ratio:.3g}"
            line.append(f"**{text}**" if row is not None and row.is_met is False else text)
        lines.append(line)
    n_met = sum(row.is_met is not False for row in rows)
    caption = f"Ratios, bold where the target is missed; it is met in {n_met} of {len(rows)} cells."
    return f"{caption}\n\n" + table([*outer, *(f"{inner} = {column}" for column in columns)], lines)


# Growth ---------------------------------------------------------------------------------------------------------------


def growth_table(rows: Sequence[Row]) -> str:
    [axis] = rows[0].sizes or {"": 0}
    lines = []
    for row in rows:
        ours, rival, ratio, half, *_ = cells_of(row)
        lines.append([f"{(row.sizes or {})[axis]:,}", ours, rival, ratio, half])
    return f"{rows[0].what}\n\n" + table((axis, "median", rows[0].against, "ratio", "middle half"), lines)


def growth_exponents(rows: Sequence[Row]) -> str:
    [axis] = rows[0].sizes or {"": 0}
    sizes = [(row.sizes or {})[axis] for row in rows]
    texts = []
    for name, values in (("ours", [r.seconds for r in rows]), (rows[0].against, [r.rival_seconds for r in rows])):
        over_all, last = exponent(sizes, values), exponent(sizes[-2:], values[-2:])
        texts.append(f"{name} {over_all:.2f} over all, {last:.2f} between the last two")
    return f"Exponent of {axis} (least squares of the logarithms): {'; '.join(texts)}."


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(value) over log(size); at least two different sizes, all positive."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = (headings, ["---"] * len(headings), *lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


if __name__ == "__main__":
    main()
