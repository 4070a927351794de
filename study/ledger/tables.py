"""The tables of a ledger, and how a study is copied from one ledger to another.

One SQL database holds Optuna's own tables (the sampler's memory) and those below; results are keyed by (trial, seed).
"""

from __future__ import annotations

import sqlalchemy as sa

from study.ledger.checksums import SUM
from study.ledger.database import close_optuna, open_database, open_optuna

SCHEMA_VERSION = 2

metadata = sa.MetaData()
study_table = sa.Table(
    "mpo_study",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("uuid", sa.String, nullable=False),
    sa.Column("schema_version", sa.Integer, nullable=False),
    sa.Column("config", sa.Text, nullable=False),  # JSON of the first study file
    sa.Column("corpus_sha256", sa.String, nullable=False),
    sa.Column("created", sa.String, nullable=False),
    sa.Column(SUM, sa.String, nullable=True),
)
result_table = sa.Table(
    "mpo_result",
    metadata,
    sa.Column("study_uuid", sa.String, primary_key=True),
    sa.Column("trial", sa.Integer, primary_key=True),
    sa.Column("seed", sa.Integer, primary_key=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("content", sa.Text, nullable=False),  # JSON of the whole SeedResult
    sa.Column(SUM, sa.String, nullable=True),
)
stop_table = sa.Table(
    "mpo_stop",
    metadata,
    sa.Column("study_uuid", sa.String, primary_key=True),
    sa.Column("trial", sa.Integer, primary_key=True),
    sa.Column("content", sa.Text, nullable=False),  # JSON of the whole Stop
    sa.Column(SUM, sa.String, nullable=True),
)
driver_table = sa.Table(
    "mpo_driver",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_uuid", sa.String, nullable=False),
    sa.Column("started", sa.String, nullable=False),
    sa.Column("environment", sa.Text, nullable=False),  # JSON
    sa.Column(SUM, sa.String, nullable=True),
)
growth_table = sa.Table(
    "mpo_growth",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_uuid", sa.String, nullable=False),
    sa.Column("made", sa.String, nullable=False),
    sa.Column("command", sa.String, nullable=False),  # what the user asked for
    sa.Column("config", sa.Text, nullable=True),  # JSON of the study from then on, if the whole study grew
    sa.Column("seeds", sa.Text, nullable=True),  # JSON: the seeds that single trials got, [[trial, [seed, ...]], ...]
    sa.Column(SUM, sa.String, nullable=True),
)


def optuna_name(name: str, uuid: str) -> str:
    """Optuna's name of a study; it has the UUID because names may be used again."""
    return f"{name}-{uuid}"


def empty_ledger(url: str) -> sa.Engine:
    """A ledger with all its tables, including Optuna's, and no study."""
    engine = open_database(url)
    metadata.create_all(engine)
    close_optuna(open_optuna(url))
    return engine


def copy_study(source: sa.Engine, target: sa.Engine, name: str, uuid: str) -> None:
    """Copy one study's rows, and those common to all studies, as of one moment, from a ledger to an empty one.

    Args:
        target: a SQLite file made by `empty_ledger`, whose tables and columns the source has.
    """
    own = sa.MetaData()
    own.reflect(target)
    studies, trials = own.tables["studies"], own.tables["trials"]
    of_study = sa.select(studies.c.study_id).where(studies.c.study_name == optuna_name(name, uuid))
    of_trials = sa.select(trials.c.trial_id).where(trials.c.study_id.in_(of_study))
    wanted = {"study_uuid": [uuid], "study_id": of_study, "trial_id": of_trials}
    is_sqlite = source.dialect.name == "sqlite"
    one_moment = {} if is_sqlite else {"isolation_level": "REPEATABLE READ"}
    with source.connect().execution_options(**one_moment) as reader, target.begin() as writer:
        if is_sqlite:
            reader.exec_driver_sql("BEGIN")  # otherwise each table would be read at another moment
        for table in own.sorted_tables:
            query = sa.select(table)
            if table.name == study_table.name:
                query = query.where(table.c.name == name)
            key = next((key for key in wanted if key in table.c), None)
            if key is not None:
                query = query.where(table.c[key].in_(wanted[key]))
            writer.execute(table.delete())
            for rows in reader.execute(query.order_by(*table.primary_key.columns)).mappings().partitions(1000):
                writer.execute(table.insert(), [dict(row) for row in rows])
