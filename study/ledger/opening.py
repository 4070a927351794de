"""Opening a ledger: its file is checked, and its study must be the one of the study file."""

from __future__ import annotations

import uuid as uuid_module

import sqlalchemy as sa

from study.errors import StudyError
from study.ledger.checksums import insert
from study.ledger.database import check_file, check_tables, open_database, way_back
from study.ledger.rows import Growths, read_study
from study.ledger.tables import SCHEMA_VERSION, metadata, result_table, study_table
from study.spec.config import StudyConfig
from study.spec.definition import definition, differences, only_adds
from study.spec.trial import now

_UNDO = "undo the change, or begin a new study with another name or --dir"


def open_tables(url: str) -> sa.Engine:
    """A ledger's database, checked and with all our tables."""
    engine = open_database(url)
    check_file(engine)
    check_tables(engine, study_table, result_table)
    metadata.create_all(engine)
    return engine


def open_study(
    engine: sa.Engine, url: str, config: StudyConfig, corpus_sha256: str, expected: str | None, may_begin: bool
) -> tuple[str, str]:
    """UUID and time of creation of the study on record, or of a new one; for the arguments see `Ledger`."""
    name, row = config.name, read_study(engine, config.name)
    if expected is not None and (row is None or row["uuid"] != expected):
        raise StudyError(
            f"the ledger does not contain study {name} ({expected}), which was run here before; "
            f"restore its ledger.db, or begin a new study with another --dir{way_back(url, '; ')}"
        )
    if row is None and not may_begin:
        raise StudyError(f"no study {name} here that could grow; run it without that option first")
    if row is None:
        uuid, created = uuid_module.uuid4().hex, now()
        with engine.begin() as connection:
            insert(
                connection,
                study_table,
                name=name,
                uuid=uuid,
                schema_version=SCHEMA_VERSION,
                config=config.model_dump_json(),
                corpus_sha256=corpus_sha256,
                created=created,
            )
        return uuid, created
    if row["corpus_sha256"] != corpus_sha256:
        raise StudyError(
            f"study {name} was begun with another study file; it differs in corpus or tokenizer (SHA-256 was "
            f"{row['corpus_sha256'][:12]}…, now {corpus_sha256[:12]}…); {_UNDO}"
        )
    return row["uuid"], row["created"]


def adds_to(growths: Growths, config: StudyConfig, extend: bool) -> bool:
    """Whether a config adds to the study on record; it must be equal otherwise.

    Raises:
        StudyError: the config differs from the study, or adds to it without `extend`.
    """
    newest = growths.history[-1]
    changed = list(differences(definition(newest), definition(config)))
    if not changed:
        return False
    adds = only_adds(newest, config)
    if not (adds and extend):
        hint = "the file only adds to the study: give --extend to add that, or undo the change"
        raise StudyError(
            f"study {newest.name} was begun with another study file; it differs in {', '.join(changed)}; "
            f"{hint if adds else _UNDO}"
        )
    new, following = [seed for seed in config.seed_list if seed not in newest.seed_list], max(newest.seed_list) + 1
    if (newest.claims.looks or growths.more_seeds) and new != list(range(following, following + len(new))):
        why = "claims.looks take the first seeds" if newest.claims.looks else "refine has added seeds to some trials"
        raise StudyError(f"seeds: new ones must be {following} and following, since {why}; use --seeds +{len(new)}")
    return True
