"""``Module``: an ordinary mutable Python object that owns boxes and other modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from . import bind, changes
from .bind import STATE, Cell
from .box import Box, is_array
from .errors import DeferredError, did_you_mean
from .explain import NoAttribute, explained
from .fingerprint import value_key
from .hooks import Hooked, run_backward_hooks, run_forward_hooks, run_pre_hook
from .nesting import CALLS, DEEP, far_below, made_after, nested, repr_of
from .parameter import ArrayAttribute, Buffer, Parameter
from .random import BIRTHS
from .registry import Registry
from .shapes import as_sharding, is_inexact, parse_targets
from .state_dict import StateDict, load_own, load_state_dict, save_own, save_state_dict
from .trees import as_array
from .walk import Links, changed, join, own_boxes, path_of, touch, walk

__all__ = ["Module"]

_MISSING = object()
_SIMPLE = frozenset({int, float, str, bytes, bool, type(None)})


class Module(Hooked):
    """What ``lamina.nn.Module`` is made from: parts, calls, changes and copies."""

    training: bool
    call_super_init: ClassVar[bool] = False
    cls_to_become: ClassVar[type[Module] | None] = None
    _version: ClassVar[int] = 1

    _links: Links
    _parameters: dict[str, Parameter | None]
    _buffers: dict[str, Buffer | None]
    _modules: dict[str, Any]
    _array_attributes: dict[str, Cell]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        fields = self.__dict__
        links = Links(self)
        fields["training"] = True
        fields["_links"] = links
        fields["_parameters"] = Registry(links.me)
        fields["_buffers"] = Registry(links.me)
        fields["_modules"] = Registry(links.me)
        fields["_array_attributes"] = Registry(links.me)
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            name = type(self).__name__
            raise TypeError(f"{name}() takes no arguments; define {name}.__init__ to accept some")

    # Registration.

    def _adopt(self, part: Any) -> None:
        """Link a newly registered part to this module."""
        fields = self.__dict__
        links = fields["_links"]
        _link(part, links.me)
        if isinstance(part, Box):
            if part.state == "unshaped" and part.is_unshaped:
                links.pending = True
            if not links.parents and links.origin is None:
                links.origin = BIRTHS.take(links.born)
            return
        if not isinstance(part, Module):
            return
        origin, part._links.origin = part._links.origin, None
        if origin is None:
            return
        own = links.origin
        if not links.parents and own is None:
            links.origin = origin
        elif own is not None and own[0] == origin[0] and origin[1] < own[1]:
            links.origin = origin
            BIRTHS.give_back(own)
        else:
            BIRTHS.give_back(origin)

    def _contain(self, value: Any, where: str) -> Module | None:
        """Turn a list, tuple or dict that holds parts into a module; ``nn.Module`` does so."""
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        fields = self.__dict__
        descriptor = getattr(type(self), name, None)
        if descriptor is not None and hasattr(type(descriptor), "__set__"):
            object.__setattr__(self, name, value)
            return
        parameters, buffers = fields["_parameters"], fields["_buffers"]
        modules, arrays = fields["_modules"], fields["_array_attributes"]
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
        elif name in arrays and (value is None or is_array(value)):
            bind.write(arrays[name], None if value is None else as_array(value))
        elif name in modules:
            container = None if value is None else self._contain(value, self._where(name))
            if container is None and value is not None:
                raise TypeError(
                    f"{self._where(name)} is a module; can't assign {type(value).__name__} (a "
                    f"module or None expected)\n    fix: `del module.{name}` first to use the name "
                    f"for something else"
                )
            modules[name] = container
        elif is_array(value) and self._takes_array(name, value):
            self._register(name, ArrayAttribute(as_array(value), name), arrays)
        else:
            if isinstance(value, (list, tuple, dict)):
                container = self._contain(value, self._where(name))
                if container is not None:
                    self._register(name, container, modules)
                    return
            self._set_plain(name, value)

    def _where(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"

    def _takes_array(self, name: str, value: Any) -> bool:
        """Tell whether a new array attribute will last; one that ends with a trace is refused."""
        if not bind.is_tracer(value):
            return True
        if STATE.frames and not changes.is_born_inside(self._links.born):
            changes.refuse_tracer_attribute(type(self).__name__, name)
        return False

    def _set_plain(self, name: str, value: Any) -> None:
        fields = self.__dict__
        old = fields.get(name, _MISSING)
        plain = type(old) in _SIMPLE and type(value) in _SIMPLE
        if old is value or (plain and value_key(old) == value_key(value)):
            return
        links = fields["_links"]
        if STATE.frames:
            inside, cls = changes.is_born_inside(links.born), type(self).__name__
            if not STATE.inferring:
                if bind.holds_tracer(value) and not inside:
                    changes.refuse_tracer_attribute(cls, name)
                changes.refuse_static_change(links.born, _PLAIN_ATTRIBUTE, cls=cls, name=name)
            if not inside:
                changes.on_error(lambda: self._put_back(name, old), always=not STATE.inferring)
        if name in fields["_array_attributes"]:
            del fields["_array_attributes"][name]
        fields[name] = value
        touch((links.me,), by=changed(links, name, old, value) if plain else None)

    def _put_back(self, name: str, old: Any) -> None:
        if old is _MISSING:
            self.__dict__.pop(name, None)
        else:
            self.__dict__[name] = old
        touch((self._links.me,))

    def _register(self, name: str, value: Any, registry: Registry) -> None:
        fields = self.__dict__
        if registry.get(name) is value and value is not None:
            return
        for key in ("_parameters", "_buffers", "_modules", "_array_attributes"):
            other = fields[key]
            if other is not registry and name in other:
                del other[name]
        old = registry.get(name)
        registry[name] = value
        fields.pop(name, None)
        if isinstance(old, Box):  # a bias draws from the size of the weight that is there now
            for _, box in own_boxes(self):
                box.follow(old, value)

    def _assign(self, registry: Registry, name: str, value: Any) -> None:
        box: Any = registry[name]
        if box is not None and (value is not None or box.is_place):
            box.data = value
        elif value is None:
            registry[name] = None
        elif registry is self.__dict__["_buffers"]:
            registry[name] = Buffer(value)
        else:
            raise TypeError(
                f"{self._where(name)} is a parameter set to None; assign an nn.Parameter(value) to "
                f"give it a value\n    fix: module.{name} = nn.Parameter(value)"
            )

    def _check_attributes(self) -> None:
        """Refuse lists and dicts that were filled with parts after they were assigned."""
        for name, value in self.__dict__.items():
            if type(value) in (list, dict) and value:
                items = value.values() if type(value) is dict else value
                if any(isinstance(item, (Box, Module)) for item in items):
                    kind = "ModuleList()" if type(value) is list else "ModuleDict()"
                    raise TypeError(
                        f"{self._where(name)}: modules or parameters were put into a plain "
                        f"{type(value).__name__} after it had been assigned; they would be lost "
                        f"from the model\n    fix: self.{name} = nn.{kind} before filling it"
                    )

    def __getattr__(self, name: str) -> Any:
        fields = self.__dict__
        for registry in ("_parameters", "_modules"):
            parts = fields.get(registry)
            if parts is not None and name in parts:
                return parts[name]
        for registry in ("_buffers", "_array_attributes"):
            parts = fields.get(registry)
            if parts is not None and name in parts:
                return None if parts[name] is None else bind.read(parts[name])
        if hasattr(type(self), name):
            # A property raised AttributeError: let its own message through.
            return object.__getattribute__(self, name)
        raise NoAttribute(self, name)

    def __delattr__(self, name: str) -> None:
        for registry in (self._parameters, self._buffers, self._modules, self._array_attributes):
            if name in registry:
                del registry[name]
                return
        changes.refuse_static_change(
            self._links.born, _PLAIN_ATTRIBUTE, cls=type(self).__name__, name=name
        )
        object.__delattr__(self, name)
        touch((self._links.me,))

    def __dir__(self) -> list[str]:
        parts = (*self._parameters, *self._buffers, *self._modules, *self._array_attributes)
        return sorted({*object.__dir__(self), *(p for p in parts if p.isidentifier())})

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Add a parameter, or declare that there is none (``None``)."""
        self._check_name(name, self._parameters)
        if param is not None and not isinstance(param, Parameter):
            raise TypeError(
                f"register_parameter({name!r}): expected nn.Parameter or None, got "
                f"{type(param).__name__}\n    fix: write nn.Parameter(value)"
            )
        self._register(name, param, self.__dict__["_parameters"])

    def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> None:
        """Add state that is not trained.

        Args:
            name: attribute name.
            tensor: an array, an ``nn.Buffer``, or ``None``: a place that takes any array later.
            persistent: whether it is part of ``state_dict`` (default True).
        """
        self._check_name(name, self._buffers)
        buffer = tensor if isinstance(tensor, Buffer) else Buffer(tensor)
        buffer.persistent = persistent
        self._register(name, buffer, self.__dict__["_buffers"])

    def add_module(self, name: str, module: Module | None) -> None:
        """Add a child module under ``name``."""
        self._check_name(name, self._modules)
        if module is not None and not isinstance(module, Module):
            raise TypeError(
                f"add_module({name!r}): expected a module or None, got {type(module).__name__}"
            )
        self._register(name, module, self.__dict__["_modules"])

    register_module = add_module

    def _check_name(self, name: Any, registry: dict[str, Any]) -> None:
        if not isinstance(name, str):
            raise TypeError(f"a name is a str, got {type(name).__name__}")
        if not name:
            raise KeyError("a name can't be empty")
        if "." in name:
            raise KeyError(f"a name can't contain a dot, got {name!r}; dots separate levels")
        parts = (self._parameters, self._buffers, self._modules, self._array_attributes)
        taken = hasattr(type(self), name) or name in self.__dict__
        if (taken or any(name in part for part in parts)) and name not in registry:
            raise KeyError(f"{type(self).__name__} has an attribute {name!r} already")

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
        names = [name for name, box in own_boxes(self) if _lacks_size(box)]
        if names:
            raise DeferredError(
                f"{path_of(self)}: the sizes of {', '.join(names)} are unknown and "
                f"{type(self).__name__} does not say how to find them\n"
                f"    fix: def infer_shapes(self, x): self.{names[0]}.shape = (x.shape[-1], ...)"
            )

    def has_uninitialized_params(self) -> bool:
        """Tell whether some size of a parameter or buffer is unknown, here or below."""
        return any(_lacks_size(box) for box in walk(self).names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = STATE
        links = self._links
        if not state.depth:
            state.entry = bind.trace_mark()
            if not state.frames and links.compiled is not None:
                return links.compiled(*args, **kwargs)
        state.depth += 1
        deep = state.depth == DEEP
        if deep:
            CALLS.enter()
        try:
            for hook, with_kwargs in list(self._forward_pre_hooks.values()):
                args, kwargs = run_pre_hook(self, hook, with_kwargs, args, kwargs)
            if links.pending:
                self._infer_own(args, kwargs)
            if self._backward_hooks or self._backward_pre_hooks:
                output = run_backward_hooks(
                    self, list(self._backward_pre_hooks.values()),
                    list(self._backward_hooks.values()), args,
                    lambda *inputs: self.forward(*inputs, **kwargs),
                )  # fmt: skip
            else:
                output = self.forward(*args, **kwargs)
            if self._forward_hooks:
                output = run_forward_hooks(self, args, kwargs, output)
            return output
        except Exception as error:
            for hook, with_kwargs, always in list(self._forward_hooks.values()):
                if always:
                    hook(self, args, kwargs, None) if with_kwargs else hook(self, args, None)
            better = explained(error, self, args, kwargs)
            if better is error:
                raise
            raise better from error
        finally:
            if deep:
                CALLS.leave()
            state.depth -= 1

    def _infer_own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = STATE
        former, state.inferring = state.inferring, True
        cls, become = type(self), self.cls_to_become
        try:
            changes.on_error(lambda: self._become(cls, True))
            self.infer_shapes(*args, **kwargs)
            pending = any(_lacks_size(b) for _, b in own_boxes(self))
            self._become(become if become is not None and not pending else cls, pending)
        finally:
            state.inferring = former

    def _become(self, cls: type[Module], pending: bool) -> None:
        object.__setattr__(self, "__class__", cls)
        self._links.pending = pending
        touch((self._links.me,))

    # Showing.

    def _get_name(self) -> str:
        return type(self).__name__

    def extra_repr(self) -> str:
        """Return what to print between the parentheses of the module's ``repr``."""
        return ""

    @nested
    def __repr__(self) -> str:
        extra = self.extra_repr()
        lines = extra.split("\n") if extra else []
        if len(lines) <= 1 and not self._modules:
            return f"{self._get_name()}({extra})"
        for name, child in self._modules.items():
            lines.append(f"({name}): " + repr_of(child).replace("\n", "\n  "))
        return f"{self._get_name()}(\n  " + "\n  ".join(lines) + "\n)"

    # Finding parts.

    def named_modules(
        self, memo: set[Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """Yield ``(dotted name, module)`` for this module and all below it."""
        memo = set() if memo is None else memo
        for name, module in walk(self).modules:
            if remove_duplicate:
                if module in memo:
                    continue
                memo.add(module)
            yield join(prefix, name), module

    def modules(self) -> Iterator[Module]:
        """Yield this module and all below it, each once."""
        return iter(walk(self).paths)

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield ``(name, module)`` for the direct children, each once."""
        self._check_attributes()
        seen: set[int] = set()
        for name, module in self._modules.items():
            if module is not None and id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def children(self) -> Iterator[Module]:
        """Yield the direct children, each once."""
        return (module for _, module in self.named_children())

    def _named_boxes(self, kind: type, prefix: str, recurse: bool, once: bool) -> Iterator[Any]:
        seen: set[Any] = set()
        for name, box in walk(self).entries if recurse else own_boxes(self):
            if isinstance(box, kind) and not (once and box in seen):
                seen.add(box)
                yield join(prefix, name), box

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """Yield ``(dotted name, parameter)``; a tied parameter once, under its first name."""
        return self._named_boxes(Parameter, prefix, recurse, remove_duplicate)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield all parameters, each once."""
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Buffer]]:
        """Yield ``(dotted name, buffer)``, each buffer once, without empty places."""
        for name, buffer in self._named_boxes(Buffer, prefix, recurse, remove_duplicate):
            if buffer.state != "empty":
                yield name, buffer

    def buffers(self, recurse: bool = True) -> Iterator[Buffer]:
        """Yield all buffers, each once."""
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))

    def ties(self) -> dict[str, str]:
        """Return ``{further name: canonical name}`` of every tied parameter and buffer.

        Example:
            >>> from lamina import nn
            >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            >>> net[1].weight = net[0].weight
            >>> net.ties()
            {'1.weight': '0.weight'}
        """
        return dict(walk(self).aliases)

    def get_submodule(self, target: str) -> Module:
        """Return the module at a dotted path; raises ``AttributeError`` if there is none."""
        module: Any = self
        for part in target.split(".") if target else ():
            module = module._modules.get(part)
            if module is None:
                names = [name for name, _ in walk(self).modules]
                raise AttributeError(
                    f"{type(self).__name__} has no submodule {target!r}."
                    + did_you_mean(target, names)
                )
        return module

    def set_submodule(self, target: str, module: Module, strict: bool = False) -> None:
        """Put ``module`` at a dotted path; with ``strict`` only if a module is there already."""
        if not target:
            raise ValueError("set_submodule needs a path, got ''")
        if not isinstance(module, Module):
            raise TypeError(
                f"set_submodule({target!r}): expected a module, got {type(module).__name__}"
            )
        above, _, name = target.rpartition(".")
        parent = self.get_submodule(above)
        if strict and name not in parent._modules:
            raise AttributeError(f"{type(self).__name__} has no submodule {target!r}")
        parent._register(name, module, parent.__dict__["_modules"])

    def get_parameter(self, target: str) -> Parameter:
        """Return the parameter at a dotted path; raises ``AttributeError`` if there is none."""
        return self._get_box(target, "_parameters", "parameter")

    def get_buffer(self, target: str) -> Buffer:
        """Return the buffer (the box) at a dotted path; raises ``AttributeError`` if there is
        none.
        """
        return self._get_box(target, "_buffers", "buffer")

    def _get_box(self, target: str, registry: str, kind: str) -> Any:
        above, _, name = target.rpartition(".")
        box = self.get_submodule(above).__dict__[registry].get(name)
        if box is None:
            names = [path for path, _ in walk(self).entries]
            raise AttributeError(
                f"{type(self).__name__} has no {kind} {target!r}." + did_you_mean(target, names)
            )
        return box

    # Changing all parts, each through its own method.

    @nested
    def apply(self, fn: Callable[[Any], Any]) -> Self:
        """Call ``fn`` on every module below, children first, then on this one."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    @nested
    def train(self, mode: bool = True) -> Self:
        """Set training mode (dropout drops, batch norm updates its statistics)."""
        if not isinstance(mode, bool):
            raise ValueError(f"train(mode): expected a bool, got {mode!r}")
        self.training = mode
        for child in self.children():
            child.train(mode)
        return self

    @nested
    def eval(self) -> Self:
        """Set evaluation mode; the same as ``train(False)``."""
        if getattr(self.train, "__func__", None) is not Module.train:
            return self.train(False)  # a module with a way of its own
        self.training = False
        for child in self.children():
            child.eval()
        return self

    @nested
    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze (``False``) or unfreeze all parameters, known shapes or not."""
        for child in self.children():
            child.requires_grad_(requires_grad)
        for _, box in own_boxes(self):
            if isinstance(box, Parameter):
                box.requires_grad = requires_grad
        return self

    @nested
    def reset_parameters(self) -> None:
        """Draw all parameters and buffers anew from their recipes, under the seed in force.

        The same seed gives the same values; ``lamina.manual_seed`` changes it.
        """
        for child in self.children():
            child.reset_parameters()
        for _, box in own_boxes(self):
            if box.init is not None:
                box.initialize()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or set them to zero."""
        for parameter in self.parameters():
            grad = parameter.grad
            if grad is not None:
                parameter.grad = None if set_to_none else jnp.zeros_like(grad)

    @nested
    def to(self, *targets: Any, dtype: Any = None, device: Any = None) -> Self:
        """Change dtype, device or sharding of all parameters and buffers, in place.

        Args:
            *targets: a dtype, a device, a platform name (``"cpu"``), a
                ``jax.sharding.Sharding``, or an array to be like; in any order.
            dtype: floating dtype for floating-point values; integers keep theirs.
            device: device, platform name or sharding.

        What has no value yet gets it with the new dtype, at the new place.
        """
        dtype, device = parse_targets(targets, dtype, device)
        if dtype is not None and not is_inexact(dtype):
            raise TypeError(f"to(dtype): expected a floating or complex dtype, got {dtype}")
        for child in self.children():
            child.to(dtype=dtype, device=device)
        for _, box in own_boxes(self):
            if dtype is not None and is_inexact(box.declared_dtype):
                box.cast(dtype)
        return self if device is None else self._put_on(device)

    def _put_on(self, device: Any) -> Self:
        for _, box in own_boxes(self):
            if box.state != "empty":
                box.sharding = as_sharding(device)
        return self

    @nested
    def type(self, dst_type: Any) -> Self:
        """Cast all parameters and buffers to a dtype."""
        for part in (*self.children(), *(box for _, box in own_boxes(self))):
            part.type(dst_type) if isinstance(part, Module) else part.cast(dst_type)
        return self

    @nested
    def _cast(self, method: str, dtype: Any) -> Self:
        """Cast floating-point values, those of children through the method of that name."""
        for child in self.children():
            getattr(child, method)()
        for _, box in own_boxes(self):
            if is_inexact(box.declared_dtype):
                box.cast(dtype)
        return self

    def float(self) -> Self:
        """Cast all floating-point values to float32."""
        return self._cast("float", jnp.float32)

    def double(self) -> Self:
        """Cast all floating-point values to float64 (float32 unless JAX's x64 is enabled)."""
        return self._cast("double", np.float64)

    def half(self) -> Self:
        """Cast all floating-point values to float16."""
        return self._cast("half", jnp.float16)

    def bfloat16(self) -> Self:
        """Cast all floating-point values to bfloat16."""
        return self._cast("bfloat16", jnp.bfloat16)

    @nested
    def cpu(self) -> Self:
        """Move all values to the CPU."""
        for child in self.children():
            child.cpu()
        return self._put_on("cpu")

    def to_empty(self, *, device: Any = None, recurse: bool = True) -> Self:
        """Give every parameter and buffer its value, at ``device`` if one is given.

        PyTorch leaves garbage in the memory; here values come from their recipes.
        """
        for box in walk(self).names if recurse else [box for _, box in own_boxes(self)]:
            if device is not None and box.state != "empty":
                box.sharding = as_sharding(device)
            bind.read(box)
        return self

    def _apply(self, fn: Callable[[jax.Array], Any], recurse: bool = True) -> Self:
        """Replace every value by ``fn(value)``; used by third-party code."""
        for box in walk(self).names if recurse else [box for _, box in own_boxes(self)]:
            if box.state != "empty":
                box.replace(jnp.asarray(fn(box.data)))
        return self

    # State dicts.

    @nested
    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
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
        return save_state_dict(self, destination, prefix, keep_vars)

    def load_state_dict(
        self, state_dict: Any, strict: bool = True, assign: bool = False, *, cast: bool = False
    ) -> Any:
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
        return load_state_dict(self, state_dict, strict, assign, cast)

    _save_to_state_dict = save_own
    _load_from_state_dict = load_own

    def get_extra_state(self) -> Any:
        """Return further state to be put into the state dict; override together with
        :meth:`set_extra_state`.
        """
        raise AttributeError(f"{type(self).__name__} has no extra state")

    def set_extra_state(self, state: Any) -> None:
        """Take back what :meth:`get_extra_state` returned."""
        raise AttributeError(
            f"{type(self).__name__} got extra state from the state dict\n"
            f"    fix: define set_extra_state(self, state)"
        )

    def __lamina_tensors__(self) -> Any:
        return self.state_dict().__lamina_tensors__()

    # Copying.

    @nested
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin: Any = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, args, *rest = super().__reduce_ex__(protocol)  # type: ignore[misc]
        return made_after, (far_below(self), function, args), *rest

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k != "_links"}
        state["_pending"] = self._links.pending
        for registry in ("_parameters", "_buffers", "_modules"):
            state[registry] = dict(state[registry])
        state["_array_attributes"] = {
            k: bind.read(cell) for k, cell in self._array_attributes.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, content in state.items():
            if name in ("_parameters", "_buffers", "_modules"):
                for key, part in content.items():
                    dict.__setitem__(self.__dict__[name], key, part)
                    if part is not None:
                        _link(part, self._links.me)
            elif name == "_pending":
                self._links.pending = content
            elif name == "_array_attributes":
                for key, value in content.items():
                    dict.__setitem__(self.__dict__[name], key, ArrayAttribute(value, key))
            else:
                self.__dict__[name] = content
        touch((self._links.me,), structure=True)

    def clone(self) -> Self:
        """Return a copy that draws its own initial values; ``copy.deepcopy`` keeps the values.

        Parameters that have a value and a recipe become abstract again in the clone.
        """
        twin = copy.deepcopy(self)
        for box in walk(twin).names:
            box.forget()
        twin._links.origin = BIRTHS.take(twin._links.born)
        return twin


def _lacks_size(box: Box) -> bool:
    return box.is_unshaped and not box.is_place


def _link(part: Any, me: Any) -> None:
    """Note that a part belongs to a module, among others if it is shared."""
    if isinstance(part, Box) and me not in part.owners:
        part.owners = (*(ref for ref in part.owners if ref() is not None), me)
    elif isinstance(part, Module) and me not in part._links.parents:
        parents = part._links.parents
        part._links.parents = (*(ref for ref in parents if ref() is not None), me)


_PLAIN_ATTRIBUTE = """{cls}.{name} is a plain Python attribute and is changed inside a compiled \
function: the change would happen once, while tracing, and then be lost.
    fix: keep changing state in a buffer, self.{name} = nn.Buffer(jnp.asarray(0)), or change it \
outside of the compiled function"""
