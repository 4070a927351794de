"""What of a URL may be shown, and what kind of place it names."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

_SECRET_KEYS = ("password", "secret", "token", "key", "signature")
"""A parameter of a URL whose name holds one of these is not shown."""


def hide_password(text: str, uri: str | None = None) -> str:
    """The text with the password of a URI, its own unless another is given, made unreadable."""
    try:
        parts = urlsplit(uri or text)
        named = [value for key, value in parse_qsl(parts.query) if any(word in key.lower() for word in _SECRET_KEYS)]
    except ValueError:
        return text if uri is not None else "the URI given"
    is_token = parts.scheme.startswith("http") and not parts.password
    for secret in filter(None, [parts.password, parts.username if is_token else None, *named]):
        for marks in (":{}@", "//{}@", "={}", "{}" if len(secret) > 3 else ":{}@"):
            text = text.replace(marks.format(secret), marks.format("***"))
    return text


def is_database(uri: str) -> bool:
    """Whether a URI names a database rather than a server."""
    return urlsplit(uri).scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")
