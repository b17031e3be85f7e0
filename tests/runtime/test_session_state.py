"""A session's state: its fields are declared once, and fork, rollback, save and restore follow the declarations."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from oracles import ROWS, SIZE, make_engine, remade

from inferix.graphs.passes import Pass
from inferix.runtime.limits import DegradationStep
from inferix.runtime.sessions.session import Session
from inferix.runtime.sessions.session_state import FieldRule, SavedFields, SaveForm, SessionState, forked

CUTS = {"local_attn_size": 6, "sink_size": 2, "num_frame_per_block": 2, "num_steps": 2, "rewind_blocks": 2}


class NumbersForm(SaveForm):
    key = "numbers"

    def write(self, value: list[int], file: SavedFields) -> None:
        file.header["numbers"] = value

    def check(self, file: SavedFields) -> None:
        assert isinstance(file.header["numbers"], list)

    def read(self, file: SavedFields) -> Any:
        return file.header["numbers"]


@dataclass(eq=False, repr=False)
class Numbered(SessionState):
    """An example of one more field: this line, and the form in a file."""

    numbers: list[int] = field(default_factory=list, metadata=forked(NumbersForm(), list))


def test_a_new_field_takes_one_line() -> None:
    engine = make_engine(dtype="float32", rewind_blocks=1)
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        list(session.stream(1))
        session.current = state = Numbered(**vars(session.current), numbers=[1])
        twin = session.fork()
        list(session.stream(1))
        session.mark_rollback()
        state.numbers.append(2)
        assert twin.current.numbers == [1]
        session.rollback()
        assert state.numbers == [1]
        state.numbers.append(3)
        file = SavedFields(engine.resources, engine.preset, {}, {})
        state.save(file)
        read = Numbered.read(file)
        read.fill(file)
        assert read.numbers == [1, 3]
        read.release()
        assert read.numbers == []
        session.rewind(1)
        assert session.current.numbers == [1]
        twin.close()
    engine.check_integrity()


CHANGING = ("timeline", "branches", "actions", "decoder", "flight", "prompts", "change")


def test_a_fork_shares_no_value_that_changes_in_place() -> None:
    engine = make_engine("rolling-forcing", dtype="float32", local_attn_size=9, window_blocks=2,
                         denoising_step_list=[1000, 500])  # fmt: skip
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        list(session.stream(2))
        session.current.change = object()
        fork = session.current.fork()
        for item in fields(SessionState):
            rule, mine, other = FieldRule.of(item), getattr(session.current, item.name), getattr(fork, item.name)
            changes = rule.copy(mine) is not mine
            assert changes == (item.name in CHANGING)
            assert (other is mine) == (not changes)
        assert fork.flight and fork.flight[0] is not session.current.flight[0]
        assert fork.flight[0].solver is not session.current.flight[0].solver
        assert fork.timeline.places is not session.current.timeline.places
        fork.release()
        session.current.change = None
    unsaved = {item.name for item in fields(SessionState) if FieldRule.of(item).save is None}
    assert unsaved == {"prefix_frames", "given", "live"}


def test_a_shot_whose_first_block_was_rolled_back_begins_after_a_restore(tmp_path, monkeypatch) -> None:
    """The prompt that cuts is taken, the block runs out of memory: the timeline is saved with the cut to come."""

    class Encoder:
        def encode(self, prompt: str) -> torch.Tensor:
            return engine.inputs.prompt_rows(None, ROWS.flip(0).float())

    engine = remade(make_engine("longlive2", "float32", **CUTS), text=Encoder)
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        list(session.stream(2))
        session.prompt(engine.preset.scene_cut_prefix + "rain")

        def failing(requests: list[Pass]) -> None:
            raise torch.OutOfMemoryError("no memory for a pass")

        with monkeypatch.context() as patch:
            patch.setattr(engine.loop, "forward", failing)
            with pytest.raises(torch.OutOfMemoryError):
                list(session.stream(1))
        assert session.current.timeline.pin_next and session.current.timeline.pinned == ()
        session.save(tmp_path / "cut.safetensors")
        twin = Session.restore(engine, tmp_path / "cut.safetensors")
        blocks, again = (list(each.stream(4)) for each in (session, twin))
        assert all(torch.equal(one.latents, other.latents) for one, other in zip(blocks, again, strict=True))
        assert session.current.timeline.pinned == twin.current.timeline.pinned == (4, 5)
        twin.close()


def test_a_window_that_overload_narrowed_stays_narrow_after_a_rewind() -> None:
    engine = make_engine("self-forcing", dtype="float32", local_attn_size=9, rewind_blocks=2)
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        list(session.stream(4))
        engine.manager.scheduler.degradations.append(DegradationStep("window", 6))
        assert engine.preset.context.local_attn_size == 6 and engine.resources.preset.context.local_attn_size == 9
        session.rewind(3)
        list(session.stream(1))
        assert session.current.branches[0].cache.frames == tuple(range(6, 12))
        with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as other:
            assert other.current.preset == session.current.preset == engine.preset
    engine.check_integrity()
