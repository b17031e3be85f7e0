"""A router before servers, in a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from live_client import WAIT

from inferix.serve.router import Router, make_router_app
from inferix.serve.server import ReadyServer, address_of, config_of, listen
from inferix.serve.settings import ServeSettings


@contextmanager
def routing(*urls: str) -> Iterator[tuple[Router, str]]:
    """A router before servers, in a thread; yields it and its URL."""
    async def servers() -> list[str]:
        return list(urls)

    listener = listen("127.0.0.1", 0, None)
    ready = threading.Event()
    router = Router(servers, ServeSettings())
    runner = ReadyServer(config_of(make_router_app(router), router.settings), ready.set)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert ready.wait(WAIT)
        yield router, address_of(listener)
    finally:
        runner.should_exit = True
        thread.join(WAIT)
        listener.close()
        assert not thread.is_alive()
