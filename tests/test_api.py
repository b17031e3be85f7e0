"""What a newcomer meets in Python: objects that tell what they are in one line, and refusals of plausible mistakes."""

import pytest
from oracles import ROWS, SIZE, make_engine

import inferix
from inferix.models.text.umt5 import clean_prompt


def test_objects_tell_what_they_are_in_one_line():
    engine = make_engine(dtype="float32", denoising_step_list=[1000])
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        (block,) = session.stream(1)
        told = [repr(engine), repr(session), repr(block)]
    assert "preset='self-forcing', device='cpu', dtype='float32', executor='eager'" in told[0]
    assert "32x32, next block 1" in told[1]
    assert told[2] == "<Block 0, latents [3, 16, 4, 4], frames [9, 32, 32, 3]>"


@pytest.mark.parametrize("seed", ["x", 1.5, True, -1, 1 << 64, None])
def test_a_seed_is_a_whole_number(seed):
    engine = make_engine(dtype="float32")
    with pytest.raises(inferix.UsageError, match=f"seed is {seed!r}"):
        engine.open(prompt_embeds=ROWS.float(), size=SIZE, seed=seed)


def test_a_prompt_is_text():
    with pytest.raises(inferix.UsageError, match="is a list; expected text"):
        clean_prompt(["a boat"])


def test_every_public_name_is_there():
    assert all(hasattr(inferix, name) for name in inferix.__all__)


def test_public_names_are_what_completion_offers():
    assert {"load", "Session", "Engine"} <= set(dir(inferix)) and "import_module" not in dir(inferix)


def test_wrong_names_of_settings_are_told_with_the_nearest():
    with pytest.raises(inferix.UsageError, match="no setting 'kv_memry'; did you mean 'kv_memory'"):
        inferix.load("wan-tiny", device="cpu", kv_memry="4GB")
    with pytest.raises(inferix.UsageError, match="did you mean 'preset'"):
        inferix.load("wan-tiny", device="cpu", presett="longlive")
