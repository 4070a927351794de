"""Hides the secret parts of a URL."""

from __future__ import annotations

import re
from urllib.parse import unquote, unquote_plus

_SECRET_KEYS = ("pass", "pwd", "secret", "token", "key", "sig", "auth", "cred", "odbc_connect")
"""A parameter of a URL is hidden if its name contains one of these."""

_SCHEME = r"[a-z][a-z0-9+.-]*://"
_URL = re.compile(_SCHEME + r"[^\s'\"<>]*[^\s'\"<>:;,.)]", re.IGNORECASE)
_USER_INFO = re.compile(rf"^({_SCHEME}|(?!{_SCHEME}))(?:([^:/@?#]*):(.*)|([^:/@?#]+))@", re.IGNORECASE | re.DOTALL)
"""Scheme; user and password, even one with wrong encoding; or a user or token alone."""
_PARAMETER = re.compile(r"([?&;#])([^=?&;#/]+)=([^?&;#]*)")
_TOKEN_SCHEMES = ("http", "s3", "databricks")
"""Schemes in which a single name before the @ may be a secret; in others it is a user."""
_HIDDEN = "***"
_SHORT = 3
"""A secret of at most this many characters may be part of other words: it is hidden only in its place in a URL."""


def hide_password(text: str, uri: str | None = None) -> str:
    """The text with all passwords, tokens and keys of a URI made unreadable.

    Args:
        text: a URI, if `uri` is None. Otherwise a message about `uri`, which may quote the URI, its secrets (as written
            or decoded), and other URIs.
    """
    if uri is None:
        return _hidden(text)
    for secret in sorted(_secrets(uri), key=len, reverse=True):
        for marks in ("{}",) if len(secret) > _SHORT else (":{}@", "//{}@", "={}"):
            text = text.replace(marks.format(secret), marks.format(_HIDDEN))
    return _URL.sub(lambda found: _hidden(found[0]), text)


def without_credentials(url: str) -> str:
    """The address of a server without user, password and parameters; a browser asks for these itself."""
    return re.split(r"[?;#]", _USER_INFO.sub(r"\1", url))[0]


def _hidden(uri: str) -> str:
    def of_user(found: re.Match[str]) -> str:
        scheme, user, password, alone = found.groups()
        if password is not None:
            return f"{scheme}{user}:{_HIDDEN}@"
        return f"{scheme}{_HIDDEN if scheme.lower().startswith(_TOKEN_SCHEMES) else alone}@"

    uri = _USER_INFO.sub(of_user, uri)
    return _PARAMETER.sub(
        lambda found: f"{found[1]}{found[2]}={_HIDDEN if found[3] and _is_secret(found[2]) else found[3]}", uri
    )


def _secrets(uri: str) -> set[str]:
    """Every secret of a URI, as written and as a library's message may show it."""
    info = _USER_INFO.match(uri)
    found = set[str]()
    if info is not None:
        alone = info[4] if info[1].lower().startswith(_TOKEN_SCHEMES) else None
        found = {info[3] or "", unquote(info[3] or ""), alone or ""}
    for _, key, value in _PARAMETER.findall(_USER_INFO.sub(r"\1", uri)):
        if _is_secret(key):
            decoded = unquote_plus(value)
            found |= {value, unquote(value), decoded}
            found |= {
                part for _, name, part in _PARAMETER.findall(f";{decoded}") if _is_secret(name)
            }  # from odbc_connect
    return found - {""}


def _is_secret(key: str) -> bool:
    return any(word in key.lower() for word in _SECRET_KEYS)
