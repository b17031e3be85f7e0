"""The examples of the docs run; the example of docs/models.md makes a video from a file in its own format."""

import re
from pathlib import Path

import torch

import inferix
from inferix import checkpoint, evaluate, load, media
from inferix.export.checkpoint import write_random
from inferix.models.registry import FORMATS, PRESETS, make_preset
from inferix.runtime.limits import Limits

PARTS = (checkpoint, evaluate, media)
DOCS = Path(__file__).parents[1] / "docs"
DOC = (DOCS / "models.md").read_text("utf-8")


def brook_file(folder):
    """A checkpoint in the layout of the documentation's example, whose layers have a prefix of their own."""
    write_random("wan-tiny", "causvid", folder)
    content = torch.load(folder / "model.pt", weights_only=True)
    (folder / "model.pt").unlink()
    student = {}
    for name, tensor in content["generator"].items():
        bare = name.removeprefix("model.")
        theirs = f"layers.{bare.removeprefix('blocks.')}" if bare.startswith("blocks.") else bare
        student[f"net.{theirs.replace('head.head', 'to_pixels')}"] = tensor
    torch.save({"student": student, "critic": {}}, folder / "brook.pt")
    return folder


def test_the_worked_example(tmp_path):
    """The documentation's example in Python: the file is recognised by the names in it."""
    (example,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    assert len(example.splitlines()) < 60
    formats, presets = dict(FORMATS), dict(PRESETS)
    try:
        exec(compile(example, "docs/models.md", "exec"), {})
        engine = load(brook_file(tmp_path / "brook"), preset="brook", device="cpu")
        assert engine.parts.form == "brook"
        with engine.open(prompt="water", size=(32, 32)) as session:
            assert [len(block.frames) for block in session.stream(2)] == [5, 8]
    finally:
        for known, before in ((FORMATS, formats), (PRESETS, presets)):
            known.clear()
            known.update(before)


def test_the_worked_example_as_files(tmp_path):
    """The two YAML files of the documentation give the engine that its Python example gives."""
    preset, names = re.findall(r"```yaml\n(# brook.*?)```", DOC, re.DOTALL)
    (tmp_path / "brook.yaml").write_text(preset, "utf-8")
    (tmp_path / "brook-names.yaml").write_text(names, "utf-8")
    scheme = make_preset(str(tmp_path / "brook.yaml"))
    assert (scheme.name, scheme.num_frame_per_block, scheme.context.sink_size) == ("brook", 2, 2)
    assert scheme.about.weights == "nobody/brook"
    folder = brook_file(tmp_path / "model")
    plain = write_random("wan-tiny", "causvid", tmp_path / "plain")
    settings = {"preset": str(tmp_path / "brook.yaml"), "device": "cpu"}
    engine = load(folder / "brook.pt", names=tmp_path / "brook-names.yaml", **settings)
    other = load(plain, **settings)
    for name, weight in other.parts.transformer.state_dict().items():
        assert torch.equal(weight, engine.parts.transformer.state_dict()[name])
    with engine.open(prompt="water", size=(32, 32)) as session:
        assert [len(block.frames) for block in session.stream(2)] == [5, 8]


def test_the_examples_about_sessions(tmp_path, monkeypatch, capsys):
    """One after the other, as they stand there."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "sessions.md").read_text("utf-8")
    shared = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(example, "docs/sessions.md", "exec"), shared)
    printed = capsys.readouterr().out
    assert re.search(r"block 2 .*\d s later", printed)
    assert re.search(r"session [0-9a-f]{32} .*1\.248 MB.*3\.7\d* MB.*4 MB", printed)
    assert all(f"`{field}`" in text for field in vars(Limits()))


def test_every_limit_control_and_route_of_a_server_is_documented():
    from inferix.serve.protocol import json_schema
    from inferix.serve.settings import LIMITS, ServeSettings

    text = (DOCS / "serving.md").read_text("utf-8")
    verbs = json_schema()["controls"]["discriminator"]["mapping"]
    events = json_schema()["events"]["discriminator"]["mapping"]
    assert all(f"`{name}`" in text for name in (*LIMITS, *verbs, *events))
    defaults = dict(re.findall(r"^\| `(\w+)` \| (\S*) ?\|", text, re.MULTILINE))
    for name in LIMITS:
        value = getattr(ServeSettings(), name)
        text = f"{value:g}" if isinstance(value, float) else str(value).lower()
        assert defaults[name] == ("" if value is None else text)


def test_the_example_about_drift(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "drift.md").read_text("utf-8"), re.DOTALL)
    exec(compile(example, "docs/drift.md", "exec"), {})
    assert re.fullmatch(r"\[0.77, .*, 0.41\]\nVDE 8.44, vde2 -0.32\n", capsys.readouterr().out)


def test_every_preset_and_format_is_documented():
    for name in (*PRESETS, *(form for form in FORMATS if form not in ("original", "diffusers"))):
        assert f"`{name}`" in DOC


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text("utf-8")
    names = [*inferix.__all__, *(f"{part.__name__.split('.')[1]}.{name}" for part in PARTS for name in part.__all__)]
    missing = [name for name in names if f"inferix.{name}" not in text]
    assert not missing
    assert text.count("::: ") == len(set(re.findall(r"::: (\S+)", text)))
