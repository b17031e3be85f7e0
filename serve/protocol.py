"""The live protocol: controls of a client, events of the server, and media messages. `docs/serving.md` describes it.

Controls and events are objects in JSON or msgpack, one a message. A media message is binary: a header of 16 bytes and
a payload. The first byte of a header is below 0x80, that of a msgpack object is not.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgpack
from msgpack.exceptions import UnpackException
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from ..errors import cut, quoted
from .refusals import Refusal

VERSION: Final = 1
SUBPROTOCOLS = ("inferix.json", "inferix.msgpack")  # of the WebSocket; the first is the default
MEDIA = ("h264", "vp9", "fmp4", "jpeg", "raw")
HEADER = struct.Struct("<BBHIII")  # kind, flags, rollout, block, frame, frames
KEY, FIRST, LAST = 1, 2, 4  # flags: decodable alone, first and last message of a block

ControlId = Annotated[int, Field(ge=0, lt=2**53)] | Annotated[str, StringConstraints(min_length=1, max_length=64)]
Seed = Annotated[int, Field(ge=0, lt=2**53)]
Share = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Degrees = Annotated[float, Field(ge=-360, le=360, allow_inf_nan=False)]
Identifier = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class Control(BaseModel):
    """A message of a client. id: its own; the receipts have it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: ControlId


class Open(Control):
    """Open a session. media: what the client can show, best first. world: a saved one to go on from."""

    type: Literal["open"]
    prompt: str | None = None
    seed: Seed = 0
    size: tuple[int, int] | None = Field(default=None, strict=False)
    media: Annotated[list[Literal["h264", "vp9", "fmp4", "jpeg", "raw"]], Field(min_length=1, max_length=8)] = ["jpeg"]
    behind: Literal["skip", "pause"] | None = None
    world: Identifier | None = None


class Attach(Control):
    """Go on with a session after a disconnection, or take over a fork. resume: its resume token."""

    type: Literal["attach"]
    session: Identifier
    resume: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    media: Annotated[list[Literal["h264", "vp9", "fmp4", "jpeg", "raw"]], Field(min_length=1, max_length=8)] = ["jpeg"]


class Prompt(Control):
    """Change the prompt. transition: blocks from the old prompt to the new one; None for the preset's way."""

    type: Literal["prompt"]
    text: str
    transition: Annotated[int, Field(ge=1, le=64)] | None = None


class Act(Control):
    """Press or release an action's key; the last one pressed and not released is in force."""

    type: Literal["act"]
    action: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    pressed: bool = True


class Camera(Control):
    """Hold keys of the camera, until the next such control. forward, right, yaw and pitch: shares of full speed.

    turn: degrees right and up, once, as by a mouse.
    """

    type: Literal["camera"]
    forward: Share = 0.0
    right: Share = 0.0
    yaw: Share = 0.0
    pitch: Share = 0.0
    turn: tuple[Degrees, Degrees] = Field(default=(0.0, 0.0), strict=False)


class Pause(Control):
    """Begin no more blocks."""

    type: Literal["pause"]


class Resume(Control):
    """Go on after a pause."""

    type: Literal["resume"]


class Stop(Control):
    """Finish the blocks that have begun and end the session."""

    type: Literal["stop"]


class Fork(Control):
    """Make a copy of the session; its receipt has what `attach` needs."""

    type: Literal["fork"]


class Rewind(Control):
    """Return to the start of a block that is kept."""

    type: Literal["rewind"]
    block: Annotated[int, Field(ge=0, lt=2**31)]


class Save(Control):
    """Save the session as a world; its receipt has the world's id."""

    type: Literal["save"]


class Restore(Control):
    """Go on from a saved world."""

    type: Literal["restore"]
    world: Identifier


class Reseed(Control):
    """Start again with another seed and the present prompt."""

    type: Literal["seed"]
    seed: Seed


class Record(Control):
    """Begin or end a recording of the session; the receipts have its url. to: address of a push by RTMP."""

    type: Literal["record"]
    format: Literal["mp4", "hls", "rtmp"] = "mp4"
    to: Annotated[str, StringConstraints(max_length=1024)] | None = None
    on: bool = True


class Snapshot(Control):
    """Keep the newest picture as a PNG file; the receipt has its url."""

    type: Literal["snapshot"]


class Ping(Control):
    """Ask for a `pong`."""

    type: Literal["ping"]


AnyControl = Annotated[
    Open | Attach | Prompt | Act | Camera | Pause | Resume | Stop | Fork | Rewind | Save | Restore | Reseed | Record
    | Snapshot | Ping,
    Field(discriminator="type"),
]
CONTROLS: TypeAdapter[Any] = TypeAdapter(AnyControl)


class Event(BaseModel):
    """A message of the server."""

    def plain(self) -> dict[str, Any]:
        """The fields that have a value."""
        return self.model_dump(exclude_none=True)


class MediaFormat(BaseModel):
    """Format of the media messages. codec: of WebCodecs or of a MIME type, None for pictures."""

    name: str
    width: int
    height: int
    fps: float
    codec: str | None = None


class Opened(Event):
    """The answer to `open` and `attach`. rest: the action in force without a key. camera: the model follows one."""

    type: Literal["opened"] = "opened"
    id: ControlId
    protocol: int = VERSION
    session: str
    resume: str
    resume_seconds: float
    model: str
    preset: str
    media: MediaFormat
    actions: list[str]
    rest: str | None
    camera: bool = False
    rewind_blocks: int
    frames_per_block: int
    behind: str
    prompt: str | None
    seed: int | None
    paused: bool
    next_block: int


class Queued(Event):
    """There is no room yet; `position` clients come before."""

    type: Literal["queued"] = "queued"
    position: int


class Received(Event):
    """A control has arrived."""

    type: Literal["received"] = "received"
    id: ControlId


class Applied(Event):
    """A control is applied. It precedes the media of `block`, the first block that shows it, which begins with the
    picture `frame`. seconds: from the arrival of the control to now.
    """

    type: Literal["applied"] = "applied"
    id: ControlId
    verb: str
    block: int
    frame: int
    seconds: float
    session: str | None = None
    resume: str | None = None
    world: str | None = None
    url: str | None = None
    bytes: int | None = None


class State(Event):
    """Snapshot of the session after each block.

    frame: the block's first picture, counted from the start of the stream. position: seconds of video at its end.
    rate: pictures per second over the last blocks. slack: seconds that the block was early. kept_from: the oldest block
    to rewind to. seconds: of the block's stages. waiting: blocks that wait for this viewer. skipped: blocks that it
    missed so far. latency: of a session made from live video, seconds from the arrival of the block's first picture to
    sending the one made from it. dropped: pictures of that video that no block was made from so far.
    """

    type: Literal["state"] = "state"
    block: int
    frame: int
    frames: int
    rollout: int
    prompt: str | None
    action: str | None
    seed: int | None
    position: float
    rate: float
    slack: float | None
    kept_from: int
    seconds: dict[str, float]
    waiting: int
    skipped: int
    overload: list[str]
    drift: dict[str, float] | None
    latency: float | None = None
    dropped: int | None = None


class Notice(Event):
    """Something that a viewer should know. kind: skipped, waited, draining, moved or warning."""

    type: Literal["notice"] = "notice"
    kind: str
    message: str
    blocks: int | None = None
    seconds: float | None = None


class Limit(BaseModel):
    name: str
    value: bool | float | str | None


class Refused(Event):
    """A message was refused and had no effect. id: None where it could not be read."""

    type: Literal["refused"] = "refused"
    id: ControlId | None = None
    code: str
    message: str
    limit: Limit | None = None
    retry_after: int | None = None


class Ended(Event):
    """The session is over. world: where it was saved, if it was."""

    type: Literal["ended"] = "ended"
    code: str
    message: str
    world: str | None = None


class Pong(Event):
    """The answer to `ping`."""

    type: Literal["pong"] = "pong"
    id: ControlId


AnyEvent = Opened | Queued | Received | Applied | State | Notice | Refused | Ended | Pong


def json_schema() -> dict[str, Any]:
    """The JSON schema of all controls and events."""
    events: TypeAdapter[Any] = TypeAdapter(Annotated[AnyEvent, Field(discriminator="type")])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Live protocol of Inferix, version {VERSION}",
        "controls": CONTROLS.json_schema(),
        "events": events.json_schema(mode="serialization"),
    }


@dataclass(frozen=True)
class Codec:
    """Reads controls and writes events in one of `SUBPROTOCOLS`."""

    subprotocol: str

    @property
    def binary(self) -> bool:
        return self.subprotocol == "inferix.msgpack"

    def read(self, message: str | bytes) -> Control:
        """A control; Refusal for what is none."""
        if isinstance(message, bytes) is not self.binary:
            expected = "binary messages in msgpack" if self.binary else "text messages in JSON"
            raise Refusal("malformed", f"controls of subprotocol {self.subprotocol} are {expected}")
        try:
            control: Control = CONTROLS.validate_python(unpack(message)) if self.binary else CONTROLS.validate_json(
                message
            )
        except ValidationError as error:
            raise invalid(error) from error
        return control

    def write(self, event: Event) -> str | bytes:
        return self.pack(event.plain())

    def pack(self, fields: dict[str, Any]) -> str | bytes:
        """A message of some fields."""
        if self.binary:
            packed: bytes = msgpack.packb(fields)
            return packed
        return json.dumps(fields, allow_nan=False)

    def read_event(self, message: str | bytes) -> dict[str, Any] | None:
        """The fields of an event; None for a media message."""
        if isinstance(message, bytes) and (not self.binary or message[:1] < b"\x80"):
            return None
        fields: dict[str, Any] = unpack(message) if self.binary else json.loads(message)
        return fields


def unpack(message: str | bytes) -> Any:
    """A msgpack object; Refusal for other bytes."""
    try:
        return msgpack.unpackb(message, raw=False, strict_map_key=True)
    except (ValueError, UnpackException) as error:
        raise Refusal("malformed", f"the message is no msgpack: {cut(str(error))}") from error


def invalid(error: ValidationError) -> Refusal:
    """The refusal of a control, by the first thing that is wrong with it."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return Refusal("malformed", f"the message is no JSON: {cut(first['msg'])}")
    place = ".".join(str(part) for part in first["loc"]) or "the message"
    code = "unknown_verb" if first["type"] == "union_tag_invalid" else "invalid"
    return Refusal(code, f"{cut(place)} is {quoted(first['input'])}: {cut(first['msg'], 400)}")


def media_message(kind: str, flags: int, rollout: int, block: int, frame: int, frames: int, payload: bytes) -> bytes:
    """A binary message. frame: index of its first picture; frames: how many there are in it."""
    return HEADER.pack(1 + MEDIA.index(kind), flags, rollout & 0xFFFF, block, frame & 0xFFFFFFFF, frames) + payload
