"""The Ray Serve application: a replica killed and another one drained, while viewers go on, ranks, and autoscaling."""

import asyncio
import os
import re
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import websockets
import yaml
from live_client import PROMPT, WAIT, Client, small_engine

from inferix.errors import UsageError
from inferix.serve.settings import ServeSettings

DOC = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
PORT = 8123
PATIENT = {  # for a machine that has other work too: seconds, and workers that are not the last to run
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_worker_niceness": "0",
}  # fmt: skip


def config(shared, replicas=None):
    """The configuration of the documentation, for the small world on this machine.

    replicas: their number in place of autoscaling, which is here from one to two with a session each, without delays.
    """
    (text,) = re.findall(r"```yaml\n(applications:.*?)```", DOC, re.DOTALL)
    values = yaml.safe_load(text)
    application = values["applications"][0]
    application["args"] |= {
        "shared": str(shared), "token_file": None, "load": {"device": "cpu", "num_steps": 1}, "checkpoint_every": 2,
        "rewind_blocks": 0,
    }  # fmt: skip
    (engine,) = [part for part in application["deployments"] if part["name"] == "Engine"]
    assert engine["autoscaling_config"]["policy"]["policy_function"] == "inferix.serve.ray_app:ScaleOnSlack"
    engine["ray_actor_options"] = {"num_cpus": 0.5}
    if replicas is not None:
        del engine["autoscaling_config"]
        engine["num_replicas"] = replicas
    else:
        engine["autoscaling_config"] |= {"max_replicas": 2, "upscale_delay_s": 0, "downscale_delay_s": 0}
        application["args"] |= {"sessions": 1, "limits": {"realtime": False}}
    return values | {"http_options": {"host": "127.0.0.1", "port": PORT}}


URL = f"http://127.0.0.1:{PORT}"


@contextmanager
def cluster():
    """Ray and its HTTP proxy on this machine."""
    ray = pytest.importorskip("ray")
    from ray import serve

    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:  # paths of its sockets have to be short
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", **PATIENT}
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=short)
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": PORT})
            yield
        finally:
            serve.shutdown()
            ray.shutdown()


def deploy(values):
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(values), _blocking=False)


def connect():
    return websockets.connect(f"ws{URL.removeprefix('http')}/v1/live", max_size=None, ping_interval=None)


def servers(count):
    """The servers' numbers by address, once there are as many."""
    until, found = time.monotonic() + 5 * WAIT, {}
    while time.monotonic() < until:
        with suppress(httpx.TransportError):  # the proxy is not there yet
            answer = httpx.get(f"{URL}/v1/replicas", timeout=WAIT)
            if answer.status_code == 200 and len(found := answer.json()) == count:
                return found
        time.sleep(0.2)
    raise AssertionError(found)


async def reading(work, *clients):
    """The result of some work; clients that nobody reads answer no pings, and are disconnected."""
    readers = [asyncio.create_task(read(client)) for client in clients]
    try:
        return await work
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def read(client):
    while True:
        await client.receive()


@pytest.mark.slow
def test_replicas_are_added_for_sessions_and_removed_after_them(tmp_path):
    """Ray's own autoscaler follows `ScaleOnSlack`: one replica is full with a session, so another comes, and goes."""
    async def walk():
        async with connect() as one:
            first = Client(one)
            begun = time.perf_counter()
            await first.open()
            await reading(asyncio.to_thread(servers, 2), first)
            print(f"a second replica {time.perf_counter() - begun:.1f} s after the first was full")
            async with connect() as two:
                second = Client(two)
                await reading(second.open(), first)
                for client in (first, second):
                    await client.until("state")
                    await client.send("stop")
                    await client.until("ended")
        begun = time.perf_counter()
        await asyncio.to_thread(servers, 1)
        print(f"one replica {time.perf_counter() - begun:.1f} s after the last session")
        async with connect() as socket, Client(socket) as client:
            await client.open()
            await client.until("state")

    with cluster():
        deploy(config(tmp_path))
        servers(1)
        asyncio.run(walk())


@pytest.mark.slow
def test_a_session_outlives_a_killed_replica_and_a_drained_one(tmp_path):
    psutil = pytest.importorskip("psutil")
    engine = small_engine(ServeSettings(), rewind_blocks=0)
    alone = [block.frames.tobytes() for block in engine.open(PROMPT, seed=3).stream(120)]

    def process_at(server):
        port = int(server.rpartition(":")[2])
        (id,) = {c.pid for c in psutil.net_connections() if c.status == "LISTEN" and c.laddr.port == port}
        return psutil.Process(id)

    def holder(session):
        return next(
            server for server in servers(2)
            if httpx.get(f"{server}/v1/replica", params={"session": session}).json()["holds"]
        )  # fmt: skip

    async def follow(client, kind):
        """Events up to a move of the client's session; prints it."""
        moved = await client.until("notice", kind="moved")
        again = await client.until("opened")
        before = next(event for event in reversed(client.events) if event["type"] == "state")["block"]
        assert before + 1 - moved["blocks"] == again["next_block"]
        await client.until("state", block=before + 2)
        print(f"{kind}: moved in {moved['seconds']:.2f} s, {moved['blocks']} blocks made again")
        return moved

    async def walk():
        async with connect() as one, connect() as two:
            first, second = Client(one), Client(two)
            opened = [await client.open(media=["raw"], seed=3) for client in (first, second)]
            await first.until("state", block=5)
            await second.until("state", block=3)
            held = [await reading(asyncio.to_thread(holder, event["session"]), first, second) for event in opened]
            assert held[0] != held[1]
            process_at(held[0]).kill()
            assert (await follow(first, "killed"))["blocks"] <= 2
            begun = time.perf_counter()
            while held[0] in await reading(asyncio.to_thread(servers, 2), first, second):
                pass
            print(f"another replica took the killed one's place after {time.perf_counter() - begun:.1f} s")
            await first.applied("stop")
            third_socket = await connect()
            third = Client(third_socket)
            await reading(third.open(media=["raw"], seed=3), second)
            await reading(third.until("state", block=2), second)
            scaling = asyncio.create_task(asyncio.to_thread(deploy, config(tmp_path, 1)))
            moves = [asyncio.create_task(follow(client, "drained")) for client in (second, third)]
            done, waiting = await asyncio.wait(moves, return_when=asyncio.FIRST_COMPLETED)
            (drained,) = done
            assert drained.result()["blocks"] == 0
            for task in waiting:
                task.cancel()
            await scaling
            client = second if drained is moves[0] else third
            shown = {}
            for header, payload in zip(client.media, client.payloads, strict=True):
                shown.setdefault(header[3], []).append(payload)
            made = {block: b"".join(pictures) for block, pictures in shown.items() if block < max(shown)}
            assert list(made) == list(range(len(made))) and len(made) > 3
            assert all(pictures == alone[block] for block, pictures in made.items())
            await third_socket.close()

    begun = time.perf_counter()
    with cluster():
        deploy(config(tmp_path, 2))
        servers(2)
        print(f"two replicas after {time.perf_counter() - begun:.1f} s")
        asyncio.run(walk())


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["STRICT_PACK", "PACK"])
def test_two_ranks_of_one_replica_share_a_placement_group(placement, tmp_path):
    """A session on two ranks has the pictures of one; where a rank is killed, another replica goes on with it."""
    psutil = pytest.importorskip("psutil")
    engine = small_engine(ServeSettings(), rewind_blocks=0)
    alone = [block.frames for block in engine.open(PROMPT, seed=3).stream(3)]
    values = config(tmp_path, 1)
    values["applications"][0]["args"] |= {"bundle": {"CPU": 0.5}, "placement": placement}
    values["applications"][0]["args"]["load"] |= {"gpus": 2}

    def rank_processes():
        lines = {one: one.info["cmdline"] for one in psutil.process_iter(["cmdline"])}
        return [one for one, line in lines.items() if line and line[0] == "ray::Rank.serve"]

    def group():
        """The one placement group that is up."""
        from ray.util import placement_group_table

        (up,) = [one for one in placement_group_table().values() if one["state"] == "CREATED"]
        return up

    async def walk():
        async with connect() as socket:
            client = Client(socket)
            opened = await client.open(media=["raw"], seed=3)
            await client.until("state", block=3)
            shown = {}
            for header, payload in zip(client.media, client.payloads, strict=True):
                shown.setdefault(header[3], []).append(payload)
            for block, frames in enumerate(alone):
                made = np.frombuffer(b"".join(shown[block]), np.uint8).reshape(frames.shape)
                assert abs(made.astype(int) - frames).max() <= 1  # a rounded number may differ by one
            (rank,) = rank_processes()
            rank.kill()
            moved = await client.until("notice", kind="moved")
            again = await client.until("opened")
            assert again["session"] == opened["session"]
            await client.until("state", block=again["next_block"])
            print(f"a rank killed: moved in {moved['seconds']:.2f} s, {moved['blocks']} blocks made again")

    with cluster():
        from inferix.serve.ray_app import Arguments, build

        shared = {"shared": str(tmp_path), "load": {"device": "cpu", "gpus": 4}}
        for change, words in (
            ({"bundle": {"CPU": 1}}, "gpus is 4.*STRICT_PACK.*gpus=2"), ({"bundle": {"GPU": 1}}, "gpus is 4.*machines"),
            ({"placement": "SPREAD"}, "placement.*SPREAD"), ({"bundle": {"CPU": 0}}, "bundle"),
            ({"load": {"gpus": "two"}}, "gpus.*two"),
        ):  # fmt: skip
            with pytest.raises(UsageError, match=words):
                build(Arguments(**shared | change))
        deploy(values)
        servers(1)
        before = group()
        assert before["strategy"] == placement
        assert [bundle["CPU"] for bundle in before["bundles"].values()] == [0.5, 0.5]
        asyncio.run(walk())
        assert group()["placement_group_id"] != before["placement_group_id"]
        assert len(rank_processes()) == 1
    until = time.monotonic() + WAIT
    while rank_processes():
        assert time.monotonic() < until
        time.sleep(0.2)
