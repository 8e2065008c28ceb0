"""What a transformed function did besides returning: writes and random draws."""

from __future__ import annotations

from typing import Any

from .._core import bind
from .._core.bind import Cell, Frame
from .._core.box import Box
from .._core.hooks import refuse_kept
from .._core.module import Module
from .._core.random import note_draws
from .._core.trees import Carrier
from .._core.walk import cells_of

__all__ = ["Effects"]


class Effects:
    """Opens the frame of a transform, and passes on what was done in it.

    Made before JAX is called: inside, the open trace is already the transform's own.

    Attributes:
        written: cells of the outside that were written.
        returned: cells made inside that are returned with their modules. What else is made inside
            ends there.
    """

    def __init__(self, kind: str, **options: Any) -> None:
        self.kind, self.options = kind, options
        self.foreign = bind.under_foreign()
        self.written: list[Cell] = []
        self.returned: list[Cell] = []
        self.draws: dict[Cell, int] = {}

    def frame(self, lane: Any = None) -> Frame:
        """Return a new frame, to be entered while the function is traced."""
        lanes = () if lane is None else (lane,)
        return Frame(self.kind, lanes=lanes, foreign=self.foreign, **self.options)

    def note(self, frame: Frame, *results: Carrier) -> None:
        """Note what was done in a frame that is about to close."""
        self.written = [cell for cell in frame.written if cell not in frame.born]
        self.draws = frame.draws
        models = [x for r in results if frame.born for x in r.parts.rest if isinstance(x, Module)]
        cells = dict.fromkeys(cell for model in models for cell in cells_of(model))
        self.returned = [cell for cell in cells if cell in frame.born and not cell.is_empty]

    def collect(self, frame: Frame, *results: Carrier) -> list[Any]:
        """Note what was done; return the values of what was written or is returned."""
        self.note(frame, *results)
        return frame.collect([*self.written, *self.returned])

    def pass_on(self, values: Any) -> None:
        """Write the values, as the transform returned them, into the cells outside of it."""
        refuse_kept()
        count = len(self.written)
        bind.write_all(self.written, values[:count])
        for cell, value in zip(self.returned, values[count:], strict=True):
            cell.replace(value) if isinstance(cell, Box) else bind.write(cell, value)
        note_draws(self.draws)
