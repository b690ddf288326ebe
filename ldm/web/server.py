"""Start the page's server: its address, the token where others can reach it, and no calls to the network."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ldm.cli import Parser, Stopped, stop_on_signals
from ldm.web.models import Choice, Shelf

logger = logging.getLogger(__name__)

MAX_UPLOAD = "64mb"
# The browser of a user, too, loads nothing from elsewhere.
_CONTENT = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' "
    "'unsafe-inline'; frame-ancestors 'none'"
)
_HEADERS = ((b"content-security-policy", _CONTENT.encode()), (b"referrer-policy", b"same-origin"))


class Address(NamedTuple):
    """Where the page is served; the token is None on this computer's own address unless one was given."""

    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None

    def checked(self) -> Address:
        """The address with a token if other computers reach it; raise ValueError or OSError if it cannot be used."""
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port {self.port}: choose 1 to 65535; 7860 is usual")
        if self.token is not None and not self.token.strip():
            raise ValueError("--token '': choose a word that others cannot guess, or remove the flag for a random one")
        try:
            family, *_, place = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
        except OSError as error:
            raise OSError(
                f"--host {self.host} --port {self.port}: cannot listen there ({error.strerror or error}); "
                "choose another --port, or 127.0.0.1 or 0.0.0.0 as --host"
            ) from error
        return self if is_local(str(place[0])) or self.token else self._replace(token=secrets.token_urlsafe(16))


def is_local(host: str) -> bool:
    """True if only this computer reaches an address or name."""
    place = socket.getaddrinfo(host, None)[0][4][0]
    return ipaddress.ip_address(str(place).partition("%")[0]).is_loopback


def serve(shelf: Shelf, parsers: Mapping[str, Parser], address: Address) -> None:
    """Load the first model, then serve the page until Ctrl-C or SIGTERM.

    parsers: those of the sampling scripts by task. Raises ImportError without the extra `web`, and the errors of the
    model's files.
    """
    if find_spec("gradio") is None:
        raise ImportError('the page needs gradio: pip install -e ".[web]"')
    shelf.load(Choice(next(iter(shelf.models))))
    with tempfile.TemporaryDirectory(prefix="ldm-app-") as folder, stop_on_signals():
        try:
            page = launch(shelf, parsers, address, Path(folder))
            host = f"[{address.host}]" if ":" in address.host else address.host
            logger.info("http://%s:%d  (Ctrl-C stops the page)", host, address.port)
            if address.token is not None:
                logger.info("token: %s  (log in with any name and the token as the password)", address.token)
            page.block_thread()
        except (Stopped, KeyboardInterrupt):
            logger.info("stopped")


def launch(shelf: Shelf, parsers: Mapping[str, Parser], address: Address, folder: Path) -> Any:
    """Open the page in the background -> its gradio Blocks; `close` ends it. folder: for uploads and shown images."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at the import of gradio
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    from gradio import processing_utils  # heavy, optional

    from ldm.web.page import CSS, THEME, Page

    if not hasattr(processing_utils, "async_ssrf_protected_get"):
        raise ImportError('this gradio fetches URLs in another way: pip install -e ".[web]" for one that is supported')
    processing_utils.async_ssrf_protected_get = _refuse  # an upload that is a URL would be fetched by the server
    page = Page(shelf, parsers, folder / "shown").blocks
    token = address.token
    page.queue(default_concurrency_limit=None, api_open=False)
    page.launch(
        server_name=address.host,
        server_port=address.port,
        auth=None
        if token is None
        else lambda user, password: secrets.compare_digest(password.encode(), token.encode()),
        auth_message="Any name, and the token that the server printed as the password.",
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        max_file_size=MAX_UPLOAD,
        app_kwargs={"middleware": _middleware(local=is_local(address.host))},
        theme=THEME,
        css=CSS,
    )
    return page


async def _refuse(url: str) -> Any:
    raise ValueError(f"{url}: upload a file; this page fetches nothing")


def _middleware(local: bool) -> list[Any]:
    """local: refuse other names of this computer, by which a page of another site could reach it (DNS rebinding)."""
    from starlette.middleware import Middleware  # of gradio
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    names = ["127.0.0.1", "localhost", "[::1]", "["]  # older versions of it end at the first colon, as of "[::1]:7860"
    return [Middleware(_SecurityHeaders), *([Middleware(TrustedHostMiddleware, allowed_hosts=names)] if local else [])]


class _SecurityHeaders:
    """ASGI middleware that adds _HEADERS to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
