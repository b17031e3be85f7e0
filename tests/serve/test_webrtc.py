"""WebRTC out: an aiortc client gets moving pictures, sends controls by the data channel, and ends its session."""

import asyncio
import json

import httpx
import pytest
from live_client import PROMPT, WAIT, serving

from inferix.serve.settings import ServeSettings

aiortc = pytest.importorskip("aiortc", reason="aiortc is in the [webrtc] and [dev] extras")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(ServeSettings(realtime=False), tmp_path_factory.mktemp("served")) as running:
        yield running


async def offered(served, connection, **query):
    """Make an offer; returns the answer's response, applied if it is one."""
    await connection.setLocalDescription(await connection.createOffer())
    async with httpx.AsyncClient(base_url=served.url, timeout=WAIT) as http:
        headers = {"Content-Type": "application/sdp"}
        answer = await http.post("/v1/whep", params=query, content=connection.localDescription.sdp, headers=headers)
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
