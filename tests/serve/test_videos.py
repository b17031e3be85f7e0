"""Video jobs over HTTP: making, polling, fetching, deleting, and going on after a restart of the server."""

import io
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from live_client import PROMPT, WAIT, serving
from PIL import Image

from inferix.errors import UsageError
from inferix.media import read_video
from inferix.serve.job_store import Job, JobStore
from inferix.serve.refusals import Refusal
from inferix.serve.settings import ServeSettings
from inferix.serve.video_jobs import check_picture

SETTINGS = ServeSettings(realtime=False, jobs_waiting=2, job_seconds=30.0, upload_pixels=10_000)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(SETTINGS, tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=served.url, timeout=WAIT) as client:
        yield client


def finished(http, id):
    """The job once it has ended."""
    until = time.monotonic() + WAIT
    while time.monotonic() < until:
        video = http.get(f"/v1/videos/{id}").json()
        if video["status"] in ("completed", "failed"):
            return video
        time.sleep(0.05)
    raise AssertionError(video)


def test_a_video_is_made_and_fetched_and_remixed(http, tmp_path):
    created = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": "0.5", "seed": 3}).json()
    assert (created["object"], created["status"], created["seconds"]) == ("video", "queued", "0.5")
    video = finished(http, created["id"])
    assert (video["status"], video["progress"], video["size"]) == ("completed", 100, "64x64")
    content = http.get(f"/v1/videos/{video['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    (tmp_path / "video.mp4").write_bytes(content.content)
    assert read_video(tmp_path / "video.mp4", (64, 64)).shape == (5, 64, 64, 3)
    for variant, form in (("thumbnail", "WEBP"), ("spritesheet", "PNG")):
        picture = http.get(f"/v1/videos/{video['id']}/content", params={"variant": variant})
        assert Image.open(io.BytesIO(picture.content)).format == form
    other = {"prompt": "a blue fox in a green meadow at sunset"}
    remix = http.post(f"/v1/videos/{video['id']}/remix", json=other).json()
    assert remix["remixed_from_video_id"] == video["id"] and remix["seed"] == 3
    assert finished(http, remix["id"])["status"] == "completed"

    def picture_of(id, variant):
        return http.get(f"/v1/videos/{id}/content", params={"variant": variant}).content

    assert picture_of(remix["id"], "thumbnail") != picture_of(video["id"], "thumbnail")
    late = http.post(f"/v1/videos/{video['id']}/remix", json=other | {"at": 0.5})
    assert late.status_code == 400 and "0.5" in late.json()["error"]["message"]
    fork = http.post(f"/v1/videos/{video['id']}/remix", json=other | {"at": 0.1}).json()
    assert finished(http, fork["id"])["status"] == "completed"
    assert picture_of(fork["id"], "thumbnail") == picture_of(video["id"], "thumbnail")  # of the first block
    assert picture_of(fork["id"], "spritesheet") != picture_of(video["id"], "spritesheet")
    assert http.delete(f"/v1/videos/{fork['id']}").json()["deleted"]
    listed = http.get("/v1/videos", params={"limit": 1}).json()
    assert (listed["data"][0]["id"], listed["has_more"]) == (remix["id"], True)
    older = http.get("/v1/videos", params={"after": remix["id"]}).json()
    assert [entry["id"] for entry in older["data"]] == [video["id"]] and not older["has_more"]
    assert http.delete(f"/v1/videos/{video['id']}").json()["deleted"]
    assert http.get(f"/v1/videos/{video['id']}").status_code == 404


def test_a_fork_of_a_fork_has_the_prompts_before_it(tmp_path):
    job = Job("a" * 32, 0, "one", "m", 4.0, 64, 64, 0)
    assert job.prompts == [(None, "one")] and job.prompts_before(0) is None
    fork = replace(job, id="b" * 32, prompt="two", earlier=job.prompts_before(5))
    assert fork.prompts == [(5, "one"), (None, "two")]
    assert replace(job, prompt="three", earlier=fork.prompts_before(3)).prompts == [(3, "one"), (None, "three")]
    later = replace(job, prompt="three", earlier=fork.prompts_before(8))
    assert later.prompts == [(5, "one"), (8, "two"), (None, "three")]
    store = JobStore(tmp_path)
    store.add(job)
    store.database.execute("ALTER TABLE jobs DROP COLUMN earlier")  # as of an earlier version
    store.close()
    store = JobStore(tmp_path)
    store.add(fork)
    assert (store.get(job.id), store.get(fork.id)) == (job, fork)
    store.close()


def test_a_video_from_a_picture_in_a_form(http):
    file = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 120, np.uint8)).save(file, "PNG")
    files = {"input_reference": ("start.png", file.getvalue(), "image/png")}
    answer = http.post("/v1/videos", data={"prompt": PROMPT, "seconds": "0.5", "size": "64x64"}, files=files)
    assert answer.status_code == 200, answer.text
    assert finished(http, answer.json()["id"])["status"] == "completed"


def test_a_running_job_is_stopped_by_delete_and_too_many_are_refused(http, served):
    ids = [http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 30}).json()["id"] for _ in range(3)]
    until = time.monotonic() + WAIT
    while http.get(f"/v1/videos/{ids[0]}").json()["status"] != "in_progress" and time.monotonic() < until:
        time.sleep(0.02)
    while (answer := http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 30})).status_code != 503:
        ids.append(answer.json()["id"])
    assert answer.json()["error"]["limit"] == {"name": "jobs_waiting", "value": 2} and answer.headers["retry-after"]
    assert http.get(f"/v1/videos/{ids[0]}/content").status_code == 409
    for id in ids[::-1]:
        assert http.delete(f"/v1/videos/{id}").json()["deleted"]
    assert http.get("/v1/videos", params={"limit": 100}).json()["data"][:1] != ids[:1]
    assert not [file for id in ids for file in (served.server.jobs.folder).glob(f"{id}*")]


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({}, 422, "prompt"), ({"prompt": ""}, 422, "prompt"), ({"prompt": "x" * 3000}, 413, "prompt_characters"),
        ({"prompt": PROMPT, "seconds": "nan"}, 422, "seconds"), ({"prompt": PROMPT, "size": "64"}, 422, "size"),
        ({"prompt": PROMPT, "seconds": 31}, 400, "job_seconds"),
        ({"prompt": PROMPT, "size": "9999x9999"}, 400, "picture_pixels"),
        ({"prompt": PROMPT, "size": "63x64"}, 400, "63x64"), ({"prompt": PROMPT, "model": "other"}, 404, "other"),
        ({"prompt": PROMPT, "seed": -1}, 422, "seed"), ({"prompt": PROMPT, "fps": 3}, 422, "fps"),
        ({"prompt": " \n"}, 400, "prompt"), ([], 422, "[]"), ({"prompt": 5}, 422, "prompt"),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_before_work_begins(http, body, status, word):
    answer = http.post("/v1/videos", json=body)
    assert answer.status_code == status and word in answer.text, answer.text
    assert set(answer.json()) == {"error"}


def test_bad_bodies_and_uploads_are_refused(http, tmp_path):
    assert http.post("/v1/videos", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert http.post("/v1/videos", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    files = {"input_reference": ("../../x.png", b"no picture", "image/png")}
    answer = http.post("/v1/videos", data={"prompt": PROMPT}, files=files)
    assert answer.status_code == 400 and "input_reference" in answer.text
    big = io.BytesIO()
    Image.new("1", (200, 200)).save(big, "PNG")
    answer = http.post("/v1/videos", data={"prompt": PROMPT}, files={"input_reference": ("x.png", big.getvalue())})
    assert answer.json()["error"]["limit"] == {"name": "upload_pixels", "value": 10_000}
    bomb = tmp_path / "bomb.png"
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (2**30).to_bytes(4) * 2 + b"\1\0\0\0\0" + b"\0" * 4
    bomb.write_bytes(header)
    with pytest.raises((UsageError, Refusal)):
        check_picture(bomb, SETTINGS)


def test_jobs_survive_a_restart(tmp_path):
    folder = tmp_path / "videos"
    store = JobStore(folder)
    job = Job("a" * 32, int(time.time()), PROMPT, "tinyworld", 0.5, 64, 64, 1, status="in_progress", progress=40)
    other = Job("b" * 32, int(time.time()), PROMPT, "no-such-model", 0.5, 64, 64, 1)
    store.add(job)
    store.add(other)
    store.close()
    with serving(SETTINGS, tmp_path) as served, httpx.Client(base_url=served.url) as http:
        assert finished(http, job.id)["status"] == "completed"
        failed = finished(http, other.id)
        assert failed["status"] == "failed" and "no-such-model" in failed["error"]["message"]
    with serving(SETTINGS, tmp_path) as served, httpx.Client(base_url=served.url) as http:
        assert http.get(f"/v1/videos/{job.id}").json()["status"] == "completed"
        long = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 30}).json()["id"]
        until = time.monotonic() + WAIT
        while http.get(f"/v1/videos/{long}").json()["progress"] == 0 and time.monotonic() < until:
            time.sleep(0.05)
    store = JobStore(folder)
    stopped = store.get(long)
    assert stopped is not None and (stopped.status, stopped.progress) == ("queued", 0)
    store.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the library warns that the hosted service is closed
def test_the_client_library_of_the_videos_api(served, tmp_path):
    openai = pytest.importorskip("openai", reason="openai is in the [dev] extra")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=WAIT)
    picture = tmp_path / "start.png"
    Image.new("RGB", (64, 64)).save(picture)
    video = client.videos.create_and_poll(prompt=PROMPT, model="tinyworld", seconds="0.5", size="64x64")
    assert video.status == "completed" and video.progress == 100
    assert client.videos.download_content(video.id).read()[4:8] == b"ftyp"
    assert client.videos.download_content(video.id, variant="thumbnail").read()[8:12] == b"WEBP"
    from_picture = client.videos.create(prompt=PROMPT, seconds="0.5", input_reference=Path(picture))
    assert client.videos.poll(from_picture.id).status == "completed"
    remix = client.videos.remix(video.id, prompt="a blue fox in a green meadow at sunset")
    assert client.videos.retrieve(remix.id).remixed_from_video_id == video.id
    assert remix.id in [listed.id for listed in client.videos.list()]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


@pytest.mark.slow
def test_schemathesis_finds_no_server_error(tmp_path):
    """Random requests by the OpenAPI document: none is answered by 5xx but by a full queue, and all conform to it."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is in the [dev] extra")
    with serving(ServeSettings(realtime=False, job_seconds=0.2, jobs_waiting=4), tmp_path) as served:
        schemathesis.serializer("application/sdp")(lambda context, value: str(value).encode("utf-8", "replace"))
        schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
        for result in schema.get_all_operations():
            run_operation(result.ok(), served.url)


def run_operation(operation, url):
    """Forty random requests of one operation."""
    from hypothesis import HealthCheck, given, settings

    def shorten(case):
        """A trace records for as long as it is asked to, and the document allows a minute."""
        seconds = (case.query or {}).get("seconds", 5.0)
        if case.path == "/v1/trace" and isinstance(seconds, int | float) and 0.05 < seconds <= 60:
            case.query = {**(case.query or {}), "seconds": 0.05}

    @given(case=operation.as_strategy())
    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def check(case):
        shorten(case)
        response = case.call(base_url=url, timeout=WAIT)
        assert response.status_code < 500 or response.status_code == 503, response.text
        assert response.status_code < 400 or "error" in response.json()

    check()
