"""Looking at models and parameters: tables, statistics, pictures."""

from .summary import Summary, summary

__all__ = ["Summary", "summary"]
