"""Several processes as one engine: process 0 leads, schedules and answers; the others run the same programs on the same inputs.

    leader                                          each follower
    open the door                     <--(TCP)---   knock: its number, version and options; refused by name if they differ
    once all are here: where jax is   ---------->   join jax
    the model, once it is found       <----------   the same; refused by name if it differs
    tell(copy, program, arrays)       ---------->   receive, replay: a loop of two calls

Where the door is, is said by options or by the cluster; see cluster.py. jax gets another port, which the leader chooses. The door stays
open, to tell whoever comes late, or twice, why it may not come in: jax itself would end every process for that.

A message is its length, a line of JSON that says what the arrays are, and their bytes. Nothing is unpickled. A connection that ends without
a farewell means that its process is gone, and so does a host that no longer answers. Then nobody can go on, and the leader says so to
whoever waits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxserve.config import ParallelConfig
from jaxserve.engine.cluster import find_place
from jaxserve.errors import ConfigError

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0  # from the first process to the last
_HELLO_TIMEOUT_S = 10.0  # for whoever knocks to say who it is
_RETRY_S = 0.2
_PROBES = 3  # that a host leaves unanswered before it is lost
_PROBE_S = 2
_MAX_HEADER = 1 << 20
_FAREWELL = {"farewell": True}
_LENGTH = struct.Struct("<QQ")  # bytes of the header and of the arrays


def is_follower(parallel: ParallelConfig) -> bool:
    """Whether another process leads. Raises: ConfigError."""
    place = find_place(parallel)
    return place is not None and place.process > 0


def meet(parallel: ParallelConfig, identity: Mapping[str, Any]) -> Leader | Follower | None:
    """Meet the other processes, if there are any; to be called before anything else asks jax for its devices.

    Args:
      identity: what must be the same everywhere, by its name; the number of processes is added.
    Raises: ConfigError naming what differs, or who did not come.
    """
    place = find_place(parallel)
    if place is None:
        return None
    identity = {"--num-processes": place.count, **identity}
    group: Leader | Follower
    if place.process == 0:
        door, jax_port = Door(place.port, place.count, identity), _free_port()
        group = door.gather(START_TIMEOUT_S, jax_port)
    else:
        group, jax_port = knock(place.host, place.port, place.process, identity, timeout_s=START_TIMEOUT_S)
    host = f"[{place.host}]" if ":" in place.host else place.host
    _join_jax(f"{host}:{jax_port}", place.count, place.process)
    return group


def _join_jax(address: str, count: int, process: int) -> None:
    """Have jax know the devices of all processes."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM away from the server, which drains
    try:
        jax.distributed.initialize(address, count, process)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"jax cannot join the processes that serve together at {address}: {error}") from None
    log.info("joined process=%d of=%d devices=%d", process, count, jax.device_count())


class Door:
    """Where the other processes come in: each once, if it is like this one. Whoever comes later is told why it may not.

    Args:
      port: 0 takes a free one.
      count: of the processes that serve together, with this one.
      identity: see meet.
    Raises: ConfigError if the port is taken.
    """

    def __init__(self, port: int, count: int, identity: Mapping[str, Any]) -> None:
        self._listener = _listen(port)
        self.port: int = self._listener.getsockname()[1]
        self._count, self._identity = count, identity
        self._links: dict[int, socket.socket] = {}
        self._complete_s: float | None = None

    def gather(self, timeout_s: float, jax_port: int) -> Leader:
        """Wait for all others.

        Args:
          jax_port: where they find jax, told to all once all are here.
        Raises: ConfigError naming those that were refused or did not come; then nobody may come in.
        """
        problems: list[str] = []
        deadline_s = time.monotonic() + timeout_s
        while len(self._links) + len(problems) < self._count - 1:
            try:
                self._listener.settimeout(max(deadline_s - time.monotonic(), 1e-3))
                link, _ = self._listener.accept()
            except TimeoutError:
                missing = [str(process) for process in range(1, self._count) if process not in self._links]
                problems.append(f"process {', '.join(missing)} of {self._count} did not come within {timeout_s:g} s")
                break
            problem = self._greet(link)
            if problem is not None:
                problems.append(problem)
        refusal = "\n".join(problems) or None
        for link in self._links.values():
            with contextlib.suppress(OSError):  # gone again; whoever needs it will see
                link.sendall(_encode({"refused": refusal, "jax_port": jax_port}, ()))
        if refusal is not None:
            for opened in (self._listener, *self._links.values()):
                opened.close()
            raise ConfigError(refusal)
        self._complete_s = time.monotonic()
        self._listener.settimeout(None)
        threading.Thread(target=self._turn_away, name="door", daemon=True).start()
        return Leader(self._links, self._listener)

    def _turn_away(self) -> None:
        with contextlib.suppress(OSError):  # the leader has closed the door
            while True:
                self._greet(self._listener.accept()[0])

    def _greet(self, link: socket.socket) -> str | None:
        """Hear who it is and let it in; why not, if it says that it is one of these processes and is refused."""
        try:
            link.settimeout(_HELLO_TIMEOUT_S)
            hello, _ = _receive(link, max_body=0)
            process, identity = int(hello["process"]), dict(hello["identity"])
            problem = self._problem_of(process, identity)
            if problem is not None:
                link.sendall(_encode({"refused": problem}, ()))
        except (OSError, ValueError, LookupError, TypeError):  # not one of these processes, or gone already
            link.close()
            return None
        if problem is None:
            _open_for_steps(link)
            self._links[process] = link
        else:
            log.warning("%s", problem)
            link.close()
        return problem

    def _problem_of(self, process: int, identity: Mapping[str, Any]) -> str | None:
        if self._complete_s is not None:
            since = f"all {self._count} have been here for {time.monotonic() - self._complete_s:.0f} s"
            return f"process {process} is refused: it comes too late, {since}; start all of them again, together"
        if not 0 < process < self._count:
            return f"process {process} is refused: beside the leader there are processes 1 to {self._count - 1}"
        if process in self._links:
            return f"process {process} is refused: another process has this --process-id"
        return _difference(process, self._identity, identity)


def knock(host: str, port: int, process: int, identity: Mapping[str, Any], *, timeout_s: float) -> tuple[Follower, int]:
    """Come in at the leader's door, which need not be there yet; also where to find jax.

    Raises: ConfigError saying why this process is refused, or that there is no leader.
    """
    deadline_s, where = time.monotonic() + timeout_s, f"the leader at {host} port {port}"
    while True:
        try:
            link = socket.create_connection((host, port), timeout=timeout_s)
            break
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise ConfigError(f"{where} cannot be reached: {error}") from None
            time.sleep(_RETRY_S)
    try:
        link.sendall(_encode({"process": process, "identity": dict(identity)}, ()))
        link.settimeout(timeout_s + _HELLO_TIMEOUT_S)
        answer, _ = _receive(link)
    except OSError as error:
        link.close()
        raise ConfigError(f"{where} does not answer: {error}") from None
    if answer["refused"] is not None:
        link.close()
        raise ConfigError(answer["refused"])
    _open_for_steps(link)
    return Follower(link), answer["jax_port"]


def _difference(process: int, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Why a process is refused; None if it is like this one."""
    mine = json.loads(json.dumps(dict(mine)))  # as it is after a journey
    said = [f"{name} is {theirs.get(name)!r}, the leader's is {value!r}" for name, value in mine.items() if theirs.get(name) != value]
    return f"process {process} is refused: its {'; '.join(said)}" if said else None


class Leader:
    """The connections to all followers.

    Args:
      links: one for each follower, by its process's number.
      listener: of the door through which they came.
    """

    def __init__(self, links: Mapping[int, socket.socket], listener: socket.socket) -> None:
        self._links, self._listener = dict(links), listener
        self._on_loss: Callable[[str], None] | None = None
        self._lost: str | None = None
        self._closing = False
        self._lock = threading.Lock()

    def agree(self, identity: Mapping[str, Any]) -> None:
        """See that something else is the same everywhere, and begin to watch over the followers.

        Raises: ConfigError naming what differs, or who is gone.
        """
        problems: list[str] = []
        for process, link in self._links.items():
            try:
                problem = _difference(process, identity, _receive(link, max_body=0)[0])
                link.sendall(_encode({"refused": problem}, ()))
            except OSError as error:
                problem = f"process {process} is gone: {error}"
            problems += [] if problem is None else [problem]
        if problems:
            raise ConfigError("\n".join(problems))
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
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
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

    def close(self) -> None:
        """Leave."""
        self._link.close()

    def agree(self, identity: Mapping[str, Any]) -> None:
        """See that something else is the same as the leader's. Raises: ConfigError naming what differs, or that the leader is gone."""
        try:
            self._link.sendall(_encode(identity, ()))
            answer, _ = _receive(self._link)
        except OSError as error:
            raise ConfigError(f"the leader is gone: {error}") from None
        if answer["refused"] is not None:
            raise ConfigError(answer["refused"])

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


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
    except OSError as error:
        raise ConfigError(
            f"port {port}, where the other processes are to come in, is not free: {error.strerror}; choose another with --coordinator "
            "HOST:PORT, or with JAX_COORDINATOR_PORT where the cluster says who takes part"
        ) from None


def _open_for_steps(link: socket.socket) -> None:
    """Wait as long as it takes for what the other process says, unless its host is gone: no power, no network."""
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":  # elsewhere the system's own patience of hours
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_S)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_S)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        # Of data on their way, which keep probes from being sent.
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _PROBE_S * (1 + _PROBES))


def _free_port() -> int:
    with _listen(0) as listener:
        return listener.getsockname()[1]


def _encode(head: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> bytes:
    line = json.dumps(head).encode()
    body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return _LENGTH.pack(len(line), len(body)) + line + body


def _receive(link: socket.socket, *, max_body: int | None = None) -> tuple[dict[str, Any], bytes]:
    """A message. Raises: ConnectionError at the end of the connection."""
    num_header, num_body = _LENGTH.unpack(_read(link, _LENGTH.size))
    if num_header > _MAX_HEADER or (max_body is not None and num_body > max_body):
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
