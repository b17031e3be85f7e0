"""WebRTC: an aiortc client gets moving pictures, sends controls and video, and ends its session."""

import asyncio
import json
import re
from types import SimpleNamespace

import av
import httpx
import numpy as np
import pytest
from live_client import PROMPT, WAIT, Client, serving
from routers import routing

from inferix.serve.refusals import Refusal
from inferix.serve.settings import ServeSettings
from inferix.serve.video_in import VideoIn

aiortc = pytest.importorskip("aiortc", reason="aiortc is in the [webrtc] and [dev] extras")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(ServeSettings(realtime=False), tmp_path_factory.mktemp("served")) as running:
        yield running


async def offered(served, connection, way="whep", **query):
    """Make an offer; returns the answer's response, applied if it is one."""
    await connection.setLocalDescription(await connection.createOffer())
    async with httpx.AsyncClient(base_url=served.url, timeout=WAIT) as http:
        headers = {"Content-Type": "application/sdp"}
        answer = await http.post(f"/v1/{way}", params=query, content=connection.localDescription.sdp, headers=headers)
    if answer.status_code == 201:
        await connection.setRemoteDescription(aiortc.RTCSessionDescription(answer.text, "answer"))
    return answer


def test_pictures_controls_and_the_end(served):
    async def watch():
        connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
        connection.addTransceiver("video", direction="recvonly")
        channel = connection.createDataChannel("inferix")
        events: asyncio.Queue = asyncio.Queue()
        channel.on("message", lambda message: events.put_nowait(json.loads(message)))
        tracks: asyncio.Queue = asyncio.Queue()
        connection.on("track", tracks.put_nowait)
        answer = await offered(served, connection, prompt=PROMPT, seed=2)
        async with asyncio.timeout(WAIT):
            track = await tracks.get()
            frames = [await track.recv() for _ in range(6)]
            assert {(frame.width, frame.height) for frame in frames} == {(64, 64)}

            async def until(**fields):
                while not fields.items() <= (event := await events.get()).items():
                    pass
                return event

            opened = await until(type="opened")
            assert opened["seed"] == 2 and answer.headers["location"].endswith(opened["session"])
            channel.send(json.dumps({"type": "act", "id": 7, "action": "right"}))
            applied = await until(type="applied", id=7)
            assert (await until(type="state"))["block"] == applied["block"]
            channel.send("{")
            assert (await until(type="refused"))["code"] == "malformed"
        async with httpx.AsyncClient(base_url=served.url) as http:
            assert (await http.delete(answer.headers["location"])).status_code == 200
            while served.server.live.sessions:
                await asyncio.sleep(0.02)
            assert (await http.delete(answer.headers["location"])).status_code == 404
        await connection.close()

    asyncio.run(watch())


@pytest.mark.parametrize("sdp", ["", "v=0", "x" * 70_000, "v=0\r\no=- 0 0 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\n"])
def test_what_is_no_offer_is_refused_and_holds_no_session(served, sdp):
    answer = httpx.post(f"{served.url}/v1/whep", params={"prompt": PROMPT}, content=sdp, timeout=WAIT)
    assert answer.status_code in (400, 413) and "error" in answer.json()
    assert not served.server.live.sessions


class Plain(aiortc.VideoStreamTrack):
    """A track of one colour, [R, G, B], that may be changed; 30 pictures a second of 96x64."""

    def __init__(self, colour):
        super().__init__()
        self.colour = colour

    async def recv(self):
        pts, time_base = await self.next_timestamp()
        frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), self.colour, np.uint8), format="rgb24")
        frame.pts, frame.time_base = pts, time_base
        return frame


def peer():
    return aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))


@pytest.mark.slow
def test_a_world_is_made_from_a_clients_video_and_shown_on_the_same_connection(served):
    """The colour of the pictures follows that of the video, and each state says the latency."""
    async def send():
        connection, track, events = peer(), Plain([200, 30, 30]), asyncio.Queue()
        connection.addTrack(track)
        channel, tracks = connection.createDataChannel("inferix"), asyncio.Queue()
        channel.on("message", lambda message: events.put_nowait(json.loads(message)))
        connection.on("track", tracks.put_nowait)
        async with asyncio.timeout(WAIT):
            answer = await offered(served, connection, "whip", prompt=PROMPT, strength=0.05)
            assert answer.status_code == 201, answer.text
            shown = await tracks.get()

            async def until(test):
                while not test(colour := (await shown.recv()).to_ndarray(format="rgb24").mean((0, 1))):
                    pass
                return colour

            red = await until(lambda colour: colour[0] > colour[2] + 40)
            track.colour = [30, 30, 200]
            blue = await until(lambda colour: colour[2] > colour[0] + 40)
            print(red, blue)
            for type, fields in (("fork", {}), ("save", {}), ("restore", {"world": "0" * 32})):
                channel.send(json.dumps({"type": type, "id": type, **fields}))
            channel.send(json.dumps({"type": "seed", "id": "seed", "seed": 5}))
            states, answers = [], {}
            while "seed" not in answers or states[-1]["seed"] != 5:
                event = await events.get()
                if event["type"] == "state":
                    states.append(event)
                elif event["type"] in ("applied", "refused"):
                    answers[event["id"]] = event["type"]
            assert answers == {"fork": "refused", "save": "refused", "restore": "refused", "seed": "applied"}
            assert all(state["latency"] > 0 and state["dropped"] >= 0 for state in states)
            block = served.server.host.engine.preset.num_frame_per_block
            print(f"latency {states[-1]['latency']:.2f} s at {block} latent frames a block")
            channel.close()
            await connection.close()
            while served.server.live.sessions:
                await asyncio.sleep(0.02)

    asyncio.run(send())
    metrics = httpx.get(f"{served.url}/metrics").text
    assert "inferix_video_to_pixel_seconds_count" in metrics


def test_a_clients_video_is_watched_on_another_connection(served):
    async def send():
        connection = peer()
        connection.addTransceiver(Plain([90, 90, 90]), direction="sendonly")
        connection.addTransceiver("audio", direction="sendonly")  # which nothing reads
        connection.addTransceiver(Plain([0, 0, 0]), direction="sendonly")
        async with asyncio.timeout(WAIT):
            answer = await offered(served, connection, "whip", prompt=PROMPT)
            directions = re.findall(r"a=(sendonly|recvonly|sendrecv|inactive)", answer.text)
            assert directions == ["recvonly", "inactive", "inactive"]
            session = answer.headers["location"].rpartition("/")[2]
            async with served.connect() as socket, Client(socket) as client:
                resume = answer.headers["inferix-resume"]
                await client.send("attach", session=session, resume=resume, media=["raw"])
                opened = await client.until("opened")
                assert (await client.until("state"))["latency"] > 0
                rewound = await client.applied("rewind", block=opened["next_block"])
                assert (await client.until("state"))["block"] == rewound["block"]
                async with httpx.AsyncClient(base_url=served.url) as http:
                    assert (await http.delete(f"/v1/whep/{session}")).status_code == 404
                    assert (await http.delete(answer.headers["location"])).status_code == 200
                assert (await client.until("ended"))["code"] == "stopped"
            await connection.close()
            while served.server.live.sessions:
                await asyncio.sleep(0.02)

    asyncio.run(send())


@pytest.mark.slow
def test_offers_are_answered_through_a_router(served):
    """Pictures come from the server itself; the offer's session is ended by the router's address."""
    async def watch(url):
        connection = peer()
        connection.addTransceiver("video", direction="recvonly")
        tracks: asyncio.Queue = asyncio.Queue()
        connection.on("track", tracks.put_nowait)
        async with asyncio.timeout(WAIT):
            answer = await offered(SimpleNamespace(url=url), connection, prompt=PROMPT)
            assert answer.status_code == 201 and answer.headers["inferix-resume"]
            track = await tracks.get()
            assert (await track.recv()).width == 64
            async with httpx.AsyncClient(base_url=url, timeout=WAIT) as http:
                assert (await http.delete(answer.headers["location"])).status_code == 200
                while served.server.live.sessions:
                    await asyncio.sleep(0.02)
                assert (await http.delete(answer.headers["location"])).status_code == 404
        await connection.close()

    with routing(served.url) as (_, url):
        asyncio.run(watch(url))


def test_an_offer_without_video_to_send_is_refused(served):
    async def ask(**query):
        connection = peer()
        connection.addTransceiver("video", direction="recvonly")
        answer = await offered(served, connection, "whip", **query)
        await connection.close()
        return answer

    assert "sends no video" in asyncio.run(ask(prompt=PROMPT)).json()["error"]["message"]
    for query in ({}, {"prompt": PROMPT, "strength": 0}, {"prompt": PROMPT, "strength": 1.1}):
        assert asyncio.run(ask(**query)).status_code == 422
    assert not served.server.live.sessions


def test_the_newest_pictures_of_a_track_are_kept():
    class Track:
        """Pictures as fast as they are asked for; then one that is too large."""

        count = 0

        async def recv(self):
            await asyncio.sleep(0.002)
            self.count += 1
            width = 64 if self.count < 60 else 128
            return av.VideoFrame.from_ndarray(np.full((32, width, 3), self.count, np.uint8), format="rgb24")

    async def take():
        video, track = VideoIn((16, 16), 500.0, 4, 64 * 32), Track()
        sampling = asyncio.create_task(video.sample())
        with pytest.raises(Refusal, match="128x32"):
            await video.receive(track)
        sampling.cancel()
        assert video.dropped > 0 and len(video.waiting) == 4
        arrived, pictures = await video.take(3)
        levels = pictures.mean((1, 2, 3))
        assert pictures.shape == (3, 16, 16, 3) and arrived > 0 and not video.waiting
        assert list(levels) == sorted(levels) and levels[-1] > 30

    asyncio.run(take())
