"""The paired benchmark on a CPU: its refusals, the cases that are kept when one fails, and one round of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from inferix.bench import cpu_pairs
from inferix.bench.result import Series, read_result
from inferix.errors import InferixError, UsageError

HERE = Path(cpu_pairs.__file__).parents[1]


def measure(out: Path, **given):
    settings = {"before": HERE, "rounds": 1, "dtype": ["float32"], "case": [], "threads": [1], "target": []} | given
    cpu_pairs.main(out=out, **settings)


@pytest.mark.parametrize(
    ("given", "bad"),
    [
        ({"case": ["large world"]}, "large world"), ({"dtype": ["float8"]}, "float8"), ({"target": ["onyx"]}, "onyx"),
        ({"before": Path("/nowhere")}, "/nowhere"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_measured_are_refused_before_anything_is_written(given, bad, tmp_path):
    with pytest.raises(UsageError, match=bad):
        measure(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_cases_that_were_measured_are_kept_when_one_fails(tmp_path, monkeypatch):
    def run_case(case, *_):
        if case.name == cpu_pairs.CASES[1].name:
            raise InferixError("a candidate ended")
        return {f"{case.name}/1/after/block cpu": Series("s", (0.5,))}, {"after": 0}

    monkeypatch.setattr(cpu_pairs, "run_case", run_case)
    with pytest.raises(InferixError, match="ended"):
        measure(tmp_path)
    result = read_result(tmp_path / "pairs-cpu-float32.json")
    assert list(result.facts["cases"]) == list(result.facts["levels"]) == [cpu_pairs.CASES[0].name]
    assert result.series["small world/1/after/block cpu"].samples == (0.5,)


@pytest.mark.slow
def test_a_round_measures_every_candidate_and_a_tree_has_its_own_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_pairs, "CASES", (replace(cpu_pairs.CASES[0], fill=3, blocks=1),))
    measure(tmp_path)
    result = read_result(tmp_path / "pairs-cpu-float32.json")
    parts = ("transformer", "block")
    names = {
        f"small world/1/{name}/{part} {clock}"
        for name in ("before", "after", "fused") for part in parts for clock in ("cpu", "wall")
    }  # fmt: skip
    assert set(result.series) == names
    assert all(len(series.samples) == 1 and series.samples[0] > 0 for series in result.series.values())
    assert result.facts["levels"]["small world"]["after"] == 0  # the same tree twice
    assert result.facts["levels"]["small world"]["fused"] <= 1
