"""The arguments and options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

StudyFile = Annotated[Path, typer.Argument(metavar="FILE", help="The study file (YAML).")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The study's folder, which `run` made.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the study file, e.g. protocol.steps=100."),
]
StorageOption = Annotated[
    str | None,
    typer.Option(metavar="PATH|URL", help="Checkpoints and weights. Default: as in the last run, else DIR/storage."),
]


class Executor(StrEnum):
    ray = "ray"
    inline = "inline"


class Where(StrEnum):
    frontier = "frontier"


ExecutorOption = Annotated[Executor, typer.Option(help="Ray Tune, or this process.")]
AddressOption = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster. Default: $RAY_ADDRESS, else a local Ray.")
]
TrackingOption = Annotated[
    str | None,
    typer.Option(metavar="URI|off", help="MLflow tracking URI. Default: as in the last run, else a database in DIR."),
]
LedgerOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="PostgreSQL database of the ledger. Default: as in the last run, else DIR/ledger.db.",
    ),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Export = Annotated[Path, typer.Argument(metavar="FILE", help="The file of the ledger, such as ledger.db.xz.")]
