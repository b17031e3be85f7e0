"""Video in: the pictures of a peer's camera, sampled at the rate of the video that blocks are made from."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import numpy as np

from ..runtime.media_input import fitted
from ..runtime.sinks import Frames
from .refusals import Refusal


class VideoIn:
    """Keeps the newest pictures of a track, one each `1 / fps` seconds, fitted to `size` (width, height).

    room: pictures that are kept; older ones are dropped and counted. most_pixels: of a picture of the track.
    """

    def __init__(self, size: tuple[int, int], fps: float, room: int, most_pixels: int) -> None:
        self.size, self.fps, self.most_pixels = size, fps, most_pixels
        self.waiting: deque[tuple[float, Frames]] = deque(maxlen=room)
        self.dropped = 0
        self._newest: Any = None
        self._arrived = asyncio.Event()
        self._more = asyncio.Event()

    async def receive(self, track: Any) -> None:
        """Take the pictures of a track until it ends. Refusal for one that is too large."""
        from aiortc.mediastreams import MediaStreamError

        while True:
            try:
                picture = await track.recv()
            except MediaStreamError:
                return
            if picture.width * picture.height > self.most_pixels:
                limit = ("upload_pixels", self.most_pixels)
                raise Refusal("too_long", f"a picture has {picture.width}x{picture.height} pixels", 413, limit)
            self._newest = picture
            self._arrived.set()

    async def sample(self) -> None:
        """Keep the newest picture each `1 / fps` seconds; one that has no successor yet is repeated."""
        await self._arrived.wait()
        start, count, last, pixels = time.perf_counter(), 0, None, np.empty((0, 0, 3), np.uint8)
        while True:
            picture = self._newest
            if picture is not last:
                last, pixels = picture, await asyncio.to_thread(rgb, picture, self.size)
            if len(self.waiting) == self.waiting.maxlen:
                self.dropped += 1
            self.waiting.append((time.perf_counter(), pixels))
            self._more.set()
            count += 1
            late = time.perf_counter() - start - count / self.fps
            if late > 1:  # pictures that were due meanwhile are left out
                start += late
            await asyncio.sleep(max(0.0, -late))

    async def take(self, count: int) -> tuple[float, Frames]:
        """The newest `count` pictures [T, H, W, 3], and when the first of them arrived; waits until they are there."""
        while len(self.waiting) < count:
            self._more.clear()
            await self._more.wait()
        while len(self.waiting) > count:
            self.waiting.popleft()
            self.dropped += 1
        arrived = self.waiting[0][0]
        pictures = np.stack([pixels for _, pixels in self.waiting])
        self.waiting.clear()
        return arrived, pictures


def rgb(picture: Any, size: tuple[int, int]) -> Frames:
    """A picture of PyAV in RGB [H, W, 3], which fills `size`; what is beyond is cut off."""
    return np.array(fitted(picture.to_image(), size, "crop"), np.uint8)
