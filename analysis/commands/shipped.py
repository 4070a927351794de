"""The studies that the project ships: their reports, and what the documents say of them. `make results`.

STUDIES has a folder for each study, which gets its report. OUT has a folder for each study, which gets the parts of
the report that are shipped. A DOCUMENT has places (see `report/places.py`) named STUDY or STUDY:PART, which are filled
with text about the study.
"""

from __future__ import annotations

import os
import shutil
from argparse import ArgumentParser, RawTextHelpFormatter
from collections.abc import Mapping
from pathlib import Path

from analysis.errors import AnalysisError
from analysis.paper.trials import paper_trials
from analysis.paper.write import write_comparison
from analysis.report.answers import answers
from analysis.report.places import fill_place, places
from analysis.report.report import INDEX, write_report
from analysis.report.tables import average_table, comparisons_table, rates_table, to_markdown, trials_table
from analysis.results.findings import Findings
from analysis.results.summary import VAL_LOSS
from analysis.runs.load import load_study, resolve_study

SHIPPED = {
    "report/figures/frontier_val_loss.svg": "frontier.svg",
    "report/figures/frontier_val_loss.txt": "frontier.txt",
    "report/tables/trials.md": "trials.md",
    "report/tables/comparisons.md": "comparisons.md",
    "paper/comparison.md": "paper.md",
}
"""Shipped files: the path in the study's folder, and the name in OUT/NAME."""
TRIALS = ("configuration", "family", "arm", "parameters", "seeds", "val loss (nats)", "val accuracy (%)")
MPO_LOSS = ("compared", "against", "difference", "verdict", "p adjusted", "declared", "seeds")


def main() -> None:
    parser = ArgumentParser(
        prog="python -m analysis.commands.shipped", description=__doc__, formatter_class=RawTextHelpFormatter
    )
    parser.add_argument("studies", type=Path, metavar="STUDIES")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("documents", type=Path, metavar="DOCUMENT", nargs="+")
    given = parser.parse_args()
    try:
        ship(given.studies, given.out, given.documents)
    except (AnalysisError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def ship(studies: Path, out: Path, documents: list[Path]) -> None:
    """Write the report of every study in the folder `studies`, ship its parts, and fill the documents' places.

    Raises:
        AnalysisError: a study cannot be read or reported on.
        ValueError: a document has a place with another name.
    """
    findings = {}
    for folder in sorted(path for path in studies.iterdir() if path.is_dir()):
        findings[folder.name] = ship_study(folder, out / folder.name)
        print(f"{folder.name}: {folder / 'report' / INDEX}")
    texts = [
        (document, place, place_text(document, place, findings, out))
        for document in documents
        for place in places(document)
    ]
    for document, place, text in texts:  # only after all texts are known
        fill_place(document, place, text)


def ship_study(folder: Path, out: Path) -> Findings:
    """Write a study's report to FOLDER/report and copy the shipped parts to the folder `out`.

    A study with the paper's models also gets the comparison with the paper, in FOLDER/paper.
    """
    runs = load_study(resolve_study(folder), cache=folder / "cache")
    findings = write_report(runs, folder / "report", light=True)
    if len(paper_trials(runs).frame):
        write_comparison(runs, folder / "paper", light=True)
    out.mkdir(parents=True, exist_ok=True)
    for source, name in SHIPPED.items():
        if (folder / source).exists():
            shutil.copy(folder / source, out / name)
        else:
            (out / name).unlink(missing_ok=True)
    return findings


def place_text(document: Path, place: str, findings: Mapping[str, Findings], out: Path) -> str:
    """Return the text for one place of a document.

    Args:
        findings: the findings of each study, by its name; the shipped parts are in OUT/NAME.
    Raises:
        ValueError: the place names another study, or a part that a study does not have.
    """
    study, _, part = place.partition(":")
    if study not in findings:
        raise ValueError(f"{document}: has a place for {place}, but the studies are {', '.join(findings)}")
    said = parts(findings[study], out / study, Path(os.path.relpath(out / study, document.parent)).as_posix())
    if part not in said:
        known = ", ".join(filter(None, said))
        raise ValueError(f"{document}: has a place for {place}, but the parts of a study are {known}")
    return said[part]


def parts(findings: Findings, folder: Path, shipped: str) -> dict[str, str]:
    """Texts about a study, in Markdown: the figure, the tables and the first screen's answers. The key "" holds all.

    Args:
        folder: that of the study's shipped parts.
        shipped: the same, relative to the document.
    """
    of_mpo = findings.summary.loc[findings.summary["family"] == "mpo", "trial"]
    is_shown = findings.compared["trial"].isin(of_mpo) & (findings.compared["measure"] == VAL_LOSS.name)
    mpo = comparisons_table(findings.compared[is_shown]).shown
    title = f"Frontier of {findings.runs.name}: validation loss against trainable parameters"
    caption = " ".join((folder / "frontier.txt").read_text(encoding="utf-8").split())
    said = {
        "figure": f"![{title}]({shipped}/frontier.svg)",
        "caption": f"*{caption}*",
        "trials": to_markdown(trials_table(findings.summary).shown[list(TRIALS)]),
        "rates": to_markdown(rates_table(findings.summary).shown),
        "average": to_markdown(average_table(findings.runs, findings.summary).shown),
        "mpo-loss": to_markdown(mpo[list(MPO_LOSS)]) if len(mpo) else "Nothing.\n",
    }
    found = {answer.name: (answer.question, to_markdown(answer.rows)) for answer in answers(findings)}
    link = (
        f"All [trials]({shipped}/trials.md) and [comparisons]({shipped}/comparisons.md). `make results` writes the "
        f"report with all figures and data to results/.shipped/{findings.runs.name}/report."
    )
    questions = [f"*{question}*\n\n{rows}" for question, rows in found.values()]
    said |= {name: rows for name, (_, rows) in found.items()}
    return said | {"": "\n".join([said["figure"], "", said["caption"], "", said["trials"], *questions, link])}


if __name__ == "__main__":
    main()
