"""Memory there is, and the refusal of what does not fit before weights are read."""

from pathlib import Path

import pytest
import torch

from inferix import UsageError, load
from inferix.bench.subject import Subject, open_engine
from inferix.export.checkpoint import write_random
from inferix.models.family import Family
from inferix.models.registry import MODELS, family_of, make_preset
from inferix.runtime.capacity import memory_check
from inferix.runtime.capacity.available_memory import Available, available_memory, host_available
from inferix.runtime.capacity.planner import needed
from inferix.runtime.config import EngineConfig

GB = 10**9
MEMINFO = "MemTotal: 40000000 kB\nMemFree: 1 kB\nMemAvailable: 20000000 kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = {
    "proc/self/cgroup": "5:memory:/jobs/one\n4:cpu:/\n0::/\n",
    "sys/fs/cgroup/memory/jobs/one/memory.limit_in_bytes": f"{8 * GB}\n",
    "sys/fs/cgroup/memory/jobs/one/memory.usage_in_bytes": f"{5 * GB}\n",
    "sys/fs/cgroup/memory/jobs/one/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GB}\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
}
V2 = {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/b/memory.max": "max\n",
    "sys/fs/cgroup/a/b/memory.current": "7\n",
    "sys/fs/cgroup/a/memory.max": f"{6 * GB}\n",
    "sys/fs/cgroup/a/memory.current": f"{4 * GB}\n",
    "sys/fs/cgroup/a/memory.stat": f"inactive_file {GB}\n",
}
HIDDEN = {  # a container that sees its group at the root of the mount
    "proc/self/cgroup": "0::/host/path\n",
    "sys/fs/cgroup/memory.max": f"{2 * GB}\n",
    "sys/fs/cgroup/memory.current": "0\n",
}


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 20_480_000_000), (V1, 5 * GB), (V2, 3 * GB), (HIDDEN, 2 * GB),
        ({**V2, "sys/fs/cgroup/a/memory.max": f"{60 * GB}"}, 20_480_000_000),
        ({**HIDDEN, "sys/fs/cgroup/memory.current": f"{3 * GB}"}, 0),
    ],
    ids=["no cgroup", "version 1", "version 2, in a parent", "at the root", "wide", "above"],
)  # fmt: skip
def test_the_least_of_machine_and_cgroups_counts(files, count, tmp_path):
    available = host_available(write(tmp_path, {"proc/meminfo": MEMINFO, **files}))
    assert available is not None and available.count == count


def test_a_system_that_does_not_say(tmp_path):
    assert host_available(tmp_path) is None


def test_this_machine_has_some():
    available = available_memory(torch.device("cpu"))
    assert available is None or 0 < available.count < 2**50


@pytest.fixture
def memory(monkeypatch):
    """Sets the memory there is, in bytes; making weights of a random model is an error."""

    def unread(*arguments):
        raise AssertionError("weights are made")

    monkeypatch.setattr(Family, "random_state", unread)
    return lambda count: monkeypatch.setattr(memory_check, "available_memory", lambda device: Available(count, "here"))


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("wan-1.3b", {}, ["26.45 GB", "832x480", "float32", "dtype='bfloat16'", "--dtype bfloat16", "13.57 GB"]),
        ("wan-1.3b", {"size": (1664, 960), "dtype": "bfloat16"}, ["1664x960", "size=("]),
        ("wan-14b", {"preset": "krea"}, ["wan-14b", "krea"]),
        ("wan-14b", {"dtype": "bfloat16"}, ["61.04 GB", "28.58 GB"]),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers_before_weights_are_made(model, settings, words, memory):
    memory(23 * GB)
    with pytest.raises(UsageError) as refused:
        load(model, device="cpu", **settings)
    assert all(word in str(refused.value) for word in [*words, "23 GB here", "--force"])


def test_what_is_advised_fits(memory):
    memory(23 * GB)
    with pytest.raises(AssertionError, match="weights are made"):
        load("wan-1.3b", device="cpu", dtype="bfloat16")
    memory(10 * GB)
    with pytest.raises(UsageError) as refused:
        load("wan-1.3b", device="cpu", dtype="bfloat16")
    assert "vae='taehv'" in str(refused.value)
    with pytest.raises(AssertionError, match="weights are made"):
        load("wan-1.3b", device="cpu", dtype="bfloat16", vae="taehv")


def test_force_loads_all_the_same(memory):
    memory(0)
    with pytest.raises(UsageError, match="wan-tiny"):
        load("wan-tiny", device="cpu")
    with pytest.raises(AssertionError, match="weights are made"):
        load("wan-tiny", device="cpu", force=True)


@pytest.mark.parametrize("wrong", [{"size": (833, 480)}, {"local_attn_size": 0}, {"batches": "none.json"}])
def test_settings_are_checked_first(wrong, memory):
    memory(10**15)
    with pytest.raises(Exception, match=r"833|local_attn_size|none\.json") as refused:
        load("wan-1.3b", device="cpu", force=True, **wrong)
    assert not isinstance(refused.value, AssertionError)


def test_a_checkpoint_is_compared_before_its_weights_are_read(memory, tmp_path, monkeypatch):
    folder = write_random("wan-tiny", "self-forcing", tmp_path / "tiny")
    monkeypatch.setattr(Family, "load", lambda *given: pytest.fail("weights are read"))
    memory(0)
    with pytest.raises(UsageError, match="tiny with self-forcing"):
        load(folder, device="cpu")


def test_the_text_encoder_counts_where_prompts_are_text(memory, tmp_path):
    folder = write_random("wan-tiny", "self-forcing", tmp_path / "tiny")
    memory(10**15)
    assert load(folder, device="cpu").parts.text is not None
    assert load(folder, device="cpu", text_prompts=False).parts.text is None


def test_pages_asked_for_and_a_second_decoder_count():
    config = EngineConfig.of("wan-tiny", "self-forcing", device="cpu")
    spec, preset = MODELS["wan-tiny"], make_preset("self-forcing")
    plain = memory_check.MemoryCheck(config, preset)
    load_of = plain.workload(spec, family_of(spec).decoder_spec(spec), 0)
    pages = memory_check.planner.memory(load_of).each["pages"]
    asked = EngineConfig.of("wan-tiny", "self-forcing", device="cpu", kv_memory=3 * pages)
    more = memory_check.MemoryCheck(asked, preset)
    assert plain.more_bytes(load_of, None) == 0
    assert more.more_bytes(load_of, None) == 2 * pages
    assert plain.more_bytes(load_of, family_of(spec).tiny_decoder_spec(spec)) > 10**6


def test_a_stream_without_a_window_counts_with_its_first(memory):
    config = EngineConfig.of("wan-1.3b", "self-forcing", device="cpu")
    spec = MODELS["wan-1.3b"]
    endless = memory_check.MemoryCheck(config, make_preset("self-forcing", local_attn_size=-1))
    bounded = memory_check.MemoryCheck(config, make_preset("self-forcing"))
    decoder = family_of(spec).decoder_spec(spec)
    assert needed(endless.workload(spec, decoder, 0)) < needed(bounded.workload(spec, decoder, 0))


def test_a_bench_asks_first(memory, monkeypatch):
    monkeypatch.setattr("inferix.bench.subject.draw_weights", lambda *given: pytest.fail("weights are drawn"))
    memory(10 * GB)
    with pytest.raises(UsageError, match="wan-14b"):
        open_engine(Subject("wan-14b", random_weights=True, device="cpu"))
