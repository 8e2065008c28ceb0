"""State dicts: a module's values by name, and loading them all or not at all."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from .bind import VERSION
from .errors import DeferredError, LoadError, ShapeError, did_you_mean, format_shape
from .hooks import RemovableHandle, add_hook
from .parameter import Box, array, canonical
from .walk import walk

if TYPE_CHECKING:
    from .module import Module

__all__ = ["IncompatibleKeys", "StateDict", "StateMixin"]

_EXTRA = "_extra_state"
_NO_HOOKS: Any = MappingProxyType({})


class IncompatibleKeys(namedtuple("IncompatibleKeys", ["missing_keys", "unexpected_keys"])):
    """What a non-strict load left out: ``missing_keys`` and ``unexpected_keys``."""

    __slots__ = ()

    def __repr__(self) -> str:
        return (
            super().__repr__()
            if self.missing_keys or self.unexpected_keys
            else ("<All keys matched successfully>")
        )


class StateDict(OrderedDict):
    """An ordered dict ``{name: array}`` that also knows the ties, for saving.

    Attributes:
        ties: ``{further name: canonical name}``.
        wide: ``{name: dtype}`` of values that files hold with a wider dtype than JAX does
            (PyTorch's 64-bit counters).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ties: dict[str, str] = {}
        self.wide: dict[str, np.dtype] = {}
        self._metadata: dict[str, Any] = {}

    def __lamina_tensors__(self) -> tuple[dict[str, Any], dict[str, str], dict[str, np.dtype]]:
        names = self.keys()
        ties = {a: b for a, b in self.ties.items() if a in names and b in names}
        return dict(self), ties, {k: v for k, v in self.wide.items() if k in names}


class StateMixin:
    """The part of :class:`Module` that reads and writes state dicts."""

    _state_dict_hooks: dict[int, Any] = _NO_HOOKS
    _state_dict_pre_hooks: dict[int, Any] = _NO_HOOKS
    _load_hooks: dict[int, Any] = _NO_HOOKS
    _load_pre_hooks: dict[int, Any] = _NO_HOOKS

    def state_dict(
        self: Any, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> StateDict:
        """Return all parameters and persistent buffers by name: a snapshot.

        Args:
            destination: a dict to fill (default: a new one).
            prefix: put before every name.
            keep_vars: return the boxes themselves instead of their values (default False).

        Returns:
            An ordered dict ``{name: jax.Array}`` with PyTorch's names and order. Later training
            changes none of its arrays. A tied value appears under each of its names.

        Raises:
            DeferredError: if shapes are still unknown; all such names are listed.

        Example:
            >>> from lamina import nn
            >>> list(nn.Linear(2, 3).state_dict())
            ['weight', 'bias']
        """
        is_top = destination is None
        if is_top:
            unknown = [
                f"  {name}: {format_shape(box.shape)}"
                for name, box, _ in walk(self).entries
                if box._awaits_shapes and not box._is_free
            ]
            if unknown and not keep_vars:
                raise DeferredError(
                    "no values yet, some sizes are unknown:\n"
                    + "\n".join(unknown)
                    + "\n  mend: pass data through the model once, net(x), or call lamina.infer"
                )
            destination = StateDict()
        for hook in list(self._state_dict_pre_hooks.values()):
            hook(self, prefix, keep_vars)
        metadata = {"version": self._version}
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]] = metadata
        self._adopt_containers()
        self._save_to_state_dict(destination, prefix, keep_vars)
        for name, child in self._modules.items():
            if child is not None:
                child.state_dict(
                    destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars
                )
        if is_top:
            for alias, name in walk(self).aliases.items():
                if prefix + alias in destination and prefix + name in destination:
                    destination.ties[prefix + alias] = prefix + name
        for hook in list(self._state_dict_hooks.values()):
            result = hook(self, destination, prefix, metadata)
            if result is not None:
                destination = result
        return destination

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, box in self._own_boxes():
            if box._is_empty if hasattr(box, "persistent") else False:
                continue
            if not getattr(box, "persistent", True):
                continue
            destination[prefix + name] = box if keep_vars else box.data
            if isinstance(destination, StateDict) and canonical(box._dtype) != box._dtype:
                destination.wide[prefix + name] = box._dtype
        if type(self).get_extra_state is not StateMixin.get_extra_state:
            destination[prefix + _EXTRA] = self.get_extra_state()

    def get_extra_state(self) -> Any:
        """Return further state to be put into the state dict; override together with
        :meth:`set_extra_state`.
        """
        raise AttributeError(f"{type(self).__name__} has no extra state")

    def set_extra_state(self, state: Any) -> None:
        """Take back what :meth:`get_extra_state` returned."""
        raise LoadError(
            f"{type(self).__name__} got extra state from the state dict but defines no "
            f"set_extra_state(self, state)"
        )

    def load_state_dict(
        self: Any,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        assign: bool = False,
        *,
        cast: bool = False,
    ) -> IncompatibleKeys:
        """Take values from a state dict: all of them, or, if anything is wrong, none.

        Args:
            state_dict: ``{name: array}``; JAX, NumPy or anything with ``__array__``.
            strict: names must match exactly (default True). A tied value may come under any of
                its names.
            assign: take over each array's dtype instead of insisting on the parameter's.
            cast: convert each array to the parameter's dtype.

        Returns:
            The missing and unexpected names; both empty if ``strict``.

        Raises:
            LoadError: listing every missing, unexpected, mis-shaped and mis-typed name at once,
                or that nothing matched at all. The model is then unchanged.

        Example:
            >>> from lamina import nn
            >>> a, b = nn.Linear(2, 3), nn.Linear(2, 3)
            >>> b.load_state_dict(a.state_dict())
            <All keys matched successfully>
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"load_state_dict: expected a mapping of names to arrays, got "
                f"{type(state_dict).__name__}"
            )
        missing: list[str] = []
        unexpected: list[str] = []
        errors: list[str] = []
        options = {"assign": assign, "cast": cast}
        with all_or_nothing(walk(self).names):
            _load(self, dict(state_dict), options, strict, missing, unexpected, errors)
            missing = _without_ties(self, missing, state_dict)
            result = IncompatibleKeys(missing, unexpected)
            for module in self.modules():
                for hook in list(module._load_hooks.values()):
                    hook(module, result)
            _report(self, state_dict, strict, *result, errors)
        return result

    def _load_from_state_dict(
        self: Any,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take this module's own values; override to accept older names or layouts."""
        for hook in list(self._load_pre_hooks.values()):
            hook(
                self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                error_msgs,
            )  # fmt: skip
        own = set()
        for name, box in self._own_boxes():
            if not getattr(box, "persistent", True) or (
                getattr(box, "_is_empty", False) and prefix + name not in state_dict
            ):
                continue
            own.add(name)
            if prefix + name not in state_dict:
                missing_keys.append(prefix + name)
                continue
            problem = _take(box, state_dict[prefix + name], local_metadata)
            if problem:
                error_msgs.append(f"{prefix + name}: {problem}")
        has_extra = type(self).set_extra_state is not StateMixin.set_extra_state
        if prefix + _EXTRA in state_dict:
            if has_extra or strict:
                self.set_extra_state(state_dict[prefix + _EXTRA])
        elif has_extra:
            missing_keys.append(prefix + _EXTRA)
        for key in state_dict:
            if key.startswith(prefix) and key != prefix + _EXTRA:
                head = key[len(prefix) :].split(".", 1)
                known = head[0] in self._modules if len(head) > 1 else head[0] in own
                if not known:
                    unexpected_keys.append(key)

    def __lamina_tensors__(self: Any) -> Any:
        return self.state_dict().__lamina_tensors__()

    def register_state_dict_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook(module, prefix, keep_vars)`` before ``state_dict`` collects."""
        return add_hook(self, "_state_dict_pre_hooks", hook)

    def register_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook(module, state_dict, prefix, local_metadata)`` on the collected dict."""
        return add_hook(self, "_state_dict_hooks", hook)

    _register_state_dict_hook = register_state_dict_post_hook

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook(module, state_dict, prefix, local_metadata, strict, missing_keys,
        unexpected_keys, error_msgs)`` before the module takes its values; it may edit the dict.
        """
        return add_hook(self, "_load_pre_hooks", hook)

    def _register_load_state_dict_pre_hook(
        self, hook: Callable[..., Any], with_module: bool = False
    ) -> RemovableHandle:
        call = hook if with_module else (lambda module, *args: hook(*args))
        return add_hook(self, "_load_pre_hooks", call)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook(module, incompatible_keys)`` after all values are taken; it may edit the
        two lists.
        """
        return add_hook(self, "_load_hooks", hook)


def _load(
    module: Any,
    state: dict[str, Any],
    options: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
    prefix: str = "",
) -> None:
    module._adopt_containers()
    module._load_from_state_dict(state, prefix, dict(options), strict, missing, unexpected, errors)
    parts: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        if key.startswith(prefix):
            parts.setdefault(key[len(prefix) :].partition(".")[0], {})[key] = value
    for name, child in module._modules.items():
        if child is not None:
            start = f"{prefix}{name}."
            _load(child, parts.get(name, {}), options, strict, missing, unexpected, errors, start)


@contextlib.contextmanager
def all_or_nothing(boxes: Iterable[Box]) -> Iterator[None]:
    """Give boxes back what they held if the block fails."""
    fields = ("_value", "_shape", "_dtype", "_exposed")
    before = [(box, {field: getattr(box, field) for field in fields}) for box in boxes]
    try:
        yield
    except BaseException:
        for box, values in before:
            for field, value in values.items():
                setattr(box, field, value)
        VERSION.exposed += 1
        VERSION.static += 1
        raise


def _take(box: Box, value: Any, options: Mapping[str, Any]) -> str | None:
    """Write one loaded value into a box, or say why not."""
    try:
        if isinstance(value, Box):
            value = value.data
        if not hasattr(value, "dtype"):
            value = np.asarray(value)
        wide = np.dtype(value.dtype) if str(value.dtype) in _WIDE else None
        value = value if isinstance(value, jax.Array) else _to_jax(value)
        shape = box.shape
        if (
            not box._is_free
            and (
                len(shape) != value.ndim
                or any(a is not None and a != b for a, b in zip(shape, value.shape, strict=True))
            )
            and box._shape is not None
        ):
            hint = ""
            if value.ndim == 2 and value.shape[::-1] == tuple(shape):
                hint = "; it fits transposed: value.T"
            return f"expected shape {format_shape(shape)}, got {format_shape(value.shape)}{hint}"
        if options.get("assign"):
            box._dtype = wide or np.dtype(value.dtype)
            box._value = None if box._value is None else box._value.astype(value.dtype)
        elif value.dtype != box.dtype and not box._is_free:
            if not options.get("cast"):
                return (
                    f"expected dtype {np.dtype(box.dtype).name}, got {value.dtype.name}; pass "
                    f"cast=True to convert it or assign=True to take it over"
                )
            value = value.astype(box.dtype)
        if box._sharding is not None:
            value = jax.device_put(value, box._sharding)
        box._write(value)
    except (ShapeError, TypeError, ValueError) as error:
        return str(error)
    return None


_WIDE = ("int64", "uint64", "float64", "complex128")


def _to_jax(value: Any) -> jax.Array:
    host = np.asarray(value)
    return jnp.asarray(host.astype(canonical(host.dtype)) if str(host.dtype) in _WIDE else host)


def _without_ties(net: Module, missing: list[str], state: Mapping[str, Any]) -> list[str]:
    """Drop missing names whose value came under another name of the same box."""
    names: dict[Box, list[str]] = {}
    by_name: dict[str, Box] = {}
    for name, box, _ in walk(net).entries:
        names.setdefault(box, []).append(name)
        by_name[name] = box
    return [
        name
        for name in missing
        if name not in by_name or not any(other in state for other in names[by_name[name]])
    ]


def _conflicts(net: Module, state: Mapping[str, Any]) -> list[str]:
    """Find tied names for which the state dict holds different values."""
    problems = []
    for alias, name in walk(net).aliases.items():
        if alias in state and name in state and state[alias] is not state[name]:
            first, second = np.asarray(array(state[name])), np.asarray(array(state[alias]))
            if first.shape != second.shape or first.tobytes() != second.tobytes():
                problems.append(
                    f"{alias}: tied to {name}, but the state dict holds two different values; "
                    f"untie the parameters or drop one of the names"
                )
    return problems


def _report(
    net: Any,
    state: Mapping[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    lines: list[str] = []
    problems = errors + _conflicts(net, state)
    names = [name for name, _, _ in walk(net).entries]
    if strict:
        lines += [f"  missing: {name}{did_you_mean(name, unexpected)}" for name in missing]
        lines += [f"  unexpected: {name}{did_you_mean(name, names)}" for name in unexpected]
    elif state and names and set(unexpected) >= set(state):
        lines.append(
            f"  none of the {len(state)} names in the state dict belongs to the model, for "
            f"instance {next(iter(state))!r}.{did_you_mean(next(iter(state)), names)}"
        )
    lines += [f"  {problem}" for problem in problems]
    if lines:
        mend = (
            "\n  mend: rename the keys, or load_state_dict(state, strict=False) to skip missing "
            "and unexpected names"
            if strict and (missing or unexpected)
            else ""
        )
        raise LoadError(
            f"the state dict does not fit {type(net).__name__}; nothing was loaded:\n"
            + "\n".join(lines)
            + mend
        )
