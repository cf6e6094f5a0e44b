"""Several processes as one engine: process 0 leads, schedules and answers; the others run the same programs on the same inputs.

    leader                                        each follower
    join ---- jax.distributed: all of them -----> join
    broadcast address and token --(collective)--> connect, say who it is; refused by name if it differs
    tell(copy, program, arrays) -----(TCP)------> receive, replay: a loop of two calls

A message is its length, a line of JSON that says what the arrays are, and their bytes. Nothing is unpickled. A connection that ends without
a farewell means that its process is gone: then nobody can go on, and the leader says so to whoever waits.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxserve.config import ParallelConfig
from jaxserve.errors import ConfigError

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 120.0  # from the first process that is ready to the last
_ADDRESS_BYTES = 512
_MAX_HEADER = 1 << 20
_FAREWELL = {"farewell": True}
_LENGTH = struct.Struct("<QQ")  # bytes of the header and of the arrays


def join(parallel: ParallelConfig) -> None:
    """Meet the other processes, if there are any; to be called before anything else asks jax for its devices.

    Raises: ConfigError if they do not all come.
    """
    if not parallel.is_multihost or jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM away from the server, which drains
    try:
        if parallel.coordinator in (None, "auto"):
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(parallel.coordinator, parallel.num_processes, parallel.process_id)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes of --coordinator={parallel.coordinator} did not meet: {error}") from None
    log.info("joined process=%d of=%d devices=%d", jax.process_index(), jax.process_count(), jax.device_count())


def is_follower(parallel: ParallelConfig) -> bool:
    """Whether another process leads; joins it where only jax knows. Raises: ConfigError."""
    if parallel.process_id is None:
        join(parallel)
        return parallel.is_multihost and jax.process_index() > 0
    return parallel.process_id > 0


class Leader:
    """The connections to all followers.

    Args:
      links: one for each follower, by its process's number.
    """

    def __init__(self, links: Mapping[int, socket.socket]) -> None:
        self._links = dict(links)
        self._on_loss: Callable[[str], None] | None = None
        self._lost: str | None = None
        self._closing = False
        self._lock = threading.Lock()
        for process, link in self._links.items():
            threading.Thread(target=self._watch, args=(process, link), name=f"follower-{process}", daemon=True).start()

    def tell(self, copy: int, program: str, arrays: Sequence[np.ndarray]) -> None:
        """Have every follower run a program of a copy of the model on these arrays.

        Raises: ConnectionError if one of them is gone.
        """
        head = {"copy": copy, "program": program, "arrays": [(array.dtype.str, array.shape) for array in arrays]}
        message = _encode(head, arrays)
        for process, link in self._links.items():
            try:
                link.sendall(message)
            except OSError as error:
                self._lose(f"process {process} is gone: {error}")
        if self._lost is not None:
            raise ConnectionError(self._lost)

    def on_loss(self, call: Callable[[str], None]) -> None:
        """Call this, once, from another thread, when a follower is lost; at once if one is lost already."""
        with self._lock:
            self._on_loss = call
            lost = self._lost
        if lost is not None:
            call(lost)

    def close(self) -> None:
        """Let the followers go."""
        self._closing = True
        for link in self._links.values():
            try:
                link.sendall(_encode(_FAREWELL, ()))
                link.close()
            except OSError:
                log.debug("a follower was gone before it was let go")

    def _watch(self, process: int, link: socket.socket) -> None:
        """Followers say nothing: whatever can be read is the end."""
        try:
            link.recv(1)
            reason = "it ended its connection"
        except OSError as error:
            reason = str(error)
        if not self._closing:
            self._lose(f"process {process} is gone: {reason}")

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._lost is not None:
                return
            self._lost, call = reason, self._on_loss
        log.critical("a follower is lost: %s", reason)
        if call is not None:
            call(reason)


class Follower:
    """The connection to the leader."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def receive(self) -> tuple[int, str, list[np.ndarray]] | None:
        """The copy, program and arrays of the next message; None when the leader lets go.

        Raises: ConnectionError if the leader is gone.
        """
        head, body = _receive(self._link)
        if head == _FAREWELL:
            return None
        arrays, at = [], 0
        for dtype, shape in head["arrays"]:
            count = int(np.prod(shape))
            arrays.append(np.frombuffer(body, np.dtype(dtype), count, at).reshape(shape))
            at += count * np.dtype(dtype).itemsize
        return head["copy"], head["program"], arrays


def meet(identity: Mapping[str, Any]) -> Leader | Follower | None:
    """Connect the processes that have joined; None if there is only this one.

    Args:
      identity: what must be the same everywhere, by its name.
    Raises: ConfigError naming what differs, or who did not come.
    """
    if jax.process_count() == 1:
        return None
    if jax.process_index() > 0:
        return _follow(json.loads(bytes(_broadcast(b"")).rstrip(b"\0")), identity)
    token = secrets.token_hex(32)
    with socket.create_server(("", 0)) as listener:
        listener.settimeout(HELLO_TIMEOUT_S)
        address = {"host": _own_address(), "port": listener.getsockname()[1], "token": token}
        _broadcast(json.dumps(address).encode())
        return Leader(_accept(listener, token, identity))


def _accept(listener: socket.socket, token: str, identity: Mapping[str, Any]) -> dict[int, socket.socket]:
    links: dict[int, socket.socket] = {}
    problems: list[str] = []
    while len(links) + len(problems) < jax.process_count() - 1:
        try:
            link, _ = listener.accept()
            link.settimeout(HELLO_TIMEOUT_S)
            hello, _ = _receive(link)
        except TimeoutError:
            raise ConfigError(f"{jax.process_count() - 1 - len(links)} processes joined, but did not connect") from None
        except (ConnectionError, ValueError):
            continue
        if not isinstance(hello.get("token"), str) or not hmac.compare_digest(hello["token"], token):
            link.close()
            continue
        differing = [name for name in identity if hello["identity"].get(name) != json.loads(json.dumps(identity[name]))]
        said = "; ".join(f"{name} is {hello['identity'].get(name)!r}, the leader's is {identity[name]!r}" for name in differing)
        problem = f"process {hello['process']} is refused: its {said}" if differing else None
        link.sendall(_encode({"refused": problem}, ()))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.settimeout(None)
        if problem is None:
            links[hello["process"]] = link
        else:
            problems.append(problem)
    if problems:
        raise ConfigError("\n".join(problems))
    return links


def _follow(address: Mapping[str, Any], identity: Mapping[str, Any]) -> Follower:
    try:
        link = socket.create_connection((address["host"], address["port"]), timeout=HELLO_TIMEOUT_S)
        link.sendall(_encode({"token": address["token"], "process": jax.process_index(), "identity": dict(identity)}, ()))
        answer, _ = _receive(link)
    except OSError as error:
        raise ConfigError(f"the leader at {address['host']} port {address['port']} cannot be reached: {error}") from None
    if answer["refused"] is not None:
        raise ConfigError(answer["refused"])
    link.settimeout(None)
    return Follower(link)


def _own_address() -> str:
    """The address under which others reach this host."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def _broadcast(mine: bytes) -> np.ndarray:
    """Bytes of process 0, at every process."""
    assert len(mine) <= _ADDRESS_BYTES, f"{len(mine)=}"
    return np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(mine.ljust(_ADDRESS_BYTES, b"\0"), np.uint8)))


def _encode(head: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> bytes:
    line = json.dumps(head).encode()
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return _LENGTH.pack(len(line), len(body)) + line + body


def _receive(link: socket.socket) -> tuple[dict[str, Any], bytes]:
    """A message. Raises: ConnectionError at the end of the connection."""
    num_header, num_body = _LENGTH.unpack(_read(link, _LENGTH.size))
    if num_header > _MAX_HEADER:
        raise ConnectionError(f"a header of {num_header} bytes: this is not a process of ours")
    return json.loads(_read(link, num_header)), _read(link, num_body)


def _read(link: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = link.recv(min(count, 1 << 20))
        if not part:
            raise ConnectionError("the other process is gone")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
