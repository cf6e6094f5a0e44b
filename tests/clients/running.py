"""A real server in a process of its own, for tests that talk to it with real clients."""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

SMALL = ["--max-rows", "4", "--max-step-tokens", "32", "--decode-rows", "4", "--prefill-tokens", "32", "--cache-bytes", "1048576"]


@contextlib.contextmanager
def running_server(model: pathlib.Path, *options: str, start_timeout_s: float = 180) -> Iterator[str]:
    """Base URL of a server of the model, ready to answer; stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as output:
        command = [
            sys.executable,
            "-m",
            "jaxserve.serve",
            "--model",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            *SMALL,
            *options,
        ]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(url, process, time.monotonic() + start_timeout_s)
            yield url
        except BaseException:
            output.seek(0)
            print(output.read().decode(errors="replace")[-8000:])
            raise
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], deadline: float) -> None:
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
                json.load(reply)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)  # not a wait for a result but the pace of asking
    raise TimeoutError(f"{url} is not ready")
