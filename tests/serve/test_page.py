"""The page in a browser: pictures move, a key shows in the block of its receipt, and a reload comes back.

The browser is Debian's chromium, driven by playwright; without it these tests are skipped.
"""

import shutil
import time
from contextlib import ExitStack

import numpy as np
import pytest
from camera_world import ROUNDING, camera_engine, differences, first_picture, replayed
from live_client import PROMPT, WAIT, serving, small_engine
from routers import routing

from inferix.bench import serve as bench
from inferix.schemes.camera import CameraMove
from inferix.serve.settings import ServeSettings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required"]
FLAGS += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a camera that shows moving figures

EXPECTED = ("Failed to load resource", "WebSocket connection to")  # without a token, and at the server's end

# Keeps of each picture that is drawn: its block, and its mean distance to the picture before it.
WATCH = """() => {
  const pane = inferix.active(), shown = pane.player.shown, small = document.createElement("canvas");
  small.width = small.height = 32;
  const context = small.getContext("2d", { willReadFrequently: true });
  let before = null;
  window.seen = [];
  pane.player.shown = (entry) => {
    shown(entry);
    context.drawImage(pane.canvas, 0, 0, 32, 32);
    const now = context.getImageData(0, 0, 32, 32).data;
    let sum = 0;
    if (before) for (let place = 0; place < now.length; place++) sum += Math.abs(now[place] - before[place]);
    before = now;
    window.seen.push({ block: entry.block, frame: entry.frame, change: sum / now.length });
  };
  window.applied = [];
  const told = pane.applied.bind(pane);
  pane.applied = (event, sent) => { window.applied.push(event); told(event, sent); };
}"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in the [dev] extra")
    if CHROMIUM is None:
        pytest.skip("no chromium here; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    settings = ServeSettings(realtime=False, sessions=16)  # those of closed pages keep their places for a while
    with serving(settings, tmp_path_factory.mktemp("served"), small_engine(settings, 8, num_steps=4)) as running:
        yield running


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    context.set_default_timeout(WAIT * 1000)
    opened = context.new_page()
    errors = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    yield opened
    context.close()
    assert [error for error in errors if not error.startswith(EXPECTED)] == []


def wait_for(page, condition):
    """Wait until an expression is true in the page, whose policy allows no evaluation of text by itself."""
    for _ in range(int(WAIT * 20)):
        if value := page.evaluate(f"() => {condition}"):
            return value
        page.wait_for_timeout(50)
    raise AssertionError(condition)


def enter(page, url):
    page.goto(url)
    wait_for(page, "window.inferix && inferix.active().player.drawn > 4")


def test_a_key_shows_in_the_block_of_its_receipt_and_a_reload_comes_back(page, served):
    enter(page, served.url)
    page.evaluate(WATCH)
    wait_for(page, "seen.length > 12")
    page.keyboard.down("d")
    block = wait_for(page, "applied.length && applied[0].block")
    wait_for(page, f"seen.at(-1).block > {block} + 1")
    page.keyboard.up("d")
    seen = page.evaluate("() => seen.slice(1)")
    still = max(entry["change"] for entry in seen if entry["block"] < block)
    moved = [entry for entry in seen if entry["change"] > 2 * still]
    assert moved and moved[0]["block"] in (block, block + 1), (block, still, seen)

    page.fill("#prompt", "a blue fox in a green meadow at sunset")
    page.keyboard.press("Enter")
    wait_for(page, "applied.some((event) => event.verb === 'prompt')")
    page.click("#strip button:not(:disabled) >> nth=1")
    back = wait_for(page, "(applied.find((event) => event.verb === 'rewind') || {}).block")
    wait_for(page, f"inferix.active().last.block >= {back}")
    page.click("#fork")
    wait_for(page, "inferix.panes().length === 2 && inferix.panes()[1].player.drawn > 4")
    page.click(".pane:nth-child(2) .close")
    wait_for(page, "inferix.panes().length === 1")
    page.click("#save")
    with page.expect_download() as download:
        page.click(".toast button:has-text('Download')")
    assert download.value.path().stat().st_size > 1000
    session, at = page.evaluate("() => [inferix.active().world.facts.session, inferix.active().last.block]")
    page.reload()
    wait_for(page, "window.inferix && inferix.active().player.drawn > 0")
    assert page.evaluate("() => inferix.active().world.facts.session") == session
    assert wait_for(page, "(inferix.active().last || {}).block") >= at
    page.set_input_files("#file", download.value.path())
    wait_for(page, "inferix.active().last.rollout === 1")


def test_pictures_move_after_the_command(page):
    """Prints the seconds from `inferix serve` to the second picture in a browser that runs already."""
    begun = time.perf_counter()
    with bench.serving(None, []) as (url, _):
        page.goto(url)
        wait_for(page, "window.inferix && inferix.active().player.drawn > 1")
        print(f"pictures move {time.perf_counter() - begun:.2f} s after inferix serve")
        page.goto("about:blank")


def test_the_page_asks_for_the_token(page, tmp_path):
    with serving(ServeSettings(token="sixteen-characters!"), tmp_path) as served:
        page.goto(served.url)
        page.fill("#token", "sixteen-characters!")
        page.keyboard.press("Enter")
        wait_for(page, "window.inferix && inferix.active().player.drawn > 0")


def test_every_control_has_a_name_and_the_phone_a_pad(browser, served):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    enter(page, served.url)
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea")]
        .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || (e.labels && e.labels.length)))
        .map((e) => e.outerHTML)""")
    assert nameless == []
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    page.evaluate(WATCH)
    page.tap("#pad [data-action=right]")
    assert wait_for(page, "applied.filter((event) => event.verb === 'act').length === 2")
    context.close()


@pytest.mark.parametrize("media", ["raw", "jpeg", "h264", "vp9", "fmp4"])
def test_every_media_format_is_shown(browser, served, media):
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{served.url}/?media={media}")
    wait_for(page, "window.inferix && inferix.active().player.drawn > 8")
    assert page.evaluate("() => inferix.active().world.facts.media.name") == media
    page.evaluate(WATCH)
    page.keyboard.down("d")
    wait_for(page, "seen.some((entry) => entry.change > 1)")
    context.close()


# Watches a session by WHEP; keeps the events of its data channel, and each picture's mean distance to the one before.
WATCH_WEBRTC = """async (prompt) => {
  const peer = window.peer = new RTCPeerConnection(), channel = window.channel = peer.createDataChannel("inferix");
  const video = document.createElement("video"), small = new OffscreenCanvas(32, 32);
  const context = small.getContext("2d", { willReadFrequently: true });
  window.events = [];
  window.changes = [];
  let before = null;
  const look = () => {
    context.drawImage(video, 0, 0, 32, 32);
    const now = context.getImageData(0, 0, 32, 32).data;
    if (before) changes.push(now.reduce((sum, value, place) => sum + Math.abs(value - before[place]), 0) / now.length);
    before = now;
    video.requestVideoFrameCallback(look);
  };
  channel.onmessage = ({ data }) => events.push(JSON.parse(data));
  video.muted = true;
  video.requestVideoFrameCallback(look);
  peer.ontrack = ({ track }) => { video.srcObject = new MediaStream([track]); video.play(); };
  peer.addTransceiver("video", { direction: "recvonly" });
  await peer.setLocalDescription();
  while (peer.iceGatheringState !== "complete") await new Promise((done) => setTimeout(done, 20));
  const options = { method: "POST", body: peer.localDescription.sdp, headers: { "Content-Type": "application/sdp" } };
  const answer = await fetch(`/v1/whep?seed=3&prompt=${encodeURIComponent(prompt)}`, options);
  await peer.setRemoteDescription({ type: "answer", sdp: await answer.text() });
}"""


def test_the_browser_watches_a_session_by_webrtc(page, served):
    pytest.importorskip("aiortc")
    page.goto(served.url)
    page.evaluate(WATCH_WEBRTC, PROMPT)
    wait_for(page, "changes.length > 8 && channel.readyState === 'open'")
    page.evaluate("() => channel.send(JSON.stringify({ type: 'act', id: 1, action: 'right' }))")
    wait_for(page, "events.some((event) => event.type === 'applied' && event.id === 1)")
    wait_for(page, "changes.some((change) => change > 1)")
    page.evaluate("() => channel.send(JSON.stringify({ type: 'stop', id: 2 }))")
    wait_for(page, "events.at(-1).type === 'ended'")
    page.evaluate("() => peer.close()")


def test_the_page_makes_a_world_from_the_camera_and_goes_back(page, served):
    """The pictures of a strength near 0 are those of the browser's fake camera, which is green."""
    pytest.importorskip("aiortc")
    enter(page, f"{served.url}/?strength=0.05")
    first, offers = page.evaluate("() => inferix.active().world.facts.session"), []
    page.on("request", lambda request: offers.append(request.url) if "/v1/whip" in request.url else None)
    page.dblclick("#camera")  # the second click comes while the browser asks for the camera
    wait_for(page, "inferix.active().last && inferix.active().last.latency > 0")
    assert len(offers) == 1 and page.get_attribute("#camera", "aria-pressed") == "true"
    wait_for(page, "inferix.active().blocks.length > 1")
    colour = page.evaluate("""() => {
        const { canvas } = inferix.active(), { width, height } = canvas;
        const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data, sums = [0, 0, 0];
        pixels.forEach((value, place) => { if (place % 4 < 3) sums[place % 4] += value; });
        return sums.map((sum) => sum / (width * height));
    }""")
    assert colour[1] > colour[0] + 20 and colour[1] > colour[2] + 20, colour
    assert "behind the camera" in page.text_content(".pane .now")
    second = page.evaluate("() => inferix.active().world.facts.session")
    page.dblclick("#camera")
    wait_for(page, f"![{first!r}, {second!r}].includes(inferix.active().world.facts?.session)")
    wait_for(page, "inferix.active().last.latency === undefined")
    assert len(offers) == 1 and page.get_attribute("#camera", "aria-pressed") == "false"


def test_the_page_goes_on_at_another_server(page, tmp_path):
    """The session's server drains; the page draws on, in the same session, and its keys work."""
    settings = ServeSettings(checkpoint_every=1000, shared=tmp_path / "shared", realtime=False, sessions=2)
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(settings, tmp_path / name)) for name in "ab"]
        _, url = stack.enter_context(routing(*(served.url for served in servers)))
        enter(page, url)
        session = page.evaluate("() => inferix.active().world.facts.session")
        first, second = servers if session in servers[0].server.live.sessions else servers[::-1]
        page.evaluate(WATCH)
        first.runner.request_drain()
        wait_for(page, "document.querySelector('#toasts').textContent.includes('Another server')")
        drawn, block = page.evaluate("() => [inferix.active().player.drawn, inferix.active().last.block]")
        wait_for(page, f"inferix.active().player.drawn > {drawn} + 8 && inferix.active().last.block > {block}")
        assert page.evaluate("() => inferix.active().world.facts.session") == session
        assert session in second.server.live.sessions
        page.keyboard.down("d")
        assert wait_for(page, "applied.some((event) => event.verb === 'act')")
        page.keyboard.up("d")
        page.reload()
        wait_for(page, "window.inferix && inferix.active().player.drawn > 0")
        assert page.evaluate("() => inferix.active().world.facts.session") == session


# Keeps the pixels of the first picture of each block as it is drawn, and the camera's controls with their receipts.
WATCH_CAMERA = """() => {
  const pane = inferix.active(), shown = pane.player.shown, send = pane.world.send.bind(pane.world);
  window.pictures = [];
  window.sent = [];
  pane.player.shown = (entry) => {
    shown(entry);
    if (!entry.first) return;
    const { width, height } = entry.picture, context = entry.picture.getContext("2d");
    const pixels = Array.from(context.getImageData(0, 0, width, height).data).filter((_, place) => place % 4 < 3);
    pictures.push({ block: entry.block, pixels });
  };
  pane.world.send = (type, fields = {}) => {
    const answered = send(type, fields);
    if (type === "camera") answered.then((event) => window.sent.push({ fields, block: event.block }));
    return answered;
  };
}"""


def test_the_page_walks_and_looks_around_a_world_with_a_camera(page, tmp_path):
    """A key, then the mouse: pictures are those of a session that is given the same moves at the same blocks."""
    settings = ServeSettings(realtime=False, image=first_picture(tmp_path / "first.png", (96, 64)))
    with serving(settings, tmp_path, camera_engine(settings)) as served:
        enter(page, served.url)
        page.evaluate(WATCH_CAMERA)
        wait_for(page, "pictures.length > 0")
        assert not page.is_visible(".walks") and page.is_visible(".looks")
        page.keyboard.down("w")
        first = wait_for(page, "sent.length && sent[0].block")
        wait_for(page, f"pictures.at(-1).block > {first}")
        page.keyboard.up("w")
        box = page.locator(".pane canvas[role=img]").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 150, y - 50, steps=5)
        page.mouse.up()
        turned = wait_for(page, "(sent.find(({ fields }) => fields.turn) || {}).block")
        wait_for(page, f"pictures.at(-1).block > {turned}")
        page.screenshot(path=tmp_path / "camera.png")
        sent, pictures = page.evaluate("() => [sent, pictures]")
        prompt = page.evaluate("() => inferix.active().prompt")
    moves: dict[int, list[CameraMove]] = {}
    for control in sent:
        moves.setdefault(control["block"], []).append(CameraMove(**control["fields"]))
    assert moves[first][0] == CameraMove(forward=1)
    angles = np.sum([move.turn for given in moves.values() for move in given], axis=0)
    assert angles[0] > 20 and angles[1] > 6  # degrees right and up
    shown = [(one["block"], 0, np.array(one["pixels"], np.uint8).reshape(64, 96, 3)) for one in pictures]
    engine = camera_engine(settings)
    opening = {"prompt": prompt, "size": (96, 64), "image": settings.image}
    count = pictures[-1]["block"] + 1
    same, other = (differences(shown, replayed(engine, opening, given, count)) for given in (moves, {}))
    assert max(same.values()) <= ROUNDING, same
    assert max(value for block, value in other.items() if block < first) <= ROUNDING < other[first], other
