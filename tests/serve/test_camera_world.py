"""A world with a camera, served: what clients send moves it, and video jobs begin with the server's image."""

import asyncio
import time

import httpx
import numpy as np
import pytest
from camera_world import ROUNDING, camera_engine, differences, first_picture, replayed
from live_client import WAIT, Client, serving
from oracles import SIZE

from inferix.schemes.camera import CameraMove
from inferix.serve.settings import ServeSettings

PROMPT, ONE_STEP = "a canal", {"denoising_step_list": [1000]}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    settings = ServeSettings(realtime=False, image=first_picture(folder / "first.png"))
    with serving(settings, folder, camera_engine(settings, **ONE_STEP)) as running:
        yield running


def test_keys_and_mouse_of_a_client_move_the_camera(served):
    """A key that is released before a block begins shows in that block; pictures are those of a library session."""
    move = CameraMove(forward=1, turn=(20, 0))

    async def walk():
        async with served.connect() as socket, Client(socket) as client:
            opened = await client.open(media=["raw"], size=SIZE, seed=3, prompt=PROMPT)
            assert opened["camera"] and opened["actions"] == []
            await client.until("state", block=0)
            press = await client.send("camera", forward=move.forward, turn=move.turn)
            release = await client.send("camera")
            shown, ended = [await client.until("applied", id=id) for id in (press, release)]
            assert (shown["verb"], shown["block"]) == ("camera", ended["block"]) and shown["frame"] > 0
            await client.send("camera", yaw=2)
            refused = await client.until("refused")
            assert refused["code"] == "invalid" and "yaw" in refused["message"]
            await client.until("state", block=shown["block"] + 1)
            await client.send("stop")
            await client.until("ended")
            starts = {event["block"]: event["frame"] for event in client.events if event["type"] == "state"}
            pictures = [
                (header[3], header[4] - starts[header[3]], np.frombuffer(payload, np.uint8).reshape(*SIZE[::-1], 3))
                for header, payload in zip(client.media, client.payloads, strict=True)
                if header[3] in starts
            ]
            return shown["block"], pictures

    moved, pictures = asyncio.run(walk())
    count = pictures[-1][0] + 1
    assert count > moved + 1
    opening = {"prompt": PROMPT, "seed": 3, "size": SIZE, "image": served.server.settings.image}
    engine = camera_engine(served.server.settings, **ONE_STEP)
    same = differences(pictures, replayed(engine, opening, {moved: [move, CameraMove()]}, count))
    assert max(same.values()) <= ROUNDING, same
    other = differences(pictures, replayed(engine, opening, {}, count))
    assert max(other[block] for block in range(moved)) <= ROUNDING < other[moved], other


def test_a_video_job_begins_with_the_image_of_the_server(served):
    with httpx.Client(base_url=served.url, timeout=WAIT) as http:
        body = {"prompt": PROMPT, "seconds": "0.5", "size": f"{SIZE[0]}x{SIZE[1]}"}
        job = http.post("/v1/videos", json=body).json()
        until = time.monotonic() + WAIT
        while job["status"] not in ("completed", "failed") and time.monotonic() < until:
            time.sleep(0.05)
            job = http.get(f"/v1/videos/{job['id']}").json()
    assert (job["status"], job["size"]) == ("completed", "32x32"), job
