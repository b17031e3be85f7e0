"""How many pages a session of a preset needs: arithmetic on a preset's sizes."""

from __future__ import annotations

from dataclasses import dataclass

from .presets import Preset


@dataclass(frozen=True)
class PageNeeds:
    """Pages of one branch of a session: context, scratch lent to a pass, and reserve for rewinding.

    context is None where the window has no end.
    """

    context: int | None
    scratch: int
    reserve: int

    @property
    def total(self) -> int | None:
        return None if self.context is None else self.context + self.scratch + self.reserve


def page_needs(preset: Preset) -> PageNeeds:
    """Pages that the policy can ask for at most."""
    policy, block = preset.context, preset.num_frame_per_block
    # A block that is denoised alone has pages of its own, while the block before still sees its own window.
    both = block if policy.commit_in_next and preset.window_blocks == 1 else 0
    limits = [policy.local_attn_size + policy.sink_beside_window + both] if policy.local_attn_size != -1 else []
    if policy.segment_frames:
        limits.append(policy.segment_frames)
    if not policy.commit:
        limits.append(policy.rebuild_frames + block)
    context = min(limits, default=None)
    reserve = policy.rewind_blocks * (block + both if policy.commit else block + policy.rebuild_frames)
    if policy.rewind_blocks and policy.segment_frames:
        reserve += policy.rebuild_frames
    if policy.rewind_blocks and policy.prompt_switch == "recache":
        reserve += context or 0
    scratch = preset.window_blocks * block if preset.window_blocks > 1 else 0
    if any(branch.reads is not None for branch in preset.sampler.guide.branches):  # it writes no frame of a pass
        scratch = (preset.window_blocks + policy.commit_in_next) * block
    return PageNeeds(context, scratch, reserve)


def window(preset: Preset) -> int:
    """Latent frames that a block sees at most, itself included, for a preset whose window has an end."""
    context, policy = page_needs(preset).context, preset.context
    assert context is not None, preset.name
    both = preset.num_frame_per_block if policy.commit_in_next and preset.window_blocks == 1 else 0
    return context - policy.sink_beside_window - both


def branches(preset: Preset) -> int:
    """Runs of the network over each pass: guidance has several."""
    return len(preset.sampler.guide.branches)


def conditionings(preset: Preset) -> int:
    """Prompts that are prepared for a stream: one for each branch, and each set of weights that runs it."""
    return branches(preset) * (1 if preset.sampler.boundary_ratio else len(preset.weight_sets))


def needs_negative(preset: Preset) -> bool:
    """True where passes use a negative prompt: as guidance's other conditioning, or as the null caption."""
    texts = [branch.text for branch in preset.sampler.guide.branches]
    return "negative" in texts or preset.context.clean_text == "null"


def least_pages(preset: Preset, cache: int | None = None) -> int:
    """Pages that one session needs; where the window has no end, those of its first block.

    cache: of the branches of guidance with this cache alone, as `Guidance.caches` numbers them.
    """
    guide = preset.sampler.guide
    branches = [branch for branch, number in zip(guide.branches, guide.caches, strict=True) if cache in (None, number)]
    pasts = sum(branch.writes_past for branch in branches)
    alone = any(not branch.sees_past for branch in branches)
    pages = pasts * (page_needs(preset).total or preset.num_frame_per_block)
    return pages + alone * preset.window_blocks * preset.num_frame_per_block  # for the pass


def staging_slots(preset: Preset) -> int:
    """Frames that the buffer before pages of another dtype has room for."""
    needs = page_needs(preset)
    return (needs.context or preset.num_frame_per_block) + needs.scratch
