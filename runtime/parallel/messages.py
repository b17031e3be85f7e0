"""Control messages between rank 0 and the other ranks, over TCP: JSON, a plan's bytes, and tensors. Nothing is pickled.

As bytes: `INFR`, the lengths of three parts (little-endian, 4, 4 and 8 bytes), then JSON in UTF-8, the plan as
`encode_plan` has it, and tensors as safetensors named 0, 1, ...
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from ...errors import InferixError, quoted

HEADER = struct.Struct("<4sIIQ")
MAGIC = b"INFR"
LARGEST = 1 << 31  # bytes of JSON and of a plan; tensors may be larger


@dataclass(frozen=True)
class Message:
    """kind: what the receiver does with it. values: plain values."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    plan: bytes = b""
    tensors: tuple[Tensor, ...] = ()


class Connection:
    """One end of a connection. Any thread may send; one thread receives. unsent: the rest of a beat."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream, self.lock, self.unsent = stream, threading.Lock(), b""
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Message) -> None:
        """Send a message; OSError where the other end is gone."""
        text = json.dumps({"kind": message.kind, **message.values}).encode()
        named = {str(index): tensor.cpu().contiguous() for index, tensor in enumerate(message.tensors)}
        data = save(named) if named else b""
        with self.lock:
            header = HEADER.pack(MAGIC, len(text), len(message.plan), len(data))
            self.stream.sendall(self.unsent + header + text + message.plan)
            self.unsent = b""
            self.stream.sendall(data)

    def beat(self) -> None:
        """Send a sign of life, and wait for nothing; OSError where the other end is gone.

        A message on its way is such a sign, and so are the bytes of a full socket, which the other end has yet to read.
        """
        text = json.dumps({"kind": "beat"}).encode()
        if self.lock.acquire(blocking=False):
            try:
                beat = self.unsent or HEADER.pack(MAGIC, len(text), 0, 0) + text
                with contextlib.suppress(BlockingIOError):
                    self.unsent = beat[self.stream.send(beat, socket.MSG_DONTWAIT) :]
            finally:
                self.lock.release()

    def receive(self) -> Message | None:
        """The next message; None at the end of the connection. InferixError for other bytes."""
        header = self.read(HEADER.size)
        if header is None:
            return None
        magic, text_length, plan_length, length = HEADER.unpack(header)
        if magic != MAGIC or max(text_length, plan_length) > LARGEST:
            raise InferixError(f"a message between ranks begins with {quoted(header)}; expected {MAGIC!r} and lengths")
        parts = [self.read(size) for size in (text_length, plan_length, length)]
        if None in parts:
            return None
        text, plan, data = (part or b"" for part in parts)
        values = json.loads(text)
        named = load(data) if data else {}
        return Message(values.pop("kind"), values, plan, tuple(named[str(index)] for index in range(len(named))))

    def read(self, size: int) -> bytes | None:
        """Exactly `size` bytes; None where the connection ends before them."""
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            try:
                count = self.stream.recv_into(view[at:])
            except OSError:
                return None
            if count == 0:
                return None
            at += count
        return bytes(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed by the other end
            self.stream.shutdown(socket.SHUT_RDWR)
        self.stream.close()


def connected(address: Sequence[Any], timeout: float) -> Connection:
    """Connect to (host, port)."""
    stream = socket.create_connection((address[0], address[1]), timeout)
    stream.settimeout(None)
    return Connection(stream)
