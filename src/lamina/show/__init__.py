"""Looking at models and parameters: tables, statistics, pictures."""

from .image import save_image
from .statistics import Description, Statistics, describe
from .summary import Summary, summary

__all__ = ["Description", "Statistics", "Summary", "describe", "save_image", "summary"]
