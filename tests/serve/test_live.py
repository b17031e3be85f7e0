"""The live protocol: sessions, receipts, forks, rewinds, saved worlds, coming back, slow viewers and the end."""

import asyncio
import gc
import json
import math
import platform
import subprocess
import sys
import time
import weakref
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import msgpack
import numpy as np
import pytest
import torch
import websockets
from live_client import PROMPT, WAIT, Client, serving, small_engine
from safetensors.torch import save_file

from inferix.runtime.sessions.session_file import NOTE
from inferix.serve.connection import Closed, Connection
from inferix.serve.heap import limit_arenas
from inferix.serve.outbox import Outbox
from inferix.serve.protocol import MEDIA
from inferix.serve.real_time import Measured
from inferix.serve.settings import ServeSettings
from inferix.serve.worlds import Worlds


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    settings = ServeSettings(sessions=3, queue=1, realtime=False)
    with serving(settings, tmp_path_factory.mktemp("served")) as running:
        yield running


def run(scenario):
    """Run a scenario, and wait until no session is left."""
    asyncio.run(scenario)


async def all_gone(served):
    while served.server.live.sessions:
        await asyncio.sleep(0.01)


def test_a_walk_with_receipts(served):
    async def walk():
        async with served.connect() as socket, Client(socket) as client:
            opened = await client.open(media=["raw"])
            assert opened["actions"] == ["stay", "up", "down", "left", "right"] and opened["rest"] == "stay"
            first = await client.until("state")
            assert (first["block"], first["frame"], first["frames"]) == (0, 0, 1)
            press = await client.applied("act", action="right")
            state = await client.until("state")
            assert (press["block"], press["frame"]) == (state["block"], state["frame"]) and press["seconds"] > 0
            tap = await client.send("act", action="up")
            release = await client.send("act", action="up", pressed=False)
            shown = await client.until("applied", id=tap)
            ended = await client.until("applied", id=release)
            assert ended["block"] == shown["block"] + 1  # however short a press is, it is one block long
            prompt = "a blue fox in a green meadow at sunset"
            changed = await client.applied("prompt", text=prompt, transition=2)
            assert (await client.until("state", block=changed["block"]))["prompt"] == prompt
            received = [event["id"] for event in client.events if event["type"] == "received"]
            assert received == list(range(2, client.last_id + 1))
            blocks = [header[3] for header in client.media]
            assert blocks == sorted(blocks) and {header[0] for header in client.media} == {1 + MEDIA.index("raw")}
            frames = [header[4] for header in client.media]
            assert frames == list(range(len(frames)))
            assert all(len(payload) == 64 * 64 * 3 for payload in client.payloads)
            await client.applied("stop")
            ended = await client.until("ended")
            assert ended["code"] == "stopped" and not ended["message"].startswith("error")
        await all_gone(served)

    run(walk())


def test_rewind_fork_save_and_restore_go_on_as_one_engine_session_would(served):
    async def walk():
        async with served.connect() as socket, Client(socket) as client:
            await client.open(media=["raw"], seed=3)
            for _ in range(3):
                await client.until("state")
            await client.applied("pause")
            paused = await client.applied("save")
            fork = await client.applied("fork")
            assert fork["block"] == paused["block"] and paused["bytes"] > 0
            await client.send("resume")
            ahead = await pictures(client, paused["block"])
            back = await client.applied("rewind", block=paused["block"])
            assert back["block"] == paused["block"]
            assert (await pictures(client, paused["block"])) == ahead
            restored = await client.applied("restore", world=paused["world"])
            assert restored["block"] == paused["block"]
            state = await client.until("state")
            assert (state["rollout"], state["prompt"], state["seed"]) == (1, PROMPT, 3)
            assert (await pictures(client, paused["block"])) == ahead
            async with served.connect() as other, Client(other) as twin:
                await twin.send("attach", session=fork["session"], resume=fork["resume"], media=["raw"])
                await twin.until("opened")
                assert (await pictures(twin, paused["block"])) == ahead
                await twin.send("stop")
                await twin.until("ended")
            again = await client.applied("seed", seed=4)
            assert again["block"] == 0
            assert (await client.until("state", block=0))["seed"] == 4
            await client.send("stop")
            await client.until("ended")
        await all_gone(served)

    async def pictures(client, block):
        """The payloads of the last block with this index, once they are there."""
        if not client.events or client.events[-1].get("block") != block or client.events[-1]["type"] != "state":
            await client.until("state", block=block)
        count = client.events[-1]["frames"]
        return client.payloads[-count:]

    run(walk())


def test_messages_in_msgpack(served):
    async def walk():
        async with served.connect(subprotocols=["inferix.msgpack"]) as socket:
            assert socket.subprotocol == "inferix.msgpack"
            await socket.send(msgpack.packb({"type": "open", "id": "one", "prompt": PROMPT}))
            opened = msgpack.unpackb(await socket.recv())
            assert opened["type"] == "opened" and opened["id"] == "one"
            kinds = [(await socket.recv())[0] for _ in range(4)]
            assert all(kind < 0x80 or kind >= 0x80 for kind in kinds) and 1 + MEDIA.index("jpeg") in kinds
            await socket.send(json.dumps({"type": "stop", "id": 1}))
            events = [msgpack.unpackb(m) async for m in first_of(socket, 20) if m[0] >= 0x80]
            assert "malformed" in [event.get("code") for event in events]
            await socket.send(msgpack.packb({"type": "stop", "id": 2}))
            async for _ in socket:
                pass
        await all_gone(served)

    async def first_of(socket, count):
        for _ in range(count):
            yield await socket.recv()

    run(walk())


def test_a_client_comes_back_with_its_token_and_takes_its_session_over(served):
    async def walk():
        async with served.connect() as socket, Client(socket) as client:
            opened = await client.open()
            seen = await client.until("state")
        async with served.connect() as socket, Client(socket) as client:
            refused = await client.refused("attach", session=opened["session"], resume="wrong")
            assert refused["code"] == "not_found"
        async with served.connect() as socket, Client(socket) as client:
            await client.send("attach", session=opened["session"], resume=opened["resume"])
            assert (await client.until("opened"))["session"] == opened["session"]
            assert (await client.until("state"))["block"] > seen["block"]
            async with served.connect() as second, Client(second) as other:
                await other.send("attach", session=opened["session"], resume=opened["resume"])
                await other.until("opened")
                with pytest.raises(websockets.ConnectionClosed) as closed:
                    while True:
                        await client.receive()
                assert closed.value.rcvd.code == 4001
                await other.send("stop")
                await other.until("ended")
        await all_gone(served)

    run(walk())


def test_places_a_queue_and_a_refusal_that_names_the_limit(served):
    async def walk():
        sockets = [await served.connect() for _ in range(5)]
        clients = [Client(socket) for socket in sockets]
        for client in clients[:3]:
            await client.open()
        await clients[3].send("open", prompt=PROMPT)
        assert (await clients[3].until("queued"))["position"] == 0
        early = await clients[3].send("act", action="left")
        refused = await clients[4].refused("open", prompt=PROMPT)
        assert refused["limit"] == {"name": "sessions", "value": 3} and refused["retry_after"] > 0
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await clients[4].receive()
        assert closed.value.rcvd.code == 1013
        assert (await clients[0].refused("fork"))["limit"]["name"] == "sessions"
        await clients[0].send("stop")
        await clients[3].until("opened")
        await clients[3].until("applied", id=early)
        for client in clients[1:4]:
            await client.send("stop")
            await client.until("ended")
        for socket in sockets:
            await socket.close()
        await all_gone(served)

    run(walk())


def test_a_session_that_would_be_late_waits_or_is_refused_until_there_is_time(served, monkeypatch):
    live = served.server.live
    monkeypatch.setattr(live, "settings", replace(live.settings, realtime=True))
    monkeypatch.setattr(live.real_time, "blocks", deque([Measured(math.inf, 0.5, 1.0, late=False)]))
    monkeypatch.setattr(live.real_time, "note_block", lambda *_: None)

    async def walk():
        sockets = [await served.connect() for _ in range(3)]
        first, second, third = (Client(socket) for socket in sockets)
        await first.open()
        assert httpx.get(f"{served.url}/v1/replica").json()["load"] == 0.5
        await second.send("open", prompt=PROMPT)
        await second.until("queued")
        assert (await third.refused("open", prompt=PROMPT))["limit"] == {"name": "realtime", "value": True}
        assert (await first.refused("fork"))["limit"] == {"name": "realtime", "value": True}
        live.real_time.blocks[0] = Measured(math.inf, 0.4, 1.0, late=False)
        await second.until("opened")  # though nobody has left
        for client in (first, second):
            await client.send("stop")
            await client.until("ended")
        for socket in sockets:
            await socket.close()
        await all_gone(served)

    run(walk())


def test_sessions_of_gone_clients_free_their_memory(tmp_path):
    settings = ServeSettings(sessions=1, queue=0, resume_seconds=0.2, idle_seconds=60)
    engine = small_engine(settings)
    with serving(settings, tmp_path, engine) as served:

        async def walk():
            for _ in range(2):
                async with served.connect() as socket, Client(socket) as client:
                    await client.open()
                    await client.until("state")
                await all_gone(served)

        run(walk())
        gauges = engine.metrics()["gauges"]
        assert gauges["pages_in_use"] == gauges["reserved_bytes"] == 0
    engine.check_integrity()


def codecs():
    """PyAV's codecs of this process."""
    return sum(type(one).__name__ == "VideoCodecContext" for one in gc.get_objects())


@pytest.mark.parametrize("media", ["h264", "fmp4"])
def test_an_encoder_is_freed_without_the_collector(served, media):
    """A codec's memory is none of Python's, whose collector may run much later."""
    gc.collect()
    before = codecs()

    async def watch():
        async with served.connect() as socket, Client(socket) as client:
            await client.open(media=[media])
            await client.until("state")
            assert codecs() > before
            await client.send("stop")
            await client.until("ended")

    gc.disable()
    try:
        asyncio.run(watch())
        deadline = time.monotonic() + WAIT
        while codecs() > before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert codecs() == before
    finally:
        gc.enable()


def test_the_heap_of_a_server_has_few_parts(monkeypatch):
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    assert limit_arenas() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert not limit_arenas()
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    monkeypatch.setattr("inferix.serve.heap.os", SimpleNamespace(name="nt", environ={}))
    assert not limit_arenas()


def test_what_is_there_is_frozen_without_its_garbage():
    script = """
import gc, weakref
from inferix.serve.heap import freeze
class Ring:
    def __init__(self):
        self.own = self
gc.collect()
gc.disable()
before, kept, lost = gc.get_freeze_count(), [[] for _ in range(1000)], weakref.ref(Ring())
freeze()
assert gc.get_freeze_count() >= before + 1000
assert len(gc.get_objects(generation=2)) < 100
assert lost() is None
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=WAIT)


def test_an_error_that_ends_a_connection_leaves_no_cycle():
    """With the collector off, all that the frame refers to is freed as soon as the error is."""

    class Sent:
        pass

    async def fail(sent):
        await asyncio.sleep(0)
        raise Closed(4000, "test")

    async def wait(sent):
        await asyncio.Event().wait()

    async def end(*makers):
        sent = Sent()
        works = [maker(sent) for maker in makers]
        with pytest.raises(Closed):
            await Connection._first_of(None, *works)
        return weakref.ref(sent)

    gc.disable()
    try:
        for makers in ((fail, wait), (wait, fail)):
            assert asyncio.run(end(*makers))() is None
    finally:
        gc.enable()


def test_a_stopped_server_drains_and_saves(tmp_path):
    """The next server of the folder goes on with the world: its file says prompt and seed, and so does a copy of it."""
    settings = ServeSettings(save_on_exit=True, drain_seconds=30)
    saved = {}

    async def walk(served):
        socket = await served.connect()
        client = Client(socket)
        await client.open(seed=7)
        await client.until("state")
        served.runner.request_drain()
        saved.update(await client.until("ended"))
        with pytest.raises(websockets.ConnectionClosed):
            await client.receive()

    with serving(settings, tmp_path) as served:
        run(walk(served))
    assert saved["code"] == "draining"
    world = tmp_path / "worlds" / f"{saved['world']}.safetensors"

    async def go_on(served):
        copy = httpx.post(f"{served.url}/v1/worlds", content=world.read_bytes()).json()["id"]
        async with served.connect() as socket, Client(socket) as client:
            opened = await client.open(world=saved["world"])
            assert (opened["prompt"], opened["seed"]) == (PROMPT, 7) and opened["next_block"] > 0
            await client.applied("restore", world=copy)
            state = await client.until("state")
            assert (state["prompt"], state["seed"]) == (PROMPT, 7)
            assert (await client.applied("seed", seed=8))["block"] == 0

    with serving(settings, tmp_path) as served:
        run(go_on(served))


@pytest.mark.parametrize(
    ("note", "about"),
    [
        (None, (None, None)), ("", (None, None)), ("{", (None, None)), ("[1]", (None, None)), ("[" * 999, (None, None)),
        ('{"prompt": "a fox", "seed": 3}', ("a fox", 3)), ('{"prompt": "", "seed": -1}', (None, None)),
        ('{"prompt": "' + "x" * 21 + '", "seed": true}', (None, None)), ('{"prompt": 5, "seed": 3.5}', (None, None)),
    ],
)  # fmt: skip
def test_what_a_file_says_of_its_world_is_checked(tmp_path, note, about):
    worlds = Worlds(tmp_path, 1, 20)
    world, path = worlds.new()
    save_file({"x": torch.zeros(1)}, path, None if note is None else {NOTE: note})
    assert worlds.about(world) == about


def test_the_outbox_drops_the_oldest_blocks_and_keeps_their_receipts():
    from inferix.serve.outbox import LiveBlock, Receipt

    async def fill():
        outbox = Outbox(2)
        for number in range(4):
            outbox.put_block(LiveBlock(np.zeros((1, 2, 2, 3), np.uint8), number, [Receipt(number, "act", 0.0)]))
        assert (outbox.blocks, outbox.skipped) == (2, 2)
        first = await outbox.take()
        assert first.state == 2 and [receipt.id for receipt in first.receipts] == [0, 2]

    asyncio.run(fill())


@pytest.mark.slow
def test_ten_thousand_reconnects_leave_nothing_behind(served):
    """Memory after the last is that after the first thousand, and so are the open files."""
    memory, files = [], []

    def look():
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
        files.append(len(list(Path("/proc/self/fd").iterdir())))

    async def walk():
        async with served.connect() as socket, Client(socket) as client:
            opened = await client.open()
        for count in range(10_000):
            if count == 1000:
                look()
            async with served.connect() as socket, Client(socket) as client:
                await client.send("attach", session=opened["session"], resume=opened["resume"])
                await client.until("opened")
        async with served.connect() as socket, Client(socket) as client:
            await client.send("attach", session=opened["session"], resume=opened["resume"])
            await client.until("state")
            await client.send("stop")
            await client.until("ended")
        await all_gone(served)
        connections = served.server.metrics.registry.get_sample_value("inferix_connections")
        while connections:
            await asyncio.sleep(0.02)
            connections = served.server.metrics.registry.get_sample_value("inferix_connections")

    run(walk())
    look()
    print(f"memory {memory}, files {files}")
    assert memory[1] - memory[0] < 64 << 20 and files[1] <= files[0]
    assert served.server.host.engine.metrics()["gauges"]["pages_in_use"] == 0


@pytest.mark.slow
def test_sigterm_ends_the_command_and_its_sessions(tmp_path):
    command = [sys.executable, "-m", "inferix", "serve", "--port", "0", "--json", "--folder", str(tmp_path)]
    process = subprocess.Popen([*command, "--limit", "save_on_exit=true"], stdout=subprocess.PIPE, text=True)
    facts = json.loads(process.stdout.readline())

    async def walk():
        address = f"ws{facts['url'].removeprefix('http')}/v1/live"
        async with websockets.connect(address) as socket, Client(socket) as client:
            await client.open()
            await client.until("state")
            process.terminate()
            return await client.until("ended")

    ended = asyncio.run(walk())
    assert process.wait(WAIT) == 0 and process.stdout.read() == ""
    assert ended["code"] == "draining" and (tmp_path / "worlds" / f"{ended['world']}.safetensors").is_file()


def test_metrics_name_what_happened(served):
    async def walk():
        async with served.connect() as socket, Client(socket) as client:
            await client.open()
            await client.applied("act", action="up")
            await client.refused("act", action="jump")
            await client.send("stop")
            await client.until("ended")
        await all_gone(served)

    run(walk())
    text = httpx.get(f"{served.url}/metrics").text
    for line in (
        'inferix_control_to_pixel_seconds_count{verb="act"}', 'inferix_refusals_total{code="invalid",limit=""}',
        "inferix_engine_blocks_total", "inferix_engine_pages_in_use", "inferix_engine_denoise_seconds_bucket",
        'inferix_media_bytes_total{media="jpeg"}', "inferix_live_sessions 0.0", "inferix_real_time_load 0.0",
    ):  # fmt: skip
        assert line in text
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok", "sessions": 0, "places": 3}
    (model,) = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert model["id"] == "tinyworld" and PROMPT in model["examples"]


def test_a_trace_has_engine_decoder_encoder_and_transport_of_a_session_on_one_clock(served):
    async def walk():
        async with served.connect() as socket, Client(socket) as client:
            await client.open()
            await client.until("state", block=0)
            served.server.trace.begin()
            await client.until("state", block=4)
            await client.send("stop")
            await client.until("ended")
            return served.server.trace.end()["traceEvents"]

    events = asyncio.run(walk())
    tracks = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    spans = [(tracks[event["pid"]], event) for event in events if event["ph"] == "X"]
    assert {track for track, _ in spans} == {"engine", "decoder", "encoder", "transport"}
    assert len({event["tid"] for _, event in spans}) == 1
    spans.sort(key=lambda span: span[1]["ts"])
    order = [track for track, event in spans if event["args"]["block"] == 3]
    assert list(dict.fromkeys(order)) == ["engine", "decoder", "encoder", "transport"]
    answer = httpx.get(f"{served.url}/v1/trace", params={"seconds": 0.01}).json()
    assert not [event for event in answer["traceEvents"] if event["ph"] == "X"] and not served.server.trace.recording


def test_a_slow_viewer_skips_or_pauses_as_declared(served):
    """A viewer that takes nothing: its outbox holds `room` blocks, and only `skip` goes on making blocks."""
    async def lag(behind):
        async with served.connect() as socket, Client(socket) as client:
            opened = await client.open(behind=behind, media=["raw"])
            assert opened["behind"] == behind
            await client.until("state")
            live = served.server.live.sessions[opened["session"]]
            stuck = asyncio.run_coroutine_threadsafe(hold(live), served.runner.loop)
            await asyncio.wrap_future(stuck)
            assert live.outbox.blocks <= live.outbox.room
            if behind == "skip":
                assert (await client.until("notice", kind="skipped"))["blocks"] > 0
            else:
                assert (await client.until("notice", kind="waited"))["seconds"] > 0
                assert live.outbox.skipped == 0
            await client.send("stop")
            await client.until("ended")
        await all_gone(served)

    async def hold(live):
        """Take nothing from the outbox until it has been full for a while."""
        take, free = live.outbox.take, asyncio.Event()

        async def held():
            await free.wait()
            return await take()

        live.outbox.take = held
        for _ in range(1000):
            await asyncio.sleep(0.02)
            if live.outbox.skipped or (live.behind == "pause" and live.outbox.blocks == live.outbox.room):
                break
        await asyncio.sleep(0.1)
        free.set()

    for behind in ("skip", "pause"):
        run(lag(behind))
