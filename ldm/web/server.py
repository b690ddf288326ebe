"""Start the page's server: its address, the token where others can reach it, and no calls to the network."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Mapping
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ldm.cli import Parser, Stopped, stop_on_signals
from ldm.web.models import Choice, Shelf

logger = logging.getLogger(__name__)

MAX_UPLOAD = "64mb"
TOKEN = "LDM_APP_TOKEN"  # environment variable
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
    random: bool = False  # True if the token was generated here and is printed

    def checked(self) -> Address:
        """The address, with a token if other computers reach it; the environment variable LDM_APP_TOKEN may hold one.

        Raises ValueError or OSError if it cannot be used.
        """
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port {self.port}: choose 1 to 65535; 7860 is usual")
        flag, token = ("--token", self.token) if self.token is not None else (TOKEN, os.environ.get(TOKEN))
        if token is not None:
            if not token.strip():
                raise ValueError(f"{flag} '': choose a word that others cannot guess, or remove it for a random one")
            if token != token.encode(errors="replace").decode():
                raise ValueError(f"{flag}: not UTF-8 text; use UTF-8 in the terminal and in the locale")
        try:
            place = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            for family, *_, each in (place, (socket.AF_INET, ("127.0.0.1", self.port))):  # gradio binds the latter, too
                with socket.socket(family, socket.SOCK_STREAM) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(each)
        except (OSError, UnicodeError) as error:
            reason = "not a name" if isinstance(error, UnicodeError) else error.strerror or error
            raise OSError(
                f"--host {self.host or '(empty)'} --port {self.port}: cannot listen there ({reason}); "
                "choose another --port, or 127.0.0.1 or 0.0.0.0 as --host"
            ) from error
        address = self._replace(host=str(place[4][0]), token=token)
        return address if token or address.local else address._replace(token=secrets.token_urlsafe(16), random=True)

    @property
    def local(self) -> bool:
        """True if only this computer reaches it."""
        return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback

    @property
    def url_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def serve(shelf: Shelf, parsers: Mapping[str, Parser], address: Address) -> None:
    """Load the first model, then serve the page until Ctrl-C or SIGTERM.

    parsers: those of the sampling scripts by task. Raises ImportError without the extra `web`, and the errors of the
    model's files.
    """
    if find_spec("gradio") is None:
        raise ImportError('the page needs gradio: pip install -e ".[web]"')
    shelf.load(Choice(next(iter(shelf.models))))
    with tempfile.TemporaryDirectory(prefix="ldm-app-", ignore_cleanup_errors=True) as folder:
        try:
            with stop_on_signals(), closing(launch(shelf, parsers, address, Path(folder))) as page:
                logger.info("http://%s:%d  (Ctrl-C stops the page)", address.url_host, address.port)
                if address.random:
                    logger.info("token: %s  (log in with any name and the token as the password)", address.token)
                page.blocks.block_thread()
        except (Stopped, KeyboardInterrupt):
            logger.info("stopped")


def launch(shelf: Shelf, parsers: Mapping[str, Parser], address: Address, folder: Path) -> Any:
    """Open the page in the background -> its Page; `close` ends it. folder: for uploads and shown images."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at the import of gradio
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    direct = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "localhost", address.host)
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, direct))  # gradio asks its own server
    from gradio import processing_utils  # heavy, optional

    from ldm.web.page import CSS, THEME, USERS, Page

    if not hasattr(processing_utils, "async_ssrf_protected_get"):
        raise ImportError('this gradio fetches URLs in another way: pip install -e ".[web]" for one that is supported')
    processing_utils.async_ssrf_protected_get = _refuse  # an upload that is a URL would be fetched by the server
    page = Page(shelf, parsers, folder / "shown", folder / "uploads")
    token = address.token
    page.blocks.queue(default_concurrency_limit=None, api_open=False)
    page.blocks.launch(
        server_name=address.url_host,
        server_port=address.port,
        auth=None
        if token is None
        else lambda user, password: secrets.compare_digest(password.encode(errors="surrogatepass"), token.encode()),
        auth_message="Any name, and the server's token as the password.",
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
        state_session_capacity=USERS,
        app_kwargs={"middleware": _middleware(names_are_checked=address.local and token is None)},
        theme=THEME,
        css=CSS,
    )
    return page


async def _refuse(url: str) -> Any:
    raise ValueError(f"{url}: upload a file; this page fetches nothing")


def _middleware(names_are_checked: bool) -> list[Any]:
    from starlette.middleware import Middleware  # of gradio

    return [Middleware(_SecurityHeaders), *([Middleware(_LocalNames)] if names_are_checked else [])]


class _LocalNames:
    """ASGI middleware that refuses requests for other names than this computer's own, and those of other sites.

    By such a name, a page of another site could reach this one (DNS rebinding); a token prevents that, too. Pages of
    other sites could also upload files, of which a browser tells the origin.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        headers = [(key, value.decode("latin-1")) for key, value in scope.get("headers", ())]
        names = [value for key, value in headers if key == b"host"]
        names += [value.partition("//")[2] for key, value in headers if key == b"origin"]
        text = f"{' '.join(names)}: not a local address; other names of this server need a token (--token)"
        await (self.app if all(map(_is_local, names)) else PlainTextResponse(text, 400))(scope, receive, send)


def _is_local(name: str) -> bool:
    """True if the host or origin of a request is an address of this computer only, or localhost."""
    try:
        host = urlsplit(f"//{name}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
