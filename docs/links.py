"""A hook of MkDocs: the site has no page for a file outside docs, so its link becomes the file's path."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+((?!results/)[\w./-]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the links of a page that lead out of docs."""
    depth = page.file.src_uri.count("/")

    def shown(link: re.Match[str]) -> str:
        is_outside = link[0].count("../") > depth
        return f"{link[1]} (`{link[2]}`)" if is_outside else link[0]

    return _OUTSIDE.sub(shown, markdown)
