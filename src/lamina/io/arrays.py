"""The one place where bytes of a file become ``jax.Array`` or numpy arrays, and back.

On CPU, JAX takes 64-byte aligned host memory as it is. So an aligned tensor is the mapped file
itself, and all others are read in vectors into aligned memory of our own: one copy, never two. JAX
copies a borrowed buffer before it writes to it, so the file is never changed.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.errors import FileError, TypeMismatchError
from .mounts import on_network
from .tensorfile import FileBytes, TensorHandle

__all__ = ["garbage_collector_paused", "host_array", "is_array", "to_jax", "to_numpy"]

_ALIGN = 64
_SMALL = 4096
_ARENA = 32 << 20
_NARROW = {
    np.dtype(np.int64): np.dtype(np.int32),
    np.dtype(np.uint64): np.dtype(np.uint32),
    np.dtype(np.float64): np.dtype(np.float32),
    np.dtype(np.complex128): np.dtype(np.complex64),
}


@contextlib.contextmanager
def garbage_collector_paused() -> Iterator[None]:
    """Thousands of new objects would have it search the whole heap for garbage again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@garbage_collector_paused()
def to_jax(
    handles: Sequence[TensorHandle], *, dtype: Any = None, copy: bool | None = None
) -> list[jax.Array]:
    """Read tensors as JAX arrays on the default device.

    Args:
        handles: what to read; handles of the same tensor give one and the same array.
        dtype: cast floating-point tensors to this dtype.
        copy: ``True`` reads into memory of our own; ``False`` maps the file wherever it can;
            ``None`` maps unless the file is on a network file system.

    Returns:
        One array per handle. 64-bit types become 32-bit unless JAX's x64 mode is on, with one
        warning that names the tensors. Single integers, such as the counters of batch
        normalisation, keep their value and cause no warning.

    Raises:
        FileError: if the data cannot be read, or integers do not fit in 32 bits.
    """
    narrow = {} if jax.dtypes.canonicalize_dtype(np.int64) == np.int64 else _NARROW
    hosts, places = _host_arrays(handles, dtype, narrow, copy, alias=True)
    narrowed = [
        handle
        for handle, place in zip(handles, places, strict=True)
        if handle.dtype.itemsize >= 8
        and _was_narrowed(handle.dtype, hosts[place].dtype, narrow)
        and not (handle.shape == () and handle.dtype.kind in "iu")
    ]
    if narrowed:
        _warn_narrowed(narrowed, narrow)
    arrays = jax.device_put(hosts)
    return [
        _random_key(handle, arrays[place]) if handle.prng else arrays[place]
        for handle, place in zip(handles, places, strict=True)
    ]


@garbage_collector_paused()
def to_numpy(
    handles: Sequence[TensorHandle], *, dtype: Any = None, copy: bool | None = None
) -> list[np.ndarray]:
    """Read tensors as numpy arrays with the file's exact dtypes.

    Args:
        handles: what to read; handles of the same tensor give one and the same array.
        dtype: cast floating-point tensors to this dtype.
        copy: as for ``to_jax``; arrays that map the file are read-only, copies are writable.

    Returns:
        One array per handle. Random keys come as their data.

    Raises:
        FileError: if the data cannot be read.
    """
    hosts, places = _host_arrays(handles, dtype, {}, copy, alias=False)
    return [hosts[place] for place in places]


def is_array(value: object) -> bool:
    """Whether ``value`` is stored as a tensor: an array, or something that gives one."""
    kind = type(value)
    known = _KINDS.get(kind)
    if known is None:
        # Asking whether something is a jax.Array is slow, so each type is asked once.
        known = _KINDS[kind] = isinstance(value, jax.Array | np.ndarray) or (
            not isinstance(value, np.generic | type)
            and not hasattr(kind, "__lamina_tensors__")
            and (hasattr(kind, "__jax_array__") or hasattr(kind, "__array__"))
        )
    return known


_KINDS: dict[type, bool] = {}


def host_array(value: Any, where: str) -> tuple[np.ndarray, str]:
    """Return a value's bytes on the host, without a copy where possible.

    Args:
        value: an array, or an object with ``__jax_array__`` or ``__array__``.
        where: its dotted path, for messages.

    Returns:
        The array in the machine's byte order, and the name of the random-key implementation if
        ``value`` is a typed JAX key (else ``""``).

    Raises:
        TypeMismatchError: if the array has no plain elements, is traced, was deleted, or is spread
            over several processes.
    """
    prng = ""
    is_jax = isinstance(value, jax.Array)
    if not is_jax and hasattr(value, "__jax_array__"):
        value = value.__jax_array__()
        is_jax = True
    try:
        if is_jax and not isinstance(value.dtype, np.dtype):
            prng = str(jax.random.key_impl(value))
            value = jax.random.key_data(value)
        host = np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        raise TypeMismatchError(
            f"{where}: cannot save a traced value; call save outside of jit and grad"
        ) from None
    except RuntimeError as error:
        raise TypeMismatchError(f"{where}: {_unreadable(value)}") from error
    if host.dtype.hasobject or host.dtype.names is not None or host.dtype.kind in "OSUMm":
        raise TypeMismatchError(
            f"{where}: cannot save an array of dtype {host.dtype}; "
            f"only numbers and booleans are stored"
        )
    if not host.dtype.isnative:
        host = host.astype(host.dtype.newbyteorder("="))
    return host, prng


def _unreadable(value: Any) -> str:
    if isinstance(value, jax.Array) and value.is_deleted():
        return (
            "the array was deleted (donated to a compiled function); "
            "save the array that the function returned"
        )
    return (
        "the array cannot be read by this process; if it is spread over several, gather it first "
        "with jax.experimental.multihost_utils.process_allgather"
    )


def _host_arrays(
    handles: Sequence[TensorHandle],
    dtype: Any,
    narrow: dict[np.dtype, np.dtype],
    copy: bool | None,
    alias: bool,
) -> tuple[list[np.ndarray], list[int]]:
    """Return the distinct arrays, and for every handle the index of its own.

    ``alias``: a mapped array is good only if JAX can take it over, that is, 64-byte aligned.
    """
    target = None if dtype is None else np.dtype(dtype)
    copies: dict[str, bool] = {}
    seen: dict[Hashable, int] = {}
    places: list[int] = []
    hosts: list[np.ndarray] = []
    slots: list[tuple[TensorHandle, int, np.dtype]] = []
    for handle in handles:
        index = seen.setdefault(handle.key, len(hosts))
        places.append(index)
        if index < len(hosts):
            continue
        if handle.file not in copies:
            copies[handle.file] = on_network(handle.file) if copy is None else copy
        wanted = handle.dtype
        if target is not None and jnp.issubdtype(wanted, jnp.floating):
            wanted = target
        wanted = narrow.get(wanted, wanted)
        mapped = wanted == handle.dtype and not handle.refused and not copies[handle.file]
        if alias:
            mapped = mapped and handle.contiguous and _mappable(handle)
        if mapped:
            hosts.append(handle.read())
        else:
            slots.append((handle, index, wanted))
            hosts.append(_EMPTY)
    _fill(slots, hosts)
    return hosts, places


_EMPTY = np.empty(0, np.uint8)


def _was_narrowed(was: np.dtype, now: np.dtype, narrow: dict[np.dtype, np.dtype]) -> bool:
    # Not narrow.get(was) == now: numpy takes None for float64.
    return was in narrow and narrow[was] == now


def _mappable(handle: TensorHandle) -> bool:
    return handle.nbytes == 0 or (
        handle.offset % _ALIGN == 0
        and handle.nbytes >= _SMALL
        and isinstance(handle.source, FileBytes)
    )


def _fill(slots: list[tuple[TensorHandle, int, np.dtype]], hosts: list[np.ndarray]) -> None:
    """Give every slot aligned memory and read the tensors into it, in the order of the file."""
    slots.sort(key=lambda slot: (slot[0].file, slot[0].offset))
    places = _allocate([_size(handle, wanted) for handle, _, wanted in slots])
    run: list[memoryview] = []
    source: FileBytes | None = None
    start = end = 0
    for (handle, index, wanted), (block, position) in zip(slots, places, strict=True):
        hosts[index] = np.ndarray(handle.shape, wanted, block, position)
        file = handle.source
        if wanted != handle.dtype or not handle.contiguous or not isinstance(file, FileBytes):
            _convert(handle, hosts[index])
        elif handle.nbytes:
            if file is not source or handle.offset != end:
                if source is not None:
                    source.read_into(start, run)
                source, run, start = file, [], handle.offset
            run.append(block[position : position + handle.nbytes])
            end = handle.offset + handle.nbytes
    if source is not None:
        source.read_into(start, run)


def _size(handle: TensorHandle, wanted: np.dtype) -> int:
    if handle.refused:
        handle.read()
    # Shapes were checked against the file, so this is bounded by its size.
    return handle.nbytes // handle.dtype.itemsize * wanted.itemsize


def _allocate(sizes: list[int]) -> list[tuple[memoryview, int]]:
    """Return for every size a 64-byte aligned place: a block of memory and a position in it.

    Blocks are bounded, so that one small tensor that outlives the others keeps little alive.
    """
    places: list[tuple[memoryview, int]] = []
    positions: list[int] = []
    used = 0
    for size in sizes:
        room = -(-size // _ALIGN) * _ALIGN
        if positions and used + room > _ARENA:
            block = _aligned(used)
            places += [(block, position) for position in positions]
            positions, used = [], 0
        positions.append(used)
        used += room
    block = _aligned(used)
    places += [(block, position) for position in positions]
    return places


def _aligned(size: int) -> memoryview:
    memory = np.empty(size + _ALIGN, np.uint8)
    start = -memory.ctypes.data % _ALIGN
    return memory[start : start + size].data


def _convert(handle: TensorHandle, out: np.ndarray) -> None:
    read = handle.read()
    if read.size and read.dtype.kind in "iu" and out.dtype.itemsize < read.dtype.itemsize:
        limits = np.iinfo(out.dtype)
        low, high = int(read.min()), int(read.max())
        if low < limits.min or high > limits.max:
            raise FileError(
                f"{handle.file}: tensor {handle.name!r} has {read.dtype} values from {low} to "
                f"{high} that do not fit {out.dtype}; turn x64 on with "
                f'jax.config.update("jax_enable_x64", True), or load with numpy=True'
            )
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, read, casting="unsafe")


def _warn_narrowed(handles: list[TensorHandle], narrow: dict[np.dtype, np.dtype]) -> None:
    names = [f"{h.name!r} ({h.dtype} -> {narrow[h.dtype]})" for h in handles]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    warnings.warn(
        f"{handles[0].file}: 64-bit tensors were loaded as 32-bit: {shown}. Keep 64 bits with "
        f'jax.config.update("jax_enable_x64", True), or load with numpy=True.',
        stacklevel=5,  # _warn_narrowed, to_jax and its wrapper, load
    )


def _random_key(handle: TensorHandle, data: jax.Array) -> jax.Array:
    try:
        return jax.random.wrap_key_data(data, impl=handle.prng)
    except (ValueError, TypeError, KeyError) as error:
        raise FileError(
            f"{handle.file}: tensor {handle.name!r} is not the data of a "
            f"{handle.prng!r} random key: {error}"
        ) from error
