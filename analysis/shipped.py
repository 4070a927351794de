"""The studies that the project ships: their reports, and what the documents say of them. `make results`.

    python -m analysis.shipped STUDIES OUT DOCUMENT ...

STUDIES has a folder for each study, OUT gets a folder for each, with a light report; and each DOCUMENT has a place (see
`analysis.places`) of the name of a study for what is said of it: the figure of its frontier, its table, the sentences of
its first screen. Nothing of that is typed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from analysis.errors import AnalysisError
from analysis.findings import Findings
from analysis.load import load_study, resolve_study
from analysis.paper.trials import paper_trials
from analysis.paper.write import write_comparison
from analysis.places import fill_place, places
from analysis.report import INDEX, write_report
from analysis.tables import to_markdown, trials_table

FIGURE = "figures/frontier_val_loss.svg"
COLUMNS = ("configuration", "family", "arm", "parameters", "seeds", "val loss (nats)", "val accuracy (%)")


def main() -> None:
    if len(sys.argv) < 4:
        raise SystemExit((__doc__ or "").strip())
    studies, out, *documents = map(Path, sys.argv[1:])
    try:
        ship(studies, out, documents)
    except (AnalysisError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


def ship(studies: Path, out: Path, documents: list[Path]) -> None:
    """Write the light report of every study in the folder `studies` to OUT/NAME/report, and fill the documents' places.

    Raises:
        AnalysisError: a study cannot be read or reported on.
        ValueError: a document has a place for something else.
    """
    findings = {}
    for folder in sorted(path for path in studies.iterdir() if path.is_dir()):
        runs = load_study(resolve_study(folder), cache=folder / "cache")
        findings[folder.name] = write_report(runs, out / folder.name / "report", light=True)
        print(f"{folder.name}: {out / folder.name / 'report' / INDEX}")
        if len(paper_trials(runs).frame):
            write_comparison(runs, out / folder.name / "paper")
    for document in documents:
        for name in places(document):
            if name not in findings:
                raise ValueError(f"{document}: has a place for {name}, which is none of {', '.join(findings)}")
            fill_place(document, name, section(findings[name], _link(out / name / "report", document)))


def section(findings: Findings, report: str) -> str:
    """What a document says of a study.

    Args:
        report: the report's folder, as seen from the document.
    """
    shown = trials_table(findings.summary).shown[list(COLUMNS)]
    said = [f"- *{answer.question}* {' '.join(answer.sentences)}" for answer in findings.answers]
    return "\n".join(
        [
            f"![Frontier of {findings.runs.name}: validation loss against trainable parameters]({report}/{FIGURE})",
            "",
            to_markdown(shown),
            *said,
            "",
            f"Everything else: [the report]({report}/{INDEX}), its [figures]({report}/figures) and "
            f"[tables]({report}/tables) with their data.",
        ]
    )


def _link(folder: Path, document: Path) -> str:
    return Path(os.path.relpath(folder, document.parent)).as_posix()


if __name__ == "__main__":
    main()
