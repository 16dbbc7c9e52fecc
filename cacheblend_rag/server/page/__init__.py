"""A page to try the server with: plain HTML, CSS and one script; nothing is fetched from elsewhere.

It is served at ``/``. All that it does goes through the endpoints, with the key that is typed in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

PAGE = {  # its paths: they say nothing of anybody
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_router() -> APIRouter:
    """The page's routes."""
    router = APIRouter(include_in_schema=False)
    for path, (name, kind) in PAGE.items():
        content = (Path(__file__).parent / name).read_bytes()
        router.add_api_route(path, _sender(content, kind), methods=["GET"])
    return router


def _sender(content: bytes, kind: str) -> Callable[[], Response]:
    def send() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=_HEADERS)

    return send
