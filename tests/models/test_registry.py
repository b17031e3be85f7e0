"""The registry of families: one from outside is registered, loaded by name and removed; clashes are refused."""

import dataclasses
from collections.abc import Mapping

import pytest

import inferix
from inferix.errors import UsageError
from inferix.models.family import Format
from inferix.models.registry import FAMILIES, MODELS, PRESETS, default_preset, family_of, formats, register, unregister
from inferix.models.wan.family import WAN, WanFamily
from inferix.schemes.presets import About

SPEC = dataclasses.replace(MODELS["wan-tiny"], name="brook-tiny", family="brook", ffn_dim=128, num_layers=1)
PRESET = dataclasses.replace(
    PRESETS["self-forcing"], name="brook", about=About("brook-tiny", "MIT", "nobody/brook"), num_frame_per_block=2
)


class Brook(WanFamily):
    name, models, presets, demo = "brook", {SPEC.name: SPEC}, (PRESET,), SPEC.name
    formats: Mapping[str, Format] = {"brook": WAN.formats["original"]}


@pytest.fixture
def brook():
    family = Brook()
    register(family)
    yield family
    unregister(family)


def test_a_family_from_outside_runs_by_its_names(brook):
    assert family_of(SPEC) is brook and default_preset("brook-tiny") == "brook" and "brook" in formats()
    engine = inferix.load("brook-tiny", device="cpu")
    assert (engine.spec, engine.preset.name) == (SPEC, "brook")
    with engine.open(prompt="water", size=(32, 32)) as session:
        assert [len(block.latents) for block in session.stream(2)] == [2, 2]
    assert inferix.load(preset="brook", device="cpu").spec is SPEC


def test_a_removed_family_leaves_nothing(brook):
    unregister(brook)
    try:
        assert not {"brook", "brook-tiny"} & {*FAMILIES, *MODELS, *PRESETS, *formats()}
        with pytest.raises(UsageError, match=r"'brook-tiny'.*'brook'"):
            family_of(SPEC)
    finally:
        register(brook)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "wan"}, "family 'wan'"),
        ({"models": {"wan-tiny": SPEC}}, "model 'wan-tiny'"),
        ({"presets": (PRESETS["krea"],)}, "preset 'krea'"),
        ({"formats": {"causvid": WAN.formats["causvid"]}}, "format 'causvid'"),
        ({"models": {"wan-other": dataclasses.replace(SPEC, family="wan")}}, r"'brook-tiny'.*'wan'.*'brook'"),
    ],
)
def test_names_that_are_taken_are_refused(change, words):
    family = Brook()
    for key, value in change.items():
        setattr(family, key, value)
    with pytest.raises(UsageError, match=words):
        register(family)
    assert not {"brook", "brook-tiny"} & {*FAMILIES, *MODELS, *PRESETS}


def test_what_a_family_lacks_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"brook.*original"):
        super(WanFamily, Brook()).write_random(tmp_path, SPEC, "original", 0, None)
