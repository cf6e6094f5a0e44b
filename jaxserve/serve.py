"""`python -m jaxserve.serve`: read the configuration, start the HTTP server, load the model behind it.

The port opens at once and /health says how far loading is. SIGTERM and SIGINT drain: no new requests, running ones finish
within --drain-timeout-s, exit code 0; a second signal stops at once. If the engine fails, the process ends with code 1.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from types import FrameType

import uvicorn

from jaxserve.api.app import create_app
from jaxserve.config import EngineConfig, parse_args
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.errors import ConfigError

log = logging.getLogger(__name__)


class Server:
    """One engine and its HTTP front end, from start to drained."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._signals = 0
        self._failed = False
        self._stopped: asyncio.Event
        self._uvicorn: uvicorn.Server

    def run(self) -> int:
        """Serve until a signal or a failure; returns the exit code."""
        asyncio.run(self._serve())
        return 1 if self._failed else 0

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        engine = AsyncEngine(self._config, on_failure=self._on_failure)
        server = self._config.server
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                create_app(engine), host=server.host, port=server.port, log_level=server.log_level, access_log=server.access_log,
                lifespan="off", timeout_keep_alive=75, h11_max_incomplete_event_size=64 << 10, server_header=False,
            )  # fmt: skip
        )
        self._uvicorn.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        engine.start()
        serving = asyncio.create_task(self._uvicorn._serve())
        stopping = asyncio.create_task(self._stopped.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        engine.begin_drain()
        if not self._failed and await engine.wait_idle(server.drain_timeout_s):
            await asyncio.sleep(0.1)  # the last bytes of the last streams
        self._uvicorn.should_exit = True
        await asyncio.wait({serving}, timeout=5)
        engine.stop()

    def _on_signal(self, *_: FrameType) -> None:
        self._signals += 1
        if self._signals > 1:
            log.warning("stopping at once")
            self._uvicorn.force_exit = True
            sys.exit(0)
        log.info("draining: running answers have %.0f s to finish", self._config.server.drain_timeout_s)
        self._stopped.set()

    def _on_failure(self, detail: str) -> None:
        log.critical("stopping: %s", detail)
        self._failed = True
        self._stopped.set()


def main() -> None:
    """Entry point of the command line."""
    try:
        config = parse_args(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"jaxserve: {error}")
    logging.basicConfig(level=config.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    gc.set_threshold(10_000, 50, 50)  # a full collection among a model's many objects would stall a step
    sys.exit(Server(config).run())


if __name__ == "__main__":
    main()
