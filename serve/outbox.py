"""The outbox of one session: what waits for its viewer. It belongs to the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..runtime.sinks import Frames
from .metrics import ServerMetrics
from .protocol import Applied, ControlId, Event, State

SHOWN = ("act", "camera", "prompt")  # verbs whose receipts measure control to pixel
MOST_EVENTS = 256  # that wait before the client's messages are read no more


@dataclass
class Receipt:
    """A control on its way. received: seconds of `time.perf_counter`. prompt: the new one, of a change of prompt.

    begun: the engine has applied it, and no block has shown it yet.
    """

    id: ControlId
    verb: str
    received: float
    prompt: str | None = None
    begun: bool = False
    action: str | None = None


@dataclass(eq=False)
class LiveBlock:
    """A block for a viewer. receipts: the controls that it is the first to show.

    arrived: when the first picture that it is made from did, in seconds of `time.perf_counter`.
    """

    frames: Frames
    state: State
    receipts: list[Receipt] = field(default_factory=list)
    arrived: float | None = None

    def applied(self, now: float, metrics: ServerMetrics) -> Iterator[Applied]:
        """The receipts as events of now, and as measurements."""
        for receipt in self.receipts:
            seconds = now - receipt.received
            if receipt.verb in SHOWN:
                metrics.control_to_pixel.labels(receipt.verb).observe(seconds)
            yield Applied(
                id=receipt.id, verb=receipt.verb, block=self.state.block, frame=self.state.frame, seconds=seconds
            )


class Outbox:
    """Events and blocks in order; at most `room` blocks, of which the oldest are dropped for newer ones.

    skipped: number of blocks dropped.
    """

    def __init__(self, room: int) -> None:
        self.room, self.skipped = room, 0
        self.items: deque[Event | LiveBlock] = deque()
        self.finished = False
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def blocks(self) -> int:
        return sum(isinstance(item, LiveBlock) for item in self.items)

    def put(self, event: Event) -> None:
        self.items.append(event)
        self._wake()

    def put_block(self, block: LiveBlock) -> int:
        """Add a block and return how many were dropped for it; it takes over their receipts."""
        dropped = 0
        while self.blocks >= self.room:
            oldest = next(item for item in self.items if isinstance(item, LiveBlock))
            self.items.remove(oldest)
            block.receipts[:0] = oldest.receipts
            dropped += 1
        self.skipped += dropped
        self.items.append(block)
        self._wake()
        return dropped

    def drop_blocks(self) -> list[Receipt]:
        """Drop all blocks, which the session has left behind; returns their receipts."""
        blocks = [item for item in self.items if isinstance(item, LiveBlock)]
        self.items = deque(item for item in self.items if not isinstance(item, LiveBlock))
        self._wake()
        return [receipt for block in blocks for receipt in block.receipts]

    def finish(self, event: Event) -> None:
        """Add the last event."""
        if not self.finished:
            self.finished = True
            self.put(event)

    async def take(self) -> Event | LiveBlock | None:
        """The next item; None after the last one."""
        while not self.items:
            if self.finished:
                return None
            await self._change()
        item = self.items.popleft()
        self._wake()
        return item

    async def room_for_block(self) -> None:
        """Wait until a block can be added without dropping one."""
        await self._until(lambda: self.blocks < self.room)

    async def wait_finished(self) -> None:
        """Wait until the last event has been added."""
        await self._until(lambda: False)

    async def room_for_events(self) -> None:
        """Wait while too many events are there: their viewer sends, and does not read."""
        await self._until(lambda: len(self.items) < MOST_EVENTS)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self.finished:
            await self._change()

    async def _change(self) -> None:
        """Wait until something is added or taken."""
        change = asyncio.get_running_loop().create_future()
        self._waiting.add(change)
        try:
            await change
        finally:
            self._waiting.discard(change)

    def _wake(self) -> None:
        for change in self._waiting:
            if not change.done():
                change.set_result(None)
