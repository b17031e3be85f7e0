"""The protocol of scorers, and the view of a video that they see.

A scorer turns frames into one score a frame, one score a pair of neighbouring frames, or one feature a frame.
`video_drift.py` computes figures of segments from them. A scorer keeps no state, so one object serves many videos.
`metrics.py` has the ones of this package by name; any object of the protocol can be passed instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .measures import Better

Kind = Literal["frame", "pair", "feature"]
LUMA = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)  # BT.709, of gamma-coded values
FLOW_SIDE = (128, 416)  # least and most pixels of the longer side of the pictures that flow is computed on


@dataclass
class View:
    """A frame with what scorers may use of its surroundings; derived pictures are computed once for all scorers.

    frame: uint8 RGB [H, W, 3]. previous: the frame before, None for the first. references: up to three frames of the
    first second, or of the first second after the latest prompt switch.
    """

    frame: NDArray[np.uint8]
    index: int
    fps: float
    previous: View | None = None
    references: Sequence[View] = field(default=(), repr=False)

    @cached_property
    def luma(self) -> NDArray[np.float32]:
        """Brightness from 0 to 1, float32 [H, W]."""
        return np.asarray((self.frame @ LUMA) / np.float32(255))

    @cached_property
    def flow_luma(self) -> NDArray[np.uint8]:
        """Brightness at the size that flow is computed on, uint8 [h, w]."""
        import cv2

        height, width = self.luma.shape
        least, most = FLOW_SIDE
        longer = max(height, width)
        scale = most / longer if longer > most else max(1, -(-least // longer))
        size = max(16, round(width * scale)), max(16, round(height * scale))
        picture = np.rint(self.luma * 255).astype(np.uint8)
        if size == (width, height):
            return picture
        mode = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        return np.asarray(cv2.resize(picture, size, interpolation=mode), np.uint8)

    @cached_property
    def flow(self) -> NDArray[np.float32]:
        """Optical flow from the previous frame to this, in pixels of `flow_luma`, [h, w, 2] with x and y.

        Dense inverse search (Kroeger et al. 2016), OpenCV's medium preset.
        """
        import cv2

        assert self.previous is not None
        search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        room = np.zeros((*self.flow_luma.shape, 2), np.float32)
        return np.asarray(search.calc(self.previous.flow_luma, self.flow_luma, room), np.float32)

    @cached_property
    def speed(self) -> NDArray[np.float32]:
        """Length of `flow`, short sides of the picture each second, [h, w]."""
        import cv2

        length = cv2.magnitude(self.flow[..., 0], self.flow[..., 1])
        return np.asarray(length * np.float32(self.fps / min(length.shape)), np.float32)


class Scorer(Protocol):
    """Scores of frames.

    name: its key in reports. version: changes whenever a score changes. weights: SHA-256 of its weights, None without.
    kind: whether `score` gives numbers of frames, numbers of pairs (the frame and its previous one), or features.
    better: the direction of improvement. floor: the least score that changes are divided by (see `vde2`).
    partial: True if NaN means that a frame has no score, such as a frame without a still region; for any other scorer
    NaN is a fault. smallest: least height and width of frames, pixels. about: a few words for tables.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def weights(self) -> str | None: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def better(self) -> Better: ...

    @property
    def floor(self) -> float: ...

    @property
    def partial(self) -> bool: ...

    @property
    def smallest(self) -> int: ...

    @property
    def about(self) -> str: ...

    def score(self, views: Sequence[View]) -> NDArray[Any]:
        """Scores of consecutive frames: [n], or [n, D] for features. Each view of a pair scorer has `previous`."""

    def similarity(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        """Similarity of features along their last axis, 1 for equal ones; unused for other kinds."""


@dataclass(frozen=True)
class FunctionScorer:
    """A scorer without weights, from a function of one view."""

    name: str
    kind: Kind
    function: Callable[[View], Any]
    about: str
    better: Better = "neither"
    floor: float = 0.02
    version: str = "1"
    weights: str | None = None
    partial: bool = False
    smallest: int = 16
    package: str | None = None
    compare: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]] | None = None

    def score(self, views: Sequence[View]) -> NDArray[Any]:
        return np.array([self.function(view) for view in views], dtype=np.float64)

    def similarity(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        assert self.compare is not None
        return self.compare(one, other)
