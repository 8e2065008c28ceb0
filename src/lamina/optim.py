"""``Optimizer``: any optax transformation, with its state kept by parameter name."""

from __future__ import annotations

import copy
import functools
import importlib
import types
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._core import bind
from ._core.bind import STATE, Cell
from ._core.box import array
from ._core.errors import DeferredError, LoadError, did_you_mean, format_shape
from ._core.module import Module
from ._core.parameter import Parameter, is_trainable
from ._core.walk import revision_of, walk

__all__ = ["Optimizer"]


class _StateCell(Cell):
    """One array of an optimizer's state; its first value comes from the transformation.

    Attributes:
        path: the parts of its name, in which a parameter's own name is ``None``.
        owner: a weak reference to that parameter, if there is one.
    """

    __slots__ = ("dtype", "name", "optimizer", "owner", "path", "shape")
    is_fixed = True  # type: ignore[assignment]

    def __init__(self, optimizer: Any, path: Any, owner: Any, shape: Any, dtype: Any) -> None:
        super().__init__()
        bind.belong(self, optimizer().born)
        self.optimizer, self.name, self.path = optimizer, "", path
        self.owner = None if owner is None else weakref.ref(owner)
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    def describe(self) -> str:
        return f"optimizer state {self.name!r}"

    def form(self) -> Any:
        return self

    def stand_in(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def first_value(self) -> Any:
        self.optimizer().make_first_values()
        return bind.settled_value(self)


class Optimizer:
    """Updates the trainable parameters of a model with an optax transformation.

    May be made before shapes are known. Tied parameters have one state. Parameters that are added,
    frozen or unfrozen later are followed: a frozen one keeps its state until it is trained again.

    Args:
        net: the model, or a list of models, whose parameters are then called ``0.weight`` ...
        tx: an optax transformation, such as ``optax.adamw(1e-3)``.

    Example:
        >>> import jax.numpy as jnp, lamina, optax
        >>> from lamina import nn
        >>> net = nn.Linear(3, 1)
        >>> opt = lamina.Optimizer(net, optax.adam(1e-2))
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     loss = lamina.backward(lambda: (net(jnp.ones((2, 3))) ** 2).mean())
        ...     opt.step()
        >>> int(opt.state_dict()["0.count"])
        3

    Source: optax, https://optax.readthedocs.io
    """

    def __init__(self, net: Any, tx: optax.GradientTransformation) -> None:
        nets = list(net) if isinstance(net, (list, tuple)) else [net]
        if not nets or not all(isinstance(part, Module) for part in nets):
            kinds = ", ".join(type(part).__name__ for part in nets)
            raise TypeError(
                f"Optimizer: expected a module, got {kinds or 'nothing'}, or a list of them\n"
                f"    fix: lamina.Optimizer(net, optax.adam(1e-3)); freeze what is not to be "
                f"trained: net.encoder.requires_grad_(False)"
            )
        if not hasattr(tx, "update"):
            raise TypeError(
                f"Optimizer: expected an optax transformation, got {type(tx).__name__}\n"
                f"    fix: for instance optax.adam(1e-3)"
            )
        prefixes = [f"{i}." for i in range(len(nets))] if nets != [net] else [""]
        self._begin(net, prefixes, optax.with_extra_args_support(tx), {})

    def _begin(self, net: Any, prefixes: list[str], tx: Any, values: dict[str, Any]) -> None:
        self._net, self._prefixes, self._tx = net, prefixes, tx
        self.born = bind.birth()
        self._values = values
        """What cells that will be made start with, by name: the state of a copy."""
        self._made: dict[Any, _StateCell] = {}
        """Every cell that was ever needed, by its parameter and its path, so that it is found
        again when the parameter has another name, or was frozen for a while."""
        self._cells: dict[str, _StateCell] = {}
        self._names: dict[str, Parameter] = {}
        self._treedef: Any = None
        self._facts: Any = None
        self._revisions: Any = None

    @property
    def net(self) -> Any:
        """The model, or the list of models."""
        return self._net

    @net.setter
    def net(self, net: Any) -> None:
        raise AttributeError(
            "an optimizer's model can't be replaced: its state belongs to the model's parameters\n"
            "    fix: opt = lamina.Optimizer(net, tx)"
        )

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The optax transformation. A new one needs a new optimizer."""
        return self._tx

    @tx.setter
    def tx(self, tx: Any) -> None:
        raise AttributeError(
            "an optimizer's transformation can't be replaced: its state belongs to it\n"
            "    fix: opt = lamina.Optimizer(net, tx); for a new learning rate "
            "optax.inject_hyperparams and opt.hyperparams['learning_rate'] = ..."
        )

    # The parameters and their state.

    @property
    def _nets(self) -> list[tuple[str, Module]]:
        nets = self.net if isinstance(self.net, (list, tuple)) else [self.net]
        return list(zip(self._prefixes, nets, strict=True))

    def _all_names(self) -> dict[Any, str]:
        names: dict[Any, str] = {}
        for prefix, net in self._nets:
            for box, name in walk(net).names.items():
                names.setdefault(box, prefix + name)
        return names

    def _trainable(self) -> dict[str, Parameter]:
        return {name: box for box, name in self._all_names().items() if is_trainable(box)}

    def _sync(self) -> dict[str, Parameter]:
        """Follow the model: make state for new parameters, set that of frozen ones aside."""
        revisions = [revision_of(net) for _, net in self._nets]
        if revisions == self._revisions:
            return self._names
        names = self._trainable()
        unknown = [name for name, box in names.items() if box.is_unshaped]
        if unknown:
            raise DeferredError(
                f"the optimizer's state can't be made yet, sizes are unknown: {', '.join(unknown)}"
                f"\n    fix: pass data through the model once, net(x), or call lamina.infer"
            )
        facts = {n: (id(box), box.shape, box.dtype) for n, box in names.items()}
        if facts != self._facts:
            made = self._made.items()
            self._made = {k: c for k, c in made if c.owner is None or c.owner() is not None}
            specs = {n: jax.ShapeDtypeStruct(box.shape, box.dtype) for n, box in names.items()}
            shapes = jax.eval_shape(self._tx.init, specs)
            leaves, self._treedef = jax.tree_util.tree_flatten_with_path(shapes)
            self._owners = [_owner(path, names) for path, _ in leaves]
            self._cells = {}
            for (path, leaf), owner in zip(leaves, self._owners, strict=True):
                self._cells[_join(path)] = self._cell(path, leaf, owner, names.get(owner or ""))
            self._facts = facts
        self._names, self._revisions = names, revisions
        return names

    def _cell(self, path: Any, leaf: Any, owner: str | None, box: Parameter | None) -> _StateCell:
        """Return the cell for one leaf of the state, the one of old if there is one."""
        name = _join(path)
        place = tuple(None if part == owner else part for part in map(_part, path))
        cell = self._made.get((id(box), place))
        if cell is None or cell.shape != leaf.shape:
            cell = _StateCell(weakref.ref(self), place, box, leaf.shape, leaf.dtype)
            self._made[id(box), place] = cell
            value = self._values.pop(name, None)
            if value is not None and value.shape == leaf.shape:
                bind.settle(cell, jnp.asarray(value, leaf.dtype))
        elif cell.dtype != leaf.dtype:
            cell.dtype = np.dtype(leaf.dtype)
            if not cell.is_empty:
                bind.write(cell, bind.read(cell).astype(leaf.dtype))
        cell.name = name
        return cell

    def make_first_values(self) -> None:
        """Give state that has no value yet its first one."""
        params = {}
        for name, box in self._sync().items():
            if bind.settled_value(box) is None:
                bind.fill(box)
            params[name] = bind.settled_value(box)
        with jax.ensure_compile_time_eval():
            values = jax.tree.leaves(self._tx.init(params))
            for cell, value in zip(self._cells.values(), values, strict=True):
                if bind.settled_value(cell) is None:
                    # A copy: some transformations put one array into several places.
                    bind.settle(cell, jnp.array(value, cell.dtype))

    # Stepping.

    def step(self, grads: Any = None, **extra: Any) -> None:
        """Update the parameters.

        Args:
            grads: ``{name: gradient}`` as :func:`lamina.value_and_grad` returns it, for a list of
                models a list of such. Left out, the ``.grad`` of each parameter is used, and
                parameters without one are skipped.
            **extra: passed on to the transformation (for instance ``value=loss``).

        Raises:
            LoadError: for gradients under unknown or frozen names, or of a wrong shape.
            DeferredError: if there are no gradients at all.
        """
        names = self._sync()
        if grads is None:
            grads = {name: box.grad for name, box in names.items() if box.grad is not None}
            if not grads:
                raise DeferredError(
                    "opt.step(): no parameter has a gradient\n"
                    "    right:  loss = lamina.backward(lambda: loss_fn(net(x), y)); opt.step()\n"
                    "    fix: call lamina.backward before, or pass the gradients: opt.step(grads)"
                )
        elif isinstance(grads, Sequence):
            parts = zip(self._prefixes, grads, strict=True)
            grads = {prefix + name: g for prefix, part in parts for name, g in part.items()}
        self._check(names, grads)
        params = {name: box.data for name, box in names.items()}
        state = jax.tree.unflatten(self._treedef, list(map(bind.read, self._cells.values())))
        given = {name: array(grads[name]) for name in names if name in grads}
        update = functools.partial(_update, self._tx)
        if not STATE.frames:
            update = _compiled(self._tx)
        new_params, new_state = update(params, state, given, extra)
        for name, box in names.items():
            if name in given:
                box.data = new_params[name]
        cells = zip(self._cells.values(), self._owners, jax.tree.leaves(new_state), strict=True)
        for cell, owner, value in cells:
            if owner is None or owner in given:
                bind.write(cell, jnp.asarray(value, cell.dtype))

    def _check(self, names: Mapping[str, Parameter], grads: Mapping[str, Any]) -> None:
        problems = []
        others = {p + n for p, net in self._nets for n, _ in walk(net).entries} - names.keys()
        for name, grad in grads.items():
            if name not in names:
                why = "is frozen or tied" if name in others else "is no parameter of the model"
                problems.append(f"  {name}: {why}.{did_you_mean(name, names)}")
            elif tuple(np.shape(grad)) != names[name].shape:
                problems.append(
                    f"  {name}: expected shape {format_shape(names[name].shape)}, got "
                    f"{format_shape(np.shape(grad))}"
                )
        if problems:
            raise LoadError(
                "opt.step(grads): these gradients do not fit:\n"
                + "\n".join(problems)
                + "\n    fix: pass what lamina.value_and_grad returns for this model"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, or set them to zero."""
        for _, net in self._nets:
            net.zero_grad(set_to_none)

    # The state as data.

    @property
    def state(self) -> Any:
        """The optax state, a pytree of arrays; can be set to one of the same structure."""
        self._sync()
        values = [bind.read(cell) for cell in self._cells.values()]
        return _read_only(jax.tree.unflatten(self._treedef, values))

    @state.setter
    def state(self, state: Any) -> None:
        self._sync()
        leaves = jax.tree_util.tree_flatten_with_path(_writable(state))[0]
        if [_join(path) for path, _ in leaves] != list(self._cells):
            raise LoadError(
                "opt.state: the new state has another structure than the old one\n"
                "    fix: set it to what opt.state was, or to jax.tree.map(f, opt.state)"
            )
        for cell, (_, value) in zip(self._cells.values(), leaves, strict=True):
            bind.write(cell, jnp.asarray(value, cell.dtype))

    @property
    def hyperparams(self) -> MutableMapping[str, Any]:
        """The numbers that ``optax.inject_hyperparams`` made part of the state, by name.

        Example:
            >>> import lamina, optax
            >>> from lamina import nn
            >>> opt = lamina.Optimizer(nn.Linear(2, 1), optax.inject_hyperparams(optax.sgd)(0.1))
            >>> opt.hyperparams["learning_rate"] = 0.01
            >>> round(float(opt.hyperparams["learning_rate"]), 3)
            0.01
        """
        self._sync()
        cells = {}
        for name, cell in self._cells.items():
            head, _, last = name.rpartition(".")
            if head.rpartition(".")[2] == "hyperparams":
                cells[last if last not in cells else name] = cell
        return _Hyperparams(cells)

    def state_dict(self) -> dict[str, jax.Array]:
        """Return the state as ``{name: array}``, a snapshot ready for :func:`lamina.save`."""
        self._sync()
        return {name: bind.read(cell) for name, cell in self._cells.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the state from a dict that :meth:`state_dict` returned: all of it or nothing.

        Raises:
            LoadError: listing every missing, unexpected and mis-shaped entry.
        """
        self._sync()
        problems = [
            f"  missing: {name}{did_you_mean(name, state_dict)}"
            for name in self._cells
            if name not in state_dict
        ]
        values = {}
        for name, value in state_dict.items():
            cell = self._cells.get(name)
            if cell is None:
                problems.append(f"  unexpected: {name}{did_you_mean(name, self._cells)}")
                continue
            value = jnp.asarray(value)
            if value.shape != cell.shape or value.dtype != cell.dtype:
                problems.append(
                    f"  {name}: expected {cell.dtype}{list(cell.shape)}, got "
                    f"{value.dtype}{list(value.shape)}"
                )
            values[name] = value
        if problems:
            raise LoadError(
                "the optimizer's state does not fit; nothing was loaded:\n"
                + "\n".join(problems)
                + "\n    fix: build the model and optax transformation that it was saved with"
            )
        for name, value in values.items():
            cell = self._cells[name]
            if not cell.is_empty:
                value = jax.device_put(value, bind.read(cell).sharding)
            bind.write(cell, value)

    def __lamina_tensors__(self) -> Any:
        return self.state_dict(), {}, {}

    def __lamina_reach__(self) -> tuple[Any, list[Cell], list[Any]]:
        """Tell compiled functions what they may touch: facts, cells, and further parts."""
        if not any(box.is_unshaped for box in self._trainable().values()):
            self._sync()
        facts = tuple(self._names), tuple(self._cells), self._treedef, tuple(self._prefixes)
        return facts, list(self._cells.values()), [net for _, net in self._nets] + [self._tx]

    def __getattr__(self, name: str) -> Any:
        if name == "param_groups":
            raise AttributeError(
                "an Optimizer has no param_groups\n"
                "    fix: optax.multi_transform for different rates, "
                "optax.inject_hyperparams and opt.hyperparams['learning_rate'] for changing ones"
            )
        raise AttributeError(f"'Optimizer' object has no attribute {name!r}")

    def __repr__(self) -> str:
        kind = ", ".join(type(net).__name__ for _, net in self._nets)
        return f"Optimizer({kind}, {len(self._trainable())} parameters)"

    # Copying: the model is copied with it, by one deepcopy of both to the same copy.

    def __getstate__(self) -> dict[str, Any]:
        values, names = dict(self._values), self._all_names()
        for cell in self._made.values():
            box = None if cell.owner is None else cell.owner()
            if not cell.is_empty and (cell.owner is None or box in names):
                name = ".".join(names[box] if part is None else part for part in cell.path)
                values[name] = np.asarray(bind.read(cell))
        return {"net": self.net, "prefixes": self._prefixes, "values": values}

    def __reduce__(self) -> Any:
        return _rebuild, (self.__getstate__(), _described(self._tx))

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = self.__getstate__()
        state["net"] = copy.deepcopy(self.net, memo)
        twin._begin(state["net"], state["prefixes"], self._tx, state["values"])
        return twin


class _Hyperparams(MutableMapping[str, Any]):
    """Numbers in an optimizer's state, by name."""

    def __init__(self, cells: dict[str, Any]) -> None:
        self._cells = cells

    def __getitem__(self, name: str) -> jax.Array:
        return bind.read(self._cell(name))

    def __setitem__(self, name: str, value: Any) -> None:
        cell = self._cell(name)
        bind.write(cell, jnp.broadcast_to(jnp.asarray(value, cell.dtype), cell.shape))

    def _cell(self, name: str) -> Any:
        if name not in self._cells:
            known = f"it has {', '.join(self._cells)}" if self._cells else "it has none"
            raise KeyError(
                f"no hyperparameter {name!r}: {known}; make one of it with "
                f"optax.inject_hyperparams(optax.adam)(learning_rate=...)"
            )
        return self._cells[name]

    def __delitem__(self, name: str) -> None:
        raise TypeError("hyperparameters can't be removed")

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)

    def __repr__(self) -> str:
        return repr(dict(self))


class _ReadOnly(dict):
    """A dict within ``opt.state``, which is a copy: changing it would do nothing."""

    def __setitem__(self, name: Any, value: Any) -> None:
        raise TypeError(
            f"opt.state is a snapshot: setting {name!r} in it would change nothing\n"
            f"    fix: opt.hyperparams[{name!r}] = value"
        )

    update = setdefault = pop = clear = __setitem__  # type: ignore[assignment]


jax.tree_util.register_pytree_with_keys(
    _ReadOnly,
    lambda d: ([(jax.tree_util.DictKey(k), d[k]) for k in sorted(d)], tuple(sorted(d))),
    lambda keys, values: _ReadOnly(zip(keys, values, strict=True)),
)


def _read_only(state: Any) -> Any:
    return _replaced(state, dict, _ReadOnly)


def _writable(state: Any) -> Any:
    return _replaced(state, _ReadOnly, dict)


def _replaced(tree: Any, kind: type, by: type) -> Any:
    """Return a state in which the dicts of hyperparameters are of another type."""
    if isinstance(tree, tuple):
        parts = [_replaced(part, kind, by) for part in tree]
        if hasattr(tree, "_fields"):
            tree = type(tree)(*parts)
            numbers = getattr(tree, "hyperparams", None)
            return tree._replace(hyperparams=by(numbers)) if type(numbers) is kind else tree
        return type(tree)(parts)
    if type(tree) is dict:
        return {k: _replaced(v, kind, by) for k, v in tree.items()}
    return [_replaced(part, kind, by) for part in tree] if type(tree) is list else tree


def _update(tx: Any, params: Any, state: Any, grads: Any, extra: Any) -> Any:
    given = {
        name: grads[name].astype(value.dtype) if name in grads else jnp.zeros_like(value)
        for name, value in params.items()
    }
    updates, new_state = tx.update(given, state, params, **extra)
    return optax.apply_updates(params, updates), new_state


@functools.lru_cache(maxsize=256)
def _compiled(tx: Any) -> Any:
    return jax.jit(functools.partial(_update, tx))


def _join(path: Any) -> str:
    """Write a path into an optax state as a name: ``0.mu.layer.weight``."""
    return ".".join(map(_part, path))


def _part(key: Any) -> str:
    fields = (getattr(key, field, None) for field in ("key", "name", "idx"))
    return str(next(field for field in fields if field is not None))


def _owner(path: Any, names: Mapping[str, Parameter]) -> str | None:
    """Return the parameter that a leaf of the state belongs to, if any."""
    for key in reversed(path):
        if getattr(key, "key", None) in names:
            return key.key
    return None


# optax's transformations are functions made inside functions, which pickle does not take. They are
# described by where their code is found, and by what they close over.


def _described(value: Any) -> Any:
    if isinstance(value, types.FunctionType) and "<locals>" in value.__qualname__:
        cells = [_described(cell.cell_contents) for cell in value.__closure__ or ()]
        extras = _described(value.__defaults__), _described(value.__kwdefaults__)
        return _Function(value.__globals__["__name__"], value.__code__.co_qualname, cells, extras)
    if isinstance(value, tuple):
        parts = [_described(part) for part in value]
        return _Tuple(type(value), parts)
    if isinstance(value, dict):
        return {k: _described(v) for k, v in value.items()}
    if isinstance(value, functools.partial):
        return _Partial([_described(p) for p in (value.func, value.args, value.keywords)])
    return value


class _Tuple:
    def __init__(self, kind: type, parts: list[Any]) -> None:
        self.kind, self.parts = kind, parts

    def build(self) -> Any:
        parts = [_built(part) for part in self.parts]
        return self.kind(*parts) if hasattr(self.kind, "_fields") else self.kind(parts)


class _Partial:
    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def build(self) -> Any:
        function, args, keywords = map(_built, self.parts)
        return functools.partial(function, *args, **keywords)


class _Function:
    """Where a function's code is found, and what it closes over."""

    def __init__(self, module: str, path: str, cells: list[Any], extras: Any) -> None:
        self.module, self.path, self.cells, self.extras = module, path, cells, extras

    def build(self) -> Any:
        scope = vars(importlib.import_module(self.module))
        first, *inner = [part for part in self.path.split(".") if part != "<locals>"]
        code: Any = getattr(scope.get(first), "__wrapped__", scope.get(first))
        code = getattr(code, "__code__", None)
        for name in inner:
            code = next((c for c in code.co_consts if getattr(c, "co_name", "") == name), None)
            if code is None:
                raise LoadError(
                    f"the optimizer's transformation uses {self.module}.{self.path}, which this "
                    f"version does not have\n"
                    f"    fix: build the optimizer anew and load its state_dict"
                )
        cells = tuple(types.CellType(_built(cell)) for cell in self.cells)
        function = types.FunctionType(code, scope, inner[-1], _built(self.extras[0]), cells)
        function.__kwdefaults__ = _built(self.extras[1])
        return function


def _built(value: Any) -> Any:
    if isinstance(value, (_Tuple, _Partial, _Function)):
        return value.build()
    if type(value) is dict:
        return {k: _built(v) for k, v in value.items()}
    return value


def _rebuild(state: dict[str, Any], tx: Any) -> Optimizer:
    optimizer = Optimizer.__new__(Optimizer)
    optimizer._begin(state["net"], state["prefixes"], _built(tx), state["values"])
    return optimizer
