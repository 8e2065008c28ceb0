"""Reading and writing files."""

from lamina.io.native import load, open, save
from lamina.io.tensorfile import TensorFile, TensorHandle

__all__ = ["TensorFile", "TensorHandle", "load", "open", "save"]
