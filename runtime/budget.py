"""How much KV memory a session of a preset needs, and how many pages a budget holds: arithmetic on sizes only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UsageError
from ..schemes.presets import Preset

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(given: int | str) -> int:
    """Bytes of 6000000000, "6GB" or "5.5 GiB"; UsageError for what is none or not above 0."""
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", str(given).strip())
    if isinstance(given, bool) or found is None or found[2].upper() not in UNITS or found[1].count(".") > 1:
        raise UsageError(f"memory is {given!r}; expected bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    count = int(float(found[1]) * UNITS[found[2].upper()]) if found[1] != "." else 0
    if count < 1:
        raise UsageError(f"memory is {given!r}; expected more than 0 bytes")
    return count


def in_words(count: int) -> str:
    """Bytes for people."""
    for unit in ("GB", "MB", "kB"):
        scale = UNITS[unit.upper()]
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count} bytes"


@dataclass(frozen=True)
class PageNeeds:
    """Pages of one branch of a session: held, lent to a pass as scratch, and kept back for rewinding.

    held is None where the window has no end.
    """

    held: int | None
    scratch: int
    kept_back: int

    @property
    def total(self) -> int | None:
        return None if self.held is None else self.held + self.scratch + self.kept_back


def page_needs(preset: Preset) -> PageNeeds:
    """What the policy can ask for at most."""
    policy, block = preset.context, preset.num_frame_per_block
    limits = [policy.local_attn_size] if policy.local_attn_size != -1 else []
    if policy.segment_frames:
        limits.append(policy.segment_frames)
    if not policy.commit:
        limits.append(policy.rebuild_frames + block)
    held = min(limits, default=None)
    kept_back = policy.rewind_blocks * (block if policy.commit else block + policy.rebuild_frames)
    if policy.rewind_blocks and policy.segment_frames:
        kept_back += policy.rebuild_frames
    if policy.rewind_blocks and policy.prompt_switch == "recache":
        kept_back += held or 0
    return PageNeeds(held, preset.window_blocks * block if preset.window_blocks > 1 else 0, kept_back)


def branches(preset: Preset) -> int:
    """Pasts that a session keeps: guidance has one for each of its two conditionings."""
    return 1 if preset.sampler.guidance_scale == 1 else 2


def least_pages(preset: Preset) -> int:
    """Pages that one session needs; where the window has no end, those of its first block."""
    return branches(preset) * (page_needs(preset).total or preset.num_frame_per_block)


def staging_slots(preset: Preset) -> int:
    """Frames that the buffer before pages of another dtype has room for."""
    needs = page_needs(preset)
    return (needs.held or preset.num_frame_per_block) + needs.scratch


def pages_in(budget: int, page_bytes: int, fixed: int, preset: Preset) -> int:
    """Pages that fit into `budget` bytes beside `fixed` ones; UsageError where a session of the preset needs more."""
    least = least_pages(preset)
    pages = (budget - fixed) // page_bytes
    if pages < least:
        raise UsageError(
            f"kv_memory is {in_words(budget)}, but one session of {preset.name} needs "
            f"{in_words(least * page_bytes + fixed)}: {least} latent frames of {in_words(page_bytes)}. Give at least "
            "that much, or ask for a smaller window (local_attn_size), smaller pictures (size) or fewer bytes a number "
            "(kv_dtype)"
        )
    return pages
