"""Several processes for one world: the stream of one, saves across, and faults that name their rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracles import SIZE
from safetensors.torch import load_file, save_file
from thread_ranks import difference, pair, socketpair
from torch import Tensor

from inferix import RankFailed, UsageError, load
from inferix.bench import rank_faults
from inferix.errors import SessionEnded
from inferix.models.wan.write_checkpoint import random_lora
from inferix.runtime.engine import Engine
from inferix.runtime.parallel.messages import Connection, Message
from inferix.runtime.parallel.peers import Peer, Peers
from inferix.runtime.plans import Offload, PassPlan
from inferix.runtime.sessions.session import Session

SETTINGS = {"preset": "longlive", "dtype": "float64", "local_attn_size": 6, "sink_size": 1}
ROWS = torch.randn(3, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LIMIT = 1e-10


@pytest.fixture(scope="module")
def alone() -> Engine:
    return load("wan-ranks", device="cpu", **SETTINGS)


@pytest.fixture(scope="module")
def ranked() -> Iterator[Engine]:
    engine = load("wan-ranks", device="cpu", gpus=2, rank_timeout=30, **SETTINGS)
    yield engine
    engine.resources.worker.end()


def blocks(session: Session, count: int) -> Tensor:
    return torch.cat([block.latents for block in session.stream(count, decode=False)])


def stream(engine: Engine, path: Path) -> tuple[Tensor, Tensor]:
    """Three blocks, of which the session after two is saved, and one more under another prompt."""
    with engine.open(prompt_embeds=ROWS, seed=4) as session:
        first = blocks(session, 2)
        session.save(path)
        session.prompt(embeds=ROWS * 0.5)
        return first, blocks(session, 2)


def resumed(engine: Engine, path: Path) -> Tensor:
    with Session.restore(engine, path) as session:
        session.prompt(embeds=ROWS * 0.5)
        return blocks(session, 2)


def test_two_processes_make_the_stream_of_one_and_go_on_with_each_others_saves(
    alone: Engine, ranked: Engine, tmp_path: Path
) -> None:
    first, rest = stream(alone, tmp_path / "one")
    found, more = stream(ranked, tmp_path / "two")
    assert max(difference(found, first), difference(more, rest)) <= LIMIT
    assert difference(resumed(ranked, tmp_path / "one"), rest) <= LIMIT
    assert difference(resumed(alone, tmp_path / "two"), rest) <= LIMIT
    ranked.check_integrity()


@pytest.mark.slow
def test_two_processes_decode_the_pictures_of_one(alone: Engine, ranked: Engine) -> None:
    made = []
    for engine in (alone, ranked):
        with engine.open(prompt_embeds=ROWS, seed=4) as session:
            made += [block.frames.astype(int) for block in session.stream(1)]
    assert ranked.parts.shard.columns.size == 2
    assert abs(made[0] - made[1]).max() <= 1  # a rounded number may differ by one


def test_settings_that_ranks_cannot_divide_are_refused_with_the_nearest_that_work(ranked: Engine) -> None:
    for gpus, parallel, nearest in ((3, "ulysses", "gpus=2"), (5, "auto", "gpus=4"), (2, "uliss", "ulysses")):
        with pytest.raises(UsageError, match=str(gpus) if parallel != "uliss" else parallel) as error:
            load("wan-ranks", device="cpu", gpus=gpus, parallel=parallel)
        assert nearest in str(error.value)
    with pytest.raises(UsageError, match=r"gpus"):
        load("wan-ranks", device="cpu", gpus=0)
    with pytest.raises(UsageError, match=r"size|tokens"):
        ranked.open(prompt_embeds=ROWS, size=(80, 80))
    with pytest.raises(UsageError, match=r"style\.safetensors"):  # of all ranks, which live on
        ranked.use_lora("style.safetensors")
    with pytest.raises(UsageError, match=r"shard_weights"):
        load("wan-ranks", device="cpu", shard_weights=True)


def test_an_adapter_is_applied_and_removed_on_all_ranks(alone: Engine, ranked: Engine, tmp_path: Path) -> None:
    save_file(random_lora(alone.spec, 3), tmp_path / "lora.safetensors")
    made = []
    for engine in (alone, ranked):
        with engine.open(prompt_embeds=ROWS, seed=4) as session:
            first = blocks(session, 1)
            engine.use_lora(tmp_path / "lora.safetensors", 4.0)
            second = blocks(session, 1)
            engine.use_lora(None)
            made.append(torch.cat([first, second, blocks(session, 1)]))
    assert difference(*made) <= LIMIT


def test_an_error_of_all_ranks_is_one_error_and_the_ranks_live_on(ranked: Engine) -> None:
    worker = ranked.resources.worker
    with pytest.raises(KeyError):
        worker.execute(Offload((1, 1), 99, (0,)))
    with ranked.open(prompt_embeds=ROWS) as session:
        assert len(blocks(session, 1)) == 3


def test_a_killed_rank_is_named_and_all_processes_end(ranked: Engine) -> None:
    (peer,) = ranked.resources.worker.peers.peers
    with ranked.open(prompt_embeds=ROWS) as session:
        blocks(session, 1)
        os.kill(peer.pid, signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(RankFailed, match=rf"rank 1 \(process {peer.pid} .*SIGKILL"):
            blocks(session, 3)
        assert time.monotonic() - begun < 20  # seconds; no measure of speed: without the fault it would wait for 30
    assert peer.process is not None and peer.process.poll() == -signal.SIGKILL
    with pytest.raises(RankFailed, match=r"rank 1"):
        ranked.open(prompt_embeds=ROWS)


def test_an_error_of_one_rank_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from inferix.runtime.parallel import rank_process

    with pair("self-forcing", "ulysses") as (_, engine), engine.open(prompt_embeds=ROWS[:, :16], size=SIZE) as session:
        blocks(session, 1)

        def fails(worker, inbox, message) -> None:
            raise ValueError("out of luck")

        monkeypatch.setattr(rank_process, "run", fails)
        with pytest.raises(RankFailed, match=r"rank 1 .*out of luck"):
            blocks(session, 1)


def test_a_rank_that_hangs_is_named_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    from inferix.runtime.parallel import rank_process

    run = rank_process.run
    with pair("self-forcing", "ulysses") as (_, engine), engine.open(prompt_embeds=ROWS[:, :16], size=SIZE) as session:
        blocks(session, 1)

        def hangs(worker, inbox, message) -> None:
            if message.plan.find(PassPlan.__name__.encode()) < 0:
                run(worker, inbox, message)

        engine.resources.worker.peers.timeout = 0.5
        monkeypatch.setattr(rank_process, "run", hangs)
        with pytest.raises(RankFailed, match=r"rank 1 .*0.5 s: it hangs"):
            blocks(session, 1)


def test_sessions_end_with_the_ranks_of_their_engine() -> None:
    with pair("self-forcing", "ulysses") as (_, engine):
        sessions = [engine.open(prompt_embeds=ROWS[:, :16], size=SIZE) for _ in range(2)]
        assert engine.fault is None
        engine.resources.worker.peers.fail("rank 1 was lost")
        with pytest.raises(RankFailed, match="rank 1 was lost"):
            engine.run(keep=True)
        assert engine.fault is not None and "rank 1 was lost" in engine.fault
        for session in sessions:
            with pytest.raises(SessionEnded, match="rank 1 was lost"):
                blocks(session, 1)


def test_rank_0_that_failed_alone_is_known_by_ranks_that_wait_for_it() -> None:
    mine, theirs = (Connection(end) for end in socketpair())
    peers = Peers([Peer(1, mine, 0, "test")], timeout=60)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            theirs.send(Message("beat", {"waits": True}))

    thread = threading.Thread(target=beat)
    thread.start()
    begun = time.monotonic()
    assert not peers.all_failed()
    assert time.monotonic() - begun < 30  # seconds; no measure of speed: without the beats it would wait for 60
    over.set()
    thread.join()
    peers.close()
    theirs.close()


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "layout"), [("self-forcing", "ulysses"), ("longlive", "pass-q")])
def test_graphs_with_collectives_make_the_stream_of_eager(preset: str, layout: str) -> None:
    settings: dict[str, object] = {"dtype": "float64", "local_attn_size": 6, "denoising_step_list": [1000, 500]}
    settings |= {"sink_size": 1} if preset == "longlive" else {}
    alone = load("wan-ranks", preset, device="cpu", **settings)
    fused = load("wan-ranks", preset, device="cpu", gpus=2, parallel=layout, executor="fused", **settings)
    made = []
    for engine in (alone, fused):
        with engine.open(prompt_embeds=ROWS, seed=4) as session:
            made.append(blocks(session, 4))
    assert difference(*made) <= LIMIT
    fused.resources.worker.end()


@pytest.mark.slow
def test_ranks_store_graphs_in_folders_of_their_own_and_trace_none_again(tmp_path: Path) -> None:
    """In processes of their own: graphs name groups, whose numbers are those of a process's worlds."""
    script = (
        "import sys, torch, inferix, safetensors.torch\n"
        "settings = {'local_attn_size': 6, 'denoising_step_list': [1000], 'executor': 'fused'}\n"
        "ranked = {'gpus': int(sys.argv[1]), 'parallel': sys.argv[2], 'graphs': sys.argv[3]}\n"
        "engine = inferix.load('wan-ranks', 'self-forcing', device='cpu', **settings, **ranked)\n"
        "with engine.open(prompt_embeds=torch.ones(3, 64)) as session:\n"
        "    made = torch.cat([block.latents for block in session.stream(2, decode=False)])\n"
        "safetensors.torch.save_file({'made': made}, sys.argv[4])\n"
        "print(engine.executor.traces)\n"
    )

    def traced(layout: str, name: str) -> int:
        arguments = ["2", layout, str(tmp_path / "graphs"), str(tmp_path / name)]
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=400)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return int(done.stdout)

    assert traced("ulysses", "first") > 0
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "graphs").rglob("*.json")}
    assert {path.parent.name for path in stored} == {"rank-0-of-2", "rank-1-of-2"}
    assert traced("ulysses", "second") == 0
    assert stored == {path: path.stat().st_mtime_ns for path in (tmp_path / "graphs").rglob("*.json")}
    assert torch.equal(*(load_file(tmp_path / name)["made"] for name in ("first", "second")))
    with pytest.raises(RuntimeError, match=r"shard"):
        traced("pass-q", "other")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]])
def test_the_command_starts_ranks_or_joins_those_of_torchrun(launcher: list[str], tmp_path: Path) -> None:
    ranks = [] if launcher else ["--gpus", "2"]
    options = ["--model", "wan-ranks", "--device", "cpu", "--prompt", "fog", "--blocks", "2"]
    options += ["--set", "local_attn_size=6"]
    out = ["--latents-only", "--out", str(tmp_path / "out.safetensors"), "--json"]
    command = [sys.executable, *launcher, "-m", "inferix", "generate", *options, *ranks, *out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["engine"]["config"]["gpus"] == 2
    assert len(json.loads(done.stdout.splitlines()[-1])["blocks"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_rank_outlives_rank_0(number: signal.Signals, tmp_path: Path) -> None:
    script = (
        "import inferix\n"
        "engine = inferix.load('wan-ranks', 'self-forcing', device='cpu', gpus=2, local_attn_size=6)\n"
        "print(engine.resources.worker.peers.peers[0].pid, flush=True)\n"
        "with engine.open(prompt='fog') as session:\n"
        "    for _ in session.stream(10000, decode=False):\n"
        "        print('block', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        rank = int(process.stdout.readline())
        assert process.stdout.readline() == "block\n"
        process.send_signal(number)
    deadline = time.monotonic() + 60
    while is_alive(rank):
        assert time.monotonic() < deadline, f"process {rank} is left"
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_ends_once_rank_0_is_silent_and_the_first_reports_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from inferix.runtime.parallel import rank_process

    codes: dict[str, int] = {}

    def ends(code: int) -> None:
        codes[threading.current_thread().name] = code
        raise SystemExit  # of the thread

    monkeypatch.setattr(rank_process, "BEAT", 0.05)
    for rank in (1, 2):
        codes.clear()
        mine, theirs = (Connection(end) for end in socketpair())
        inbox = rank_process.Inbox(mine, rank, ends)
        inbox.timeout = 2.0
        for _ in range(15):
            theirs.beat()
            time.sleep(0.2)
        assert not codes  # after 3 s
        until(lambda: "rank-0-watch" in codes)
        assert codes == {"rank-0-watch": 1} and inbox.queue.empty()
        assert ("rank 0 has sent nothing for 2 s" in capsys.readouterr().err) == (rank == 1)
        theirs.close()
        until(lambda: codes.keys() >= {"rank-0", "beat"})


def test_a_rank_whose_socket_is_full_delays_no_beat_to_another() -> None:
    ends = [[Connection(end) for end in socketpair()] for _ in range(2)]
    (full, reads), (mine, theirs) = ends
    fill(full.stream)
    received: list[str] = []

    def receive() -> None:
        while (message := theirs.receive()) is not None:
            received.append(message.kind)

    thread = threading.Thread(target=receive)
    thread.start()
    peers = Peers([Peer(1, full, 0, "test"), Peer(2, mine, 0, "test")], timeout=60)
    until(lambda: len(received) >= 3)
    assert set(received) == {"beat"} and peers.fault is None
    peers.close()
    reads.close()
    thread.join()


def fill(stream: socket.socket) -> None:
    """Send until nothing more fits, and the system moves nothing on to the other end."""
    for size in (1 << 16, 1):  # a few bytes may fit where many do not
        refused = 0
        while refused < 20:
            try:
                stream.send(bytes(size), socket.MSG_DONTWAIT)
                refused = 0
            except BlockingIOError:
                refused += 1
                time.sleep(0.01)


def test_a_beat_that_was_sent_in_part_goes_on_before_the_next_message(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = (Connection(end) for end in socketpair())
    stream = mine.stream

    class Narrow:
        """Takes a few bytes at a time."""

        def send(self, data: bytes, flags: int) -> int:
            return stream.send(data[:7], flags)

        def sendall(self, data: bytes) -> None:
            stream.sendall(data)

    monkeypatch.setattr(mine, "stream", Narrow())
    for _ in range(3):
        mine.beat()
    mine.send(Message("plan", {"number": 3}))
    kinds = [message.kind for message in (theirs.receive(), theirs.receive()) if message is not None]
    assert kinds == ["beat", "plan"]
    monkeypatch.undo()
    mine.close()
    theirs.close()


def test_rank_0_that_was_stopped_knows_it() -> None:
    mine, theirs = (Connection(end) for end in socketpair())
    peers = Peers([Peer(1, mine, 0, "test")], timeout=0.01)  # any look takes longer
    until(lambda: peers.fault is not None)
    assert "rank 0 was stopped" in (peers.fault or "")
    peers.close()
    theirs.close()


@pytest.mark.slow
def test_a_stopped_rank_0_ends_the_other_ranks_with_one_error() -> None:
    message, seconds, left = rank_faults.stopped(3, 3.0, "pass-q")
    assert "rank 0 has sent nothing for 3 s" in message
    assert left == 0 and seconds < 20  # no measure of speed: without beats they would wait for rank 0


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
