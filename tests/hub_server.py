"""A loopback server with the routes of the Hugging Face Hub, and the faults that a test asks for.

Repositories are folders: FOLDER/<datasets|models>/<owner>/<name>/<commit>/.
"""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 4_096
"""Files of at least this many bytes are LFS files with a SHA-256; smaller ones have git's blob hash."""


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.branches: dict[str, str] = {}
        """The commit of each branch."""
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        """Method, path, Range header and Authorization header of each request."""
        self.break_after: dict[str, int] = {}
        """The number of bytes after which the next download of a file breaks off, by file name."""
        self.corrupt: set[str] = set()
        self.stalled: set[str] = set()
        self.gated = False
        self.busy = 0
        """How many requests are still answered with 429."""
        self.delay = 0.0
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, repo: str, files: dict[str, bytes], kind: str = "datasets", commit: str = COMMIT) -> None:
        for name, content in files.items():
            file = self.folder / kind / repo / commit / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def route(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(
            (self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        time.sleep(self.hub.delay)
        if self.hub.busy:
            self.hub.busy -= 1
            return self.answer(429, {"error": "too many"}, {"Retry-After": "0"})
        if self.hub.gated and self.headers.get("Authorization") != "Bearer hf_secret":
            return self.answer(
                401,
                {"error": "gated"},
                {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this dataset is restricted"},
            )
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            kind, repo, rest = parts[1], "/".join(parts[2:4]), parts[4:]
            revision = rest[1] if len(rest) > 1 else "main"
            action = rest[0] if rest else "revision"
        else:
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            repo, action, revision = "/".join(parts[:2]), parts[2], parts[3]
        folder = self.hub.folder / kind / repo
        if not folder.is_dir():
            return self.answer(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.branches.get(revision, revision)
        if not (folder / commit).is_dir():
            return self.answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        if action == "revision":
            return self.answer(
                200,
                {
                    "id": repo,
                    "sha": commit,
                    "siblings": [],
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                },
            )
        if action == "tree":
            return self.answer(
                200,
                [
                    entry(file, folder / commit)
                    for file in sorted((folder / commit).rglob("*"))
                    if file.is_file()
                ],
            )
        file = folder / commit / "/".join(parts[4:])
        if not file.is_file():
            return self.answer(404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"})
        return self.send(file, commit)

    def send(self, file: Path, commit: str) -> None:
        content = file.read_bytes()
        listed = entry(file, file.parent)
        etag = listed.get("lfs", listed)["oid"]
        if file.name in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        if (span := self.headers.get("Range")) is not None:
            start = int(span.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        for key, value in {
            "X-Repo-Commit": commit,
            "ETag": f'"{etag}"',
            "Content-Length": str(len(content) - start),
            "Accept-Ranges": "bytes",
            "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if file.name in self.hub.stalled:
            self.close_connection = True
            time.sleep(2)
            return
        end = self.hub.break_after.pop(file.name, len(content))
        self.wfile.write(content[start:end])
        if end < len(content):
            self.close_connection = True

    def answer(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def entry(file: Path, root: Path) -> dict:
    """A file as the Hub's route `tree` lists it."""
    content = file.read_bytes()
    listed = {"type": "file", "path": file.relative_to(root).as_posix(), "size": len(content)}
    listed["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if len(content) >= LARGE:
        listed["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return listed
