"""Every error that lamina raises on purpose."""

from ._core.errors import (
    DataDependentError,
    DeferredError,
    FileError,
    ForeignTransformError,
    LaminaError,
    LoadError,
    RuleError,
    ShapeError,
    StaticWriteError,
    TypeMismatchError,
    UnprovenError,
)

__all__ = [
    "DataDependentError",
    "DeferredError",
    "FileError",
    "ForeignTransformError",
    "LaminaError",
    "LoadError",
    "RuleError",
    "ShapeError",
    "StaticWriteError",
    "TypeMismatchError",
    "UnprovenError",
]
