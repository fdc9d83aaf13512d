"""The chat page: one file, whose own script and style are the only ones a browser may run."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import Response

HTML = (Path(__file__).parent / "chat.html").read_text(encoding="utf-8")


def policy(html: str) -> str:
    """The Content-Security-Policy of a page: its inline script and style, named by hash, calls to its server."""
    script, style = (_source(html, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


def _source(html: str, tag: str) -> str:
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    hashes = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
    return " ".join(f"'sha256-{one}'" for one in hashes)


HEADERS = {
    "Content-Security-Policy": policy(HTML),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def chat_page() -> Response:
    """GET /."""
    return Response(HTML, media_type="text/html", headers=HEADERS)
