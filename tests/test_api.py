"""The public API: one-line reprs, public names, and refusals of plausible mistakes."""

import os
import subprocess
import sys

import pytest
from oracles import ROWS, SIZE, make_engine

import inferix
from inferix.models.text.umt5 import clean_prompt


def test_reprs_are_one_line_with_the_main_facts():
    engine = make_engine(dtype="float32", denoising_step_list=[1000])
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        (block,) = session.stream(1)
        texts = [repr(engine), repr(session), repr(block)]
    assert all("\n" not in text for text in texts)
    assert all(f"{value!r}" in texts[0] for value in ("self-forcing", "cpu", "float32", "eager"))
    assert "32x32" in texts[1]
    assert texts[2] == "<Block 0, latents [3, 16, 4, 4], frames [9, 32, 32, 3]>"


@pytest.mark.parametrize("seed", ["x", 1.5, True, -1, 1 << 64, None])
def test_a_seed_is_a_whole_number(seed):
    engine = make_engine(dtype="float32")
    with pytest.raises(inferix.UsageError, match=f"seed.*{seed!r}"):
        engine.open(prompt_embeds=ROWS.float(), size=SIZE, seed=seed)


def test_a_prompt_is_text():
    with pytest.raises(inferix.UsageError, match=r"prompt.*list"):
        clean_prompt(["a boat"])


def test_every_public_name_is_there():
    assert all(hasattr(inferix, name) for name in inferix.__all__)


def test_public_names_are_what_completion_offers():
    assert {"load", "Session", "Engine"} <= set(dir(inferix)) and "import_module" not in dir(inferix)


def test_an_unknown_setting_is_refused_with_the_nearest_name():
    with pytest.raises(inferix.UsageError, match=r"'kv_memry'.*'kv_memory'"):
        inferix.load("wan-tiny", device="cpu", kv_memry="4GB")
    with pytest.raises(inferix.UsageError, match=r"'presett'.*'preset'"):
        inferix.load("wan-tiny", device="cpu", presett="longlive")


@pytest.mark.skipif(sys.platform != "linux", reason="the OpenMP of torch for Linux prints its settings")
@pytest.mark.parametrize(
    ("chosen", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_threads_that_wait_spin_for_a_short_time_unless_the_user_chose(chosen, spins):
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = kept | {"OMP_DISPLAY_ENV": "verbose"} | chosen
    run = [sys.executable, "-c", "import inferix, torch"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    lines = {line.strip() for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line}
    if not lines:
        pytest.skip("this torch has another OpenMP than GNU's")
    assert any(line.split("=")[1].strip(" '") == spins for line in lines)
