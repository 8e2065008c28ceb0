"""Reading and writing files: arrays, nested objects and models, and nothing is ever executed."""

from lamina.io.diff import Difference, FileDiff, file_diff
from lamina.io.native import load, open, save
from lamina.io.stats import Stats, tensor_stats
from lamina.io.tensorfile import TensorFile, TensorHandle

__all__ = [
    "Difference",
    "FileDiff",
    "Stats",
    "TensorFile",
    "TensorHandle",
    "file_diff",
    "load",
    "open",
    "save",
    "tensor_stats",
]
