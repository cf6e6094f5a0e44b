"""How long a server takes from process start to its first answer: without compiled programs, then with them.

1. Make a cache directory that has the downloaded models of --models-from and nothing else.
2. Start `python -m jaxserve.serve` with it and ask for one token over HTTP, again and again, until it answers.
3. Stop it, and start it again, --repeats times, now with the programs that the first start compiled.

What follows `--` goes to the server. Prints the seconds at which it said something new of itself on /health, and at which it answered.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
_POLL_S = 0.05
_BODY = json.dumps({"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}).encode()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    default = pathlib.Path.home() / ".cache" / "jaxserve"
    parser.add_argument("--models-from", type=pathlib.Path, default=default, help="a --cache-dir with the model (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="starts with compiled programs (default: %(default)s)")
    parser.add_argument("options", nargs="*", help="options of jaxserve.serve, behind --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-start-") as name:
        cache = pathlib.Path(name)
        (cache / "models").symlink_to(args.models_from / "models")
        for i in range(1 + args.repeats):
            print(f"{'cold' if i == 0 else 'warm'}: {start_once(cache, args.options)}", flush=True)


def start_once(cache: pathlib.Path, options: list[str]) -> str:
    """Start, ask, stop; the seconds of each state."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jaxserve.serve", "--cache-dir", str(cache), "--host", "127.0.0.1", "--port", str(port), *options]
    states: dict[str, float] = {}
    with (cache / "server.log").open("ab") as log:
        started = time.monotonic()
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            while True:
                if server.poll() is not None:
                    sys.exit((cache / "server.log").read_text()[-4000:])
                state = state_of(base)
                states.setdefault(state.split(" ")[0], time.monotonic() - started)
                if state == "ok" and answers(base):
                    break
                time.sleep(_POLL_S)
            states["first answer"] = time.monotonic() - started
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
    return ", ".join(f"{state} {seconds:.1f} s" for state, seconds in states.items())


def state_of(base: str) -> str:
    """What /health says: "starting" before the port is open."""
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=5) as response:
            return str(json.load(response)["status"])
    except urllib.error.HTTPError as error:
        return str(json.load(error)["status"])
    except OSError:
        return "starting"


def answers(base: str) -> bool:
    """Whether one token comes back."""
    request = urllib.request.Request(f"{base}/v1/completions", _BODY, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return bool(json.load(response)["choices"])


if __name__ == "__main__":
    main()
