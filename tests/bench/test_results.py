"""Result files, the comparison of two, and the page of many."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from inferix.bench import machine, nvml
from inferix.bench.compare import compare
from inferix.bench.goals import GOALS
from inferix.bench.plots import PLOTS, has_matplotlib, long_run, points
from inferix.bench.report import page, stems, write_report
from inferix.bench.result import SCHEMA, Series, read_folder, read_result, write_result
from inferix.cli.main import app
from inferix.errors import UsageError

from .example_results import CPU, FULL, H200, block_result

ROOT = Path(__file__).parents[2]


def noisy(middle: float, count: int = 15, seed: int = 0) -> list[float]:
    """Samples with a tail of slow ones, as a busy machine gives them."""
    generator = random.Random(seed)
    return [middle * (1 + 0.02 * generator.random() + 0.3 * (generator.random() < 0.1)) for _ in range(count)]


def test_a_result_survives_writing_and_reading(tmp_path):
    result = block_result({"eager/block": noisy(0.2)})
    path = write_result(result, tmp_path / "deep" / "block.json")
    assert read_result(path) == result
    assert read_folder(tmp_path) == {"deep/block.json": result}
    assert len(path.read_text().splitlines()) < 200  # samples of a series are in one line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": SCHEMA - 1}, f"schema {SCHEMA - 1}.*older"),
        ({"schema": SCHEMA + 1}, f"schema {SCHEMA + 1}.*newer"),
        ({"schema": None}, "schema"),
        ({"kind": "blok"}, "\'blok\'.*\'block\'"),
        ({"facts": 3}, "facts is 3"),
        ({"extra": 3}, "has 'extra'"),
        ({"environment": {"date": ""}}, "environment.*command"),
        ({"series": {"eager/block": {"unit": "s", "samples": [], "better": "less"}}}, "series 'eager/block'"),
        ({"series": {"eager/block": [1.0]}}, r"series 'eager/block' is \[1.0\]"),
        ({"series": {"eager/block": {"unit": "s", "samples": [10**400], "better": "less"}}}, "series 'eager/block'"),
        ({"series": {"x" * 10_000: 1}}, "series 'xxx"),
        ({"kind": "x" * 10_000}, "kind 'xxx"),
        ({"x" * 10_000: 1}, "has 'xxx"),
    ],
)
def test_a_foreign_or_old_file_is_refused(tmp_path, change, expected):
    path = write_result(block_result({"eager/block": [0.2]}), tmp_path / "block.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=expected) as caught:
        read_result(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "9" * 5000])
def test_what_is_no_file_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match=r"x\.json"):
        read_folder(tmp_path)
    for read, name in ((read_result, "x.json"), (read_result, "none.json"), (read_folder, "none")):
        with pytest.raises(UsageError, match=str(tmp_path / name)):
            read(tmp_path / name)


def test_quantiles():
    series = Series("s", (4.0, 1.0, 3.0, 2.0, 5.0))
    assert (series.median, series.best, series.worst) == (3.0, 1.0, 5.0)
    assert (series.quantile(0), series.quantile(0.25), series.quantile(0.9)) == (1.0, 2.0, pytest.approx(4.6))
    assert Series("B/s", (1.0, 2.0), "more").best == 2.0


def test_a_planted_slowdown_is_found_and_noise_is_not():
    before = block_result({"eager/block": noisy(0.2), "plain/block": noisy(0.5, seed=1), "eager/decode": noisy(0.1, 3)})
    slow = noisy(0.215, seed=2)
    after = block_result({"eager/block": slow, "plain/block": noisy(0.5, seed=3), "eager/decode": noisy(0.9, 3)})
    changes = {change.name: change for change in compare(before, after).changes}
    assert {name: change.verdict for name, change in changes.items()} == {
        "eager/block": "slower", "plain/block": "same", "eager/decode": "few",
    }  # fmt: skip
    assert changes["eager/block"].low <= changes["eager/block"].ratio <= changes["eager/block"].high
    back = {change.name: change.verdict for change in compare(after, before).changes}
    assert back["eager/block"] == "faster"
    wild = block_result({"eager/block": [0.1, 0.4, 0.1, 0.4, 0.25]})
    (unsure,) = compare(wild, block_result({"eager/block": [0.4, 0.1, 0.1, 0.4, 0.26]})).changes
    assert unsure.verdict == "unsure"


def test_a_difference_that_cannot_be_ruled_out_is_not_the_same():
    before = block_result({"eager/block": [0.1] * 5})
    (slower,) = compare(before, block_result({"eager/block": [0.15, 0.15, 0.15, 0.1, 0.1]})).changes
    assert slower.ratio == pytest.approx(1.5) and slower.verdict == "unsure"
    (within,) = compare(before, before, threshold=0.7).changes
    assert within.verdict == "same"


def test_only_what_belongs_together_is_compared():
    result = block_result({"eager/block": noisy(0.2)})
    for other, expected in (
        (block_result({"eager/block": noisy(0.2)}, H200), "cpu.*cuda"),
        (block_result({"eager/block": noisy(0.2)}, model="wan-14b"), "wan-1.3b.*wan-14b"),
        (block_result({"plain/block": noisy(0.2)}), "quantity"),
    ):
        with pytest.raises(UsageError, match=expected):
            compare(result, other)
    more = {"eager/block": noisy(0.2), "fused/block": [0.1]}
    comparison = compare(result, block_result(more, CPU | {"name": "Another"}, rounds=2))
    assert comparison.new == ("fused/block",)
    assert comparison.differences == (
        "device.name: Some Processor in A, Another in B", "settings.rounds: None in A, 2 in B",
    )  # fmt: skip
    other = block_result({"eager/block": noisy(0.2)})
    other.environment["host"] |= {"processor": "q", "threads": 2, "system": "t", "load": 3.0}
    other.environment.update(commit="def", date="2026-02-02", command="another")
    assert compare(result, other).differences == (
        "commit: abc in A, def in B", "host.processor: p in A, q in B", "host.system: s in A, t in B",
        "host.threads: 1 in A, 2 in B",
    )  # fmt: skip


def test_the_compare_command_prints_and_fails_on_slower(tmp_path):
    a = write_result(block_result({"eager/block": noisy(0.2)}), tmp_path / "a.json")
    b = write_result(block_result({"eager/block": noisy(0.3, seed=5)}), tmp_path / "b.json")
    runner = CliRunner()
    done = runner.invoke(app, ["bench", "compare", str(a), str(b)])
    assert done.exit_code == 0
    assert "eager/block" in done.stdout and "slower" in done.stdout
    failed = runner.invoke(app, ["bench", "compare", str(a), str(b), "--fail-on-slower", "--json"])
    assert failed.exit_code == 1
    assert "slower in" in failed.stderr
    assert json.loads(failed.stdout)["changes"][0]["verdict"] == "slower"
    assert runner.invoke(app, ["bench", "compare", str(b), str(a), "--fail-on-slower"]).exit_code == 0


def test_cpu_figures_stay_away_from_gpu_goals():
    cpu = block_result({"eager/block": [0.1234], "eager/transformer": [0.1011], "eager/decode": [0.0123]})
    text = page({"cpu.json": cpu}, "results", "page.md", {})
    measured, _, goals = text.partition("## Goals on a GPU")
    assert measured.index("## What was measured") < measured.index("eager: ") < measured.index("no figure of a GPU")
    assert goals.count("not measured yet") == len(GOALS)
    assert "123.4" not in goals and "123.4" in measured and "## On a GPU" not in measured
    assert "(CPU, Some Processor)" in measured and "goal" not in measured.partition("## On a CPU")[2]
    assert "Goals" not in page({"cpu.json": cpu}, "results", "page.md", {}, goals=False)


def test_goals_are_shown_for_the_project_s_results_and_foreign_json_is_passed_over(tmp_path):
    write_result(block_result({"eager/block": [0.1234]}), tmp_path / "a.json")
    for name, text in (("package.json", '{"name": "x"}'), ("list.json", "[1]"), ("kind.json", '{"kind": "block"}')):
        (tmp_path / name).write_text(text)
    done = CliRunner().invoke(app, ["bench", "report", str(tmp_path), "--out", str(tmp_path / "page.md")])
    assert done.exit_code == 0, done.stderr
    assert all(f"/{name}'" in done.stderr for name in ("package.json", "list.json", "kind.json"))
    assert "/a.json" not in done.stderr
    assert "Goals" not in (tmp_path / "page.md").read_text("utf-8")
    shown = write_report(tmp_path, tmp_path / "page.md", goals=True)[0]
    assert "## Goals on a GPU" in shown.read_text("utf-8")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UsageError, match=r"broken\.json"):
        read_folder(tmp_path)


def test_a_goal_is_shown_beside_its_card_and_its_work_only():
    series = {"eager/transformer": [0.4321], "eager/block": [0.5], "plain/transformer": [0.3], "plain/block": [0.4]}
    on_h200, on_h100 = block_result(series, H200), block_result(series, H200 | {"name": "NVIDIA H100"})
    other = block_result(series, H200, size=[416, 240])
    rows = {}
    for name, result in (("h200", on_h200), ("h100", on_h100), ("other", other)):
        text = page({f"{name}.json": result}, "results", "page.md", {})
        rows[name] = next(line for line in text.splitlines() if "window 21: transformer" in line)
    assert "0.432 s, eager, missed (`h200.json`)" in rows["h200"]  # of the executor, not of the faster baseline
    assert "0.432 s, eager, on another GPU: NVIDIA H100 (`h100.json`)" in rows["h100"]
    assert "not measured yet" in rows["other"]


PRESET = block_result({"eager/block": [0.2]}).settings["preset"]


@pytest.mark.parametrize(
    "change",
    [
        {"preset": PRESET | {"num_frame_per_block": 1}},
        {"preset": PRESET | {"sampler": PRESET["sampler"] | {"denoising_step_list": [1000]}}},
        {"preset": PRESET | {"context": PRESET["context"] | {"commit": False}}},
        {"preset": PRESET | {"context": PRESET["context"] | {"sink_size": 3}}},
        {"config": FULL | {"lowp": "fp8"}},
        {"config": FULL | {"dtype": "float16"}},
    ],
)
def test_no_goal_is_reached_by_other_work(change):
    series = {"captured/transformer": [0.1], "captured/block": [0.2], "captured/interval": [0.2]}
    assert [goal for goal in GOALS if goal.matches(block_result(series, H200))]
    assert not [goal for goal in GOALS if goal.matches(block_result(series, H200, **change))]


def test_goals_lie_above_their_floors_and_agree_with_each_other_and_with_the_dry_run():
    floors = {goal.name: goal.floor for goal in GOALS}
    assert all(goal.value > floor for goal in GOALS if (floor := floors[goal.name]) is not None)
    assert all(goal.predicted > floors[goal.name] for goal in GOALS if goal.predicted and floors[goal.name])
    assert floors[GOALS[0].name] == pytest.approx(202e12 / 989e12, rel=0.02)
    transformer, both, tiny, decode = (GOALS[index] for index in (0, 1, 2, 5))
    assert both.value == pytest.approx(transformer.value + decode.value)
    assert both.predicted == pytest.approx(transformer.predicted + decode.predicted)
    assert floors[both.name] == pytest.approx(floors[transformer.name] + floors[decode.name])
    assert transformer.value < tiny.value < both.value and transformer.predicted < tiny.predicted < both.predicted
    dry = json.loads((ROOT / "bench" / "results" / "dry-run-after.json").read_text("utf-8"))["configurations"]
    for goal, name in ((0, "self-forcing"), (3, "longlive"), (4, "krea"), (6, "self-forcing-fp8")):
        assert GOALS[goal].predicted == pytest.approx(dry[name]["parts"]["block"]["predicted"], abs=6e-4)


def test_no_goal_is_reached_by_trained_weights_or_a_part_of_the_card():
    result = block_result({"captured/transformer": [0.1]}, H200)
    trained = replace(result, subject=result.subject | {"random_weights": False})
    assert not [goal for goal in GOALS if goal.matches(trained)]
    part = block_result({"captured/transformer": [0.1]}, H200 | {"name": "NVIDIA H200 MIG 1g.18gb"})
    assert GOALS[0].on_its_card(result) and not GOALS[0].on_its_card(part)


def test_a_block_that_was_not_captured_misses_the_goal_of_one_graph():
    (goal,) = [goal for goal in GOALS if goal.quantity == "graphs"]
    result = block_result({"captured/block": [0.2]}, H200)
    for launches, expected in (
        ({"graphs": 1, "kernels": 9}, "1 graph, captured, 9 kernels beside, met"),
        ({"graphs": 0, "kernels": 9000}, "0 graph, captured, 9000 kernels beside, missed"),
    ):
        result.facts["candidates"]["captured"]["launches"] = launches
        assert expected in page({"a.json": result}, "results", "page.md", {})
    result.facts["candidates"]["captured"]["refused"] = "it ran as fused"
    assert goal.reached(result) is None
    assert "no figure in `a.json`" in page({"a.json": result}, "results", "page.md", {})


def test_a_goal_of_fewer_bits_is_not_reached_in_full():
    (goal,) = [goal for goal in GOALS if goal.bits]
    series = {"captured/transformer": [0.1], "eager/transformer": [0.2]}
    result = block_result(series, H200, config=FULL | goal.bits)
    assert goal.matches(result) and goal.reached(result) is None
    facts = result.facts["candidates"]
    facts["captured"]["fewer_bits"], facts["eager"]["fewer_bits"] = True, False
    assert goal.reached(result) == (0.1, "captured")
    facts["captured"]["refused"] = "it differs"
    assert goal.reached(result) is None


def test_a_goal_is_for_layers_and_pages_of_its_bits():
    fp8 = FULL | {"lowp": "fp8", "kv_dtype": "fp8"}
    series = {"captured/transformer": [0.1], "captured/block": [0.2]}
    others = fp8 | {"kv_dtype": None}, fp8 | {"lowp_keep": ["*.v"]}
    for config, reached in ((FULL, {None}), (fp8, {"fp8"}), *((other, set()) for other in others)):
        result = block_result(series, H200, config=config)
        matching = [goal for goal in GOALS if goal.quantity == "transformer" and goal.matches(result)]
        assert {goal.bits.get("lowp") for goal in matching} == reached
    assert all(goal.command.startswith("inferix bench") for goal in GOALS)


def test_a_report_has_pictures_and_every_result(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install matplotlib")
    series = {f"{name}/{what}": noisy(0.2 + at / 10) for at, name in enumerate(("captured", "plain"))
              for what in ("block", "transformer", "decode")}  # fmt: skip
    write_result(block_result(series), tmp_path / "in" / "a b.json")
    refused = block_result({"eager/block": [0.1]})
    refused.facts["candidates"]["broken"] = {"about": "a", "difference": 1.0, "refused": "it is off"}
    write_result(refused, tmp_path / "in" / "c.json")
    written = write_report(tmp_path / "in", tmp_path / "page.md")
    assert len(written) == 1 + len(PLOTS["block"]) + 1  # one candidate has no ratios, and its stages were not timed
    text = (tmp_path / "page.md").read_text()
    for path in written[1:]:
        assert f"](page/{path.name})" in text
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "refused: it is off" in text and "| 1.50 (1.4" in text
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_low_precision_candidates_are_compared_with_work_in_their_precision():
    series = {f"{name}/{what}": [0.1] for name in ("captured", "eager")
              for what in ("block", "transformer", "decode", "pass 0")}  # fmt: skip
    result = block_result(series, H200, config=FULL | {"lowp": "fp8"})
    result.ceilings["packed_flops"] = Series("FLOP/s", (9e14,), "more")
    half = {"flops": 10**12, "nbytes": 5 * 10**8}
    result.facts["work"]["fewer_bits"] = {"passes": [half], "transformer": half}
    result.facts["candidates"]["captured"]["fewer_bits"] = True
    result.facts["bits_off"] = 0.07
    assert [(point.name, point.stage, point.intensity, point.most) for point in points(result)] == [
        ("captured", "transformer", 2000, 9e14), ("captured", "decoder", 1000, 5e14),
        ("eager", "transformer", 1000, 5e14),
    ]  # fmt: skip
    text = page({"a.json": result}, "results", "page.md", {})
    assert "| pass | work | GB at least, low precision | GB at least | captured, ms | eager, ms |" in text
    assert "| denoise over 21 | 1 TFLOP | 0.5 | 1 | 100 | 100 |" in text
    assert "at least 1 GB (0.5 in low precision)" in text
    assert "`captured`: with fp8 linears;" in text and "differs by 7.0e-02" in text
    config = FULL | {"lowp": "fp8", "lowp_layers": ["blocks.0.*"], "lowp_keep": ["*.v"]}
    full = block_result({"eager/block": [0.1]}, H200, config=config)
    full.facts["bits_off"] = 0.07
    text = page({"a.json": full}, "results", "page.md", {})
    assert "bfloat16, fp8 linears in blocks.0.* but *.v (GPU" in text and "in full precision" not in text


def test_the_page_says_why_a_candidate_was_not_inspected():
    result = block_result({"captured/block": [0.2]}, H200)
    result.facts["candidates"]["captured"] |= {"memory": {}, "launches": None, "not_seen": "cannot run: no memory"}
    text = page({"a.json": result}, "results", "page.md", {})
    assert "`captured`: cannot run: no memory." in text and "launches per block" not in text


def test_a_report_removes_pictures_of_the_page_before_and_nothing_else(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install matplotlib")
    folder, out = tmp_path / "in", tmp_path / "page.md"
    write_result(block_result({"eager/block": [0.2], "eager/transformer": [0.1]}), folder / "old.json")
    old = write_report(folder, out)[1:]
    mine = [tmp_path / "page" / name for name in ("mine.json", "mine.png")]
    for path in mine:
        path.write_text("{}")
    (folder / "old.json").rename(folder / "new.json")
    new = write_report(folder, out)[1:]
    assert new and not [path for path in old if path.exists()]
    assert sorted((tmp_path / "page").iterdir()) == sorted([*mine, *new])


def test_a_report_does_not_go_where_results_are(tmp_path):
    result, names = block_result({"eager/block": [0.2]}), ("a.json", "block/b.json")
    results = [write_result(result, tmp_path / "in" / name) for name in names]
    for out in (tmp_path / "in.md", tmp_path / "in" / "block.md"):
        with pytest.raises(UsageError, match=f"{out.with_suffix('')}.*out"):
            write_report(tmp_path / "in", out)
    with pytest.raises(UsageError, match=r"a\.json.*a\.md"):
        write_report(tmp_path / "in", results[0])
    assert all(read_result(path) for path in results)


def test_pictures_of_names_that_look_alike_are_not_the_same():
    assert stems(["a b.json", "a-b.json", "a/b.json", "a.json"]) == ["a-b", "a-b-2", "a-b-3", "a"]


def test_the_committed_page_equals_a_report_of_the_committed_results():
    folder = ROOT / "bench" / "results"
    committed = (ROOT / "docs" / "performance.md").read_text("utf-8")
    links = {name: [] for name in read_folder(folder)}
    for line in committed.splitlines():
        if line.startswith("!["):
            link = line.partition("](")[2].rstrip(")")
            assert (ROOT / "docs" / link).is_file()
            stem = max((name.removesuffix(".json") for name in links if Path(link).name.startswith(name[:-5])), key=len)
            links[f"{stem}.json"].append(link)
    generated = page(read_folder(folder), "bench/results", "docs/performance.md", links)
    assert committed == generated, "write it again: inferix bench report bench/results --out docs/performance.md"


class FakeLibrary:
    """NVML of a GPU with values of power and energy, and without temperature."""

    def nvmlDeviceGetPowerUsage(self, handle, value):
        value._obj.value = 123_456
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
        value._obj.value = 7_000
        return 0

    def nvmlDeviceGetTemperature(self, handle, kind, value):
        return 3

    def nvmlSystemGetDriverVersion(self, text, length):
        text.value = b"580.1"
        return 0


def test_values_that_a_gpu_does_not_report_are_none(monkeypatch):
    card = nvml.Card(FakeLibrary(), None)
    assert card.state()["watts"] == 123.456
    assert card.state()["celsius"] is None and card.state()["graphics_mhz"] is None
    assert (card.energy(), card.driver()) == (7.0, "580.1")
    monkeypatch.setattr(nvml, "LIBRARIES", ("libnothing.so",))
    assert nvml.find_card("GPU-1") is None


def test_the_attention_goal_is_a_ratio_within_one_run():
    forms = {"triton": {"seconds": 3e-3}, "sdpa cudnn": {"seconds": 2e-3}, "sdpa flash": {"seconds": 4e-3}}
    row = {"op": "block_attention", "case": "1.3B, full window", "forms": forms | {"flex": {"refused": "off"}}}
    (goal,) = [goal for goal in GOALS if goal.kind == "kernels"]
    result = replace(block_result({}, H200, dtype="bfloat16"), kind="kernels", facts={"rows": [row]})
    assert goal.matches(result) and goal.reached(result) == (pytest.approx(1.5), "")
    assert not goal.matches(replace(result, settings={"dtype": "float16"}))
    row["forms"] = {"triton": {"seconds": 3e-3}}
    assert goal.reached(result) is None


def test_a_command_is_quoted_for_a_shell(monkeypatch):
    monkeypatch.setattr(machine.sys, "argv", ["/somewhere/bench/gpu_check.py", "--unit", "a b"])
    for module, name in (("inferix.bench.gpu_check", "python -m inferix.bench.gpu_check"), (None, "gpu_check.py")):
        spec = module and SimpleNamespace(name=module)
        monkeypatch.setattr(machine.sys.modules["__main__"], "__spec__", spec)
        assert machine.command() == f"{name} --unit 'a b'"


def test_the_page_warns_of_a_busy_machine():
    for load, threads, device, busy in ((0.1, 2, CPU, False), (0.5, 2, CPU, True), (0.5, 1, CPU, False),
                                        (1.0, 2, H200, False), (9.5, 1, CPU, True)):  # fmt: skip
        result = block_result({"eager/block": [0.2]}, device)
        result.environment["host"].update(load=load, threads=threads)
        warning = f"** (load {load} on 2 cores)"
        assert (warning in page({"a.json": result}, "results", "page.md", {})) == busy


def test_the_page_has_throttle_reasons_and_no_missing_values():
    result = block_result({"captured/block": [0.2]}, H200)
    unknown = dict.fromkeys(nvml.Card(FakeLibrary(), None).state())
    result.environment["clocks"] = unknown
    text = page({"a.json": result}, "results", "page.md", {})
    assert "GPU at the start: no readings" in text and "None of" not in text
    state = unknown | {"graphics_mhz": 1980, "graphics_mhz_most": 1980, "celsius": 50, "slowed_by": 0x1}
    slow = state | {"graphics_mhz": 1500, "slowed_by": 0x4 | 0x20, "candidate": "captured"}
    result.environment["clocks"] = slow
    result.facts["clocks_in_between"] = [state, slow, slow]
    text = page({"a.json": result}, "results", "page.md", {})
    assert "1500 of 1980 MHz, 50 °C, **throttled by the power limit and its temperature**" in text
    assert "3 readings between timings: 1500 to 1980 MHz, 50 to 50 °C, **throttled by the power limit** in 2" in text
    assert "**throttled by its temperature** in 2 of them (captured)" in text
    result.facts["clocks_in_between"] = [state]
    assert "50 to 50 °C, never throttled" in page({"a.json": result}, "results", "page.md", {})


def test_high_quantiles_need_samples():
    assert Series("s", (1.0,) * 19).tail(0.95) is None and Series("s", (1.0,) * 20).tail(0.95) == 1
    assert Series("s", (1.0,) * 99).tail(0.99) is None and Series("s", (1.0,) * 100).tail(0.99) == 1


def test_the_page_has_the_check_of_a_stream_and_the_stalls_of_a_long_run(tmp_path):
    times, waits = [0.5] * 200, {"late_blocks": 1, "waited": 2.5, "longest_wait": 2.5}
    times[100], times[6] = 4.0, 6.0
    stream = {"fps": 24.0, "frames": 240, "blocks": 20, "video_fps": 16, "real_time_factor": 1.5, "jitter": 0.0,
              **waits}  # fmt: skip
    tenths = {f"{key}_by_tenth": [0.5] * 10 for key in ("interval", "processor_seconds", "process_memory")}
    long = {"minutes": 2.5, "blocks": 200, "blocks_before_full": 5, "intervals": times, "processor_seconds": times,
            "process_memory": [1] * 200, "device_memory": None, "device_memory_by_tenth": None, **tenths,
            **waits}  # fmt: skip
    one = {"sessions": 1, "fps": 24.0, "intervals": [0.5] * 20, **waits}
    check = {"difference": 0.015, "tolerance": 0.077, "bits_off": 0.07}
    facts = {"sink": "memory", "check": check, "stream": stream, "sessions": [one, one | {"sessions": 2}], "long": long}
    result = replace(block_result({"fused/interval": [0.5] * 20}), kind="stream", facts=facts)
    text = page({"a.json": result}, "results", "page.md", {})
    assert "difference 1.5e-02, allowed 7.7e-02;" in text and "differs by 7.0e-02." in text
    assert "| fused | interval | 500 | 500 |  | 500 | 20 |" in text  # too few for p99
    assert "200 blocks, computed in 109 s of wall time" in text
    assert "p99 710 ms, worst 6000 ms." in text and "waits at 1 of 200 blocks" in text
    assert "| 2 | 24 | 12 | 500 | 500 | 1 of 20 |" in text
    if has_matplotlib():
        assert long_run(result, tmp_path / "long.png")
