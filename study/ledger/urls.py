"""The kind of place that a URL names."""

from __future__ import annotations

from urllib.parse import urlsplit


def is_database(uri: str) -> bool:
    """Whether a URI names a database rather than a server."""
    return urlsplit(uri).scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")
