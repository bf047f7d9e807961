"""A hub on 127.0.0.1, spoken to by the real hub client: models, adapters and data sets out of local folders."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT, OLD_COMMIT = "a" * 40, "b" * 40
_NAME = r"[\w.-]+/[\w.-]+"
_OLD = ("old", OLD_COMMIT)
ROOT = Path(__file__).parent.parent

# Reads lines [script, folder] and answers each with a line [what it printed, its traceback].
RUN_SCRIPTS = """
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    script, sys.argv[1] = json.loads(line)
    printed, complaints = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try: exec(script, {})
        except Exception: complaints = traceback.format_exc()
    print(json.dumps([printed.getvalue().splitlines(), complaints]), flush=True)
"""


@dataclass(kw_only=True)
class Hub:
    """What it has, what it was asked for, and how it misbehaves."""

    models: dict[str, Path] = field(default_factory=dict)  # name -> folder; adapters are models to a hub
    datasets: dict[str, Path] = field(default_factory=dict)
    old: dict[str, Path] = field(default_factory=dict)  # models as they are at the tag "old"
    secret: str | None = None  # a token that models are given for; None: to everybody
    address: str = ""
    downloads: Counter[str] = field(default_factory=Counter)  # answered requests by file, parts included
    parts: list[tuple[str, int]] = field(default_factory=list)  # (file, first byte) where only the rest was wanted
    cuts: set[str] = field(default_factory=set)  # files whose next answer ends in the middle
    holds: set[str] = field(
        default_factory=set
    )  # files whose next answer stops in the middle until nobody waits for it
    damages: Counter[str] = field(default_factory=Counter)  # how many of a file's next answers have wrong bytes
    sent_bytes: Counter[str] = field(default_factory=Counter)  # by file

    @property
    def shards(self) -> set[str]:
        """The files of weights that were downloaded."""
        return {file for file in self.downloads if file.endswith(".safetensors")}

    @contextmanager
    def serving(self) -> Iterator["Hub"]:
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def forget(self) -> None:
        """Forget what was asked for, and behave."""
        for each in (self.downloads, self.parts, self.cuts, self.holds, self.damages, self.sent_bytes):
            each.clear()

    @contextmanager
    def one_process(self, library: Path) -> Iterator[Callable[[str, Path], list[str]]]:
        """What `known_to` does, for many scripts in one process: importing transformers takes seconds."""
        process = self.started(RUN_SCRIPTS, library)

        def run(script: str, folder: Path) -> list[str]:
            print(json.dumps([script, str(folder)]), file=process.stdin, flush=True)
            lines, complaints = json.loads(process.stdout.readline())
            assert not complaints, complaints
            return lines

        try:
            yield run
        finally:
            process.communicate(timeout=120)

    def known_to(self, script: str, folder: Path) -> list[str]:
        """What `script` prints with `folder` as its argument, in a process that knows this hub for the hub."""
        process = self.started(script, folder)
        said, complaints = process.communicate(timeout=120)
        assert process.returncode == 0, complaints
        return said.splitlines()

    def started(self, script: str, folder: Path) -> subprocess.Popen[str]:
        """`script`, running, with `folder` as its argument, in a process that knows this hub for the hub."""
        environment = {
            **os.environ,
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(folder / "library"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-c", script, str(folder)],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_POST(self) -> None:
        """Which of some files are there."""
        repository = re.fullmatch(rf"/api/(models|datasets)/({_NAME})/paths-info/.*", self.path)
        folder = getattr(self.hub, repository[1]).get(repository[2]) if repository else None
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if folder is None:
            self.missing("RepoNotFound")
            return
        self.as_json([told for told in listed(folder) if told["path"] in json.loads(body)["paths"]])

    def answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.hub.secret is not None and self.headers["Authorization"] != f"Bearer {self.hub.secret}":
            self.missing("RepoNotFound", status=401)
            return
        if found := re.fullmatch(rf"/api/(models|datasets)/({_NAME})(?:/(revision|tree)/([^/]+)(/.*)?)?", path):
            kind, name, question, revision, below = found.groups()
            folder = getattr(self.hub, "old" if revision in _OLD else kind).get(name)
            if folder is None:
                self.missing("RepoNotFound")
            elif question == "tree":
                self.as_json([] if below else listed(folder))
            else:
                siblings = [told | {"rfilename": told["path"]} for told in listed(folder)]
                commit = OLD_COMMIT if revision in _OLD else COMMIT
                self.as_json({"id": name, "sha": commit, "siblings": siblings})
            return
        found = re.fullmatch(rf"/(datasets/)?({_NAME})/resolve/(main|old|{COMMIT}|{OLD_COMMIT})/(.*)", path)
        is_old = found is not None and found[3] in _OLD
        models = self.hub.old if is_old else self.hub.models
        repositories = self.hub.datasets if found and found[1] else models
        folder = repositories.get(found[2]) if found else None
        file = folder / found[4] if found and folder else None
        commit = OLD_COMMIT if is_old else COMMIT
        if file is None or not file.is_file():
            self.missing("EntryNotFound", commit=commit)
            return
        self.send_file(file, commit=commit, with_body=with_body)

    def send_file(self, file: Path, *, commit: str, with_body: bool) -> None:
        body = file.read_bytes()
        first, last = 0, len(body) - 1
        headers = {"ETag": f'"{tag_of(file)}"', "X-Repo-Commit": commit}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), min(last, int(wanted[2] or last))
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            self.hub.parts.append((file.name, first))
        self.headed(206 if wanted else 200, headers | {"Content-Length": str(last + 1 - first)})
        if not with_body:
            return
        self.hub.downloads[file.name] += 1
        if self.hub.damages[file.name]:
            self.hub.damages[file.name] -= 1
            body = body[:-1] + bytes([body[-1] ^ 1])
        stop = last + 1
        if file.name in self.hub.cuts:
            self.hub.cuts.discard(file.name)
            stop = len(body) // 2
            self.close_connection = True
        held = file.name in self.hub.holds
        if held:
            stop = len(body) // 2
        self.wfile.write(body[first:stop])
        self.hub.sent_bytes[file.name] += stop - first
        if held:
            self.rfile.read()  # ends with the connection
            self.hub.holds.discard(file.name)
            self.close_connection = True

    def as_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.headed(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def missing(self, code: str, *, status: int = 404, commit: str = COMMIT) -> None:
        self.headed(status, {"X-Error-Code": code, "X-Repo-Commit": commit, "Content-Length": "0"})

    def headed(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


def listed(folder: Path) -> list[dict[str, Any]]:
    """The files of a repository, as the hub tells of them."""
    files = []
    for file in sorted(folder.iterdir()):
        size = file.stat().st_size
        told: dict[str, Any] = {"type": "file", "path": file.name, "size": size, "oid": tag_of(file)}
        if file.suffix == ".safetensors":
            told["lfs"] = {"sha256": tag_of(file), "oid": tag_of(file), "size": size, "pointerSize": 134}
        files.append(told)
    return files


def tag_of(file: Path) -> str:
    body = file.read_bytes()
    return (hashlib.sha256 if file.suffix == ".safetensors" else hashlib.sha1)(body).hexdigest()
