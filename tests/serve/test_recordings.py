"""Recordings of a live session: an MP4 file, and an HLS stream that foreign readers take."""

import asyncio

import av
import httpx
import pytest
from live_client import Client, serving

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


@pytest.mark.parametrize("name", ["..%2fx", "video.mp4", "index.m3u8.part", "x" * 80])
def test_files_of_recordings_are_no_paths(served, name):
    answer = httpx.get(f"{served.url}/v1/recordings/{'0' * 32}/{name}")
    assert answer.status_code in (404, 422) and set(answer.json()) == {"error"}


def test_old_recordings_make_room(tmp_path):
    recordings = Recordings(tmp_path / "recordings", 1, 2, 60.0)
    for number in range(4):
        place = recordings.folder / f"{number:032x}"
        place.mkdir()
    recordings.trim()
    assert len(list(recordings.folder.iterdir())) == 1
    with pytest.raises(Refusal, match="63x64"):
        recordings.start("mp4", 8, (63, 64))
