"""Bad input of clients: a clear answer that names the limit, nothing leaked, and other sessions go on."""

import asyncio
import base64
import hmac
import json
import random
import re
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import httpx
import msgpack
import pytest
import websockets
from live_client import PROMPT, WAIT, Client, serving
from typer.testing import CliRunner

from inferix.cli.main import app
from inferix.errors import UsageError
from inferix.serve.access import TOKEN_PROTOCOL, Access
from inferix.serve.page_files import PAGE
from inferix.serve.protocol import Codec, json_schema
from inferix.serve.refusals import Refusal
from inferix.serve.server import listen
from inferix.serve.settings import ServeSettings, check_limits, read_token

TOKEN = "a-token-of-enough-length"
SETTINGS = ServeSettings(
    token=TOKEN, sessions=2, queue=0, prompt_characters=200, message_bytes=4096, upload_bytes=10_000,
    start_seconds=1.0, stall_seconds=2.0, messages_per_second=100.0, realtime=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(SETTINGS, tmp_path_factory.mktemp("served")) as running:
        yield running
        assert not running.server.live.sessions


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
        yield client


def routes(served):
    """Every path and method of the server but the page's files."""
    for path, methods in httpx.get(f"{served.url}/openapi.json", headers=bearer(TOKEN)).json()["paths"].items():
        yield from ((method.upper(), path) for method in methods)
    yield from (("GET", "/openapi.json"), ("GET", "/no-such-path"), ("DELETE", "/v1/worlds/x"))


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("headers", [{}, bearer("x" * len(TOKEN)), bearer("-"), {"Authorization": TOKEN}, bearer("é")])
def test_every_route_needs_the_token(served, headers):
    client = httpx.Client(headers={name: value.encode() for name, value in headers.items()})
    for method, path in routes(served):
        answer = client.request(method, served.url + path.replace("{", "").replace("}", ""))
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "no_token"), (method, path)
        assert TOKEN not in answer.text
    assert httpx.get(served.url).status_code == 200  # the page, which asks for the token


def test_the_websocket_needs_the_token_too(served):
    async def knock():
        for token in (None, "wrong" * 5):
            with pytest.raises(websockets.InvalidStatus) as refused:
                await served.connect(token)
            assert refused.value.response.status_code == 401
        encoded = base64.urlsafe_b64encode(TOKEN.encode()).decode().rstrip("=")
        for protocol in (TOKEN_PROTOCOL + "$$$", TOKEN_PROTOCOL + encoded[:-2], TOKEN_PROTOCOL):
            with pytest.raises(websockets.InvalidStatus):
                await served.connect(subprotocols=["inferix.json", protocol])
        async with served.connect(subprotocols=["inferix.json", TOKEN_PROTOCOL + encoded]) as socket:
            assert socket.subprotocol == "inferix.json"
        with pytest.raises(websockets.InvalidStatus) as refused:
            await served.connect(TOKEN, origin="https://elsewhere.example")
        assert refused.value.response.status_code == 403

    asyncio.run(knock())


def test_tokens_are_compared_as_hashes_in_constant_time(monkeypatch):
    """Whatever a token's length and beginning, two hashes are compared, by the function that takes constant time."""
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda one, other: compared.append((one, other)) or compare(one, other))
    guarded = Access(None, TOKEN, (), 1, 1.0)
    for token in (TOKEN, TOKEN[:-1] + "x", "x" + TOKEN[1:], "", "x" * 5000, "é"):
        headers = [(b"host", b"x"), (b"authorization", f"Bearer {token}".encode())]
        refused = guarded.refusal({"type": "http", "path": "/", "headers": headers})
        assert (refused is None) == (token == TOKEN)
    assert len(compared) == 6 and all(len(one) == len(other) == 32 for one, other in compared)


def test_without_a_token_only_this_machine_is_served(tmp_path):
    with pytest.raises(UsageError, match=r"'0\.0\.0\.0'.*token"):
        listen("0.0.0.0", 0, None)
    with pytest.raises(UsageError, match="no-such-host"):
        listen("no-such-host.invalid", 0, TOKEN)
    with serving(ServeSettings(), tmp_path) as served:
        assert httpx.get(f"{served.url}/health").json()["status"] == "ok"
        answer = httpx.get(f"{served.url}/health", headers={"Host": "rebound.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_host")


@pytest.mark.parametrize("world", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "a" * 32, "A" * 32, "%00", "x" * 500])
def test_ids_are_no_paths(http, world):
    answer = http.get(f"/v1/worlds/{world}")
    assert answer.status_code in (404, 422) and set(answer.json()) == {"error"}


def test_an_upload_is_refused_by_size_and_by_content(http, served):
    answer = http.post("/v1/worlds", content=b"x" * 20_000)
    assert answer.status_code == 413 and answer.json()["error"]["limit"] == {"name": "upload_bytes", "value": 10_000}
    endless = http.post("/v1/worlds", content=(b"x" * 1000 for _ in range(20)))  # without a length
    assert endless.status_code == 413
    for content in (b"", b"PK\x03\x04" + b"\0" * 100, b"\xff" * 8 + b"{}", b"x" * 9000):
        answer = http.post("/v1/worlds", content=content)
        assert answer.status_code in (400, 499) and "worlds" not in answer.text, answer.text
    assert not list(served.server.worlds.folder.iterdir())


MALFORMED = [
    "", "{", "[]", "null", "1e999", '"open"', '{"type": "open"}', '{"id": 1}', "[" * 4000, '{"type": "x", "id": 1}',
    '{"type": "prompt", "id": {}, "text": "a"}', '{"type": "open", "id": 1, "seed": -1}',
    '{"type": "open", "id": 1, "extra": 1}', '{"type": "open", "id": 1, "media": ["gif"]}',
    '{"type": "open", "id": 1, "world": "../../x"}', '{"type": "open", "id": 1, "size": [1]}', '{"id": 9' + "9" * 4000,
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_control_is_refused(text):
    with pytest.raises(Refusal) as refused:
        Codec("inferix.json").read(text)
    assert refused.value.code in ("malformed", "invalid", "unknown_verb") and len(str(refused.value)) < 1000


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81", b"\x92\x01", b"\xff\xff", b"\x81\xc4\x01x\x01", b"\x91" * 999])
def test_malformed_msgpack_is_refused(data):
    with pytest.raises(Refusal):
        Codec("inferix.msgpack").read(data)
    with pytest.raises(Refusal):
        Codec("inferix.msgpack").read("text")


def test_a_session_outlives_bad_controls(served):
    async def misuse():
        async with served.connect(TOKEN) as socket, Client(socket) as client:
            assert (await client.refused("pause"))["code"] == "wrong_order"
            await client.open(media=["raw"])
            assert (await client.refused("open", prompt=PROMPT))["code"] == "wrong_order"
            refused = await client.refused("prompt", text="x" * 201)
            assert refused["limit"] == {"name": "prompt_characters", "value": 200}
            for verb, fields, word in (
                ("prompt", {"text": " "}, "prompt"), ("act", {"action": "jump"}, "jump"),
                ("rewind", {"block": 999}, "999"), ("restore", {"world": "0" * 32}, "0000"), ("camera", {}, "camera"),
            ):  # fmt: skip
                if verb == "camera":
                    await client.send(verb)
                    refused = await client.until("refused")
                else:
                    refused = await client.refused(verb, **fields)
                assert word in refused["message"]
            await socket.send(b"\x81")
            assert (await client.until("refused"))["code"] == "malformed"
            await socket.send("x" * 4096)
            assert (await client.until("refused"))["code"] == "malformed"
            await client.until("state")
            await client.send("stop")
            await client.until("ended")

    asyncio.run(misuse())


def test_messages_that_are_too_long_too_many_or_never_come(served):
    async def misuse():
        async with served.connect(TOKEN) as socket:
            await socket.send("x" * 5000)
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd.code == 1009
        async with served.connect(TOKEN) as socket, Client(socket) as client:
            with pytest.raises(websockets.ConnectionClosed):
                for _ in range(400):
                    await client.send("ping")
                while True:
                    await client.receive()
            limits = [event.get("limit") for event in client.events]
            assert {"name": "messages_per_second", "value": 100.0} in limits
        async with served.connect(TOKEN) as socket, Client(socket) as client:
            refused = await client.until("refused")
            assert refused["limit"] == {"name": "start_seconds", "value": 1.0}

    asyncio.run(misuse())


UPLOAD = f"POST /v1/worlds HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 99\r\n\r\nabc"


def test_half_open_sockets_hold_no_place_and_are_closed_in_time(served):
    """Sockets that stay open and go no further: a session goes on beside them, and each is answered or closed."""
    parts = [b"", b"GET /v1/live HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00", UPLOAD.encode()]
    with ExitStack() as opened:
        sockets = [opened.enter_context(served.raw_socket()) for _ in range(3) for _ in parts]
        for socket, part in zip(sockets, parts * 3, strict=True):
            socket.sendall(part)

        async def still_served():
            async with served.connect(TOKEN) as socket, Client(socket) as client:
                await client.open()
                await client.until("state")
                await client.send("stop")
                await client.until("ended")

        asyncio.run(still_served())
        for first in range(0, len(sockets), len(parts)):
            silent, cut, other, upload = sockets[first : first + len(parts)]
            assert silent.recv(1) == cut.recv(1) == b"" and b" 400 " in other.recv(4096)
            answer = upload.recv(4096)
            while b"stall_seconds" not in answer and (more := upload.recv(4096)):
                answer += more
            assert b" 408 " in answer and b"stall_seconds" in answer


def test_a_client_that_answers_no_pings_is_disconnected(monkeypatch, tmp_path):
    """A WebSocket by hand that opens a session and is silent: its session waits for it, and then frees its memory."""
    monkeypatch.setattr("inferix.serve.server.PING_SECONDS", 0.3)
    with serving(ServeSettings(resume_seconds=0.3), tmp_path) as own, own.raw_socket() as socket:
        key = base64.b64encode(b"x" * 16).decode()
        head = "GET /v1/live HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        socket.sendall(f"{head}Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        assert b" 101 " in socket.recv(4096)
        text = json.dumps({"type": "open", "id": 1, "prompt": PROMPT}).encode()
        socket.sendall(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text)
        until = time.monotonic() + WAIT
        while not own.server.live.sessions and time.monotonic() < until:
            time.sleep(0.02)
        assert own.server.live.sessions
        while own.server.live.sessions and time.monotonic() < until:
            time.sleep(0.02)
        assert not own.server.live.sessions


def fuzzed(numbers, count):
    """Messages near valid ones: cut, with bytes changed, or with fields of other types."""
    valid = [
        {"type": "open", "id": 1, "prompt": PROMPT}, {"type": "act", "id": 2, "action": "up", "pressed": True},
        {"type": "prompt", "id": "p", "text": "a blue fox"}, {"type": "rewind", "id": 3, "block": 0},
        {"type": "attach", "id": 4, "session": "0" * 32, "resume": "x"},
        {"type": "restore", "id": 5, "world": "1" * 32},
    ]  # fmt: skip
    values = [None, -1, 2**70, 1.5, "", "x" * 300, [], {}, True, "\0", "../..", [[[[]]]]]
    for _ in range(count):
        message = dict(numbers.choice(valid))
        kind = numbers.randrange(4)
        if kind:
            message[numbers.choice([*message, "more"])] = numbers.choice(values)
        pack = numbers.random() < 0.5
        try:
            data = msgpack.packb(message) if pack else json.dumps(message).encode()
        except OverflowError:  # no such integer in msgpack
            continue
        if kind == 3:
            data = bytearray(data)
            for _ in range(numbers.randrange(1, 6)):
                data[numbers.randrange(len(data))] = numbers.randrange(256)
            data = bytes(data[: numbers.randrange(len(data) + 1)])
        yield data


def read_all(numbers, count):
    codecs = Codec("inferix.json"), Codec("inferix.msgpack")
    read = 0
    for data in fuzzed(numbers, count):
        for codec in codecs:
            message = data if codec.binary else data.decode("utf-8", "replace")
            try:
                codec.read(message)
                read += 1
            except Refusal as refusal:
                json.dumps(refusal.as_dict())
    return read


def test_fuzzed_messages_are_read_or_refused():
    assert 0 < read_all(random.Random(0), 2000) < 2000


@pytest.mark.slow
def test_many_fuzzed_messages_are_read_or_refused():
    assert read_all(random.Random(1), 100_000)


@pytest.mark.slow
def test_a_server_outlives_fuzzed_messages(tmp_path, caplog):
    """100,000 messages, on as many connections as it takes: another session goes on, and nothing grows or is left."""
    settings = ServeSettings(sessions=3, queue=0, messages_per_second=1e6, resume_seconds=0.1, realtime=False)
    counts = Counter()

    async def spray(served, messages):
        """Send messages, each once the last one is answered, until the server has had enough of this connection."""
        protocol = random.Random(len(messages)).choice(["inferix.json", "inferix.msgpack"])
        codec = Codec(protocol)
        async with served.connect(subprotocols=[protocol]) as socket:
            try:
                while messages:
                    data = messages.pop()
                    await socket.send(data if codec.binary else data.decode("utf-8", "replace"))
                    counts["sent"] += 1
                    while True:
                        event = codec.read_event(await socket.recv())
                        if event is not None and event["type"] in ("refused", "received", "opened", "ended"):
                            break
            except websockets.ConnectionClosed as closed:
                counts[closed.rcvd.code if closed.rcvd else None] += 1

    async def watch(served, over):
        async with served.connect() as socket, Client(socket) as client:
            await client.open(media=["jpeg"])
            while not over.is_set():
                await client.until("state")
                client.events.clear()
                client.payloads.clear()
            await client.send("stop")
            await client.until("ended")

    async def attack(served):
        over, messages = asyncio.Event(), list(fuzzed(random.Random(2), 100_000))
        watching = asyncio.create_task(watch(served, over))
        half = len(messages) // 2
        while messages:
            assert not watching.done()
            await asyncio.gather(*(spray(served, messages) for _ in range(4)))
            if len(messages) > half:
                counts["memory"] = resident()
        over.set()
        await watching
        while served.server.live.sessions:
            await asyncio.sleep(0.05)

    with serving(settings, tmp_path) as served:
        asyncio.run(attack(served))
        print(dict(counts), resident() - counts["memory"])
        assert resident() - counts["memory"] < 64 << 20
        assert served.server.host.engine.metrics()["gauges"]["pages_in_use"] == 0
        assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def resident():
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_settings_are_checked(tmp_path):
    for wrong in ({"sessions": 0}, {"behind": "drop"}, {"token": "short"}, {"idle_seconds": 0}, {"message_bytes": "1"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            ServeSettings(**wrong)
    with pytest.raises(UsageError, match=r"'sesions'.*'sessions'"):
        check_limits({"sesions": 3})
    file = tmp_path / "token"
    for content in (b"", b"two words\n", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="token"):
            read_token(file)


def test_the_schema_names_every_verb():
    schema = json.dumps(json_schema())
    for verb in ("open", "attach", "prompt", "act", "pause", "resume", "stop", "fork", "rewind", "save", "restore"):
        assert f'"{verb}"' in schema


def test_the_page_needs_nothing_from_elsewhere(served):
    page = httpx.get(served.url)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for file in PAGE.iterdir():
        text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text), file.name
        assert httpx.get(f"{served.url}/{file.name}").status_code == (401 if file.name == "index.html" else 200)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--engine", "no-such-folder"], "no-such-folder"), (["--engine", "x", "--model", "y"], "--model"),
        (["--host", "0.0.0.0"], "token"), (["--limit", "sesions=3"], "'sessions'"), (["--behind", "drop"], "'drop'"),
        (["--limit", "queue=3"], "--queue"), (["--token", "no-such-file"], "no-such-file"), (["--size", "3"], "3"),
    ],
)  # fmt: skip
def test_the_command_refuses_bad_options_before_it_loads(arguments, word):
    done = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
    assert done.exit_code == 2 and word in done.stderr, done.stderr
