"""Kill writers of files at random moments: `make kills KILLS=200 SEED=0`, or `python tests/endurance/kills.py --help`.

Each kill forks a process that writes in a folder, sends it SIGKILL or SIGTERM, and checks the folder: a file under its
final name is whole, `generate` keeps its finished blocks after SIGTERM, and the next writer in the folder succeeds.
Exit code 1 if anything else is found.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from time import monotonic, sleep
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked processes must not inherit threads
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tools")]

import av  # noqa: E402
import numpy as np  # noqa: E402
from bench.example_results import block_result  # noqa: E402
from oracles import ROWS, SIZE, make_engine  # noqa: E402
from PIL import Image  # noqa: E402

from inferix.bench.plots import ratio_bars  # noqa: E402
from inferix.bench.result import read_result, write_result  # noqa: E402
from inferix.cli.main import app  # noqa: E402
from inferix.errors import InferixError  # noqa: E402
from inferix.export.checkpoint import convert, write_random  # noqa: E402
from inferix.models.wan.checkpoint import read_checkpoint  # noqa: E402
from inferix.models.wan.vae_checkpoint import find_vae  # noqa: E402
from inferix.runtime.media import VideoWriter, contact_sheet  # noqa: E402
from inferix.runtime.programs.graph_store import load_program  # noqa: E402
from inferix.runtime.sessions.batch_profile import BatchProfile, read_profiles, save_profile  # noqa: E402
from inferix.runtime.sessions.session import Session  # noqa: E402
from inferix.runtime.telemetry.records import RecordFile  # noqa: E402

ABOUT = {"model": "wan-tiny", "size": [1, 2], "dtype": "float32"}
ENDED = 60.0  # seconds within which a process must end after SIGTERM


@dataclass(frozen=True)
class Writer:
    """write: writes in a folder, again and again or for long; calls its second argument once it has begun.

    check: AssertionError or InferixError if a file in the folder is not whole. longest: seconds until the kill.
    """

    name: str
    write: Callable[[Path, Callable[[], object]], object]
    check: Callable[[Path], object]
    longest: float = 0.5
    prepare: Callable[[], object] = lambda: None


def again(write: Callable[[Path, int], object]) -> Callable[[Path, Callable[[], object]], None]:
    """A writer that writes over its own file until it is killed."""

    def run(folder: Path, begun: Callable[[], object]) -> None:
        begun()
        for number in range(1_000_000):
            write(folder, number)

    return run


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 48, 64, 3)).astype(np.uint8)


def count_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


# generate


def generate(folder: Path, begun: Callable[[], object]) -> None:
    begun()
    app(
        ["generate", "--model", "wan-tiny", "--size", "32x32", "--blocks", "5000", "--set", "local_attn_size=6",
         "--set", "denoising_step_list=[1000]", "--records", str(folder / "a.jsonl"), "--out", str(folder / "a.mp4")],
        prog_name="inferix",
    )  # fmt: skip


def check_generated(folder: Path) -> None:
    """Every file under its own name is whole, and the video has all blocks of the record."""
    record = folder / "a.json"
    if record.exists():
        content = json.loads(record.read_text("utf-8"))
        assert count_frames(folder / "a.mp4") >= content["frames"] > 0, "the video has fewer frames than its record"
        Image.open(folder / "a.png").load()
    elif (folder / "a.mp4").exists():
        assert count_frames(folder / "a.mp4") > 0
    if (folder / "a.jsonl").exists():
        check_records(folder)


# sessions


@cache
def engine() -> Any:
    return make_engine("self-forcing", "float32", denoising_step_list=[1000])


@cache
def session() -> Session:
    opened = engine().open(prompt_embeds=ROWS.float(), size=SIZE, seed=1)
    list(opened.stream(2, decode=False))
    return opened


def check_session(folder: Path) -> None:
    if (folder / "x.safetensors").exists():
        with Session.restore(engine(), folder / "x.safetensors") as restored:
            assert restored.next_block == 2
        engine().check_integrity()


# checkpoints and graphs


@cache
def checkpoint() -> Path:
    home = Path(tempfile.mkdtemp(prefix="kills-checkpoint-"))
    return write_random("wan-tiny", "original", home / "base")


def write_checkpoint(folder: Path, number: int) -> None:
    write_random("wan-tiny", "diffusers", folder / str(number))


def convert_checkpoint(folder: Path, number: int) -> None:
    convert(checkpoint(), folder / str(number))


def check_checkpoints(folder: Path) -> None:
    for place in folder.iterdir():
        if not place.name.endswith(".part"):
            assert read_checkpoint(place).tensors and find_vae([place]), place
            assert (place / "text_encoder").exists() or any(place.glob("models_t5*")), place


def write_graphs(folder: Path, number: int) -> None:
    stored = make_engine(executor="fused", denoising_step_list=[1000], graphs=str(folder / str(number)))
    with stored.open(prompt_embeds=ROWS, size=SIZE) as opened:
        list(opened.stream(1, decode=False))


def check_graphs(folder: Path) -> None:
    for path in folder.glob("*/*.json"):
        if path.name.startswith(("block-", "pass-")):
            load_program(path)
        else:
            json.loads(path.read_text("utf-8"))


# others


def write_video(folder: Path, number: int) -> None:
    with VideoWriter(folder / "x.mp4", 8, (64, 48)) as writer:
        for part in range(4):
            writer.add(frames(4, part))


def check_video(folder: Path) -> None:
    if (folder / "x.mp4").exists():
        assert count_frames(folder / "x.mp4") == 16


def write_sheet(folder: Path, number: int) -> None:
    contact_sheet(list(frames(12, number)), folder / "x.png")


def check_picture(folder: Path) -> None:
    for path in folder.glob("*.png"):
        Image.open(path).load()


def write_records(folder: Path, number: int) -> None:
    with RecordFile(folder / "a.jsonl") as records:
        for block in range(50):
            records({"session": 1, "block": block, "text": "x" * 500})


def check_records(folder: Path) -> None:
    if (folder / "a.jsonl").exists():
        for line in (folder / "a.jsonl").read_text("utf-8").splitlines():
            json.loads(line)


def write_profile(folder: Path, number: int) -> None:
    save_profile(folder / "x.json", ABOUT, (64 * (1 + number % 20), 32), BatchProfile({1: 0.5, 2: 0.7}))


def check_profile(folder: Path) -> None:
    if (folder / "x.json").exists():
        assert read_profiles(folder / "x.json", ABOUT)


@cache
def result() -> Any:
    samples = [1.0 + index / 10_000 for index in range(2000)]
    return block_result({"eager/block": samples, "fused/block": samples})


def check_result(folder: Path) -> None:
    if (folder / "r.json").exists():
        read_result(folder / "r.json")


WRITERS: dict[str, Writer] = {
    writer.name: writer
    for writer in (
        Writer("generate", generate, check_generated, longest=6.0),
        Writer("session", again(lambda folder, _: session().save(folder / "x.safetensors")), check_session,
               prepare=session),
        Writer("checkpoint", again(write_checkpoint), check_checkpoints, longest=2.0),
        Writer("convert", again(convert_checkpoint), check_checkpoints, longest=2.0, prepare=checkpoint),
        Writer("graphs", again(write_graphs), check_graphs, longest=4.0),
        Writer("video", again(write_video), check_video),
        Writer("sheet", again(write_sheet), check_picture),
        Writer("records", again(write_records), check_records),
        Writer("profiles", again(write_profile), check_profile),
        Writer("result", again(lambda folder, _: write_result(result(), folder / "r.json")), check_result,
               prepare=result),
        Writer("plot", again(lambda folder, _: ratio_bars(result(), folder / "p.png")), check_picture, longest=1.0,
               prepare=result),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """One kill: after `delay` seconds. fault: what was wrong, None if nothing was. finished: there was a whole file."""

    writer: str
    signal: signal.Signals
    delay: float
    finished: bool
    fault: str | None


def kill(writer: Writer, number: signal.Signals, delay: float, folder: Path) -> Kill:
    """Run a writer in a process of its own, end it, and check what it left."""
    writer.prepare()
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        run_child(writer, folder, lambda: os.write(write, b"x"))
    os.close(write)
    with os.fdopen(read, "rb") as begun:
        begun.read(1)
    sleep(delay)
    with suppress(ProcessLookupError):
        os.kill(process, number)
    status = ended(process)
    fault = None
    try:
        assert status is not None, f"not ended {ENDED:g} s after {number.name}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parts that the killed process left
            writer.check(folder)
        if writer.name == "generate" and number == signal.SIGTERM:
            check_kept(folder, os.waitstatus_to_exitcode(status))
    except (AssertionError, InferixError, OSError, ValueError) as error:
        fault = "".join(traceback.format_exception_only(error)).strip()
    finished = any(not path.name.endswith(".part") for path in folder.iterdir())
    return Kill(writer.name, number, delay, finished, fault)


def check_kept(folder: Path, code: int) -> None:
    """After SIGTERM `generate` ends with 143, and with a video and a record of the blocks in the file of records.

    Before its loop begins it has nothing to keep, and the signal ends it.
    """
    lines = (folder / "a.jsonl").read_text("utf-8").splitlines() if (folder / "a.jsonl").exists() else []
    blocks = sum("passes" in json.loads(line) for line in lines)
    if not blocks:
        return
    assert code == 143, f"exit code {code}"
    record = json.loads((folder / "a.json").read_text("utf-8"))
    assert blocks >= len(record["blocks"]) >= blocks - 1, f"{blocks} blocks, {len(record['blocks'])} recorded"
    assert not list(folder.glob("*.part")), "a part file is left"


def run_child(writer: Writer, folder: Path, begun: Callable[[], object]) -> None:
    """Write until the end of this process."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with open(os.devnull, "r+b", buffering=0) as nothing:
            for handle in (0, 1, 2):
                os.dup2(nothing.fileno(), handle)
        warnings.simplefilter("ignore")
        writer.write(folder, begun)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        os._exit(code)  # in any case: the parent's own work must not go on here


def ended(process: int) -> int | None:
    """The status of a process that ends within `ENDED` seconds; it is killed otherwise."""
    until = monotonic() + ENDED
    while monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return status
        sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def run(
    count: int, seed: int, names: list[str], report: Callable[[int, Kill], None] = lambda number, one: None
) -> list[Kill]:
    """Kill `count` times, each writer in turn, by SIGKILL and SIGTERM in turn; five kills of a writer in one folder."""
    random, kills = Random(seed), []
    with tempfile.TemporaryDirectory(prefix="kills-") as home:
        for number in range(count):
            writer = WRITERS[names[number % len(names)]]
            turn = number // len(names)
            folder = Path(home) / writer.name / (str(turn) if writer.name == "generate" else str(turn // 5))
            folder.mkdir(parents=True, exist_ok=True)
            how = signal.SIGTERM if (number + turn) % 2 else signal.SIGKILL
            delay = random.uniform(0, writer.longest)
            kills.append(kill(writer, how, delay, folder))
            report(number + 1, kills[-1])
    return kills


def table(kills: list[Kill]) -> str:
    lines = [f"{'writer':12}{'kills':>7}{'SIGTERM':>9}{'finished':>10}{'faults':>8}"]
    for name in (*dict.fromkeys(one.writer for one in kills), "all"):
        own = [one for one in kills if name in (one.writer, "all")]
        terms = Counter(one.signal for one in own)[signal.SIGTERM]
        finished, faults = sum(one.finished for one in own), sum(one.fault is not None for one in own)
        lines.append(f"{name:12}{len(own):7}{terms:9}{finished:10}{faults:8}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writer", action="append", choices=list(WRITERS), help="repeatable  [default: all]")
    options = parser.parse_args()

    def report(number: int, one: Kill) -> None:
        print(f"\r{number} kills", end="", file=sys.stderr, flush=True)
        if one.fault is not None:
            print(f"\n{one.writer}, {one.signal.name} after {one.delay:.3f} s: {one.fault}", file=sys.stderr)

    kills = run(options.kills, options.seed, options.writer or list(WRITERS), report)
    print(file=sys.stderr)
    print(table(kills))
    return 1 if any(one.fault for one in kills) else 0


if __name__ == "__main__":
    sys.exit(main())
