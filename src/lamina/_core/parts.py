"""The part of ``Module`` that lists, finds and changes its parts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from . import bind
from .errors import did_you_mean
from .parameter import Box, Buffer, Parameter, as_sharding
from .random import BIRTHS
from .walk import walk

if TYPE_CHECKING:
    from .module import Module

__all__ = ["PartsMixin"]


class PartsMixin:
    """Walking over modules, parameters and buffers, and changing all of them at once."""

    if TYPE_CHECKING:
        _modules: dict[str, Any]
        _parameters: dict[str, Parameter | None]
        _buffers: dict[str, Buffer | None]
        _compiler: ClassVar[Callable[..., Any]]

        def _adopt_containers(self) -> None: ...

    def _own_boxes(self) -> Iterator[tuple[str, Box]]:
        for registry in (self._parameters, self._buffers):
            for name, box in registry.items():
                if box is not None:
                    yield name, box

    def _walk_modules(self) -> Iterator[tuple[str, Module]]:
        """Yield every module once, before the tree is known to be complete."""
        stack: list[Any] = [self]
        seen: set[int] = set()
        while stack:
            module = stack.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            yield "", module
            stack.extend(child for child in module._modules.values() if child is not None)

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
            yield _join(prefix, name), module

    def modules(self) -> Iterator[Module]:
        """Yield this module and all below it, each once."""
        for _, module in self.named_modules():
            yield module

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield ``(name, module)`` for the direct children, each once."""
        self._adopt_containers()
        seen: set[int] = set()
        for name, module in self._modules.items():
            if module is not None and id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def children(self) -> Iterator[Module]:
        """Yield the direct children, each once."""
        for _, module in self.named_children():
            yield module

    def _named_boxes(
        self, parameters: bool, prefix: str, recurse: bool, remove_duplicate: bool
    ) -> Iterator[tuple[str, Any]]:
        seen: set[Box] = set()
        for name, box, is_parameter in walk(self).entries:
            if is_parameter is not parameters or (not recurse and "." in name):
                continue
            if remove_duplicate:
                if box in seen:
                    continue
                seen.add(box)
            yield _join(prefix, name), box

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """Yield ``(dotted name, parameter)``; a tied parameter once, under its first name."""
        return self._named_boxes(True, prefix, recurse, remove_duplicate)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield all parameters, each once."""
        for _, parameter in self.named_parameters(recurse=recurse):
            yield parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Buffer]]:
        """Yield ``(dotted name, buffer)``, each buffer once."""
        for name, buffer in self._named_boxes(False, prefix, recurse, remove_duplicate):
            if not buffer._is_empty:
                yield name, buffer

    def buffers(self, recurse: bool = True) -> Iterator[Buffer]:
        """Yield all buffers, each once."""
        for _, buffer in self.named_buffers(recurse=recurse):
            yield buffer

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
            module._adopt_containers()
            child = module._modules.get(part)
            if child is None:
                names = [name for name, _ in walk(self).modules]
                raise AttributeError(
                    f"{type(self).__name__} has no submodule {target!r}."
                    + did_you_mean(target, names)
                )
            module = child
        return module

    def set_submodule(self, target: str, module: Module, strict: bool = False) -> None:
        """Put ``module`` at a dotted path; with ``strict`` only if a module is there already."""
        if not target:
            raise ValueError("set_submodule needs a path, got ''")
        if not isinstance(module, PartsMixin):
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
        """Return the buffer at a dotted path; raises ``AttributeError`` if there is none."""
        return self._get_box(target, "_buffers", "buffer")

    def _get_box(self, target: str, registry: str, kind: str) -> Any:
        above, _, name = target.rpartition(".")
        box = self.get_submodule(above).__dict__[registry].get(name)
        if box is None:
            names = [path for path, _, _ in walk(self).entries]
            raise AttributeError(
                f"{type(self).__name__} has no {kind} {target!r}." + did_you_mean(target, names)
            )
        return box

    # Changing all parts.

    def apply(self, fn: Callable[[Any], Any]) -> Self:
        """Call ``fn`` on every module below, children first, then on this one."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set training mode (dropout drops, batch norm updates its statistics)."""
        if not isinstance(mode, bool):
            raise ValueError(f"train(mode): expected a bool, got {mode!r}")
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Set evaluation mode; the same as ``train(False)``."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze (``False``) or unfreeze all parameters, known shapes or not."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or set them to zero."""
        for parameter in self.parameters():
            grad = parameter.grad
            if grad is not None:
                parameter.grad = None if set_to_none else jnp.zeros_like(grad)

    def to(self, *targets: Any, dtype: Any = None, device: Any = None) -> Self:
        """Change dtype, device or sharding of all parameters and buffers, in place.

        Args:
            *targets: a dtype, a device, a platform name (``"cpu"``), a
                ``jax.sharding.Sharding``, or an array to be like; in any order.
            dtype: floating dtype for floating-point values; integers keep theirs.
            device: device, platform name or sharding.

        What has no value yet gets it with the new dtype, at the new place.
        """
        for target in targets:
            if isinstance(target, str) and target in _DTYPE_NAMES:
                dtype = target
            elif isinstance(target, (str, jax.Device, jax.sharding.Sharding)):
                device = target
            elif isinstance(target, (jax.Array, Box)):
                dtype, device = target.dtype, target.sharding
            elif target is not None:
                dtype = target
        if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(f"to(dtype): expected a floating or complex dtype, got {dtype}")
        for box in walk(self).names:
            if dtype is not None and jnp.issubdtype(box._dtype, jnp.inexact):
                box._cast(dtype)
            if device is not None and not box._is_empty:
                box.sharding = as_sharding(device)
        return self

    def type(self, dst_type: Any) -> Self:
        """Cast all parameters and buffers to a dtype."""
        for box in walk(self).names:
            box._cast(dst_type)
        return self

    def float(self) -> Self:
        """Cast all floating-point values to float32."""
        return self.to(jnp.float32)

    def double(self) -> Self:
        """Cast all floating-point values to float64 (float32 unless JAX's x64 is enabled)."""
        return self.to(np.float64)

    def half(self) -> Self:
        """Cast all floating-point values to float16."""
        return self.to(jnp.float16)

    def bfloat16(self) -> Self:
        """Cast all floating-point values to bfloat16."""
        return self.to(jnp.bfloat16)

    def cpu(self) -> Self:
        """Move all values to the CPU."""
        return self.to("cpu")

    def to_empty(self, *, device: Any = None, recurse: bool = True) -> Self:
        """Give every parameter and buffer its value, at ``device`` if one is given.

        PyTorch leaves garbage in the memory; here values come from their recipes.
        """
        for box in walk(self).names if recurse else [box for _, box in self._own_boxes()]:
            if box._is_free:
                continue
            if device is not None:
                box.sharding = as_sharding(device)
            box._read()
        return self

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
        self.__dict__["_compiled"] = self._compiler(self, **options)

    def _apply(self, fn: Callable[[jax.Array], Any], recurse: bool = True) -> Self:
        """Replace every value by ``fn(value)``; used by third-party code."""
        for box in walk(self).names if recurse else [box for _, box in self._own_boxes()]:
            if box._is_empty:
                continue
            value = jnp.asarray(fn(box.data))
            box._shape, box._dtype = tuple(value.shape), np.dtype(value.dtype)
            bind.store(box, value)
        return self

    def clone(self) -> Self:
        """Return a copy that draws its own initial values; ``copy.deepcopy`` keeps the values.

        Parameters that have a value and a recipe become abstract again in the clone.
        """
        twin = copy.deepcopy(self)
        for box in walk(twin).names:
            if box._init is not None and (box._shape is not None):
                box._value = box._exposed = None
            box._seed = None
        twin.__dict__["_origin"] = BIRTHS.take()
        return twin


_DTYPE_NAMES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
