"""Starting and ending the page: where it listens, what it may touch, and cleaning up."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import RetourError, check_range
from .desk import Desk
from .guard import LOCAL, Guard

logger = logging.getLogger(__name__)

HOST, PORT = "127.0.0.1", 7860
PREFIX = "retour-ui-"
OLDEST = 6, 31  # Of the web framework: the one that the tests ran with.
JSON_ROOM = 2**20  # What a request holds beside the picture.


class Server:
    """A running page; a context manager.

    Args:
        desk: what is behind it.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.

    Raises:
        RetourError: nothing can listen there, or the extra `ui` is missing.
    """

    def __init__(self, desk: Desk, *, host: str = HOST, port: int = PORT):
        check_range("port", port, 0, 65535)
        self.desk = desk
        self.port = _free_port(host, port)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            self._blocks = self._launch(host)
        except BaseException:
            self.close()
            raise
        # A browser goes to an address, not to all of them.
        named = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
        name = f"[{named}]" if ":" in named else named
        self.url = f"http://{name}:{self.port}/"
        if not _local(host):
            logger.warning(
                "the page listens on %s: whoever reaches this machine there can use it, for it "
                "asks for no password",
                host or "all addresses",
            )

    def _launch(self, host: str) -> Any:
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)
        import_gradio()
        from starlette.middleware import Middleware

        from .page import Page, looks

        most = 4 * ((self.desk.allowed.bytes or 0) // 3 + 1) + JSON_ROOM
        local = _local(host)
        blocks = Page(self.desk).blocks
        blocks.queue(max_size=64, api_open=False, default_concurrency_limit=4)
        settings: dict[str, Any] = {
            "server_name": host,
            "server_port": self.port,
            "share": False,
            "inbrowser": False,
            "quiet": True,
            "prevent_thread_lock": True,
            "show_error": False,
            "footer_links": [],
            "run_history": False,
            "ssr_mode": False,
            "pwa": False,
            "mcp_server": False,
            "enable_monitoring": False,
            "allowed_paths": [],
            "blocked_paths": [os.path.abspath(os.sep)],
            "max_file_size": 1,
            "state_session_capacity": 256,
            "app_kwargs": {"middleware": [Middleware(Guard, most=most, local=local)]},
            **looks(),
        }
        blocks.launch(**settings)
        return blocks

    def wait(self) -> None:
        """Serve until something is raised in this thread."""
        threading.Event().wait()

    def close(self) -> None:
        """Stop the work and the page, and remove its files."""
        self.desk.close()
        if hasattr(self, "_blocks"):
            self._blocks.close(verbose=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def import_gradio() -> Any:
    """The web framework, told to phone nobody; or one sentence about where it comes from."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError:
        raise RetourError(
            'the page needs gradio, which is not installed: pip install "retour[ui]"'
        ) from None
    found = tuple(int(part) for part in re.findall(r"\d+", gradio.__version__)[:2])
    if found < OLDEST:
        # 5.49 loses masks, and 6.0 still has visitors' browsers ask other servers.
        raise RetourError(
            f"the page needs gradio {'.'.join(map(str, OLDEST))} or newer, and "
            f'{gradio.__version__} is installed: pip install --upgrade "retour[ui]"'
        )
    return gradio


def _local(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    return host in (*LOCAL, "::1")


def _free_port(host: str, port: int) -> int:
    """The port, if something can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RetourError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another --port or "
                "--host"
            ) from None
        return int(probe.getsockname()[1])
