"""What is public: exported, documented with an example, and in the golden list."""

import doctest
import importlib
import inspect
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "public_api.txt"
MODULES = ["lamina", "lamina.nn", "lamina.nn.functional", "lamina.nn.init", "lamina.io"]
# Names that need no example, each with the reason.
WITHOUT_EXAMPLE: dict[str, str] = {}

UPDATE = """the public API has changed. If that is meant, write it into the golden list,

    python tests/test_public_api.py

and say so in CHANGELOG.md."""


def public_names():
    names = []
    for module in MODULES:
        exported = importlib.import_module(module).__all__
        assert len(exported) == len(set(exported)), f"{module}.__all__ names something twice"
        names += [f"{module}.{name}" for name in exported]
    return sorted(names)


def public_object(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def examples(text):
    return doctest.DocTestParser().get_examples(inspect.cleandoc(text or ""))


def test_the_golden_list():
    golden = GOLDEN.read_text(encoding="utf-8").split()
    current = public_names()
    added, removed = sorted(set(current) - set(golden)), sorted(set(golden) - set(current))
    assert current == golden, f"added {added}, removed {removed}: {UPDATE}"


@pytest.mark.parametrize("name", public_names())
def test_public_things_are_documented_with_an_example(name):
    thing = public_object(name)
    text = thing.__doc__ or ""
    assert text.strip(), f"{name} has no docstring"
    own = inspect.cleandoc(text)
    assert len(own.split("\n\n")[0].split("\n")) <= 3, f"{name}: begin with one short paragraph"
    if inspect.ismodule(thing):
        return
    inherited = inspect.isclass(thing) and any(text == base.__doc__ for base in thing.__mro__[1:])
    assert not inherited, f"{name} has no docstring of its own"
    if name not in WITHOUT_EXAMPLE:
        assert examples(text), f"{name} has no runnable example"


def test_the_allow_list_is_needed():
    unneeded = [name for name in WITHOUT_EXAMPLE if examples(public_object(name).__doc__)]
    assert not unneeded


def described_functions():
    """Names of the functions that have an ``Args:`` section."""
    things = {name: public_object(name) for name in public_names()}
    return [
        n for n, t in things.items() if inspect.isfunction(t) and "Args:\n" in (t.__doc__ or "")
    ]


@pytest.mark.parametrize("name", described_functions())
def test_an_args_section_names_every_argument(name):
    """In the function's own docstring, or in that of a file whose functions share arguments."""
    thing = public_object(name)
    texts = [thing.__doc__, sys.modules[thing.__module__].__doc__]
    sections = [
        inspect.cleandoc(t).split("Args:\n")[1].split("\n\n")[0] for t in texts if "Args:\n" in t
    ]
    section = "\n".join(sections)
    missing = [key for key in inspect.signature(thing).parameters if key not in section]
    assert not missing


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(public_names()) + "\n", encoding="utf-8")
