"""What a transformed function did besides returning: writes and random draws."""

from __future__ import annotations

from typing import Any

from .._core import bind
from .._core.bind import Cell, Frame

__all__ = ["Effects"]


class Effects:
    """Opens the frame of a transform, and passes on what was done in it.

    Made before JAX is called: inside, the open trace is already the transform's own.
    """

    def __init__(self, kind: str, **options: Any) -> None:
        self.kind, self.options = kind, options
        self.foreign = bind.under_foreign()
        self.written: list[Cell] = []
        self.draws: dict[Cell, int] = {}

    def frame(self, lane: Any = None) -> Frame:
        """Return a new frame, to be entered while the function is traced."""
        lanes = () if lane is None else (lane,)
        return Frame(self.kind, lanes=lanes, foreign=self.foreign, **self.options)

    def collect(self, frame: Frame) -> list[Any]:
        """Note what was done in a frame that is about to close; return the written values."""
        self.written, self.draws = list(frame.written), frame.draws
        return frame.collect()

    def pass_on(self, values: Any) -> None:
        """Write the values, as the transform returned them, into the cells outside of it."""
        bind.write_all(self.written, values)
        bind.note_draws(self.draws)
