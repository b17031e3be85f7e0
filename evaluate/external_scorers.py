"""Adapters to networks of other packages, found when they are used: MUSIQ, RAFT and AMT-S.

They have not been run here with the packages and weights: none can be installed beside this package's torch without a
download. What each network takes and returns is recorded as a `Contract` from the packages' sources, and every call is
checked against it, so that another version of a package is refused and not scored.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CheckpointError, InferixError, quoted
from ..models.files import read_tensors
from .measures import Better
from .scorers import Kind, View
from .weight_files import AMT_S, MUSIQ_SPAQ, RAFT_THINGS

MUSIQ_SIDE = 512  # pixels of the longer side, at most
RAFT_ITERATIONS = 20
MOVING_TOP = 0.05  # share of pixels with the most flow
MOVING_PIXELS = 6 / 256  # of the short side for each frame at 8 frames a second


@dataclass(frozen=True)
class Contract:
    """Tensors that a network takes and returns, read in its source. shape: sizes, or letters that stand for sizes."""

    source: str
    takes: tuple[tuple[str | int, ...], float, float]  # shape, least and largest value
    returns: tuple[str | int, ...]

    def checked(self, output: Any, sizes: dict[str, int]) -> Tensor:
        """Return a network's output, float32. InferixError if it is no finite tensor of the recorded shape."""
        network, expected = self.source, [size if isinstance(size, int) else sizes[size] for size in self.returns]
        if not isinstance(output, Tensor) or list(output.shape) != expected:
            found = list(output.shape) if isinstance(output, Tensor) else quoted(output)
            raise InferixError(f"{network} returned {found}; expected {expected}: use another version")
        if not output.isfinite().all():
            raise InferixError(f"{network} returned values that are not finite; check its weights")
        return output.float()

    def batch(self, frames: Sequence[NDArray[np.uint8]], device: str) -> Tensor:
        """Frames [H, W, 3] as the network takes them: float32 [n, 3, H, W] in its range."""
        _, low, high = self.takes
        pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).to(device, torch.float32)
        return low + pixels * ((high - low) / 255)


MUSIQ = Contract("pyiqa.archs.musiq_arch.MUSIQ", (("n", 3, "H", "W"), 0.0, 1.0), ("n", 1))
RAFT = Contract("vbench.third_party.RAFT.core.raft.RAFT", ((1, 3, "H", "W"), 0.0, 255.0), (1, 2, "H", "W"))
AMT = Contract("vbench.third_party.amt.networks.AMT-S", ((1, 3, "H", "W"), 0.0, 1.0), (1, 3, "H", "W"))


def attribute(module: str, name: str) -> Any:
    """An object of an installed package. InferixError if the package has it no longer."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InferixError(f"{module} has no usable {name}: {quoted(str(error))}; use another version") from error


def load_state(network: Any, tensors: dict[str, Any], source: Path) -> Any:
    """Load a state dict into a network of another package; CheckpointError if it does not fit."""
    state = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{quoted(source)} does not fit: {quoted(str(error))}") from error
    return network.eval()


def padded(pixels: Tensor, multiple: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Pictures with edges repeated on all sides to a multiple, and the function that cuts an output back."""
    height, width = pixels.shape[-2:]
    rows, columns = -height % multiple, -width % multiple
    top, left = rows // 2, columns // 2
    wide = F.pad(pixels, (left, columns - left, top, rows - top), mode="replicate")
    return wide, lambda output: output[..., top : top + height, left : left + width]


@dataclass(frozen=True)
class ExternalScorer:
    """A scorer by a network of another package."""

    name: str
    kind: Kind
    about: str
    weights: str
    network: Any
    device: str
    better: Better = "higher"
    floor: float = 0.02
    version: str = "1, not run here"
    partial: bool = False
    smallest: int = 16

    def similarity(self, one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        raise AssertionError(f"{self.name} has no features")


class MusiqSpaq(ExternalScorer):
    """MUSIQ with SPAQ weights, 0 to 100: LV-Bench's clarity. Pictures of at most 512 pixels across."""

    @classmethod
    def load(cls, folder: Path, digest: str, device: str) -> MusiqSpaq:
        kind = attribute("pyiqa.archs.musiq_arch", "MUSIQ")
        network = kind(pretrained_model_path=str(folder / MUSIQ_SPAQ.path)).to(device).eval()
        return cls("musiq_spaq", "frame", "MUSIQ with SPAQ weights, 0 to 100", digest, network, device, floor=5.0)

    @torch.no_grad()
    def score(self, views: Sequence[View]) -> NDArray[Any]:
        pixels = MUSIQ.batch([view.frame for view in views], self.device)
        height, width = pixels.shape[-2:]
        if max(height, width) > MUSIQ_SIDE:
            scale = MUSIQ_SIDE / max(height, width)
            size = int(scale * height), int(scale * width)
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        return MUSIQ.checked(self.network(pixels), {"n": len(views)})[:, 0].double().cpu().numpy()


class RaftMoving(ExternalScorer):
    """1 if the fastest 5 % of pixels of a pair move by more than 6 of 256 pixels at 8 frames a second, else 0.

    VBench's dynamic degree takes one frame in round(FPS / 8) and gives one answer for a video; here every pair has one,
    and a segment's score is the share of its pairs that move.
    """

    @classmethod
    def load(cls, folder: Path, digest: str, device: str) -> RaftMoving:
        kind = attribute("vbench.third_party.RAFT.core.raft", "RAFT")
        path = folder / RAFT_THINGS.path
        network = kind(Namespace(small=False, mixed_precision=False, alternate_corr=False))
        network = load_state(network, read_tensors(path), path).to(device)
        return cls("raft_moving_share", "pair", "share of pairs that move, by RAFT", digest, network, device, "neither",
                   floor=0.1)  # fmt: skip

    @torch.no_grad()
    def score(self, views: Sequence[View]) -> NDArray[Any]:
        scores = []
        for view in views:
            assert view.previous is not None
            pair, cut_back = padded(RAFT.batch([view.previous.frame, view.frame], self.device), 8)
            output = self.network(pair[:1], pair[1:], iters=RAFT_ITERATIONS, test_mode=True)
            sizes = dict(zip("HW", pair.shape[-2:], strict=True))
            flow = cut_back(RAFT.checked(output[-1] if isinstance(output, tuple) else output, sizes))
            length = flow[0].norm(dim=0).flatten()
            fastest = length.topk(max(1, int(MOVING_TOP * length.numel()))).values.mean()
            scores.append(float(fastest * view.fps / 8 > MOVING_PIXELS * min(flow.shape[-2:])))
        return np.array(scores)


class AmtRebuild(ExternalScorer):
    """1 - the mean difference of a frame and what AMT-S makes of its neighbours: VBench's motion smoothness.

    Every second frame of a video is rebuilt; the others have no score. Pictures keep their size on every device, so the
    score does not depend on a GPU's free memory, as the published one does.
    """

    @classmethod
    def load(cls, folder: Path, digest: str, device: str) -> AmtRebuild:
        kind = attribute("vbench.third_party.amt.networks.AMT-S", "Model")
        path = folder / AMT_S.path
        tensors = read_tensors(path)
        network = load_state(kind(corr_radius=3, corr_lvls=4, num_flows=3), tensors.get("state_dict", tensors), path)
        return cls("amt_s_rebuild", "pair", "every second frame rebuilt by AMT-S", digest, network.to(device), device,
                   partial=True)  # fmt: skip

    @torch.no_grad()
    def score(self, views: Sequence[View]) -> NDArray[Any]:
        scores = []
        for view in views:
            middle = view.previous
            assert middle is not None
            if view.index % 2 or middle.previous is None:
                scores.append(float("nan"))
                continue
            ends, cut_back = padded(AMT.batch([middle.previous.frame, view.frame], self.device), 16)
            half = torch.full((1, 1, 1, 1), 0.5, device=self.device)
            output = self.network(ends[:1], ends[1:], half, scale_factor=1.0, eval=True)
            output = output.get("imgt_pred") if isinstance(output, dict) else output
            sizes = dict(zip("HW", ends.shape[-2:], strict=True))
            made = (cut_back(AMT.checked(output, sizes))[0] * 255).round().clamp(0, 255).byte()
            wrong = np.abs(made.permute(1, 2, 0).cpu().numpy().astype(np.int16) - middle.frame)
            scores.append(1 - float(wrong.mean()) / 255)
        return np.array(scores)
