"""The worked example of docs/models.md runs, is short, and makes a video from a file in its own format."""

import re
from pathlib import Path

import torch

from inferix import load
from inferix.export.checkpoint import write_random
from inferix.models.wan.checkpoint import FORMATS
from inferix.runtime.presets import PRESETS

DOC = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")


def test_the_worked_example(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    assert len(example.splitlines()) < 60
    formats, presets = dict(FORMATS), dict(PRESETS)
    try:
        exec(compile(example, "docs/models.md", "exec"), {})
        folder = write_random("wan-tiny", "causvid", tmp_path / "brook")
        content = torch.load(folder / "model.pt", weights_only=True)
        (folder / "model.pt").unlink()
        torch.save({"student": content["generator"], "critic": {}}, folder / "brook.pt")
        engine = load(folder, preset="brook", device="cpu")
        assert engine.parts.form == "brook"
        with engine.open(prompt="water", size=(32, 32)) as session:
            assert [len(block.frames) for block in session.stream(2)] == [5, 8]
    finally:
        for known, before in ((FORMATS, formats), (PRESETS, presets)):
            known.clear()
            known.update(before)


def test_every_preset_and_format_is_told():
    for name in (*PRESETS, *(form for form in FORMATS if form not in ("original", "diffusers"))):
        assert f"`{name}`" in DOC
