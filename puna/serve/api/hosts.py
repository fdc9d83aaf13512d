"""Which Host headers are answered: a page of another site that makes its own name point here gets nothing."""

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from puna.serve.api.errors import ApiError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class HostGuard:
    """Middleware that refuses every request whose Host, without the port, is not among `names`."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (host := _host(scope)) not in self.names:
            message = f"This server does not answer to the host name {host!r}, only to {', '.join(sorted(self.names))}"
            await ApiError(message, code="wrong_host", status=403).response()(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _host(scope: Scope) -> str:
    """The Host header in lower case, without the port."""
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
