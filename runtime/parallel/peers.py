"""Rank 0's view of the other ranks: their connections, beats and replies, and the first fault among them.

A thread for each rank receives; one more looks for ranks that hang, and one sends beats, by which the others know that
rank 0 does not. The first fault ends all ranks: connections are
closed, which ends every process at once, and processes of this machine that do not end are killed.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...errors import InferixError, RankFailed, cut
from ...kernels.collectives import RankGroup
from .messages import Connection, Message

BEAT = 0.2  # seconds between beats, of every rank
LOOK = 0.1  # seconds between looks for ranks that hang
STUCK = 1.0  # seconds in a collective, after which a rank counts as waiting for one that has failed
GRACE = 0.5  # seconds for a rank to end by itself, and for a collective to end after a rank's error


@dataclass(eq=False)
class Peer:
    """A rank other than 0. process: where it is a child of this process. seen: time of the last message.

    waits: since when it waits in a collective, by its beats; None while it does not. done: number of plans it has
    finished. errors: by number of a plan.
    """

    rank: int
    connection: Connection
    pid: int
    host: str
    process: subprocess.Popen[bytes] | None = None
    seen: float = field(default_factory=time.monotonic)
    waits: float | None = None
    done: int = 0
    replies: deque[Message] = field(default_factory=deque)
    errors: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Peers:
    """All ranks but 0. timeout: seconds after which a rank that does not answer counts as hung."""

    def __init__(self, peers: Sequence[Peer], timeout: float) -> None:
        self.peers, self.timeout = list(peers), timeout
        self.group: RankGroup | None = None
        self.changed = threading.Condition()
        self.fault: str | None = None
        self.closed = False
        self.ran = 0  # plans that rank 0 has finished
        self.ran_at = time.monotonic()
        for peer in self.peers:
            threading.Thread(target=self._receive, args=(peer,), name=f"rank-{peer.rank}", daemon=True).start()
        threading.Thread(target=self._watch, name="ranks-watch", daemon=True).start()
        threading.Thread(target=self._beat, name="ranks-beat", daemon=True).start()

    # Messages

    def send(self, make: Callable[[Peer], Message]) -> None:
        """Send each rank its message; RankFailed where one is gone."""
        self.check()
        for peer in self.peers:
            try:
                peer.connection.send(make(peer))
            except OSError:
                self.wait_for_fault(f"{peer} does not receive")
        self.check()

    def check(self) -> None:
        """Raise the fault, if there is one."""
        if self.fault is not None:
            raise RankFailed(self.fault)

    def wait_for(self, ready: Callable[[Peer], bool], limit: float | None = None) -> bool:
        """Wait until something is true of all ranks; False after `limit` seconds. RankFailed for a fault before it."""
        end = None if limit is None else time.monotonic() + limit
        with self.changed:
            while not all(map(ready, self.peers)):
                if self.fault is not None:
                    raise RankFailed(self.fault)
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self.changed.wait(left)
        return True

    def replies(self) -> list[Message]:
        """The next reply of every rank, in the order of ranks."""
        self.wait_for(lambda peer: bool(peer.replies))
        return [peer.replies.popleft() for peer in self.peers]

    def finished(self) -> None:
        """Note that rank 0 has run a plan; an error of another rank in that plan is a fault."""
        self.ran, self.ran_at = self.ran + 1, time.monotonic()
        if (reason := self._failed_alone()) is not None:
            self.fail(reason)
        self.check()

    def all_failed(self) -> bool:
        """True if the plan that rank 0 failed at fails on every rank, so that all are where they were before it."""
        number, now = self.ran + 1, time.monotonic()
        begun, end = now, now + self.timeout
        while now < end:
            if self.wait_for(lambda peer: peer.done >= number or number in peer.errors, LOOK):
                return all(number in peer.errors for peer in self.peers)
            now = time.monotonic()
            if any(peer.waits is not None and now - max(peer.waits, begun) > STUCK for peer in self.peers):
                return False  # it waits for rank 0, which will not come
        return False

    def failed_together(self) -> None:
        """Note that a plan has failed on every rank."""
        with self.changed:
            for peer in self.peers:
                peer.done = self.ran + 1
                peer.errors.clear()
            self.ran, self.ran_at = self.ran + 1, time.monotonic()

    def _failed_alone(self) -> str | None:
        """Reason for a fault where a rank failed at a plan that rank 0 has run."""
        for peer in self.peers:
            if number := next((number for number in peer.errors if number <= self.ran), None):
                return f"{peer} failed: {peer.errors[number]}"
        return None

    def wait_for_fault(self, otherwise: str) -> None:
        """Raise the fault that made something fail here, once it is known; `otherwise` if none comes."""
        with self.changed:
            self.changed.wait_for(lambda: self.fault is not None, GRACE * 2)
        self.fail(otherwise)
        self.check()

    # Faults

    def fail(self, reason: str) -> None:
        """Note a fault, of which the first counts, and end all ranks."""
        with self.changed:
            if self.fault is not None or self.closed:
                return
            self.fault = f"{reason}. All ranks have ended; load the engine again"
            self.changed.notify_all()
        self._end()

    def close(self) -> None:
        """End all ranks."""
        with self.changed:
            if self.closed:
                return
            self.closed = True
            self.fault = self.fault or "the ranks of this engine have ended; load it again"
            self.changed.notify_all()
        self._end()

    def _end(self) -> None:
        for peer in self.peers:
            peer.connection.close()
        end = time.monotonic() + GRACE
        for peer in self.peers:
            if peer.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    peer.process.wait(max(0.0, end - time.monotonic()))
                if peer.process.poll() is None:
                    peer.process.kill()
                    peer.process.wait()

    def _receive(self, peer: Peer) -> None:
        try:
            while (message := peer.connection.receive()) is not None:
                self._note(peer, message)
        except (InferixError, ValueError) as error:
            self.fail(f"{peer} sent what is no message: {error}")
            return
        self.fail(self._ended(peer))

    def _note(self, peer: Peer, message: Message) -> None:
        values = message.values
        with self.changed:
            peer.seen = time.monotonic()
            if message.kind == "beat":
                peer.waits = (peer.waits or peer.seen) if values["waits"] else None
            elif message.kind == "done":
                peer.done = int(values["number"])
            elif message.kind == "error":
                peer.errors[int(values["number"])] = cut(str(values["error"]), 500)
            else:
                peer.replies.append(message)
            self.changed.notify_all()

    def _ended(self, peer: Peer) -> str:
        """Reason for the end of a rank's connection."""
        if peer.errors:
            return f"{peer} failed: {next(reversed(peer.errors.values()))}"
        code = None
        if peer.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = peer.process.wait(GRACE)
        if code is None:
            return f"{peer} ended"
        return f"{peer} was killed by {signal.Signals(-code).name}" if code < 0 else f"{peer} ended with code {code}"

    def _beat(self) -> None:
        while self.fault is None and not self.closed:
            time.sleep(BEAT)
            for peer in self.peers:
                with contextlib.suppress(OSError):  # the thread that receives knows its reason
                    peer.connection.beat()

    def _watch(self) -> None:
        looked = time.monotonic()
        while self.fault is None and not self.closed:
            time.sleep(LOOK)
            now = time.monotonic()
            if now - looked > self.timeout:
                self.fail(f"rank 0 was stopped for {now - looked:.0f} s, longer than rank_timeout ({self.timeout:g} s)")
                return
            looked = now
            if (reason := self._hung(time.monotonic())) is not None:
                self.fail(reason)

    def _hung(self, now: float) -> str | None:
        """Reason for a fault that no message tells: a rank that is silent, or that others wait for."""
        for peer in self.peers:
            if now - peer.seen > self.timeout:
                return f"{peer} has sent nothing for {self.timeout:g} s: it hangs"
        since = None if self.group is None else self.group.traffic.since
        waited = 0.0 if since is None else now - since
        for peer in self.peers:
            if self.ran + 1 in peer.errors and waited > GRACE:
                return f"{peer} failed: {peer.errors[self.ran + 1]}"
        if (reason := self._failed_alone()) is not None:
            return reason
        late = [peer for peer in self.peers if peer.done < self.ran]
        if late and now - self.ran_at > self.timeout:
            return f"{late[0]} has not finished a pass for {self.timeout:g} s: it hangs"
        if waited > self.timeout:
            busy = [peer for peer in self.peers if peer.waits is None]
            who = busy[0] if busy else "no rank, since all wait for each other,"
            return f"{who} has not come to a collective for {self.timeout:g} s: it hangs"
        return None

