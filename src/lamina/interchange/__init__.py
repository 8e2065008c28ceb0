"""Models for other environments: programs that run without the model's Python code."""

from .onnx import export_onnx
from .stablehlo import ExportedModule, export, load_exported

__all__ = ["ExportedModule", "export", "export_onnx", "load_exported"]
