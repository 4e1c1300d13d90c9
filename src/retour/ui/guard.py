"""What the web server lets through: the page, its assets and its queue, and nothing else.

The framework can also serve files, take uploads, fetch addresses and run named functions. The page
needs none of that, so whatever is not on the list is refused before the framework sees it. The
browser is told to load from here alone.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ALLOWED = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|login_check"
    r"|(assets|static|svelte)/[\w./-]+"
    r"|gradio_api/(startup-events|info|app_id|queue/join|queue/data|queue/data/v2|cancel|reset"
    r"|run/predict|heartbeat/\w+))/?"
)
LOCAL = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
        "form-action 'self'; frame-ancestors 'self'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """ASGI middleware in front of the framework.

    Args:
        app: what is behind it.
        most: the largest body, in bytes.
        local: listening on this machine only, so that other host names are a trick (rebinding).
    """

    def __init__(self, app: App, *, most: int, local: bool):
        self.app, self.most, self.local = app, most, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        refused = self._refusal(scope)
        if refused is not None:
            await _answer(send, *refused)
            return
        await self.app(scope, self._limited(receive), _with_headers(send))

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if self.local and host not in LOCAL:
            return 421, "this page is for this machine: start it with --host to serve others"
        path = unquote(scope["path"])
        if scope["method"] not in ("GET", "HEAD", "POST") or not allowed(path):
            return 403, "not allowed"
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.most:
            return 413, f"at most {self.most:,} bytes"
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Count what really arrives, whatever the header said."""
        seen = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return {"type": "http.disconnect"} if seen > self.most else message

        return counted


def allowed(path: str) -> bool:
    """Whether a path is one of the page's own."""
    return ALLOWED.fullmatch(path) is not None and ".." not in path


def _with_headers(send: Send) -> Send:
    async def more(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await send(message)

    return more


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
