"""The command that opens the page."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from .application import app
from .arguments import DeviceOpt, DtypeOpt
from .support import say


@app.command()
def ui(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="Offer this folder or hub id too; repeatable."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 takes a free one.")] = 7860,
    queue: Annotated[int, typer.Option("--queue", min=0, help="How many jobs may wait.")] = 8,
    limit: Annotated[
        float, typer.Option("--limit", min=1, help="How many seconds a job may run.")
    ] = 900,
    megabytes: Annotated[
        float, typer.Option("--max-upload", min=0.01, help="Largest upload, in MiB.")
    ] = 16,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
) -> None:
    """Open the page: edit pictures in a browser (extra `ui`)."""
    from ..ui.serve import import_gradio

    import_gradio()
    from ..ui.desk import Desk
    from ..ui.drawing import limits
    from ..ui.serve import Server
    from ..ui.shelf import Shelf

    shelf = Shelf([] if model is None else model, device=device, dtype=dtype)
    for name in [n for n in shelf.names if shelf.source(n) in (model or ())]:
        shelf.get(name)  # A wrong name shows now, and no visitor waits for it.
    desk = Desk(shelf, longest=queue, seconds=limit, allowed=limits(megabytes))
    # Whoever runs it as a service ends it by SIGTERM: that cleans up as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    try:
        with Server(desk, host=host, port=port) as server:
            say(f"retour is at {server.url} (Ctrl-C ends it)")
            server.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
