"""`python -m jaxserve.serve`: read the configuration, start the HTTP server, load the model behind it.

The port opens at once and /health says how far loading is. SIGTERM and SIGINT drain: no new requests, running ones finish
within --drain-timeout-s, exit code 0; a second signal stops at once. If the engine fails, the process ends with code 1.
Of several processes that serve together (--coordinator) only the first has the server; the others end when it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from typing import NoReturn

import uvicorn

from jaxserve.api.app import create_app
from jaxserve.api.connection import Connection
from jaxserve.command_line import parse_args
from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.load import follow_leader
from jaxserve.engine.multihost import is_follower
from jaxserve.errors import ConfigError
from jaxserve.metrics import Metrics

log = logging.getLogger(__name__)

_BACKLOG = 4096
_OPEN_FILES = 65_536
# After the drain: for clients to take the last bytes, and for the engine to end its step.
_LAST_BYTES_S = 5
_LAST_STEP_S = 5.0


class HttpServer(uvicorn.Server):
    """uvicorn without signal handlers of its own: `Server` decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class Server:
    """One engine and its HTTP front end, from start to drained.

    Args:
      listener: the socket to serve on, listening already.
    """

    def __init__(self, config: EngineConfig, listener: socket.socket) -> None:
        self._config = config.server
        self._is_multihost = config.parallel.is_multihost
        self._listener = listener
        self._engine = AsyncEngine(config, on_failure=self._on_failure)
        self._http = HttpServer(_uvicorn_config(config.server, self._engine))
        self._stop_asked = asyncio.Event()
        self._num_signals = 0
        self._failed = False

    def run(self) -> int:
        """Serve until a signal or a failure; returns the exit code."""
        with asyncio.Runner(loop_factory=self._http.config.get_loop_factory()) as runner:
            stopped = runner.run(self._serve())
        code = 1 if self._failed else 0
        if not stopped or self._failed or self._is_multihost:
            # It loads, compiles, or waits for a device or for processes that are gone: the interpreter's own exit would wait for that.
            _exit_at_once(code)
        return code

    async def _serve(self) -> bool:
        """Serve and drain; whether the engine has ended."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        self._engine.start()
        log.info(
            "listening on %s://%s:%d", "https" if self._config.ssl_certfile else "http", self._config.host, self._listener.getsockname()[1]
        )
        serving = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        stopping = asyncio.create_task(self._stop_asked.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not await self._engine.wait_idle(self._config.drain_timeout_s):
            log.warning("answers cut off: %d were still running", self._engine.num_unfinished)
            self._engine.abort_all()
        self._http.should_exit = True
        await serving
        return self._engine.stop(timeout_s=_LAST_STEP_S)

    def _on_signal(self) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            log.warning("stopping at once")
            _exit_at_once(0)
        log.info("draining: running answers have %.0f s to finish", self._config.drain_timeout_s)
        self._engine.begin_drain()
        self._stop_asked.set()

    def _on_failure(self, _detail: str) -> None:
        log.info("stopping: the engine has failed, as logged above")
        self._failed = True
        self._stop_asked.set()


def _uvicorn_config(server: ServerConfig, engine: AsyncEngine) -> uvicorn.Config:
    """Raises: ConfigError if the files for HTTPS cannot be used."""
    config = uvicorn.Config(
        create_app(engine), http=Connection.with_timeouts(server.read_timeout_s, server.write_timeout_s), ws="none", lifespan="off",
        log_config=None, access_log=server.access_log, proxy_headers=False, server_header=False, backlog=_BACKLOG, timeout_keep_alive=75,
        timeout_graceful_shutdown=_LAST_BYTES_S, ssl_keyfile=server.ssl_keyfile, ssl_certfile=server.ssl_certfile,
        ssl_ca_certs=server.ssl_ca_certs, ssl_cert_reqs=ssl.CERT_NONE if server.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    )  # fmt: skip
    try:
        config.load()
    except OSError as error:  # of which ssl's own errors are
        raise ConfigError(f"cannot use --ssl-keyfile, --ssl-certfile or --ssl-ca-certs: {error}") from None
    return config


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: ConfigError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; choose another with --host and --port") from None


def _raise_file_limit() -> None:
    """Every connection takes a file descriptor, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _exit_at_once(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _follow(config: EngineConfig) -> NoReturn:
    """Do what the leader says until it lets go; signals to stop are the leader's to heed, as its running answers need this process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        follow_leader(config, Metrics(config.served_names[0]))
    except ConfigError as error:
        log.critical("%s", error)
        _exit_at_once(1)
    except Exception:
        log.critical("the leader is gone, or a program failed", exc_info=True)
        _exit_at_once(1)
    _exit_at_once(0)


def main() -> None:
    """Entry point of the command line."""
    try:
        config = parse_args(sys.argv[1:])
        logging.basicConfig(level=config.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        if is_follower(config.parallel):
            _follow(config)
        server = Server(config, _listen(config.server.host, config.server.port))
    except ConfigError as error:
        sys.exit(f"jaxserve: {error}")
    _raise_file_limit()
    gc.set_threshold(10_000, 50, 50)  # a full collection among a model's many objects would stall a step
    sys.exit(server.run())


if __name__ == "__main__":
    main()
