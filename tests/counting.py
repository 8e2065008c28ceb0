"""Counts entries of functions and compilations, from outside of them; shared by test files."""

import sys

import jax


class Watch:
    """Counts, within a ``with`` block, how often functions are entered and XLA compiles.

    A count kept by the function itself would be a change of state, which compiled functions refuse.
    """

    def __init__(self, *fns):
        self.codes = {id(fn.__code__) for fn in fns}
        self.runs = self.compiles = 0

    def __enter__(self):
        self.before = sys.getprofile()
        jax.monitoring.register_event_duration_secs_listener(self.listen)
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_):
        sys.setprofile(self.before)
        jax.monitoring.unregister_event_duration_listener(self.listen)

    def note(self, frame, event, _):
        if event == "call" and id(frame.f_code) in self.codes:
            self.runs += 1

    def listen(self, event, *_, **__):
        self.compiles += event == "/jax/core/compile/backend_compile_duration"
