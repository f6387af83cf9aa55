"""What the tests of the download scripts share: a server of files, and what the scripts need."""

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# All that the scripts run, beside one way to download.
TOOLS = ("bash", "cat", "cut", "dirname", "env", "md5sum", "mkdir", "mv", "rm", "sha256sum", "wc")


class Server(ThreadingHTTPServer):
    """Serves `files` {path: bytes} with ranges; `requests` records (path, Range header).

    The next answer breaks off after `cut` bytes, if that is set.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.requests = []
        self.cut = None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        body = self.server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][: self.server.cut])
        self.server.cut = None
        return None

    def log_message(self, *_):
        pass


def environment() -> dict[str, str]:
    """The variables of a script that must not use a proxy."""
    env = {"PYTHON": sys.executable}
    for name, value in os.environ.items():
        if "proxy" not in name.lower():
            env.setdefault(name, value)
    return env


def error_of(result: subprocess.CompletedProcess) -> str:
    """The one line of the failed script's own message."""
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]
