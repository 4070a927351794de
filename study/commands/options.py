"""The arguments and options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

StudyFile = Annotated[Path, typer.Argument(metavar="FILE", help="The study file (YAML).")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The study's folder, created by `run`.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the study file, e.g. protocol.steps=100."),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|URL", help="Place of checkpoints and weights. Default: as in the last run, at first DIR/storage."
    ),
]


class Executor(StrEnum):
    ray = "ray"
    inline = "inline"


class Where(StrEnum):
    frontier = "frontier"
    contrasts = "contrasts"


ExecutorOption = Annotated[Executor, typer.Option(help="Where units run: in Ray's workers, or in this process.")]
AddressOption = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster. Default: $RAY_ADDRESS, otherwise a new local Ray.")
]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        metavar="URI|off", help="MLflow tracking URI. Default: as in the last run, at first a database in DIR."
    ),
]
LedgerOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="PostgreSQL database of the ledger. Default: as in the last run, at first DIR/ledger.db.",
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Export = Annotated[Path, typer.Argument(metavar="FILE", help="The exported file, such as ledger.db.xz.")]
