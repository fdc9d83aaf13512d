"""From a path to a running server."""

import errno
import logging
import socket
from contextlib import suppress
from pathlib import Path

import uvicorn

from puna.console import err
from puna.engine.load import load
from puna.errors import DeviceError
from puna.llama.dialog import REFERENCE, Style
from puna.serve.api.app import create_app
from puna.serve.api.hosts import LOOPBACK

SHUTDOWN_SECONDS = 5
BACKLOG = 2048  # connections that wait until they are accepted


def serve(
    path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    allow_mismatch: bool = False,
    style: Style = REFERENCE,
) -> None:
    """Serves the model at `path` (a Hugging Face folder or a run directory) until it is interrupted.

    port 0: any free one. name: what clients ask for; else the folder's name. allow_mismatch: also a checkpoint beside
    which there is another tokenizer or template than it was made with. style: how chats are written. The port is taken
    before the model is loaded. Raises DeviceError where the port or host cannot be had, CheckpointError and
    TokenizerError for what is wrong at `path`.
    """
    path = Path(path)
    with bind(host, port) as listener:
        name = name or path.resolve().name
        shown = f"[{host}]" if ":" in host else host
        hosts = LOOPBACK | {shown.lower()} if is_loopback(listener) else None
        app = create_app(load(path, allow_mismatch=allow_mismatch), name, hosts, style)
        url = f"http://{shown}:{listener.getsockname()[1]}"
        said = f"Serving {name} at {url} (chat page) and {url}/v1 (OpenAI-compatible). Ctrl-C ends it."
        listener.listen(BACKLOG)
        err.print(said, soft_wrap=True, markup=False)
        if not is_loopback(listener):
            err.print(f"Everyone who can reach {host} can use it: there is no password.", soft_wrap=True)
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("puna").setLevel(logging.INFO)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])
        err.print("Stopped.")


def bind(host: str, port: int) -> socket.socket:
    """A socket on `host`:`port`. Raises DeviceError, which names a free port where this one is taken."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise DeviceError(f"The host {host} is not known", "Use 127.0.0.1 for this machine alone.") from error
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _refused(host, port, error) from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    address = listener.getsockname()[0]
    return address.startswith("127.") or address == "::1"


def _refused(host: str, port: int, error: OSError) -> DeviceError:
    if error.errno == errno.EADDRINUSE:
        with bind(host, 0) as free:
            other = free.getsockname()[1]
        return DeviceError(f"Port {port} of {host} is in use", f"Choose another, such as {other}, which is free now.")
    if error.errno == errno.EACCES:
        return DeviceError(f"Port {port} is not allowed for this user", "Choose one above 1023.")
    return DeviceError(f"Cannot listen on {host}: {error.strerror}", "Use 127.0.0.1, or an address of this machine.")
