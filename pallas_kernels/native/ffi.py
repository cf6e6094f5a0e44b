"""XLA's foreign function interface, as numba sees it: operands and results of a call, and work shared among XLA's threads.

1. A kernel divides its work into items, each of which some thread runs once: `item(operands, results, index)`, a C function of its own.
2. XLA calls the kernel's handler, which counts the items and calls `run`.
3. `run` has XLA's other threads call `_task`, which is the same for all kernels, calls it as well, and waits for the last item.

The layout of the structures is that of xla/ffi/api/c_api.h, which jaxlib brings along and promises to keep.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import re
import threading
from collections.abc import Callable
from typing import Any, cast

import jax
from llvmlite import binding, ir
from numba import cfunc, njit
from numba.core import config

from pallas_kernels.native.memory import (
    INT64,
    address_of,
    call,
    call_item,
    fetch_add,
    free,
    intrinsic,
    ints,
    load_word,
    malloc,
    sched_yield,
    words,
)

_HANDLER = _TASK = INT64(INT64)
_ITEM = INT64(INT64, INT64, INT64)
_TASK_SYMBOL = "jaxserve_task"
_task_address = address_of(_TASK_SYMBOL)

# XLA_FFI_CallFrame, XLA_FFI_Buffer and XLA_FFI_ThreadPool_..._Args in words of 8 bytes.
_EXTENSION, _API, _CONTEXT, _STAGE_INT, _ARGS, _RETS = 1, 2, 3, 8, 9, 14
_EXECUTE = 3
_BUFFER_DATA, _BUFFER_DIMS = 3, 5
_FIRST_FUNCTION = 6  # of XLA_FFI_Api

# What the threads of one call share, in words; the first two have a cache line to themselves.
_NEXT, _DONE, _TOTAL, _HOLDERS, _ITEM_ADDRESS, _STATE_ARGS, _STATE_RETS, _STATE_WORDS = 0, 8, 16, 17, 18, 19, 20, 24


def _header() -> str:
    return (pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()


def _version(part: str) -> int:
    found = re.search(rf"#define XLA_FFI_API_{part} (\d+)", _header())
    assert found
    return int(found[1])


def _function(name: str) -> int:
    """Word of XLA_FFI_Api that points to a function."""
    struct = _header().split("struct XLA_FFI_Api {")[1].split("};")[0]
    return _FIRST_FUNCTION + re.findall(r"_XLA_FFI_API_STRUCT_FIELD\((\w+)\)", struct).index(name)


_MAJOR, _MINOR = _version("MAJOR"), _version("MINOR")
_DESTROY_ERROR = _function("XLA_FFI_Error_Destroy")
_SCHEDULE, _NUM_THREADS = _function("XLA_FFI_ThreadPool_Schedule"), _function("XLA_FFI_ThreadPool_NumThreads")


# Intrinsics and not functions: they are called everywhere, and numba compiles a function anew for each kind of argument.
@intrinsic
def data(typing_context: Any, buffers: Any, index: Any) -> Any:
    """Address of the numbers of an operand or result."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_word(builder, load_word(builder, *args), ir.Constant(ir.IntType(64), _BUFFER_DATA))

    return INT64(INT64, INT64), codegen


@intrinsic
def size(typing_context: Any, buffers: Any, index: Any, axis: Any) -> Any:
    """Length of an axis of an operand or result."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        buffers, index, axis = args
        dimensions = load_word(builder, load_word(builder, buffers, index), ir.Constant(ir.IntType(64), _BUFFER_DIMS))
        return load_word(builder, dimensions, axis)

    return INT64(INT64, INT64, INT64), codegen


def _task(state: int) -> int:
    """Items of a call until none is left; then this thread lets go of the state."""
    shared = words(state)
    while True:
        index = fetch_add(state + 8 * _NEXT, 1)
        if index >= shared[_TOTAL]:
            break
        call_item(shared[_ITEM_ADDRESS], shared[_STATE_ARGS], shared[_STATE_RETS], index)
        fetch_add(state + 8 * _DONE, 1)
    _release(state)
    return 0


@njit
def _release(state: int) -> None:
    if fetch_add(state + 8 * _HOLDERS, -1) == 1:
        free(state)


@njit
def executes(frame: int) -> bool:
    """Whether a handler is asked to run, not what version of the interface it speaks, which is answered here."""
    fields = words(frame)
    if fields[_EXTENSION] != 0 and ints(fields[_EXTENSION])[2] == 1:  # XLA_FFI_Extension_Metadata: {base, metadata *}
        version = ints(words(fields[_EXTENSION])[3])
        version[6], version[7] = _MAJOR, _MINOR
        return False
    return ints(frame)[_STAGE_INT] == _EXECUTE


@njit
def operands(frame: int) -> int:
    """To pass to `data` and `size`."""
    return words(frame)[_ARGS]


@njit
def results(frame: int) -> int:
    """To pass to `data` and `size`."""
    return words(frame)[_RETS]


@njit
def run(frame: int, total: int, item: int) -> None:
    """Runs items 0 to total - 1 of a call, on XLA's threads and this one.

    Args:
      item: the address of the kernel's item.
    """
    state = malloc(8 * _STATE_WORDS)
    shared = words(state)
    helpers = max(min(_num_threads(frame), total), 1) - 1
    shared[_NEXT], shared[_DONE], shared[_TOTAL], shared[_HOLDERS] = 0, 0, total, helpers + 2
    shared[_ITEM_ADDRESS], shared[_STATE_ARGS], shared[_STATE_RETS] = item, operands(frame), results(frame)
    for _ in range(helpers):
        _schedule(frame, _task_address(), state)
    call(_task_address(), state)
    # A helper that starts only now finds nothing to do and is not waited for: all of XLA's threads may be waiting like this one.
    while fetch_add(state + 8 * _DONE, 0) < total:
        sched_yield()
    _release(state)


@njit
def _num_threads(frame: int) -> int:
    """XLA's threads; 1 if it has no pool."""
    request = malloc(40)
    arguments = words(request)
    arguments[0], arguments[1], arguments[2], arguments[3], arguments[4] = 32, 0, words(frame)[_CONTEXT], request + 32, 1
    threads = arguments[4] if _succeeds(frame, _NUM_THREADS, request) else 1
    free(request)
    return threads


@njit
def _schedule(frame: int, task: int, state: int) -> None:
    """Has a thread of XLA's call the task, or lets go of the state in its place."""
    request = malloc(40)
    arguments = words(request)
    arguments[0], arguments[1], arguments[2], arguments[3], arguments[4] = 40, 0, words(frame)[_CONTEXT], task, state
    if not _succeeds(frame, _SCHEDULE, request):
        _release(state)
    free(request)


@njit
def _succeeds(frame: int, function: int, request: int) -> bool:
    """Calls a function of XLA_FFI_Api; drops the error if there is one."""
    api = words(words(frame)[_API])
    error = call(api[function], request)
    if error == 0:
        return True
    arguments = words(request)
    arguments[0], arguments[1], arguments[2] = 24, 0, error
    call(api[_DESTROY_ERROR], request)
    return False


def once(build: Callable[[], Any]) -> Callable[[], Any]:
    """Calls `build` at most once, also from threads that ask at the same time, and keeps what it returned."""
    lock, cached = threading.Lock(), functools.cache(build)

    @functools.wraps(build)
    def locked() -> Any:
        with lock:
            return cached()

    return locked


def use_cache() -> bool:
    """Whether numba is to keep compiled code: in jax's directory of compiled programs, if it has one, for these very sources."""
    directory = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if directory is None:
        return False
    digest = hashlib.sha256(_header().encode())
    for path in sorted(pathlib.Path(__file__).parents[1].glob("**/*.py")):
        digest.update(path.read_bytes())
    chosen = pathlib.Path(directory) / f"native-{digest.hexdigest()[:16]}"
    try:
        chosen.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    config.CACHE_DIR = str(chosen)  # pyright: ignore[reportAttributeAccessIssue]
    return os.access(chosen, os.W_OK)


def processor() -> str:
    """Name and features of this processor, as compilers know it."""
    return f"{binding.get_host_cpu_name()} {binding.get_host_cpu_features().flatten()}"


def item_address(target: str) -> Any:
    """A function of no arguments that numba compiles: the address of the item of a kernel that is defined under this name."""
    return address_of(f"{target}_item")


def define(target: str, item: Callable[[int, int, int], int] | None, handler: Callable[[int], int]) -> tuple[Any, ...]:
    """Compiles a kernel and makes it known to XLA.

    Args:
      item: item(operands, results, index); returns 0. None if there is no work to share.
      handler: handler(frame), which calls `run` if the frame `executes`; returns 0, or the address of an XLA_FFI_Error.
    Returns: what has to live as long as the process.
    """
    cache = use_cache()
    task = compiled_item = None
    if item is not None:
        task = _define_task()
        compiled_item = cast(Any, cfunc(_ITEM, cache=cache)(item))
        binding.add_symbol(f"{target}_item", compiled_item.address)
    compiled_handler: Any = cfunc(_HANDLER, cache=cache)(handler)
    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(compiled_handler.address)
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    return task, compiled_item, compiled_handler, function


@once
def _define_task() -> Any:
    task: Any = cfunc(_TASK, cache=use_cache())(_task)
    binding.add_symbol(_TASK_SYMBOL, task.address)
    return task
