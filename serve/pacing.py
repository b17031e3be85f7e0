"""Pacing: when to request a session's next block, so that it is there in time and follows the latest controls.

Numbers only. Times are seconds on one clock that the caller reads.
"""

from __future__ import annotations

from dataclasses import dataclass

SMOOTHING = 0.25  # weight of the newest block in the measured time
LEAD = 0.1  # seconds that a block is planned to be early, for encoding, sending and jitter
PIPELINED = 4  # blocks requested at once by a stream that is late: the decoder then works beside the next block


@dataclass
class Pacer:
    """Plans the requests of one stream.

    seconds: measured from a block's request to its delivery. end: when the video delivered so far has been played;
    None before the first block.
    """

    seconds: float = 0.0
    end: float | None = None
    measured: int = 0

    def wait(self, now: float) -> float:
        """Seconds to wait before the next request."""
        return 0.0 if self.end is None else max(0.0, self.end - now - self.seconds - LEAD)

    def count(self, now: float) -> int:
        """How many blocks to request: one while the stream is in time, several where it is late anyway."""
        late = self.end is not None and self.end - now - self.seconds < 0
        return PIPELINED if late and self.measured > PIPELINED else 1

    def delivered(self, now: float, requested: float | None, played: float) -> float | None:
        """Note a block of `played` seconds of video; returns its slack, None for the first one.

        requested: when it was; None for one of several, whose time is not that of a block alone.
        """
        if requested is not None:
            self.seconds += (now - requested - self.seconds) * (SMOOTHING if self.measured else 1.0)
            self.measured += 1
        slack = None if self.end is None else self.end - now
        self.end = (now if self.end is None else max(now, self.end)) + played
        return slack

    def restart(self) -> None:
        """Forget the playback: the stream was paused, or goes on from another place."""
        self.end = None
