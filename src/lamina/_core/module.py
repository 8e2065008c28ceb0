"""``Module``: an ordinary mutable Python object that owns boxes and other modules."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar, Self

import jax

from . import bind
from .bind import STATE, VERSION
from .errors import DataDependentError, DeferredError, ForeignTransformError, did_you_mean
from .hooks import RemovableHandle, add_hook, run_backward_hooks
from .parameter import Box, Buffer, Parameter
from .parts import PartsMixin
from .random import BIRTHS
from .state import StateMixin
from .walk import fingerprint, path_of, walk

__all__ = ["Module", "Registry"]

_NO_HOOKS: Any = MappingProxyType({})


class Registry(dict):
    """The parameters, buffers or children of one module, by name, in definition order.

    An ordinary dict, except that changes are noticed wherever they are made.
    """

    __slots__ = ("owner",)

    def __init__(self, owner: weakref.ref[Module]) -> None:
        super().__init__()
        self.owner = owner

    def __setitem__(self, name: str, value: Any) -> None:
        owner = self.owner()
        if owner is not None:
            self._changing(owner, name)
        super().__setitem__(name, value)
        if owner is not None and value is not None:
            owner._adopt(value)

    def __delitem__(self, name: str) -> None:
        self._changing(self.owner(), name)
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        self._changing(self.owner(), name)
        return super().pop(name, *default)

    def popitem(self) -> tuple[str, Any]:
        name = next(reversed(self))
        return name, self.pop(name)

    def clear(self) -> None:
        self._changing(self.owner(), "*")
        super().clear()

    def update(self, *others: Any, **named: Any) -> None:
        for name, value in dict(*others, **named).items():
            self[name] = value

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> Self:
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    @staticmethod
    def _changing(owner: Module | None, name: str) -> None:
        if STATE.frames and owner is not None:
            bind.check_structure_write(owner, name)
        VERSION.tree += 1
        VERSION.static += 1


class Module(PartsMixin, StateMixin):
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

    training: bool
    call_super_init: ClassVar[bool] = False
    cls_to_become: ClassVar[type[Module] | None] = None
    _version: ClassVar[int] = 1
    _contain: ClassVar[Any]
    """Turns a list, tuple or dict that holds modules or parameters into a module, or returns None.
    Supplied by ``containers.py``, whose classes are modules themselves."""
    _compiler: ClassVar[Callable[..., Any]]
    """``lamina.jit``, which stands above the core and supplies itself."""

    _parameters: dict[str, Parameter | None]
    _buffers: dict[str, Buffer | None]
    _modules: dict[str, Any]
    _forward_hooks: dict[int, Any] = _NO_HOOKS
    _forward_pre_hooks: dict[int, Any] = _NO_HOOKS
    _backward_hooks: dict[int, Any] = _NO_HOOKS
    _backward_pre_hooks: dict[int, Any] = _NO_HOOKS

    _INTERNAL: ClassVar[frozenset[str]] = frozenset(
        {"_parameters", "_buffers", "_modules", "_parents", "_origin", "_tree", "_fingerprint"}
        | {"_born", "_slots", "_self", "_pending", "_compiled", "_forward_hooks", "_load_hooks"}
        | {"_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_load_pre_hooks"}
        | {"_state_dict_hooks", "_state_dict_pre_hooks"}
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        fields = self.__dict__
        reference: Any = weakref.ref(self)
        fields["training"] = True
        fields["_parameters"] = Registry(reference)
        fields["_buffers"] = Registry(reference)
        fields["_modules"] = Registry(reference)
        fields["_parents"] = ()
        fields["_self"] = reference
        fields["_pending"] = False
        fields["_born"] = STATE.frames[0].serial if STATE.frames else None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            name = type(self).__name__
            raise TypeError(f"{name}() takes no arguments; define {name}.__init__ to accept some")

    # Registration.

    def _adopt(self, part: Box | Module) -> None:
        """Link a newly registered part to this module."""
        fields = self.__dict__
        if isinstance(part, Box):
            self._link(part)
            if part.is_unshaped and not part._is_free:
                fields["_pending"] = True
            if not fields["_parents"] and "_origin" not in fields:
                fields["_origin"] = BIRTHS.take()
            return
        self._link(part)
        origin = part.__dict__.pop("_origin", None)
        if origin is None:
            return
        own = fields.get("_origin")
        if not fields["_parents"] and own is None:
            fields["_origin"] = origin
        elif own is not None and own[0] == origin[0] and origin[1] < own[1]:
            fields["_origin"] = origin
            BIRTHS.give_back(own)
        else:
            BIRTHS.give_back(origin)

    def __setattr__(self, name: str, value: Any) -> None:
        fields = self.__dict__
        descriptor = getattr(type(self), name, None)
        if descriptor is not None and hasattr(type(descriptor), "__set__"):
            object.__setattr__(self, name, value)
            return
        parameters, buffers, modules = (
            fields["_parameters"],
            fields["_buffers"],
            fields["_modules"],
        )
        if isinstance(value, Parameter):
            self._register(name, value, parameters)
        elif isinstance(value, Buffer):
            self._register(name, value, buffers)
        elif isinstance(value, Module):
            self._register(name, value, modules)
        elif name in parameters:
            self._assign(parameters, name, value)
        elif name in buffers:
            self._assign(buffers, name, value)
        elif name in modules and name not in fields.get("_slots", ()):
            if value is None:
                modules[name] = None
                return
            container = self._contain(value, f"{type(self).__name__}.{name}")
            if container is None:
                raise TypeError(
                    f"{type(self).__name__}.{name} is a module; can't assign "
                    f"{type(value).__name__} (a module or None expected; "
                    f"`del module.{name}` first to use the name for something else)"
                )
            modules[name] = container
        else:
            if isinstance(value, (list, tuple, dict)):
                container = self._contain(value, f"{type(self).__name__}.{name}")
                if container is not None:
                    self._register(name, container, modules)
                    return
                if not value and not isinstance(value, tuple):
                    self._keep_place(name)
            old = fields.get(name, _MISSING)
            unchanged = old is value or (type(old) is type(value) in _SIMPLE and old == value)
            if STATE.frames:
                bind.check_static_write(self, name, value, unchanged)
            if not unchanged:
                VERSION.static += 1
            fields[name] = value

    def _register(self, name: str, value: Any, registry: Registry) -> None:
        fields = self.__dict__
        if registry.get(name) is value and value is not None:
            return
        fields.pop(name, None)
        fields.get("_slots", {}).pop(name, None)
        for other in (fields["_parameters"], fields["_buffers"], fields["_modules"]):
            if other is not registry and name in other:
                del other[name]
        registry[name] = value

    def _assign(self, registry: Registry, name: str, value: Any) -> None:
        box = registry[name]
        if box is not None and (value is not None or box._is_free):
            box._write(value)
        elif value is None:
            registry[name] = None
        elif registry is self.__dict__["_buffers"]:
            registry[name] = Buffer(value)
        else:
            raise TypeError(
                f"{type(self).__name__}.{name} is a parameter set to None; assign an "
                f"nn.Parameter(value) to give it a value"
            )

    def _keep_place(self, name: str) -> None:
        """Keep the place of an empty list or dict among the children, should it be filled."""
        fields = self.__dict__
        fields.setdefault("_slots", {})[name] = None
        if name not in fields["_modules"]:
            dict.__setitem__(fields["_modules"], name, None)

    def _adopt_containers(self) -> None:
        """Register lists and dicts that were empty when assigned and hold modules now."""
        fields = self.__dict__
        for name in list(fields.get("_slots", ())):
            value = fields.get(name)
            if value is not None and not value:
                continue
            del fields["_slots"][name]
            container = (
                None if value is None else self._contain(value, f"{self._get_name()}.{name}")
            )
            if container is None:
                dict.pop(fields["_modules"], name, None)
            else:
                self._register(name, container, fields["_modules"])

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__
        for registry in ("_parameters", "_buffers", "_modules"):
            parts = fields.get(registry)
            if parts is not None and name in parts:
                part = parts[name]
                if type(part) is Buffer and part._is_empty:
                    return part._read_optional()
                return part
        if hasattr(type(self), name):
            # A property raised AttributeError: let its own message through.
            return object.__getattribute__(self, name)
        known = [key for key in dir(self) if not key.startswith("_")]
        raise AttributeError(
            f"{type(self).__name__!r} object has no attribute {name!r}." + did_you_mean(name, known)
        )

    def __delattr__(self, name: str) -> None:
        for registry in (self._parameters, self._buffers, self._modules):
            if name in registry:
                del registry[name]
                return
        VERSION.static += 1
        object.__delattr__(self, name)

    def __dir__(self) -> list[str]:
        parts = (*self._parameters, *self._buffers, *self._modules)
        return sorted({*object.__dir__(self), *(p for p in parts if p.isidentifier())})

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Add a parameter, or declare that there is none (``None``)."""
        _check_name(self, name, self._parameters)
        if param is not None and not isinstance(param, Parameter):
            raise TypeError(
                f"register_parameter({name!r}): expected nn.Parameter or None, got "
                f"{type(param).__name__}; write nn.Parameter(value)"
            )
        self._register(name, param, self.__dict__["_parameters"])

    def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> None:
        """Add state that is not trained.

        Args:
            name: attribute name.
            tensor: an array, an ``nn.Buffer``, or ``None``: a place that takes any array later.
            persistent: whether it is part of ``state_dict`` (default True).
        """
        _check_name(self, name, self._buffers)
        buffer = tensor if isinstance(tensor, Buffer) else Buffer(tensor)
        buffer.persistent = persistent
        self._register(name, buffer, self.__dict__["_buffers"])

    def add_module(self, name: str, module: Module | None) -> None:
        """Add a child module under ``name``."""
        _check_name(self, name, self._modules)
        if module is not None and not isinstance(module, Module):
            raise TypeError(
                f"add_module({name!r}): expected a module or None, got {type(module).__name__}"
            )
        self._register(name, module, self.__dict__["_modules"])

    register_module = add_module

    # Calling.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; every subclass defines its own."""
        raise TypeError(
            f"{type(self).__name__} has no forward method; define `def forward(self, x): ...`"
        )

    def infer_shapes(self, *args: Any, **kwargs: Any) -> None:
        """Fill in unknown sizes from the inputs of ``forward``; runs once, before it.

        A layer with deferred sizes defines this method:

            def infer_shapes(self, x):
                self.weight.shape = (x.shape[-1], self.units)
        """
        names = [name for name, box in self._own_boxes() if box.is_unshaped and not box._is_free]
        if names:
            raise DeferredError(
                f"{path_of(self)}: the sizes of {', '.join(names)} are unknown and "
                f"{type(self).__name__} does not say how to find them.\n"
                f"    mend:  def infer_shapes(self, x):\n"
                f"               self.{names[0]}.shape = (x.shape[-1], ...)"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = STATE
        fields = self.__dict__
        if bind.under_foreign_trace():
            self._check_foreign_call()
        if state.jit_level:
            bind.note_module(self)
        elif not state.frames and state.depth == 0:
            compiled = fields.get("_compiled")
            if compiled is not None:
                return compiled(*args, **kwargs)
        if "_slots" in fields:
            self._adopt_containers()
        state.depth += 1
        try:
            if (
                self._forward_pre_hooks
                or self._forward_hooks
                or self._backward_hooks
                or (self._backward_pre_hooks)
            ):
                return self._call_with_hooks(args, kwargs)
            if fields["_pending"]:
                self._infer_own(args, kwargs)
            return self.forward(*args, **kwargs)
        except Exception as error:
            raise _explained(error, self, args, kwargs) from error.__cause__
        finally:
            state.depth -= 1

    def _check_foreign_call(self) -> None:
        """Refuse calls whose parameters JAX would keep as constants in a program it runs again."""
        outermost = STATE.depth == 0 and not STATE.frames
        if (outermost or bind.called_by_jax(2)) and walk(self).entries:
            message = _FOREIGN_CALL if outermost else _CALLED_BY_JAX
            raise ForeignTransformError(message.format(cls=type(self).__name__))

    def _infer_own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = STATE
        former, state.inferring = state.inferring, True
        cls, become = type(self), self.cls_to_become
        try:
            self.infer_shapes(*args, **kwargs)
            if state.frames:
                state.frames[0].on_error.append(lambda: self._revert(cls))
            self.__dict__["_pending"] = any(
                box.is_unshaped and not box._is_free for _, box in self._own_boxes()
            )
            if become is not None and not self.__dict__["_pending"]:
                object.__setattr__(self, "__class__", become)
                VERSION.static += 1
        finally:
            state.inferring = former

    def _revert(self, cls: type[Module]) -> None:
        object.__setattr__(self, "__class__", cls)
        self.__dict__["_pending"] = True
        VERSION.static += 1

    def _call_with_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for hook, with_kwargs in list(self._forward_pre_hooks.values()):
            if with_kwargs:
                result = hook(self, args, kwargs)
                if result is not None:
                    args, kwargs = result
            else:
                result = hook(self, args)
                if result is not None:
                    args = result if isinstance(result, tuple) else (result,)
        if self.__dict__["_pending"]:
            self._infer_own(args, kwargs)
        hooks = list(self._forward_hooks.values())
        try:
            if self._backward_hooks or self._backward_pre_hooks:
                output = run_backward_hooks(
                    self, args, lambda *inputs: self.forward(*inputs, **kwargs)
                )
            else:
                output = self.forward(*args, **kwargs)
        except Exception:
            for hook, with_kwargs, always in hooks:
                if always:
                    hook(self, args, kwargs, None) if with_kwargs else hook(self, args, None)
            raise
        for hook, with_kwargs, _ in hooks:
            result = hook(self, args, kwargs, output) if with_kwargs else hook(self, args, output)
            if result is not None:
                output = result
        return output

    def register_forward_pre_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Call ``hook(module, args)`` before ``forward``; it may return other arguments."""
        return add_hook(self, "_forward_pre_hooks", (hook, with_kwargs), prepend)

    def register_forward_hook(
        self,
        hook: Callable[..., Any],
        *,
        prepend: bool = False,
        with_kwargs: bool = False,
        always_call: bool = False,
    ) -> RemovableHandle:
        """Call ``hook(module, args, output)`` after ``forward``; it may return another output."""
        return add_hook(self, "_forward_hooks", (hook, with_kwargs, always_call), prepend)

    def register_full_backward_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook(module, grad_input, grad_output)`` when gradients pass through the module.

        Both are tuples of arrays; the hook may return a replacement for ``grad_input``. It runs
        under ``lamina.grad``, ``value_and_grad`` and ``backward``; inside a compiled function it
        sees tracers, while tracing.
        """
        return add_hook(self, "_backward_hooks", hook, prepend)

    def register_full_backward_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook(module, grad_output)`` before gradients enter the module."""
        return add_hook(self, "_backward_pre_hooks", hook, prepend)

    # Showing.

    def _get_name(self) -> str:
        return type(self).__name__

    def extra_repr(self) -> str:
        """Return what to print between the parentheses of the module's ``repr``."""
        return ""

    def __repr__(self) -> str:
        self._adopt_containers()
        extra = self.extra_repr()
        lines = extra.split("\n") if extra else []
        slots = self.__dict__.get("_slots", ())
        children = [(k, v) for k, v in self._modules.items() if k not in slots]
        if len(lines) <= 1 and not children:
            return f"{self._get_name()}({extra})"
        for name, child in children:
            lines.append(f"({name}): " + repr(child).replace("\n", "\n  "))
        return f"{self._get_name()}(\n  " + "\n  ".join(lines) + "\n)"

    # Copying.

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in _LINKS}
        for registry in ("_parameters", "_buffers", "_modules"):
            state[registry] = dict(state[registry])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = {k: state[k] for k in ("_parameters", "_buffers", "_modules")}
        self.__dict__.update({k: v for k, v in state.items() if k not in parts})
        for registry, content in parts.items():
            for name, part in content.items():
                dict.__setitem__(self.__dict__[registry], name, part)
                if part is not None:
                    self._link(part)
        VERSION.tree += 1
        VERSION.static += 1

    def _link(self, part: Box | Module) -> None:
        """Note that a part belongs to this module, among others if it is shared."""
        me = self.__dict__["_self"]
        if isinstance(part, Box):
            if me not in part._owners:
                part._owners = (*(ref for ref in part._owners if ref() is not None), me)
        elif me not in part.__dict__["_parents"]:
            parents = part.__dict__["_parents"]
            part.__dict__["_parents"] = (*(ref for ref in parents if ref() is not None), me)

    # What compiled functions need.

    def _state_boxes(self) -> list[Box]:
        return walk(self).boxes

    def _state_fingerprint(self) -> Any:
        return fingerprint(self)


_MISSING = object()
_LINKS = frozenset({"_parents", "_self", "_tree", "_fingerprint", "_born", "_compiled"})
_SIMPLE = (int, float, str, bytes, bool, type(None))


def _check_name(module: Module, name: Any, registry: dict[str, Any]) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, got {type(name).__name__}")
    if not name:
        raise KeyError("a name can't be empty")
    if "." in name:
        raise KeyError(f"a name can't contain a dot, got {name!r}; dots separate levels")
    parts = (module._parameters, module._buffers, module._modules)
    taken = hasattr(type(module), name) or name in module.__dict__
    if (taken or any(name in part for part in parts)) and name not in registry:
        raise KeyError(f"{type(module).__name__} has an attribute {name!r} already")


def _explained(error: Exception, module: Module, args: Any, kwargs: Any) -> Exception:
    """Add to an error raised in ``forward`` where it happened and what the module received."""
    if getattr(error, "_lamina_path", None) is not None:
        return error
    path = path_of(module)
    shapes = ", ".join(
        [_shape_of(arg) for arg in args] + [f"{k}={_shape_of(v)}" for k, v in kwargs.items()]
    )
    text = repr(module)
    if "\n" in text:
        text = f"{module._get_name()}(...)"
    where = f"in module {path!r}: {text}, called with ({shapes})"
    if isinstance(error, _DATA_DEPENDENT):
        explained: Exception = DataDependentError(_NOT_WHILE_TRACING.format(where=where))
        explained.__cause__ = error
    else:
        explained = error
        explained.add_note(where)
    try:
        explained._lamina_path = path  # type: ignore[attr-defined]
    except AttributeError:
        pass
    return explained


_DATA_DEPENDENT = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def _shape_of(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shape_of, value))}]"
    text = repr(value)
    return text if len(text) <= 40 else type(value).__name__


_NOT_WHILE_TRACING = """{where}:
its Python control flow (if, while, int(), bool(), a boolean index) depends on a value that is not \
known while tracing.
    mend:  run it uncompiled: call the module outside of lamina.jit
    or:    if cond: a() else b()  ->  jax.lax.cond(cond, a, b)  or  jnp.where(cond, a, b)
    or:    while cond: body()     ->  jax.lax.while_loop(cond, body, state)
    or:    for over a known number of steps that reads or writes state  ->  lamina.scan"""

_FOREIGN_CALL = """{cls} was called under a plain JAX transform that records a program (jax.jit, \
jax.lax.scan, jax.eval_shape ...): its parameters would be frozen into it as constants.
    wrong:  jax.jit(net)(x)
    right:  lamina.jit(net)(x)           (also lamina.scan, lamina.remat, lamina.infer)
    or:     jax.jit(lambda params, x: lamina.functional_call(net, params, x))"""

_CALLED_BY_JAX = """{cls} was itself given to a JAX transform as the function to record. JAX keeps \
the program it records by the identity of the function, so later calls would use old parameters.
    wrong:  jax.lax.scan(self.cell, h, xs)              jax.checkpoint(self.block)(x)
    right:  jax.lax.scan(lambda h, x: self.cell(h, x), h, xs)
    or:     lamina.scan(self.cell, h, xs)               lamina.remat(self.block)(x)"""
