"""A model hub on this machine: folders served under the hub's HTTP interface, for its real client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(models: dict[str, Path], datasets: dict[str, Path]) -> Iterator[str]:
    """Serve folders as repositories ("owner/name" → folder); gives the address for `HF_ENDPOINT`."""
    places = {("models", name): folder for name, folder in models.items()}
    places |= {("datasets", name): folder for name, folder in datasets.items()}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(b"")

        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def _answer(self, body: bytes) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            interface = parts[0] == "api"
            parts = parts[1:] if interface else parts
            kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
            name, rest = "/".join(parts[:2]), parts[2:]
            folder = places.get((kind, name))
            if folder is None:
                self._say(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif interface:
                self._describe(kind, name, folder, rest, body)
            elif rest[0] == "resolve" and (folder / "/".join(rest[2:])).is_file():
                self._send_file(folder / "/".join(rest[2:]))
            else:
                self._say(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

        def _describe(self, kind: str, name: str, folder: Path, rest: list[str], body: bytes) -> None:
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            entries = [_entry(folder, file) for file in files]
            if rest[:1] == ["tree"]:
                under = "/".join(rest[2:])
                answer = [entry for entry in entries if not under or entry["path"].startswith(under + "/")]
            elif rest[:1] == ["paths-info"]:
                fields = parse_qs(body.decode()) if not body.startswith(b"{") else json.loads(body)
                answer = [entry for entry in entries if entry["path"] in fields["paths"]]
            else:
                siblings = [{"rfilename": file} for file in files]
                answer = {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            self._say(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def _send_file(self, file: Path) -> None:
            content = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            first, last = 0, len(content) - 1
            span = self.headers.get("Range", "").removeprefix("bytes=")
            if span:
                start, _, end = span.partition("-")
                first, last = int(start), min(int(end or last), last)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._say(206 if span else 200, content[first : last + 1], headers)

        def _say(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def _entry(folder: Path, file: str) -> dict[str, object]:
    content = (folder / file).read_bytes()
    return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
