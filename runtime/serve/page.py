"""The page at /: upload a video, ask, read the streamed answer, see which cells of the frames were kept.

One static file without external resources, with the colours of `runtime.show` inserted. Its Content-Security-Policy
allows only its own script and style, by their digests, and requests to this server.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from runtime.show.colours import css

_COLOURS = "/* colours */\n"  # in the page's style


def page(request: Request) -> Response:
    """The page, as an endpoint of Starlette."""
    body, headers = _page()
    return Response(body, media_type="text/html", headers=headers)


def policy(html: str) -> str:
    """The Content-Security-Policy of a page with inline scripts and styles."""
    script, style = (" ".join(_digest(part) for part in _inner(html, tag)) for tag in ("script", "style"))
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {script}",
            f"style-src {style}",
            "connect-src 'self'",
            "img-src data:",
            "media-src blob:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


@functools.cache
def content() -> str:
    """The page's HTML."""
    return files("runtime.serve").joinpath("page.html").read_text("utf-8").replace(_COLOURS, css())


@functools.cache
def _page() -> tuple[bytes, dict[str, str]]:
    html = content()
    headers = {
        "content-security-policy": policy(html),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return html.encode(), headers


def _inner(html: str, tag: str) -> list[str]:
    return re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
