"""One WebSocket of the live protocol: it opens or attaches a session, takes controls and sends what waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import Any, Final

from starlette.websockets import WebSocket, WebSocketDisconnect

from ..errors import InferixError, one_line
from .control_reader import MISUSED, Closed, ControlReader
from .encoders import Encoder, Payload, make_encoder
from .live_session import LiveSession
from .live_sessions import LiveSessions
from .outbox import LiveBlock
from .protocol import (
    FIRST,
    KEY,
    LAST,
    SUBPROTOCOLS,
    Attach,
    Codec,
    Control,
    Event,
    Notice,
    Open,
    Opened,
    Queued,
    Refused,
    media_message,
)
from .refusals import Refusal, refusal_of
from .trace import Trace

LOG = logging.getLogger("inferix.serve")
MOST_EARLY = 64  # controls that wait for their session to be open
DISPLACED, STALLED, TOO_LATE = 4001, 4002, 4003  # codes that close a WebSocket


def encode(trace: Trace, stream: str, encoder: Encoder, block: LiveBlock) -> list[Payload]:
    """Encode the pictures of a block; called in a thread of the pool."""
    with trace.span("encoder", f"encode {encoder.format.name}", stream, block=block.state.block):
        return encoder.encode(block.frames)


class Connection:
    """A client of the live protocol. pool: threads that encode pictures."""

    def __init__(self, socket: WebSocket, hub: LiveSessions, pool: Executor) -> None:
        self.socket, self.hub, self.pool = socket, hub, pool
        offered = socket.scope.get("subprotocols", [])
        self.subprotocol = next((name for name in SUBPROTOCOLS if name in offered), None)
        self.codec = Codec(self.subprotocol or SUBPROTOCOLS[0])
        self.reader = ControlReader(self.codec, hub.settings.messages_per_second)
        self.early: list[Control] = []  # controls that came before the session was open
        self.encoder: Encoder | None = None
        self._encoding: Future[list[Payload]] | None = None
        self._displaced = asyncio.Event()
        self._applying: set[asyncio.Task[None]] = set()

    def displace(self) -> None:
        """Have the connection close: another one has its session."""
        self._displaced.set()

    async def serve(self) -> None:
        """Run from the handshake to the close."""
        await self.socket.accept(self.subprotocol)
        self.hub.metrics.connections.inc()
        try:
            await self._run()
        except WebSocketDisconnect:
            pass
        except Closed as end:
            await self._close(end.code, end.reason)
        finally:
            self.hub.metrics.connections.dec()
            self._close_encoder()

    def _close_encoder(self) -> None:
        """Close the encoder, once it has encoded what it is at."""
        encoder = self.encoder
        if encoder is None:
            return
        if self._encoding is None:
            encoder.close()
        else:
            self._encoding.add_done_callback(lambda _: encoder.close())

    async def _run(self) -> None:
        live = await self._begin()
        if live is None:
            return
        client = self.socket.client
        LOG.info("session %s attached by %s", live.id, "an unknown address" if client is None else client.host)
        try:
            await self._first_of(self._send_all(live), self._take_controls(live), self._wait_displaced())
        finally:
            live.detach(self)
            LOG.info("session %s detached", live.id)

    # Beginning

    async def _begin(self) -> LiveSession | None:
        """Open or attach the session; None where the client is refused."""
        seconds = self.hub.settings.start_seconds
        try:
            async with asyncio.timeout(seconds):
                control = await self._first_control()
        except TimeoutError:
            limit = ("start_seconds", seconds)
            await self._refuse(None, Refusal("too_late", f"nothing was opened within {seconds:g} s", 408, limit))
            raise Closed(TOO_LATE, "start_seconds") from None
        live = None
        try:
            live = await self._opened(control)
            self.encoder = make_encoder(control.media, live.session.size, self.hub.host.engine.fps)
        except InferixError as error:
            refusal = refusal_of(error)
            if live is not None and isinstance(control, Open):
                live.end(refusal.code, str(refusal))
            await self._refuse(control.id, refusal)
            raise Closed(refusal.close or MISUSED, refusal.code) from None
        await self._send(self._greeting(control, live))
        live.attach(self)
        return live

    async def _first_control(self) -> Open | Attach:
        while True:
            control = await self._receive()
            if isinstance(control, Open | Attach):
                return control
            if control is not None:
                await self._refuse(control.id, Refusal("wrong_order", "no session is open; send open or attach first"))

    async def _opened(self, control: Open | Attach) -> LiveSession:
        if isinstance(control, Attach):
            return await self.hub.attach(control)
        queued: asyncio.Queue[int] = asyncio.Queue()
        opening = asyncio.ensure_future(self.hub.open(control, queued.put_nowait))
        listening = asyncio.ensure_future(self._listen_while_queued())
        telling = asyncio.ensure_future(self._send_positions(queued))
        try:
            await asyncio.wait({opening, listening}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                listening.result()
            return await opening
        finally:
            for task in (opening, listening, telling):
                task.cancel()
            await asyncio.gather(opening, listening, telling, return_exceptions=True)

    async def _listen_while_queued(self) -> None:
        """Keep what the client sends before its session is open; ends when it is gone."""
        while True:
            control = await self._receive()
            if control is not None and len(self.early) >= MOST_EARLY:
                await self._refuse(control.id, Refusal("too_many", "the session is not open yet", 429))
            elif control is not None:
                self.early.append(control)

    async def _send_positions(self, queued: asyncio.Queue[int]) -> None:
        while True:
            await self._send(Queued(position=await queued.get()))

    def _greeting(self, control: Control, live: LiveSession) -> Opened:
        assert self.encoder is not None
        return live.greeting(control.id, self.encoder.format)

    # Controls

    async def _take_controls(self, live: LiveSession) -> None:
        for early in self.early:
            await self._take(live, early)
        while True:
            if (control := await self._receive()) is not None:
                await self._take(live, control)

    async def _take(self, live: LiveSession, control: Control) -> None:
        if isinstance(control, Open | Attach):
            await self._refuse(control.id, Refusal("wrong_order", "a session is open; use another connection"))
        else:
            await self._apply(live, control)
            await live.outbox.room_for_events()

    async def _apply(self, live: LiveSession, control: Control) -> None:
        """Apply a control to its end, also where the client goes away meanwhile."""
        task = asyncio.create_task(live.apply(control))
        self._applying.add(task)
        task.add_done_callback(self._applying.discard)
        await asyncio.shield(task)

    async def _receive(self) -> Control | None:
        """See `ControlReader.receive`."""
        return await self.reader.receive(self.socket, partial(self._refuse, None))

    # Sending

    async def _send_all(self, live: LiveSession) -> None:
        """Send what waits in the session's outbox, until its end."""
        reported = live.outbox.skipped
        while (item := await live.outbox.take()) is not None:
            if isinstance(item, LiveBlock):
                skipped, reported = live.outbox.skipped - reported, live.outbox.skipped
                if skipped:
                    await self._send(Notice(kind="skipped", message="this viewer was too slow", blocks=skipped))
                await self._send_block(live, item)
            else:
                await self._send(item)
        raise Closed(1000, "the session is over")

    async def _send_block(self, live: LiveSession, block: LiveBlock) -> None:
        """Send the receipts of a block, its pictures, and the state after it."""
        assert self.encoder is not None
        state, encoder = block.state, self.encoder
        trace, stream = self.hub.trace, live.session.id  # the engine's id, as in its records
        begin = time.perf_counter()
        self._encoding = self.pool.submit(encode, trace, stream, encoder, block)
        payloads = await asyncio.wrap_future(self._encoding)
        self.hub.real_time.note_encoding(begin, time.perf_counter())
        frame, name = state.frame, encoder.format.name
        size = sum(len(payload.data) for payload in payloads)
        with trace.span("transport", f"send {name}", stream, block=state.block, bytes=size):
            for receipt in block.applied(time.perf_counter(), self.hub.metrics):
                await self._send(receipt)
            for index, payload in enumerate(payloads):
                flags = KEY * payload.key | FIRST * (index == 0) | LAST * (index == len(payloads) - 1)
                message = media_message(
                    name, flags, state.rollout, state.block, frame, payload.frames, payload.data
                )
                await self._send_message(message)
                frame += payload.frames
        self.hub.metrics.sent.labels(name).inc(size)
        await self._send(live.state_for_viewer(block))

    async def _refuse(self, id: int | str | None, refusal: Refusal) -> None:
        self.hub.metrics.refused(refusal)
        await self._send(Refused(id=id, **refusal.as_dict()))

    async def _send(self, event: Event) -> None:
        await self._send_message(self.codec.write(event))

    async def _send_message(self, message: str | bytes) -> None:
        """Send one message; Closed where the client takes none for too long."""
        seconds: Final = self.hub.settings.stall_seconds
        try:
            async with asyncio.timeout(seconds):
                if isinstance(message, str):
                    await self.socket.send_text(message)
                else:
                    await self.socket.send_bytes(message)
        except TimeoutError:
            LOG.info("a viewer took no data for %g s", seconds)
            raise Closed(STALLED, "stall_seconds") from None
        except RuntimeError as error:  # Starlette's answer once the close was sent or received
            raise WebSocketDisconnect(1006) from error

    async def _wait_displaced(self) -> None:
        await self._displaced.wait()
        raise Closed(DISPLACED, "another connection has the session")

    async def _close(self, code: int, reason: str) -> None:
        with suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
            async with asyncio.timeout(self.hub.settings.stall_seconds):
                await self.socket.close(code, reason)

    async def _first_of(self, *works: Coroutine[Any, Any, None]) -> None:
        """Run several until one ends, cancel the others, and raise what ended it."""
        tasks = [asyncio.create_task(work) for work in works]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        errors = [one for one in (task.exception() for task in done) if one is not None]
        del task, tasks, done  # an error refers to this frame, which is not to refer to it: no cyclic garbage
        log_unexpected(errors)
        if errors:
            raise errors.pop()


def log_unexpected(errors: Sequence[BaseException]) -> None:
    """Log what is no end of a connection."""
    for error in errors:
        if not isinstance(error, Closed | WebSocketDisconnect):
            LOG.error("a connection failed: %s", one_line(error) if isinstance(error, Exception) else error)
