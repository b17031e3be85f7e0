"""`inferix route`: one address before several servers."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import typer

from ..errors import UsageError, quoted
from .options import parse_settings
from .serve import check_packages


def route(
    servers: list[str] = typer.Argument(..., metavar="URL...", help="Servers, such as http://10.0.0.2:8000."),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; any but this machine's own needs --token."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port; 0 chooses a free one."),
    token: Path | None = typer.Option(
        None, metavar="FILE", help="File with the token that clients send, and that the servers have too."
    ),
    limit: list[str] = typer.Option(
        [], "--limit", metavar="KEY=VALUE", help="A limit of inferix serve --list-limits; repeatable."
    ),
    as_json: bool = typer.Option(False, "--json", help="Address and servers as one JSON line once the router is up."),
    verbose: bool = typer.Option(False, "--verbose", help="Log every request to stderr."),
) -> None:
    """Put one address before several servers: a session goes on at another one when its server drains or dies.

    A client opens a session at the server with the lowest load that has room. Servers that share a folder and write
    checkpoints go on with each other's sessions; the viewer's connection stays open and says so. Such a server is
    started by: inferix serve --port 8001 --shared worlds --checkpoint-every 8

    Example: inferix route http://127.0.0.1:8001 http://127.0.0.1:8002
    """
    check_packages()
    from ..serve.router import Router, run_router
    from ..serve.server import address_of, listen
    from ..serve.settings import ServeSettings, check_limits, read_token

    urls = [server.rstrip("/") for server in servers]
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"server {quoted(url)} is no address; expected one such as http://10.0.0.2:8000")
    secret = None if token is None else read_token(token)
    settings = ServeSettings(token=secret, **check_limits(parse_settings(limit)))
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("inferix.serve").setLevel(logging.INFO)

    async def same() -> list[str]:
        return urls

    with listen(host, port, secret) as listener:
        address = address_of(listener)

        def ready() -> None:
            facts = {"url": address, "servers": urls}
            typer.echo(json.dumps(facts) if as_json else f"{len(urls)} servers: open {address}")
            sys.stdout.flush()

        run_router(Router(same, settings), listener, ready, "info" if verbose else "warning")
