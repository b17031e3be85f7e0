"""Policy of the past, as data: which frames a block may see, at which positions, and when it is recomputed.

`Timeline` applies a policy to one stream; nothing here knows a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError, quoted

POSITIONS = ("absolute", "window-relative", "contiguous")
SWITCHES = ("cut", "recache", "blend", "join")
IMAGES = ("prefix", "clamp", "paste", "channels")
TEXTS = ("prompt", "null")
WEIGHTS = ("plain", "memory")


@dataclass(frozen=True)
class ContextPolicy:
    """What a block attends to.

    local_attn_size: frames a block sees, itself included; -1 for all. sink_size: first frames that stay.
    positions: `absolute` frame numbers; `window-relative` numbers from 0 over the visible frames;
    `contiguous` numbers that end at the block's own absolute ones, so that the sink stands before the window.
    commit: a pass over the clean block leaves its keys and values; otherwise a rebuild before each block does.
    commit_sees_sink: a commit sees what a denoising pass sees; otherwise the last `local_attn_size` frames as they are,
    and the cache keeps the sink beside them.
    segment_frames: rebuild once the frames since the last rebuild would pass this; 0 never.
    rebuild_frames: how many of the last clean frames a rebuild keeps. reencode_head: the first of them is
    encoded again from the picture it was decoded to. restart_decoder: the decoder starts anew with them too.
    decoder_zero_start: the decoder starts from zero caches: of the four pictures of its first latent frame the last is
    kept. That changes pictures near the start, and latents where a picture is encoded again.
    prompt_switch: a new prompt only applies from the next block (`cut`), or the visible past is passed through
    the network again under it (`recache`), or it is blended in over `blend_blocks` blocks (`blend`).
    A blend begins with the old prompt and ends with the new one; before the first block it is a cut. With `join`,
    blocks that join from then on follow it; those in flight keep theirs.
    rebuild_before_switch: a rebuild runs under the prompt of the block before; otherwise under the next block's.
    recache_sink: a recache moves the sink to the first frames of the window and recomputes it; otherwise it recomputes
    the sink only until the window first rolls.
    shot_offset: added to absolute positions at each scene cut; the first block of the newest shot stays visible.
    image: an image is committed as a clean block of its own (`prefix`), or held as the first frame of the first
    block at timestep 0 (`clamp`); or whole blocks of an image or video are committed, and before each pass the frames
    that are left are put over the first ones of the first block, which keeps its timestep (`paste`); or it is given to
    every pass as channels beside the latents, with a mask, and its frame is generated like any other (`channels`).
    rest_sink: frames of a rest (the model's first action) that become the sink as the first of them leaves the window;
    0 for none. So a stream that stands still keeps what it saw when it arrived, and its errors do not add up. Where it
    moves on, the window takes their places back, one block at a time, but for those of the first `sink_size`. Models
    without actions never rest.
    sink_decay: share of the sink that stays when a frame leaves the window, whose share is the rest; 1 leaves the sink
    as it is. rewind_blocks: how many of the last blocks a session can be taken back by.
    noise2clean_kvrange: blocks that a block sees, itself the last of them, in each of equally many shares of its steps,
    the noisiest first; empty where the blocks in flight see each other and the window. clean_chunk_kvrange: blocks that
    a commit sees, itself the last; 0 for the window. Sources: MAGI-1 (arXiv 2505.13211), whose names they are.
    commit_in_next: the commit of a block runs in the first pass of the next one, or by itself before a new prompt.
    clean_text: what frames attend to in passes over clean latents: the `prompt`, or the `null` caption.
    clean_weights: what runs passes over clean latents, and so makes the cache: the `plain` weights, or the `memory`
    weights, a second full set (SGF+, arXiv 2610.10429).
    """

    local_attn_size: int
    sink_size: int
    positions: str
    commit: bool = True
    commit_sees_sink: bool = True
    segment_frames: int = 0
    rebuild_frames: int = 0
    reencode_head: bool = False
    restart_decoder: bool = False
    decoder_zero_start: bool = False
    prompt_switch: str = "cut"
    rebuild_before_switch: bool = False
    recache_sink: bool = False
    blend_blocks: int = 1
    shot_offset: int = 0
    image: str = "prefix"
    rest_sink: int = 0
    sink_decay: float = 1.0
    rewind_blocks: int = 0
    noise2clean_kvrange: tuple[int, ...] = ()
    clean_chunk_kvrange: int = 0
    clean_text: str = "prompt"
    clean_weights: str = "plain"
    commit_in_next: bool = False

    def __post_init__(self) -> None:
        choices = {
            "positions": POSITIONS, "prompt_switch": SWITCHES, "image": IMAGES, "clean_text": TEXTS,
            "clean_weights": WEIGHTS,
        }  # fmt: skip
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise UsageError(f"{key} is {quoted(getattr(self, key))}; expected one of {', '.join(known)}")
        if self.local_attn_size < 1 and self.local_attn_size != -1:
            raise UsageError(f"local_attn_size is {self.local_attn_size}; expected 1 or more, or -1 for all frames")
        counts = ("sink_size", "rest_sink", "segment_frames", "rebuild_frames", "shot_offset", "rewind_blocks")
        for key in (*counts, "clean_chunk_kvrange"):
            if getattr(self, key) < 0:
                raise UsageError(f"{key} is {getattr(self, key)}; expected 0 or more")
        if not 0 < self.sink_decay <= 1:
            raise UsageError(f"sink_decay is {self.sink_decay}; expected more than 0 and at most 1")
        if self.sink_decay < 1 and self.sink_size == 0:
            raise UsageError(f"sink_decay is {self.sink_decay}, but there is no sink; give sink_size, or leave it out")
        if self.moving_positions and self.sink_size and self.shot_offset:
            raise UsageError(
                f"positions {self.positions} with shot_offset {self.shot_offset} put the sink, the newest shot and the "
                "window at three distances; use absolute positions, no sink (sink_size=0) or no shots (shot_offset=0)"
            )
        if self.rebuild_before_switch and self.prompt_switch == "recache":
            raise UsageError("rebuild_before_switch is true, but prompt_switch is 'recache'; use cut or blend")
        if any(blocks < 1 for blocks in self.noise2clean_kvrange):
            raise UsageError(f"noise2clean_kvrange is {list(self.noise2clean_kvrange)}; expected 1 block or more each")
        if self.has_key_ranges and not self.commit_sees_sink:
            raise UsageError(
                "commit_sees_sink is false, but noise2clean_kvrange or clean_chunk_kvrange says what a block sees; "
                "set it to true, or leave the ranges out"
            )
        if self.clean_text == "null" and self.prompt_switch == "recache":
            raise UsageError(
                "clean_text is 'null', so that the cache follows no prompt, but prompt_switch is 'recache'; use cut"
            )
        if self.commit_in_next and (self.recomputes or self.reencode_head):
            raise UsageError(
                f"commit_in_next is true, but commit is {self.commit}, prompt_switch {quoted(self.prompt_switch)} and "
                f"segment_frames {self.segment_frames}; expected true, cut or blend, and 0"
            )
        if self.commit_in_next and self.prompt_switch == "join" and self.clean_text == "prompt":
            raise UsageError(
                "prompt_switch is 'join' and clean_text 'prompt', but commit_in_next runs the commit of a block among "
                "blocks of other prompts; use cut, or set clean_text=null"
            )
        if self.commit_in_next and self.clean_weights != "plain":
            raise UsageError(
                f"clean_weights is {quoted(self.clean_weights)}, but commit_in_next runs a commit and a denoising step "
                "in one pass; set it to false"
            )
        if self.blend_blocks < 1:
            raise UsageError(f"blend_blocks is {self.blend_blocks}; expected 1 or more")
        if (self.segment_frames > 0 or not self.commit) and self.rebuild_frames < 1:
            raise UsageError("rebuild_frames is 0, but the context is rebuilt; expected 1 or more")

    @property
    def needs_pixels(self) -> bool:
        """Whether the next block waits for the pictures of the one before."""
        return self.reencode_head

    @property
    def encodes_pictures(self) -> bool:
        """True where a stream needs an encoder, which tiny decoders lack: for pictures, or an image's channels."""
        return self.reencode_head or self.image == "channels"

    @property
    def sink_beside_window(self) -> int:
        """Frames of the sink that the cache keeps beside a full window, because a commit does not see them."""
        return 0 if self.commit_sees_sink else self.sink_size

    @property
    def rotates_sink(self) -> bool:
        """True where queries can need another rotation for the sink than for the window."""
        return self.moving_positions and self.sink_size > 0

    @property
    def moving_positions(self) -> bool:
        """True where a frame's position changes while the cache holds it."""
        return self.positions != "absolute"

    @property
    def recomputes(self) -> bool:
        """True where passes run over clean frames of earlier blocks: a recache, or a rebuild."""
        return self.prompt_switch == "recache" or self.segment_frames > 0 or not self.commit

    @property
    def has_key_ranges(self) -> bool:
        """True where a block's keys depend on its noise level."""
        return bool(self.noise2clean_kvrange or self.clean_chunk_kvrange)

    @property
    def has_one_context(self) -> bool:
        """True where all passes of a block denoised alone see the same frames and text."""
        return not self.has_key_ranges and self.clean_text == "prompt"

    def key_range(self, step: int, steps: int) -> int | None:
        """Blocks that a block sees at one of `steps` sampler steps, itself included; None for the whole window."""
        ranges = self.noise2clean_kvrange
        return ranges[step * len(ranges) // steps] if ranges else None

    def blocks_reached(self, window_blocks: int, steps: int) -> int:
        """Most blocks from the oldest that a block in flight sees by its key range to the newest; 0 without ranges."""
        newer = [step * window_blocks // steps for step in range(steps)]  # blocks in flight behind it at each step
        reach = [blocks + newer[step] for step in range(steps) if (blocks := self.key_range(step, steps)) is not None]
        return max([*reach, self.clean_chunk_kvrange + window_blocks - 1 if self.clean_chunk_kvrange else 0])

    def check_key_ranges(self, frames: int, window_blocks: int, steps: int) -> None:
        """UsageError unless the steps have equal shares, and what each block in flight sees lies in the window."""
        ranges, size = self.noise2clean_kvrange, self.local_attn_size
        if ranges and steps % len(ranges):
            raise UsageError(
                f"noise2clean_kvrange {list(ranges)} has {len(ranges)} entries for {steps} steps; expected a divisor"
            )
        most = self.blocks_reached(window_blocks, steps)
        if size != -1 and most * frames + self.sink_size > size:
            raise UsageError(
                f"local_attn_size {size} is smaller than the {most} blocks of {frames} frames that "
                f"noise2clean_kvrange {list(ranges)} and clean_chunk_kvrange {self.clean_chunk_kvrange} reach over, "
                f"plus sink_size {self.sink_size}; widen the window or shrink the ranges"
            )

    def most_rest_frames(self, frames: int, window_blocks: int) -> int:
        """Largest `rest_sink` for blocks of `frames`, so many at a time; 0 where the sink cannot move to a rest.

        The newest block and one before it stay beside the sink, and its frames leave the window at once.
        """
        moved = self.sink_decay < 1 or self.shot_offset or self.segment_frames or not self.commit
        if moved or self.has_key_ranges or self.commit_in_next or window_blocks > 1 or not 0 < self.sink_size <= frames:
            return 0
        most = self.local_attn_size - 2 * frames
        return most if most >= self.sink_size else 0

    def check_blocks(self, frames: int, window_blocks: int) -> None:
        """UsageError unless blocks of `frames`, so many at a time, fit beside the sink."""
        needed = frames * window_blocks + self.sink_size
        if self.local_attn_size != -1 and self.local_attn_size < needed:
            raise UsageError(
                f"local_attn_size {self.local_attn_size} is smaller than a block of {frames} frames"
                f"{f', {window_blocks} at a time,' if window_blocks > 1 else ''} plus sink_size {self.sink_size}; "
                "widen the window or shrink the sink"
            )
        if not self.commit_sees_sink and window_blocks == 1:
            raise UsageError(
                "commit_sees_sink is false, but window_blocks is 1, and a block that is denoised alone writes in the "
                "window of its commit; set it to true, or denoise several blocks together"
            )
        most = self.most_rest_frames(frames, window_blocks)
        if self.rest_sink and not self.sink_size <= self.rest_sink <= most:
            raise UsageError(
                f"rest_sink is {self.rest_sink}; expected 0{f', or {self.sink_size} to {most}' if most else ''}: it "
                f"needs a window that ends, of {self.rest_sink} frames and two blocks of {frames}, and a sink of 1 to "
                f"{frames} frames, without sink_decay, shot_offset, window_blocks, commit_in_next, a recomputed "
                "context or ranges of keys"
            )
        if self.segment_frames and self.segment_frames < self.rebuild_frames + frames:
            raise UsageError(
                f"segment_frames {self.segment_frames} is smaller than rebuild_frames {self.rebuild_frames} plus "
                f"a block of {frames}; lengthen the segment"
            )
