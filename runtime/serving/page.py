"""The chat page: its files, which are in static/, and the headers that they are sent with."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript"}

FILES = {
    "/" if file.name == "index.html" else f"/static/{file.name}": file
    for file in sorted(Path(__file__).with_name("static").iterdir())
    if file.suffix in _TYPES
}
"""Path in the URL -> file. A browser loads them before it can send a key."""

_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
}
"""With trusted types, no text can become HTML or a script, not even by a mistake of the page's own."""


def page_routes() -> list[Route]:
    """Returns a route for each file."""
    return [_route(path, file) for path, file in FILES.items()]


def _route(path: str, file: Path) -> Route:
    content, kind = file.read_bytes(), _TYPES[file.suffix]

    async def send(request: Request) -> Response:
        return Response(content, headers=_HEADERS, media_type=kind)

    return Route(path, send)
