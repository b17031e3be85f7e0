"""`inferix serve`: live sessions in the browser, and for programs over HTTP and WebSocket."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import UsageError, quoted
from .options import (
    EXECUTOR,
    FORCE,
    GPUS,
    OFFLINE,
    PARALLEL,
    check_beside_engine,
    check_nvtx,
    check_settings,
    check_start,
    note_choices,
    parse_settings,
    parse_size,
    ranks_of_launcher,
)

REWIND_BLOCKS = 12
NEEDED = ("fastapi", "uvicorn", "websockets", "msgpack", "prometheus_client", "multipart", "httpx")


def check_packages() -> None:
    """UsageError where a package of the extra `serve` is missing."""
    from importlib.util import find_spec

    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"serve needs {', '.join(missing)}; install the extra: pip install 'inferix-runtime[serve]'")


def print_limits() -> None:
    """Print every limit of a server with its default."""
    from ..serve.settings import LIMITS, MEANINGS, ServeSettings

    table = Table("limit", "default", "meaning", box=None)
    for name in LIMITS:
        table.add_row(name, str(getattr(ServeSettings(), name)), MEANINGS[name])
    Console().print(table)


def serve(
    ctx: typer.Context,
    model: str | None = typer.Option(
        None, help="Checkpoint file or folder, org/name, or a named model.  [default: the small world in the package]"
    ),
    preset: str | None = typer.Option(None, help="Decoding scheme.  [default: the model's own]"),
    exported: Path | None = typer.Option(
        None, "--engine", metavar="DIR", help="Folder that inferix export wrote, in place of a model."
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; any but this machine's own needs --token."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port; 0 chooses a free one."),
    token: Path | None = typer.Option(
        None, metavar="FILE", help="File with a token that every request has to send; 16 characters or more."
    ),
    sessions: int = typer.Option(4, min=1, help="Live sessions at a time."),
    queue: int = typer.Option(8, min=0, help="Clients that wait for a session; others are refused."),
    folder: Path | None = typer.Option(
        None, metavar="DIR", help="Folder for jobs and saved worlds, which then survive a restart."
    ),
    shared: Path | None = typer.Option(
        None, metavar="DIR", help="Folder for worlds and checkpoints in place of --folder, for several servers."
    ),
    checkpoint_every: int = typer.Option(
        0, min=0, metavar="N", help="Save each session every N blocks; it goes on from there after a crash. 0: never."
    ),
    restart: bool = typer.Option(
        False, "--restart", help="Restart the server once its engine has failed, as after the end of a GPU's process."
    ),
    image: Path | None = typer.Option(
        None, help="First picture of every session, for models that begin with one and follow a camera."
    ),
    behind: str = typer.Option("skip", help="What a slow viewer does to its stream: skip or pause."),
    limit: list[str] = typer.Option(
        [], "--limit", metavar="KEY=VALUE", help="Another limit of the server; repeatable. See --list-limits."
    ),
    list_limits: bool = typer.Option(False, "--list-limits", help="Show every limit with its default and exit."),
    rewind_blocks: int = typer.Option(REWIND_BLOCKS, min=0, help="Blocks that a session can be rewound by."),
    memory: str | None = typer.Option(None, metavar="BYTES", help="Memory for all sessions, such as 20GB."),
    base: Path | None = typer.Option(None, help="Folder with VAE and text encoder, if not with the model."),
    vae: str | None = typer.Option(None, help="Decoder: a file or folder, or taehv for the tiny one."),
    size: str | None = typer.Option(None, metavar="WxH", help="Picture size that memory is checked for."),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]"),
    dtype: str | None = typer.Option(None, help="float32, bfloat16, float16.  [default: bfloat16 on a GPU]"),
    executor: str | None = EXECUTOR,
    gpus: int | None = GPUS,
    parallel: str | None = PARALLEL,
    nvtx: bool = typer.Option(
        False, "--nvtx", help="On a GPU: mark sessions, blocks, passes, decoding and sending for nsys profile."
    ),
    settings: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Field of the preset, or a setting of the engine; repeatable."
    ),
    offline: bool = OFFLINE,
    force: bool = FORCE,
    as_json: bool = typer.Option(False, "--json", help="Address and settings as one JSON line once the server is up."),
    verbose: bool = typer.Option(False, "--verbose", help="Log every request to stderr."),
) -> None:
    """Serve a world: open the printed address in a browser and walk.

    W A S D or the arrow keys walk, a line of text changes the prompt, a click on the strip rewinds. Programs use the
    WebSocket /v1/live and the HTTP routes of /openapi.json; every control gets a receipt with the block that shows it.

    The server listens on this machine only. For others give a token, and put a proxy with TLS in front:

    Example: inferix serve

    Example: inferix serve --model self-forcing --host 0.0.0.0 --token token.txt --sessions 2 --folder served
    """
    if list_limits:
        return print_limits()
    check_packages()
    chosen = parse_settings(settings)
    check_settings(ctx, chosen)
    limits = parse_settings(limit)

    from ..models.registry import default_model
    from ..runtime.byte_sizes import parse_bytes
    from ..runtime.load import load
    from ..serve.app import Server
    from ..serve.engine_host import engine_limits
    from ..serve.heap import freeze, limit_arenas
    from ..serve.server import address_of, listen
    from ..serve.server import serve as run
    from ..serve.settings import ServeSettings, check_limits, read_token

    own: dict[str, Any] = {
        "sessions": sessions, "queue": queue, "behind": behind, "checkpoint_every": checkpoint_every
    }  # fmt: skip
    for name in check_limits(limits):
        if name in own:
            raise UsageError(f"--limit {name}: this limit has its own option; use --{name.replace('_', '-')}")
    secret = None if token is None else read_token(token)
    rules = ServeSettings(token=secret, folder=folder, shared=shared, image=image, **own, **limits)
    given: dict[str, Any] = {
        "model": model, "preset": preset, "base": base, "vae": vae, "device": device, "dtype": dtype,
        "executor": executor, "parallel": parallel,
    }  # fmt: skip
    check_nvtx(nvtx, device)
    own_parts = {f"--{name}": value for name, value in (*given.items(), ("size", size), ("gpus", gpus))}
    check_beside_engine(exported, own_parts)
    if restart and (checkpoint_every == 0 or (folder or shared) is None):
        raise UsageError(
            "--restart goes on from checkpoints, and there are none; give --checkpoint-every and --folder or --shared"
        )
    given["gpus"] = gpus or ranks_of_launcher()
    if restart and ranks_of_launcher():
        raise UsageError("--restart starts its own ranks again, and a launcher started these; give --gpus without one")
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("inferix.serve").setLevel(logging.INFO)
    if exported is None and (model is not None or preset is not None):
        check_start(model or default_model(preset), preset, {"--image": image})
    limit_arenas()
    with ExitStack() as stack:
        listener = stack.enter_context(listen(host, port, rules.token))
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inferix-serve-")))
        engine = load(
            **({} if exported is not None else given), engine=exported, offline=offline, force=force,
            size=None if size is None else parse_size(size),
            limits=engine_limits(rules, None if memory is None else parse_bytes(memory)),
            rewind_blocks=rewind_blocks, **chosen,
        )  # fmt: skip
        if exported is None:
            note_choices(engine)
        if engine.spec.condition_channels and image is None:  # of a name of the hub
            raise UsageError(f"{quoted(engine.parts.source)} begins with an image, and there is none; give --image")
        if nvtx:
            engine.start_ranges()
        address, again = address_of(listener), ["--port", str(listener.getsockname()[1])]

        def ready() -> None:
            if as_json:
                facts = {"url": address, "model": engine.parts.source, "preset": engine.preset.name}
                typer.echo(json.dumps(facts | {"sessions": rules.sessions, "folder": str(place)}))
            else:
                typer.echo(f"{engine.parts.source}, preset {engine.preset.name}: open {address}")
            sys.stdout.flush()

        freeze()
        lost = run(Server(engine, rules, place), listener, ready, "info" if verbose else "warning", restart)
    if lost:  # in the place of this process, whose engine may have left anything behind
        os.execv(sys.executable, [sys.executable, "-P", "-m", "inferix", *sys.argv[1:], *again])
