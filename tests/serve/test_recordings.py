"""Recordings of a live session: an MP4 file, and an HLS stream that foreign readers take."""

import asyncio
import io
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from live_client import Client, serving
from PIL import Image

from inferix.errors import InferixError
from inferix.media import read_video
from inferix.serve.recording import Recordings
from inferix.serve.refusals import Refusal
from inferix.serve.settings import ServeSettings


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(ServeSettings(realtime=False, recordings=1), tmp_path_factory.mktemp("served")) as running:
        yield running


def test_a_session_is_recorded_as_mp4_and_as_hls(served):
    async def walk():
        async with served.connect() as socket, Client(socket) as client:
            await client.open()
            for form in ("mp4", "hls"):
                begun = await client.applied("record", format=form)
                assert (await client.refused("record"))["code"] == "wrong_order"
                for _ in range(3):
                    await client.until("state")
                ended = await client.applied("record", on=False)
                assert ended["url"] == begun["url"] and ended["bytes"] > 0
                path = served.server.recordings.folder / begun["url"].removeprefix("/v1/recordings/")
                if form == "mp4":
                    frames = len(read_video(path, (64, 64)))
                else:
                    with av.open(str(path)) as container:
                        frames = sum(1 for _ in container.decode(video=0))
                assert frames >= 8
                assert httpx.get(served.url + ended["url"]).content == path.read_bytes()
            assert (await client.refused("record", on=False))["code"] == "wrong_order"
            taken = await client.applied("snapshot")
            picture = httpx.get(served.url + taken["url"])
            assert picture.headers["content-type"] == "image/png" and len(picture.content) == taken["bytes"]
            assert Image.open(io.BytesIO(picture.content)).size == (64, 64)
            await client.applied("record", format="mp4")
            async with served.connect() as other, Client(other) as second:
                await second.open()
                assert (await second.refused("record"))["limit"] == {"name": "recordings", "value": 1}
                await second.send("stop")
                await second.until("ended")
            await client.send("stop")
            await client.until("ended")
        while served.server.live.sessions:
            await asyncio.sleep(0.02)
        assert not served.server.recordings.open

    asyncio.run(walk())


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def read_pushed(address, listen, count=8):
    """Sizes of the first pictures that arrive at an address, read by PyAV; `listen`: as a server itself."""
    options = {"listen": "1"} if listen else {}
    quick = {"analyzeduration": "300000", "probesize": "20000"}
    with av.open(address, options=options | quick) as container:
        return [(frame.width, frame.height) for frame, _ in zip(container.decode(video=0), range(count), strict=False)]


async def push(tmp_path, address, allowed, listen):
    """Push a session to an address while it is read there."""
    with serving(ServeSettings(realtime=False, push_to=allowed), tmp_path) as served, ThreadPoolExecutor(1) as pool:
        async with served.connect() as socket, Client(socket) as client:
            await client.open()
            reading = pool.submit(read_pushed, address, listen) if listen else None
            refused = await client.refused("record", format="rtmp", to="rtmp://10.0.0.1/live/x")
            assert refused["code"] == "not_allowed" and refused["limit"] == {"name": "push_to", "value": allowed}
            assert (await client.refused("record", format="rtmp"))["code"] == "invalid"
            assert (await client.refused("record", to=address))["code"] == "invalid"
            begun = await client.applied("record", format="rtmp", to=address)
            assert begun["url"] == address
            reading = reading or pool.submit(read_pushed, address, listen)
            while not reading.done():
                await client.until("state")
            assert reading.result() == [(64, 64)] * 8
            await client.send("stop")
            await client.until("ended")
        while served.server.recordings.open:
            await asyncio.sleep(0.02)


def test_a_session_is_pushed_by_rtmp(tmp_path):
    port = free_port()
    asyncio.run(push(tmp_path, f"rtmp://127.0.0.1:{port}/live/a", f"rtmp://127.0.0.1:{port}/", listen=True))


@pytest.mark.slow
def test_a_session_is_pushed_to_nginx_which_makes_hls_of_it(tmp_path):
    module = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")
    if shutil.which("nginx") is None or not module.is_file():
        pytest.skip("nginx with its RTMP module is not installed")
    port = free_port()
    (tmp_path / "nginx.conf").write_text(f"""
        load_module {module}; daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/log;
        events {{}}
        rtmp {{ server {{ listen 127.0.0.1:{port}; application live {{
            live on; hls on; hls_path {tmp_path}/hls; hls_fragment 1s; }} }} }}
    """)
    process = subprocess.Popen(["nginx", "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-e", tmp_path / "log"])
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None, (tmp_path / "log").read_text()
        asyncio.run(push(tmp_path, f"rtmp://127.0.0.1:{port}/live/a", f"rtmp://127.0.0.1:{port}/", listen=False))
        playlist = tmp_path / "hls" / "a.m3u8"
        with playlist.open("a") as file:  # nginx does not say that it ended, and readers wait minutes for more
            file.write("#EXT-X-ENDLIST\n")
        with av.open(str(playlist)) as container:
            assert next(container.decode(video=0)).width == 64
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("name", ["..%2fx", "video.mp4", "index.m3u8.part", "x" * 80])
def test_files_of_recordings_are_no_paths(served, name):
    answer = httpx.get(f"{served.url}/v1/recordings/{'0' * 32}/{name}")
    assert answer.status_code in (404, 422) and set(answer.json()) == {"error"}


def test_pictures_of_two_threads_remove_each_other_only_when_they_are_whole(tmp_path):
    recordings, picture = Recordings(tmp_path / "recordings", 1, 1, 60.0), np.zeros((8, 8, 3), np.uint8)
    with ThreadPoolExecutor(2) as pool:
        sizes = [size for _, size in pool.map(recordings.snapshot, [picture] * 40)]
    assert min(sizes) > 0 and len(list(recordings.folder.iterdir())) in (1, 2)


@pytest.mark.parametrize("error", [None, OSError(28, "no space")])
def test_a_picture_that_is_being_written_keeps_no_other_waiting(error, tmp_path, monkeypatch):
    recordings, save = Recordings(tmp_path / "recordings", 1, 1, 60.0), Image.Image.save

    def slow_save(image, path):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(recordings.trim).result(20)
        if error is not None:
            raise error
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", slow_save)
    if error is None:
        assert recordings.snapshot(np.zeros((8, 8, 3), np.uint8))[1] > 0
    else:
        with pytest.raises(InferixError, match="space"):
            recordings.snapshot(np.zeros((8, 8, 3), np.uint8))
    assert not recordings.making and len(list(recordings.folder.iterdir())) == (error is None)


def test_old_recordings_make_room(tmp_path):
    recordings = Recordings(tmp_path / "recordings", 1, 2, 60.0)
    for number in range(4):
        place = recordings.folder / f"{number:032x}"
        place.mkdir()
    recordings.trim()
    assert len(list(recordings.folder.iterdir())) == 1
    with pytest.raises(Refusal, match="63x64"):
        recordings.start("mp4", 8, (63, 64))
