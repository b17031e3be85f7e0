"""Cameras of a world model: poses of latent frames, from a path or from keys and mouse that are held.

Poses are camera to world in OpenCV axes: x right, y down, z forward. Host numbers in float64 only; `models.rays` makes
a network's input of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UsageError, quoted

Poses = NDArray[np.float64]  # [N, 4, 4]
RIGID = 1e-3  # how far the rotation of a pose may be from one; files have float32, or a few decimals
LONGEST_PATH = 100_000  # poses
RATES = ("picture", "latent")
NORMALIZE = ("path", "block")
KEYS = ("forward", "right", "yaw", "pitch")
HORIZONTAL, NO_TURN = 1e-9, (0.0, 0.0)


@dataclass(frozen=True)
class CameraSpeeds:
    """Speeds of a camera that held keys move.

    move: world units a second. turn: degrees a second. pitch_limit: degrees from the horizon that looking up and down
    ends at.
    """

    move: float = 0.8
    turn: float = 32.0
    pitch_limit: float = 85.0

    def __post_init__(self) -> None:
        for name, most in (("move", 1e6), ("turn", 360.0), ("pitch_limit", 90.0)):
            value = getattr(self, name)
            if not is_finite(value) or not 0 < value <= most:
                raise UsageError(f"{name} is {quoted(value)}; expected a number above 0, up to {most:g}")


@dataclass(frozen=True)
class CameraMove:
    """Keys and mouse of a camera, held until the next move, and for one block at least.

    forward, right, yaw, pitch: shares of full speed in [-1, 1]; yaw turns right, pitch looks up. turn: degrees (right,
    up) that the camera turns over the next block, as a mouse does.
    """

    forward: float = 0.0
    right: float = 0.0
    yaw: float = 0.0
    pitch: float = 0.0
    turn: tuple[float, float] = NO_TURN

    def __post_init__(self) -> None:
        for name in KEYS:
            value = getattr(self, name)
            if not is_finite(value) or not -1 <= value <= 1:
                raise UsageError(f"{name} is {quoted(value)}; expected a number in -1..1")
        if len(self.turn) != 2 or not all(is_finite(angle) and abs(angle) <= 360 for angle in self.turn):
            raise UsageError(f"turn is {quoted(self.turn)}; expected two numbers of degrees in -360..360")


@dataclass(frozen=True, eq=False)
class Camera:
    """The camera that a stream begins with.

    poses: [T, 4, 4] of the pictures, or of the latent frames where `rate` is `latent`; None for one that stands still
    until it is moved. Poses of pictures are spread over whole blocks, as the published models do it. intrinsics: (fx,
    fy, cx, cy) in pixels of a picture of `size` (width, height), the model's default size if None; without intrinsics
    the focal length is the picture's width. scale: world units that become length 1, as the longest step of the path
    if None; of a camera without a path, a step at full speed. normalize: `path` for that divisor, `block` where each
    block is divided by its own longest step. speeds: of held keys.
    """

    poses: Poses | None = None
    intrinsics: tuple[float, float, float, float] | None = None
    size: tuple[int, int] | None = None
    rate: str = "picture"
    scale: float | None = None
    normalize: str = "path"
    speeds: CameraSpeeds = field(default_factory=CameraSpeeds)

    def __post_init__(self) -> None:
        for name, known in (("rate", RATES), ("normalize", NORMALIZE)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} is {quoted(getattr(self, name))}; expected one of {', '.join(known)}")
        if self.scale is not None and (not is_finite(self.scale) or self.scale <= 0):
            raise UsageError(f"scale is {quoted(self.scale)}; expected a number above 0, or None")
        if self.intrinsics is not None:
            object.__setattr__(self, "intrinsics", checked_intrinsics(self.intrinsics))
        if self.size is not None and not is_size(self.size):
            raise UsageError(f"size is {quoted(self.size)}; expected the (width, height) that intrinsics are for")
        if self.poses is not None:
            object.__setattr__(self, "poses", checked_poses(self.poses))

    def cut(self, pictures: int) -> Camera:
        """The same camera with no more poses than a stream of so many pictures takes, if they are those of pictures."""
        return self if self.poses is None or self.rate != "picture" else replace(self, poses=self.poses[:pictures])

    def blocks(self, stride: int, block: int) -> int:
        """Blocks of latent frames that the poses last for, at least one."""
        return max(1, len(self.frames(stride, block)) // block)

    def frames(self, stride: int, block: int) -> Poses:
        """Poses [F, 4, 4] of latent frames of `stride` pictures, in whole blocks. UsageError for too few poses."""
        if self.poses is None:
            return np.eye(4)[None]
        if self.rate == "latent":
            return self.poses
        count = (len(self.poses) - 1) // stride + 1
        whole = count - count % block
        if whole == 0:
            raise UsageError(
                f"poses are {len(self.poses)}; expected at least {(block - 1) * stride + 1}, one for each picture of a "
                f"block of {block} latent frames"
            )
        return resampled(self.poses[: (count - 1) * stride + 1], whole)


def is_finite(value: object) -> bool:
    """True for a finite number that is no bool."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(np.isfinite(value))


def is_size(value: Sequence[float]) -> bool:
    """True for two numbers above 0."""
    return len(value) == 2 and all(is_finite(side) and side > 0 for side in value)


def as_numbers(name: str, value: ArrayLike) -> NDArray[np.float64]:
    """An array of float64; UsageError for one with other entries, or of rows of several lengths."""
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "fiu":
            raise ValueError("no numbers")
        return array.astype(np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"{name} is {quoted(value)}; expected an array of numbers") from error


def checked_poses(value: ArrayLike) -> Poses:
    """Poses [T, 4, 4]; UsageError unless they are finite rigid motions, at least one."""
    poses = as_numbers("poses", value)
    if poses.ndim == 2 and poses.shape[1] == 16:
        poses = poses.reshape(-1, 4, 4)
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not 1 <= len(poses) <= LONGEST_PATH:
        raise UsageError(
            f"poses are of shape {list(poses.shape)}; expected [T, 4, 4], camera to world, 1 to {LONGEST_PATH} of them"
        )
    if not np.isfinite(poses).all():
        first = int(np.argmin(np.isfinite(poses).all((1, 2))))
        raise UsageError(f"poses[{first}] is not finite; expected numbers")
    rotation = poses[:, :3, :3]
    skew = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
    rest = np.abs(poses[:, 3] - [0, 0, 0, 1]).max(1)
    wrong = (skew > RIGID) | (rest > RIGID) | (np.linalg.det(rotation) < 0)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise UsageError(
            f"poses[{first}] is {quoted(poses[first].tolist())}, no rigid motion; expected a rotation, a translation "
            "and the last row 0 0 0 1"
        )
    return poses


def checked_intrinsics(value: ArrayLike) -> tuple[float, float, float, float]:
    """(fx, fy, cx, cy), of the first row of [T, 4]; UsageError for others, and without a focal length above 0."""
    array = as_numbers("intrinsics", value)
    if array.ndim == 2 and len(array):
        array = array[0]
    if array.shape != (4,) or not np.isfinite(array).all():
        raise UsageError(f"intrinsics are {quoted(value)}; expected fx, fy, cx, cy in pixels")
    fx, fy, cx, cy = array.tolist()
    if fx <= 0 or fy <= 0:
        raise UsageError(f"intrinsics are {quoted(value)}; expected focal lengths fx and fy above 0")
    return fx, fy, cx, cy


# Rotations


def quaternions(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit quaternions (w, x, y, z) [N, 4] of rotations [N, 3, 3]."""
    result = np.empty((len(rotation), 4))
    for index, r in enumerate(rotation):
        # four forms of four times the quaternion, each times one of its entries; the longest has no cancellation
        forms = np.array([
            [1 + r[0, 0] + r[1, 1] + r[2, 2], r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]],
            [r[2, 1] - r[1, 2], 1 + r[0, 0] - r[1, 1] - r[2, 2], r[0, 1] + r[1, 0], r[0, 2] + r[2, 0]],
            [r[0, 2] - r[2, 0], r[0, 1] + r[1, 0], 1 - r[0, 0] + r[1, 1] - r[2, 2], r[1, 2] + r[2, 1]],
            [r[1, 0] - r[0, 1], r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], 1 - r[0, 0] - r[1, 1] + r[2, 2]],
        ])  # fmt: skip
        form = forms[np.argmax(np.diag(forms))]
        result[index] = form / np.linalg.norm(form)
    return result


def rotations(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotations [N, 3, 3] of unit quaternions (w, x, y, z) [N, 4]."""
    w, x, y, z = quaternion.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)


def slerp(first: NDArray[np.float64], second: NDArray[np.float64], share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quaternions [N, 4] on the great circles from `first` to `second`, the shorter way."""
    dot = (first * second).sum(1, keepdims=True)
    second, dot = np.where(dot < 0, -second, second), np.clip(np.abs(dot), 0, 1)
    angle, share = np.arccos(dot), share[:, None]
    near = angle < 1e-6  # then the circle is a line
    sine = np.where(near, 1, np.sin(angle))
    weights = [np.where(near, part, np.sin(part * angle) / sine) for part in (1 - share, share)]
    mixed = weights[0] * first + weights[1] * second
    return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


def resampled(poses: Poses, count: int) -> Poses:
    """`count` poses at even distances over a path: translations between neighbours on lines, rotations by slerp."""
    places = np.linspace(0, len(poses) - 1, count)
    before = np.minimum(places.astype(int), max(len(poses) - 2, 0))
    after = np.minimum(before + 1, len(poses) - 1)
    share = places - before
    turned = quaternions(poses[:, :3, :3])
    result = np.tile(np.eye(4), (count, 1, 1))
    result[:, :3, :3] = rotations(slerp(turned[before], turned[after], share))
    weight = share[:, None]
    result[:, :3, 3] = (1 - weight) * poses[before, :3, 3] + weight * poses[after, :3, 3]
    return result


def steps_between(poses: Poses) -> Poses:
    """Motion into each pose from the one before it, in that one's axes; the identity into the first."""
    motions = np.tile(np.eye(4), (len(poses), 1, 1))
    back = poses[:-1, :3, :3].transpose(0, 2, 1)
    motions[1:, :3, :3] = back @ poses[1:, :3, :3]
    motions[1:, :3, 3] = (back @ (poses[1:, :3, 3] - poses[:-1, :3, 3])[:, :, None])[:, :, 0]
    return motions


def longest_step(motions: Poses) -> float:
    """Length of the longest translation of some motions."""
    return float(np.linalg.norm(motions[:, :3, 3], axis=1).max(initial=0))


def turn_right(degrees: float) -> NDArray[np.float64]:
    """Rotation [3, 3] about the world's y, which points down: forward moves towards x."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])


def look_up(degrees: float) -> NDArray[np.float64]:
    """Rotation [3, 3] about the camera's x: forward moves towards -y, which is up."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])


def pitch_of(rotation: NDArray[np.float64]) -> float:
    """Degrees that a camera looks up from the horizon."""
    return math.degrees(math.asin(float(np.clip(-rotation[1, 2], -1, 1))))


def moved(pose: NDArray[np.float64], move: CameraMove, speeds: CameraSpeeds, seconds: float) -> NDArray[np.float64]:
    """The pose after keys were held: it turns, then moves on the horizontal plane. `turn` is added in full."""
    turn = speeds.turn * seconds
    yaw, pitch = move.yaw * turn + move.turn[0], move.pitch * turn + move.turn[1]
    here, limit = pitch_of(pose[:3, :3]), speeds.pitch_limit
    pitch = min(max(here + pitch, min(here, -limit)), max(here, limit)) - here
    result = pose.copy()
    result[:3, :3] = turn_right(yaw) @ pose[:3, :3] @ look_up(pitch)
    step = speeds.move * seconds
    for axis, share in ((2, move.forward), (0, move.right)):
        way = result[:3, axis] * [1, 0, 1]
        if (length := float(np.linalg.norm(way))) > HORIZONTAL:
            result[:3, 3] += share * step * way / length
    return result


class CameraTrack:
    """The camera of each latent frame of a stream: given poses, then those that held keys lead to.

    first: frame of the first of `poses`, which is at most the one before the next block. held: keys of the frames after
    them, but for the first `tap_frames`, whose keys are `tapped` and over which `turn` degrees (right, up) are left to
    turn. scale: world units of length 1. seconds: of a latent frame.
    """

    def __init__(
        self,
        intrinsics: tuple[float, float, float, float],
        poses: Sequence[NDArray[np.float64]],
        scale: float,
        normalize: str,
        speeds: CameraSpeeds,
        seconds: float,
    ) -> None:
        self.intrinsics, self.scale, self.normalize = intrinsics, scale, normalize
        self.speeds, self.seconds = speeds, seconds
        self.first, self.poses, self.held = 0, list(poses), CameraMove()
        self.tapped, self.turn, self.tap_frames = CameraMove(), NO_TURN, 0

    @classmethod
    def begin(
        cls, camera: Camera, size: tuple[int, int], default_size: tuple[int, int], stride: int, fps: int, block: int
    ) -> CameraTrack:
        """The track of a camera in a stream of pictures of `size` (width, height), blocks of `block` latent frames.

        stride: pictures of a latent frame. UsageError for too few poses.
        """
        poses, seconds = camera.frames(stride, block), stride / fps
        scale = camera.scale
        if scale is None:
            scale = camera.speeds.move * seconds if camera.poses is None else longest_step(steps_between(poses)) or 1.0
        width, height = size
        given = camera.intrinsics
        if given is None:
            intrinsics = float(width), float(width), width / 2, height / 2
        else:
            across, down = (side / own for side, own in zip(size, camera.size or default_size, strict=True))
            intrinsics = given[0] * across, given[1] * down, given[2] * across, given[3] * down
        return cls(intrinsics, list(poses), scale, camera.normalize, camera.speeds, seconds)

    @property
    def end(self) -> int:
        """The first frame without a pose of its own."""
        return self.first + len(self.poses)

    def follow(self, frame: int, poses: Poses) -> None:
        """Have the camera follow `poses` from `frame` on, and stand still after them; later poses are dropped."""
        self.reach(frame)
        del self.poses[frame - self.first :]
        self.poses += list(poses)
        self.held, self.tapped, self.turn, self.tap_frames = CameraMove(), CameraMove(), NO_TURN, 0

    def hold(self, frame: int, move: CameraMove, block: int) -> None:
        """Hold keys from `frame` on; later poses are dropped.

        The move's turn is spread over the `block` frames that begin there. Keys that were pressed and released again
        before these frames began are held over them, however short that was.
        """
        self.reach(frame)
        del self.poses[max(1, frame - self.first) :]  # the stream's first frame has no step into it
        self.held = replace(move, turn=NO_TURN)
        before = self.tapped if self.tap_frames else CameraMove()
        self.tapped = CameraMove(*(getattr(move, key) or getattr(before, key) for key in KEYS))
        self.turn = self.turn[0] + move.turn[0], self.turn[1] + move.turn[1]
        self.tap_frames = max(1, frame + block - self.end)

    def reach(self, end: int) -> None:
        """Add poses that the held keys lead to, of all frames before `end`."""
        while self.end < end:
            move = self.held
            if self.tap_frames:
                share = self.turn[0] / self.tap_frames, self.turn[1] / self.tap_frames
                move = replace(self.tapped, turn=share)
                self.turn = self.turn[0] - share[0], self.turn[1] - share[1]
                self.tap_frames -= 1
            self.turn = self.turn if self.tap_frames else NO_TURN
            self.poses.append(moved(self.poses[-1], move, self.speeds, self.seconds))

    def motions(self, frames: Sequence[int]) -> Poses:
        """Motion into each of some frames, ascending, from the frame before it, at the track's scale."""
        self.reach(frames[-1] + 1)
        before = max(frames[0] - 1, self.first)
        motions = steps_between(np.array(self.poses[before - self.first : frames[-1] + 1 - self.first]))
        motions = motions[[frame - before for frame in frames]]
        scale = self.scale if self.normalize == "path" else longest_step(motions)
        motions[:, :3, 3] /= scale or 1.0
        return motions

    def forget(self, frame: int) -> None:
        """Drop poses that no frame from `frame` on needs."""
        if (gone := min(frame - 1, self.end - 1) - self.first) > 0:
            del self.poses[:gone]
            self.first += gone

    def fork(self) -> CameraTrack:
        """Return an independent copy; poses are never written."""
        twin = CameraTrack(self.intrinsics, self.poses, self.scale, self.normalize, self.speeds, self.seconds)
        twin.first, twin.held = self.first, self.held
        twin.tapped, twin.turn, twin.tap_frames = self.tapped, self.turn, self.tap_frames
        return twin


def move_of(facts: Any) -> CameraMove:
    """A move from plain values by name; UsageError for other names."""
    known = [item.name for item in fields(CameraMove)]
    if not isinstance(facts, dict) or not set(facts) <= set(known):
        raise UsageError(f"move is {quoted(facts)}; expected some of {', '.join(known)}")
    turn = facts.get("turn", NO_TURN)
    if not isinstance(turn, list | tuple):
        raise UsageError(f"turn is {quoted(turn)}; expected two numbers of degrees")
    return CameraMove(**{**facts, "turn": tuple(turn)})
