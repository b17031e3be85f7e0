"""Sessions that go on at another server: checkpoints, the choice of a server, and a router before two of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import websockets
from live_client import PROMPT, WAIT, Client, serving, small_engine
from routers import routing

from inferix.serve.checkpoints import Checkpoint, Checkpoints, knows, token_hash
from inferix.serve.protocol import Act, Fork, Prompt
from inferix.serve.refusals import Refusal
from inferix.serve.router import Router
from inferix.serve.routing import ControlMemory, ReplicaFacts, Scaling, choose, choose_for_job
from inferix.serve.settings import ServeSettings


def facts(**given):
    return ReplicaFacts(**({"replica": "r", "status": "ok", "sessions": 1, "places": 4, "load": 0.3} | given))


def test_the_least_loaded_server_with_room_is_chosen():
    servers = {"a": facts(load=0.4), "b": facts(load=0.2), "c": facts(load=0.0, sessions=0, status="draining")}
    assert choose(servers) == "b"
    servers["b"] = servers["b"].with_another().with_another()
    assert servers["b"].load == pytest.approx(0.6) and choose(servers) == "a"
    assert choose({"a": facts(load=0.6), "b": facts(load=0.9, room=0)}, moved=True) == "a"
    late = {"a": facts(late=4), "b": facts(load=0.6, realtime=False)}
    assert choose(late) == "b" and choose({"a": late["a"]}, moved=True) == "a"
    with pytest.raises(Refusal, match=r"120%.*4 of 4 sessions.*no pages") as refused:
        choose({"a": facts(load=0.6), "b": facts(sessions=4), "c": facts(room=0)})
    assert (refused.value.code, refused.value.status, refused.value.limit) == ("at_capacity", 503, ("replicas", 3))


def test_a_job_goes_to_the_server_with_the_fewest():
    servers = {"a": facts(jobs=2), "b": facts(jobs=1, load=0.9), "c": facts(jobs=1), "d": facts(status="draining")}
    assert choose_for_job(servers) == "c"
    with pytest.raises(Refusal) as refused:
        choose_for_job({"d": servers["d"]})
    assert (refused.value.code, refused.value.status) == ("at_capacity", 503)


def test_servers_are_added_for_late_blocks_and_removed_for_idle_ones():
    scaling = Scaling(least=1, most=3, load=0.7, slack=0.05)
    assert scaling.wanted([]) == 1
    assert scaling.wanted([facts(slack=0.2)]) == 1
    assert scaling.wanted([facts(slack=0.01)]) == 2  # a block was nearly late
    assert scaling.wanted([facts(sessions=4)]) == 2  # no place is left
    assert scaling.wanted([facts(load=0.3), facts(load=0.2), facts(sessions=0, load=0.0)]) == 1
    assert scaling.wanted([facts(load=0.5), facts(load=0.5), facts(load=0.5)]) == 3
    assert scaling.wanted([facts(slack=-1.0)] * 3) == 3


def test_an_empty_server_stays_where_the_other_has_no_time_for_one_more():
    for realtime, kept in ((True, 2), (False, 1)):
        busy, idle = facts(sessions=2, load=0.6, realtime=realtime), facts(sessions=0, load=0.0, realtime=realtime)
        assert Scaling().wanted([busy]) == kept and Scaling().wanted([busy, idle]) == kept


def test_controls_that_a_lost_server_had_not_applied_are_sent_again():
    memory = ControlMemory(prompt="one")
    memory.sent(Act(id=1, type="act", action="up"))
    memory.sent(Fork(id=2, type="fork"))
    memory.sent(Prompt(id=3, type="prompt", text="two"))
    assert memory.pass_on({"type": "received", "id": 3}) and not memory.pass_on({"type": "received", "id": 3})
    memory.pass_on({"type": "applied", "id": 1, "block": 4})
    memory.pass_on({"type": "state", "block": 6})
    controls, lost = memory.owed("another", "own.")
    assert [control.id for control in controls] == ["own.prompt", "own.act.up", 3]
    assert [control.type for control in controls] == ["prompt", "act", "prompt"]
    assert lost == [2] and memory.lost_blocks(5) == 2 and memory.lost_blocks(7) == 0
    memory.sent(Act(id=4, type="act", action="up", pressed=False))
    assert memory.owed("one", "own.")[0][0].id == 3


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    places = Checkpoints(tmp_path)
    session = "ab" * 16
    path = places.place(session, 3)
    made = Checkpoint(session, token_hash("secret"), places.owner, "p", 1, "skip", False, 0, 3, path.name)
    places.add(made)
    assert places.find(session) is None  # the saved session is missing
    path.write_bytes(b"x")
    assert places.find(session) == made and knows(made, "secret") and not knows(made, "Secret")
    newer = places.place(session, 6)
    newer.write_bytes(b"y")
    other = Checkpoints(tmp_path)
    other.add(Checkpoint(**{**vars(made), "file": newer.name, "block": 6, "owner": other.owner}))
    assert not path.exists() and not places.owns(session) and other.owns(session)
    about = tmp_path / f"{session}.json"
    for damaged in (b"{", b"[]", b'{"session": 1}', about.read_bytes().replace(newer.name.encode(), b"../x")):
        about.write_bytes(damaged)
        assert places.find(session) is None
    assert places.find("../../etc/passwd") is None
    places.remove(session)
    assert list(tmp_path.iterdir()) == []


def test_a_drained_server_hands_its_session_to_another_and_its_viewer_goes_on(tmp_path):
    """The pictures are those of one engine; the control that was on its way has its receipt from the second server."""
    settings = ServeSettings(checkpoint_every=1000, shared=tmp_path / "shared", realtime=False, sessions=2)
    engine = small_engine(settings)
    session = engine.open(PROMPT, seed=3)
    alone = [block.frames.tobytes() for block in session.stream(8)]
    session.close()

    async def walk(servers, url):
        async with websockets.connect(f"ws{url.removeprefix('http')}/v1/live") as socket, Client(socket) as client:
            opened = await client.open(media=["raw"], seed=3)
            await client.until("state", block=1)
            first, second = servers if opened["session"] in servers[0].server.live.sessions else servers[::-1]
            first.runner.request_drain()
            moved = await client.until("notice", kind="moved")
            again = await client.until("opened")
            assert moved["blocks"] == 0 and moved["seconds"] > 0
            assert all(again[name] == opened[name] for name in ("session", "resume", "id"))
            assert again["prompt"] == PROMPT and opened["session"] in second.server.live.sessions
            await client.until("state", block=4)
            press = await client.applied("act", action="left")
            await client.until("state", block=press["block"])
            shown = {}
            for header, payload in zip(client.media, client.payloads, strict=True):
                shown.setdefault(header[3], []).append(payload)
            made = {block: b"".join(pictures) for block, pictures in shown.items() if block < press["block"]}
            assert list(made) == list(range(press["block"])) and made == dict(enumerate(alone[: press["block"]]))
            await client.send("stop")
            assert (await client.until("ended"))["code"] == "stopped"
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tinyworld"
        assert list((tmp_path / "shared" / "checkpoints").iterdir()) == []

    with ExitStack() as stack:
        engine.hand_over()
        engines = {"a": engine, "b": None}
        servers = [stack.enter_context(serving(settings, tmp_path / name, engines[name])) for name in engines]
        _, url = stack.enter_context(routing(*(served.url for served in servers)))
        asyncio.run(walk(servers, url))


JOB, OTHER, NONE = "1" * 32, "2" * 32, "0" * 32


def test_a_request_is_passed_on_to_the_server_that_it_belongs_to():
    """Servers that only answer what they have: a job and a live session each, one a recording; one is gone."""
    has = {
        "a": {f"/v1/videos/{JOB}", f"/v1/recordings/{NONE}/video.mp4"}, "b": {f"/v1/videos/{OTHER}"},
    }  # fmt: skip
    listed = {"a": [{"id": JOB, "created_at": 5}], "b": [{"id": OTHER, "created_at": 7}]}

    def answer(request):
        server, path = request.url.host, request.url.path
        if server == "gone":
            raise httpx.ConnectError("gone")
        if path == "/v1/replica":
            holds = server == "a" and request.url.params.get("session") == JOB
            return httpx.Response(200, json=facts(holds=holds).model_dump())
        if path == "/v1/videos":
            return httpx.Response(200, json={"data": listed[server], "has_more": False})
        return httpx.Response(200 if path in has[server] else 404)

    async def urls():
        return ["http://gone", "http://a", "http://b"]

    async def ask():
        router = Router(urls, ServeSettings())
        router.client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        await router.poll()
        router.replicas["http://gone"] = facts(status="failed", jobs=0)
        router.replicas["http://a"].jobs = 1
        expected = {
            ("GET", f"/v1/videos/{JOB}"): "a", ("DELETE", f"/v1/videos/{OTHER}"): "b",
            ("GET", f"/v1/videos/{OTHER}/content"): "b", ("POST", f"/v1/videos/{JOB}/remix"): "a",
            ("GET", f"/v1/recordings/{NONE}/video.mp4"): "a", ("POST", "/v1/videos"): "b",
            ("DELETE", f"/v1/whip/{JOB}"): "a", ("POST", "/v1/whep"): "a",
        }  # fmt: skip
        for (method, path), server in expected.items():
            assert await router.server_for(method, path, {}) == f"http://{server}", path
        assert router.replicas["http://b"].jobs == 0  # asked for again by the look for a session
        assert await router.server_for("POST", "/v1/whep", {"session": JOB}) == "http://a"
        for path in (f"/v1/videos/{NONE}", f"/v1/recordings/{NONE}/x", "/v1/x", "/v1/worlds/a/b", f"/v1/whip/{NONE}"):
            with pytest.raises(Refusal) as refused:
                await router.server_for("DELETE", path, {})
            assert refused.value.status == 404
        for session in ("x", JOB + "0", "../" + JOB):  # servers would refuse to be asked for it
            with pytest.raises(Refusal) as refused:
                await router.server_for("POST", "/v1/whep", {"session": session})
            assert refused.value.code == "invalid" and "http://a" in router.replicas
        assert [job["id"] for job in await router.jobs()] == [OTHER, JOB]

    asyncio.run(ask())


@pytest.mark.slow
def test_jobs_and_recordings_are_found_at_the_server_that_has_them(tmp_path):
    settings = ServeSettings(realtime=False, sessions=1)

    async def record(url):
        async with websockets.connect(f"ws{url.removeprefix('http')}/v1/live") as socket, Client(socket) as client:
            await client.open()
            await client.applied("record")
            await client.until("state")
            ended = await client.applied("record", on=False)
            await client.send("stop")
            await client.until("ended")
        return ended

    with ExitStack() as stack:
        servers = [stack.enter_context(serving(settings, tmp_path / name)) for name in "ab"]
        _, url = stack.enter_context(routing(*(served.url for served in servers)))
        http = stack.enter_context(httpx.Client(base_url=url, timeout=WAIT))
        made = [http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 0.2}).json()["id"] for _ in range(2)]
        for served in servers:
            (own,) = httpx.get(f"{served.url}/v1/videos").json()["data"]
            assert own["id"] in made
        ended = asyncio.run(record(url))
        while any(http.get(f"/v1/videos/{id}").json()["status"] != "completed" for id in made):
            time.sleep(0.05)
        newest = http.get("/v1/videos", params={"limit": 1}).json()
        older = http.get("/v1/videos", params={"after": newest["last_id"]}).json()
        assert newest["has_more"] and not older["has_more"] and {newest["first_id"], older["first_id"]} == set(made)
        oldest = http.get("/v1/videos", params={"order": "asc", "limit": 1}).json()
        assert oldest["data"] == older["data"]
        for id in made:
            answer = http.get(f"/v1/videos/{id}")
            assert answer.headers["openai-poll-after-ms"]
            assert http.get(f"/v1/videos/{id}/content").content[4:8] == b"ftyp"
        part = http.get(ended["url"], headers={"Range": "bytes=4-7"})
        assert (part.status_code, part.content) == (206, b"ftyp")
        assert int(http.get(ended["url"]).headers["content-length"]) == ended["bytes"]
        remix = http.post(f"/v1/videos/{made[0]}/remix", json={"prompt": PROMPT}).json()
        assert remix["remixed_from_video_id"] == made[0]
        for id in (remix["id"], *made):
            assert http.delete(f"/v1/videos/{id}").json()["deleted"]
        none = "0" * 32
        for path in (f"/v1/videos/{none}", f"/v1/videos/{none}/content", f"/v1/recordings/{none}/init.mp4", "/v1/x"):
            answer = http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
        assert http.get("/v1/videos", params={"after": none}).status_code == 404
        assert http.get("/v1/videos", params={"limit": 0}).status_code == 422
        for path in (f"/v1/whep/{none}", f"/v1/whip/{none}", f"/v1/videos/{none}"):
            assert http.delete(path).status_code == 404
        assert http.post("/v1/whip", params={"prompt": PROMPT}, content="no offer").status_code == 400


@contextmanager
def started(folder, shared, every=2, options=("--set", "num_steps=1")):
    """A server in a process of its own; yields the process and its URL."""
    command = [sys.executable, "-m", "inferix", "serve", "--port", "0", "--json", "--folder", str(folder)]
    command += ["--shared", str(shared), "--checkpoint-every", str(every), "--rewind-blocks", "0", *options]
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True)
    try:
        yield process, json.loads(process.stdout.readline())["url"]
    finally:
        process.kill()
        process.wait(WAIT)


@pytest.mark.parametrize("drained", [True, False])
def test_only_an_engine_that_ends_by_itself_is_lost(tmp_path, drained):
    """What is lost is started again; a server that is stopped is not, though its engine ends meanwhile."""
    with serving(ServeSettings(), tmp_path, with_engine=True) as served:
        if drained:
            served.runner.request_drain()
        served.server.host.engine.halt()
        deadline = time.monotonic() + WAIT
        while not served.runner.should_exit and time.monotonic() < deadline:
            time.sleep(0.02)
    assert served.runner.lost is not drained


def test_servers_are_asked_for_their_numbers_while_clients_hold_all_downloads(monkeypatch):
    """Two clients have every connection for what is passed on; the router still knows its server."""
    monkeypatch.setattr("inferix.serve.router.PASSED_AT_A_TIME", 2)
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        """Numbers at once, and files that do not end."""

        protocol_version = "HTTP/1.1"

        def do_GET(self):
            numbers = facts().model_dump_json().encode() if self.path.startswith("/v1/replica") else None
            self.send_response(200)
            self.send_header("Content-Length", str(1000 if numbers is None else len(numbers)))
            self.end_headers()
            self.wfile.write(numbers or b"x")
            if numbers is None:
                self.wfile.flush()
                over.wait(WAIT)
                self.close_connection = True

        def log_message(self, *_):
            pass

    with ExitStack() as stack:
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=server.serve_forever).start()
        stack.callback(server.shutdown)
        stack.callback(over.set)
        url = f"http://127.0.0.1:{server.server_address[1]}"
        router, address = stack.enter_context(routing(url))
        http = stack.enter_context(httpx.Client(timeout=WAIT))
        for _ in range(2):
            held = stack.enter_context(http.stream("GET", f"{address}/v1/recordings/{'0' * 32}/video.mp4"))
            assert held.status_code == 200
        router.replicas = {}
        deadline = time.monotonic() + WAIT
        while url not in router.replicas and time.monotonic() < deadline:
            time.sleep(0.02)
        assert url in router.replicas
        over.set()


@pytest.mark.slow
def test_a_killed_server_costs_at_most_the_blocks_since_the_last_checkpoint(tmp_path):
    """Killed twice: once with another server there, once alone, so that its client comes back to a new one."""
    engine = small_engine(ServeSettings(), rewind_blocks=0)
    alone = [block.frames.tobytes() for block in engine.open(PROMPT, seed=3).stream(40)]

    async def kill(processes, url):
        async with websockets.connect(f"ws{url.removeprefix('http')}/v1/live") as socket, Client(socket) as client:
            opened = await client.open(media=["raw"], seed=3)
            last = await client.until("state", block=5)
            for process, server in processes:
                if httpx.get(f"{server}/v1/replica", params={"session": opened["session"]}).json()["holds"]:
                    process.kill()
            moved = await client.until("notice", kind="moved")
            print(f"moved after a kill in {moved['seconds']:.2f} s, {moved['blocks']} blocks made again")
            again = await client.until("opened")
            before = next(event for event in reversed(client.events) if event["type"] == "state")["block"]
            assert again["session"] == opened["session"] and before >= last["block"]
            assert before + 1 - moved["blocks"] == again["next_block"] and moved["blocks"] <= 2
            await client.until("state", block=before + 3)
        return opened

    async def come_back(url, opened):
        async with websockets.connect(f"ws{url.removeprefix('http')}/v1/live") as socket, Client(socket) as client:
            await client.send("attach", session=opened["session"], resume=opened["resume"], media=["raw"])
            again = await client.until("opened")
            assert again["session"] == opened["session"] and again["next_block"] >= 6
            await client.until("state")
            shown = {}
            for header, payload in zip(client.media, client.payloads, strict=True):
                shown.setdefault(header[3], []).append(payload)
            assert all(b"".join(pictures) == alone[block] for block, pictures in shown.items())

    with ExitStack() as stack:
        shared = tmp_path / "shared"
        processes = [stack.enter_context(started(tmp_path / name, shared)) for name in "ab"]
        _, url = stack.enter_context(routing(*(server for _, server in processes)))
        opened = asyncio.run(kill(processes, url))
        for process, _ in processes:
            process.kill()
        _, alone_url = stack.enter_context(started(tmp_path / "c", shared))
        asyncio.run(come_back(alone_url, opened))


def children(pid):
    """Processes that a process has started and that have not ended."""
    stats = {path.parent.name: path.read_text() for path in Path("/proc").glob("[0-9]*/stat")}
    fields = {int(child): stat.rpartition(")")[2].split() for child, stat in stats.items()}
    return [child for child, (state, parent, *_) in fields.items() if state != "Z" and int(parent) == pid]


@pytest.mark.slow
def test_a_server_whose_rank_is_killed_starts_anew_and_goes_on_from_checkpoints(tmp_path):
    options = ["--model", "wan-ranks", "--preset", "self-forcing", "--gpus", "2", "--restart"]
    options += ["--set", "local_attn_size=6", "--set", "denoising_step_list=[1000]"]

    async def lose(process, url):
        async with websockets.connect(f"ws{url.removeprefix('http')}/v1/live") as socket, Client(socket) as client:
            opened = await client.open(media=["raw"], seed=3)
            await client.until("state", block=2)
            (rank,) = children(process.pid)
            os.kill(rank, signal.SIGKILL)
            assert (await client.until("ended"))["code"] == "lost"
        return opened, rank

    async def come_back(url, opened):
        async with websockets.connect(f"ws{url.removeprefix('http')}/v1/live") as socket, Client(socket) as client:
            await client.send("attach", session=opened["session"], resume=opened["resume"], media=["raw"])
            again = await client.until("opened")
            assert again["session"] == opened["session"] and again["next_block"] >= 1
            await client.until("state")

    with started(tmp_path, tmp_path / "shared", 1, options) as (process, url):
        opened, rank = asyncio.run(lose(process, url))
        assert json.loads(process.stdout.readline())["url"] == url  # of the new program in the same process
        assert children(process.pid) != [rank]
        asyncio.run(come_back(url, opened))
