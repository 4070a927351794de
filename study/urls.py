"""What of a URL may be shown, and what kind of place it names."""

from __future__ import annotations

import re
from urllib.parse import unquote_plus, urlsplit

_SECRET_KEYS = ("pass", "pwd", "secret", "token", "key", "sig", "auth", "cred")
"""A parameter of a URL whose name holds one of these is not shown."""

_USER_INFO = re.compile(r"(://[^:/@\s]*):[^\s]*@")
"""A user and a password, be it one that is not encoded as it should be."""


def hide_password(text: str, uri: str | None = None) -> str:
    """The text with the password of a URI, its own unless another is given, made unreadable."""
    try:
        parts = urlsplit(uri or text)
        pairs = [pair.partition("=") for pair in parts.query.split("&")]
        raw = [value for key, _, value in pairs if any(word in key.lower() for word in _SECRET_KEYS)]
        named = [*raw, *map(unquote_plus, raw)]  # as it is written, and as a library's message may show it
    except ValueError:
        return text if uri is not None else "the URI given"
    is_token = parts.scheme.startswith("http") and not parts.password
    for secret in filter(None, [parts.password, parts.username if is_token else None, *named]):
        for marks in (":{}@", "//{}@", "={}", "{}" if len(secret) > 3 else ":{}@"):
            text = text.replace(marks.format(secret), marks.format("***"))
    return _USER_INFO.sub(r"\1:***@", text)


def is_database(uri: str) -> bool:
    """Whether a URI names a database rather than a server."""
    return urlsplit(uri).scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")
