"""A hub on loopback: repositories from a dict, in the few answers that huggingface_hub asks for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(repositories: dict[str, dict[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Serve {repository: {path: content}}; yields the address and the requests, one line each, as they come."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, body: bool) -> None:
            requests.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0].strip("/").split("/")
            api = path[:2] == ["api", "models"]
            owner, name, *rest = path[2:] if api else path
            files = repositories.get(f"{owner}/{name}")
            if files is None:
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
            if api and rest[:1] == ["tree"]:
                return self.send(200, json.dumps([entry(one, files[one]) for one in files]).encode(), {}, body)
            if api:
                siblings = [{"rfilename": one} for one in files]
                facts = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
                return self.send(200, json.dumps(facts).encode(), {}, body)
            content = files.get("/".join(rest[2:]))  # resolve/REVISION/PATH
            if content is None:
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": COMMIT}
            begin = self.headers.get("Range")
            if begin:
                start = int(begin.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                return self.send(206, content[start:], headers, body)
            self.send(200, content, headers, body)

        def send(self, code: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": digest(content)}


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
