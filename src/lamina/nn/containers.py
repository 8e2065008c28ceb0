"""``Module``, and containers: modules that hold others in a list, a dict or a chain."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np

from .._core.box import Box
from .._core.errors import did_you_mean, format_shape
from .._core.module import Module as CoreModule
from .._core.nesting import nested, repr_of
from .._core.parameter import Parameter
from ..func.jit import jit

__all__ = ["Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential"]


class Module(CoreModule):
    """Base class of all layers, blocks and models.

    Assign parameters, buffers, modules, and lists, tuples or dicts of them as attributes, and
    write ``forward``. Nothing is allocated when a module is built.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> class MLP(nn.Module):
        ...     def __init__(self):
        ...         self.hidden = nn.LazyLinear(8)
        ...         self.out = nn.LazyLinear(2)
        ...     def forward(self, x):
        ...         return self.out(nn.functional.relu(self.hidden(x)))
        >>> net = MLP()
        >>> net(jnp.ones((4, 3))).shape
        (4, 2)
        >>> net.hidden.weight.shape
        (8, 3)

    Source: the interface of ``torch.nn.Module``.
    """

    def _contain(self, value: Any, where: str) -> Module | None:
        return contain(value, where)

    def compile(self, **options: Any) -> None:
        """Compile every call of this module from now on, as ``lamina.jit(module)`` would.

        Args:
            **options: as for :func:`lamina.jit`.

        Example:
            >>> import jax.numpy as jnp
            >>> from lamina import nn
            >>> net = nn.LazyLinear(2)
            >>> net.compile()
            >>> net(jnp.ones((4, 3))).shape
            (4, 2)
        """
        self._links.compiled = jit(self, **options)


class _List(Module):
    """What ``Sequential`` and ``ModuleList`` share: children named ``0``, ``1``, ``2`` ..."""

    def _place(self, index: int) -> str:
        index = operator.index(index)
        size = len(self._modules)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} modules")
        return list(self._modules)[index]

    def _replace(self, modules: Iterable[Module]) -> None:
        modules = list(modules)
        self._modules.clear()
        self._append_all(modules)

    def _append_all(self, modules: Iterable[Module]) -> None:
        for module in modules:
            self.add_module(str(len(self._modules)), module)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            names = list(self._modules)[index]
            return self._slice({name: self._modules[name] for name in names})
        return self._modules[self._place(index)]

    def _slice(self, parts: dict[str, Any]) -> Any:
        twin = type(self).__new__(type(self))
        for position, (name, part) in enumerate(parts.items()):
            twin.add_module(name if self._keeps_names else str(position), part)
        return twin

    _keeps_names = False

    def __setitem__(self, index: int, module: Module) -> None:
        self._register(self._place(index), module, self.__dict__["_modules"])

    def __delitem__(self, index: Any) -> None:
        names = list(self._modules)
        removed = names[index] if isinstance(index, slice) else [self._place(index)]
        kept = {k: v for k, v in self._modules.items() if k not in removed}
        self._replace(kept.values())

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def append(self, module: Module) -> Self:
        """Add a module at the end."""
        self._append_all([module])
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add all modules of an iterable at the end."""
        if isinstance(modules, Module) and not isinstance(modules, _List):
            raise TypeError(
                f"extend: expected an iterable of modules, got {type(modules).__name__}"
            )
        self._append_all(list(modules))
        return self

    def insert(self, index: int, module: Module) -> Self:
        """Insert a module before ``index``; those behind it are renumbered."""
        parts = list(self._modules.values())
        size = len(parts)
        if not -size <= index <= size:
            raise IndexError(f"index {index} is out of range for {size} modules")
        parts.insert(index if index >= 0 else index + size, module)
        self._replace(parts)
        return self

    def pop(self, key: int) -> Module:
        """Remove a module by position and return it."""
        module = self[key]
        del self[key]
        return module

    def __add__(self, other: Iterable[Module]) -> Self:
        twin = type(self).__new__(type(self))
        twin._append_all([*self, *other])
        return twin

    def __iadd__(self, other: Iterable[Module]) -> Self:
        return self.extend(other)


class Sequential(_List):
    """Modules called one after the other.

    Args:
        *args: modules, or one ordered dict ``{name: module}``.

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
        >>> net(jnp.ones((4, 3))).shape
        (4, 2)
        >>> net[0].weight.shape, len(net[:2])
        ((8, 3), 2)

    Source: the interface of ``torch.nn.Sequential``.
    """

    _keeps_names = True

    def __init__(self, *args: Any) -> None:
        if len(args) == 1 and isinstance(args[0], Mapping):
            for name, module in args[0].items():
                self.add_module(name, module)
        else:
            for module in args:
                if not isinstance(module, Module):
                    raise TypeError(
                        f"Sequential: expected modules, got {type(module).__name__}"
                        + ("; unpack the list: Sequential(*modules)" if _is_list(module) else "")
                    )
            self._append_all(args)

    def forward(self, input: Any) -> Any:
        """Pass ``input`` through all modules in order."""
        for module in self._modules.values():
            input = module(input)
        return input

    def __mul__(self, times: int) -> Self:
        _check_times(times)
        twin = type(self).__new__(type(self))
        twin._append_all(list(self) * times)
        return twin

    __rmul__ = __mul__

    def __imul__(self, times: int) -> Self:
        _check_times(times)
        self._append_all(list(self) * (times - 1))
        return self


class ModuleList(_List):
    """A list of modules whose parameters belong to the model.

    A plain list assigned to an attribute of a module becomes one by itself.

    Args:
        modules: the modules (default: none).

    Example:
        >>> from lamina import nn
        >>> layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> print(layers)
        ModuleList(
          (0-2): 3 x Linear(in_features=4, out_features=4, bias=True)
        )

    Source: the interface of ``torch.nn.ModuleList``.
    """

    def __init__(self, modules: Iterable[Module] | None = None) -> None:
        if modules is not None:
            self.extend(modules)

    @nested
    def __repr__(self) -> str:
        if not len(self):
            return f"{self._get_name()}()"
        lines = []
        for text, group in itertools.groupby(
            enumerate(map(repr_of, self)), key=lambda pair: pair[1]
        ):
            places = [place for place, _ in group]
            text = text.replace("\n", "\n  ")
            if len(places) == 1:
                lines.append(f"({places[0]}): {text}")
            else:
                lines.append(f"({places[0]}-{places[-1]}): {len(places)} x {text}")
        return f"{self._get_name()}(\n  " + "\n  ".join(lines) + "\n)"


class ModuleDict(Module):
    """A dict of modules whose parameters belong to the model.

    Args:
        modules: a mapping or pairs ``(name, module)`` (default: none).

    Example:
        >>> from lamina import nn
        >>> heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)})
        >>> [name for name, _ in heads.named_parameters()]
        ['a.weight', 'a.bias', 'b.weight', 'b.bias']

    Source: the interface of ``torch.nn.ModuleDict``.
    """

    def __init__(self, modules: Any = None) -> None:
        if modules is not None:
            self.update(modules)

    def __getitem__(self, key: str) -> Any:
        if key not in self._modules:
            raise KeyError(f"no module {key!r}.{did_you_mean(str(key), self._modules)}")
        return self._modules[key]

    def __setitem__(self, key: str, module: Module) -> None:
        self.add_module(key, module)

    def __delitem__(self, key: str) -> None:
        del self._modules[key]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __contains__(self, key: object) -> bool:
        return key in self._modules

    def get(self, key: str, default: Any = None) -> Any:
        """Return the module under ``key``, or ``default``."""
        return self._modules.get(key, default)

    def clear(self) -> None:
        """Remove all modules."""
        self._modules.clear()

    def pop(self, key: str) -> Module:
        """Remove the module under ``key`` and return it."""
        module = self[key]
        del self._modules[key]
        return module

    def keys(self) -> Any:
        """Return the names."""
        return self._modules.keys()

    def items(self) -> Any:
        """Return ``(name, module)`` pairs."""
        return self._modules.items()

    def values(self) -> Any:
        """Return the modules."""
        return self._modules.values()

    def update(self, modules: Any) -> None:
        """Add or replace modules from a mapping or an iterable of pairs."""
        for key, module in _pairs(modules):
            self[key] = module


class _Values(Module):
    """What ``ParameterList`` and ``ParameterDict`` share: parameters beside other values."""

    def _put(self, name: str, value: Any) -> None:
        if not isinstance(value, (Box, Module)) and _is_array(value):
            value = Parameter(value)
        setattr(self, name, value)

    def _describe_value(self, name: str) -> str:
        value = getattr(self, name)
        if isinstance(value, Parameter):
            return f"Parameter containing: [{value.dtype} of size {format_shape(value.shape)}]"
        return f"Object of type: {type(value).__name__}"


class ParameterList(_Values):
    """A list of parameters that belong to the model; arrays become parameters.

    Args:
        values: parameters, arrays, or other values to keep beside them (default: none).

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> weights = nn.ParameterList([jnp.ones(2), jnp.zeros(3)])
        >>> [name for name, _ in weights.named_parameters()]
        ['0', '1']

    Source: the interface of ``torch.nn.ParameterList``.
    """

    def __init__(self, values: Iterable[Any] | None = None) -> None:
        self._size = 0
        if values is not None:
            self.extend(values)

    def _place(self, index: int) -> str:
        index = operator.index(index)
        if not -self._size <= index < self._size:
            raise IndexError(f"index {index} is out of range for {self._size} parameters")
        return str(index % self._size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)([self[i] for i in range(*index.indices(self._size))])
        return getattr(self, self._place(index))

    def __setitem__(self, index: int, value: Any) -> None:
        self._put(self._place(index), value)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self._size))

    def append(self, value: Any) -> Self:
        """Add one value at the end."""
        self._put(str(self._size), value)
        self._size += 1
        return self

    def extend(self, values: Iterable[Any]) -> Self:
        """Add all values of an iterable at the end."""
        if isinstance(values, (str, Box)) or not isinstance(values, Iterable):
            raise TypeError(
                f"extend: expected an iterable of parameters, got {type(values).__name__}"
            )
        for value in list(values):
            self.append(value)
        return self

    def __iadd__(self, values: Iterable[Any]) -> Self:
        return self.extend(values)

    def extra_repr(self) -> str:
        """List the values with their dtypes and shapes."""
        return "\n".join(f"({i}): {self._describe_value(str(i))}" for i in range(self._size))

    def __repr__(self) -> str:
        return _repr_values(self)


class ParameterDict(_Values):
    """A dict of parameters that belong to the model; arrays become parameters.

    Args:
        parameters: a mapping or pairs ``(name, value)`` (default: none).

    Example:
        >>> import jax.numpy as jnp
        >>> from lamina import nn
        >>> scales = nn.ParameterDict({"left": jnp.ones(2), "right": jnp.zeros(3)})
        >>> [name for name, _ in scales.named_parameters()]
        ['left', 'right']

    Source: the interface of ``torch.nn.ParameterDict``.
    """

    def __init__(self, parameters: Any = None) -> None:
        self._keys: dict[str, None] = {}
        if parameters is not None:
            self.update(parameters)

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(f"no parameter {key!r}.{did_you_mean(str(key), self._keys)}")
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):
            raise TypeError(f"a name is a str, got {type(key).__name__}")
        if hasattr(type(self), key):
            raise KeyError(f"ParameterDict has an attribute {key!r} already; choose another name")
        self._put(key, value)
        self._keys[key] = None

    def __delitem__(self, key: str) -> None:
        self[key]
        del self._keys[key]
        delattr(self, key)

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value under ``key``, or ``default``."""
        return self[key] if key in self._keys else default

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Return the value under ``key``, after setting it to ``default`` if there is none."""
        if key not in self:
            self[key] = default
        return self[key]

    def clear(self) -> None:
        """Remove all values."""
        for key in list(self._keys):
            del self[key]

    def pop(self, key: str) -> Any:
        """Remove the value under ``key`` and return it."""
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[str, Any]:
        """Remove the last value and return ``(name, value)``."""
        key = next(reversed(self._keys))
        return key, self.pop(key)

    def copy(self) -> ParameterDict:
        """Return a new dict with the same parameters."""
        return type(self)(self.items())

    @classmethod
    def fromkeys(cls, keys: Iterable[str], default: Any = None) -> ParameterDict:
        """Return a dict with ``default`` under each name."""
        return cls((key, default) for key in keys)

    def keys(self) -> Any:
        """Return the names."""
        return self._keys.keys()

    def items(self) -> Iterable[tuple[str, Any]]:
        """Return ``(name, value)`` pairs."""
        return [(key, self[key]) for key in self._keys]

    def values(self) -> Iterable[Any]:
        """Return the values."""
        return [self[key] for key in self._keys]

    def update(self, parameters: Any) -> None:
        """Add or replace values from a mapping or an iterable of pairs."""
        for key, value in _pairs(parameters):
            self[key] = value

    def __or__(self, other: Any) -> ParameterDict:
        twin = self.copy()
        twin.update(other)
        return twin

    def __ror__(self, other: Any) -> ParameterDict:
        twin = type(self)(other)
        twin.update(self)
        return twin

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    def extra_repr(self) -> str:
        """List the values with their dtypes and shapes."""
        return "\n".join(f"({key}): {self._describe_value(key)}" for key in self._keys)

    def __repr__(self) -> str:
        return _repr_values(self)


def _repr_values(module: Module) -> str:
    lines = module.extra_repr().replace("\n", "\n  ")
    return f"{module._get_name()}(\n  {lines}\n)" if lines else f"{module._get_name()}()"


def contain(value: Any, where: str) -> Module | None:
    """Turn a list, tuple or dict of modules or parameters into a container module.

    Returns None if it holds neither; raises ``TypeError`` if it mixes them with other things.
    """
    if not _is_list(value) and not isinstance(value, Mapping):
        return None
    items = list(value.values() if isinstance(value, Mapping) else value)
    parts: list[Any] = [
        item if isinstance(item, (Module, Box)) else contain(item, where) if _nested(item) else None
        for item in items
    ]
    if not any(part is not None for part in parts):
        return None
    strays = [type(i).__name__ for i, p in zip(items, parts, strict=True) if p is None]
    modules = all(isinstance(part, Module) for part in parts)
    parameters = all(isinstance(part, Parameter) for part in parts)
    if strays or not (modules or parameters):
        kinds = sorted({type(item).__name__ for item in items})
        raise TypeError(
            f"{where}: a {type(value).__name__} of {', '.join(kinds)}; modules or parameters in it "
            f"would be lost from the model. Keep them in a list or dict of their own, or use "
            f"nn.ModuleList / nn.ModuleDict / nn.ParameterList."
        )
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(
                f"{where}: names of modules and parameters are strings, got the keys "
                f"{list(value)!r}; write {{str(k): v}}"
            )
        pairs = dict(zip(value, parts, strict=True))
        return ModuleDict(pairs) if modules else ParameterDict(pairs)
    return ModuleList(parts) if modules else ParameterList(parts)


def _nested(value: Any) -> bool:
    return _is_list(value) or isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not hasattr(value, "_fields")


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.dtype)


def _pairs(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, (Mapping, ModuleDict, ParameterDict)):
        return list(value.items())
    return [(key, item) for key, item in value]


def _check_times(times: int) -> None:
    if not isinstance(times, int) or isinstance(times, bool):
        raise TypeError(f"Sequential * n: expected an int, got {type(times).__name__}")
    if times <= 0:
        raise ValueError(f"Sequential * n: expected a positive int, got {times}")
