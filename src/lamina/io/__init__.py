"""Reading and writing files: arrays, nested objects and models, and nothing is ever executed."""

from .checkpoints import Checkpoints, Restored
from .diff import Difference, FileDiff, file_diff
from .into import LoadReport, load_into
from .native import load, open, save
from .rename import Renaming, renamed
from .stats import Stats, tensor_stats
from .tensorfile import TensorFile, TensorHandle

__all__ = [
    "Checkpoints",
    "Difference",
    "FileDiff",
    "LoadReport",
    "Renaming",
    "Restored",
    "Stats",
    "TensorFile",
    "TensorHandle",
    "file_diff",
    "load",
    "load_into",
    "open",
    "renamed",
    "save",
    "tensor_stats",
]
