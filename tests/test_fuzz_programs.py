"""Random programs: compiled, uncompiled and mirror agree, whatever happens between calls."""

import importlib.util
import pathlib
import sys

import pytest

_PATH = pathlib.Path(__file__).parent / "fuzz_programs.py"
_LOADER = importlib.util.spec_from_file_location("lamina_fuzz_programs", _PATH)
fuzz = sys.modules[_LOADER.name] = importlib.util.module_from_spec(_LOADER)
_LOADER.loader.exec_module(fuzz)

MOST_REFUSED = 0.2  # a core that refuses everything agrees with everybody


def agree(seeds):
    """Run the programs of some seeds; a failing one is cut down to what it needs."""
    tally = fuzz.Tally()
    for seed in seeds:
        try:
            fuzz.check(fuzz.write_program(seed), tally)
        except fuzz.Failure as failure:
            pytest.fail(f"seed {seed}: {fuzz.minimal(failure).report()}", pytrace=False)
    assert tally.share <= MOST_REFUSED, tally.table(reasons=True)


@pytest.mark.parametrize("first", range(0, 24, 4))
def test_programs_agree_compiled_and_uncompiled(first):
    agree(range(first, first + 4))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1200, 50))
def test_more_programs_agree_compiled_and_uncompiled(first):
    agree(range(first, first + 20))


def test_one_seed_gives_one_program():
    assert fuzz.write_program(3).source() == fuzz.write_program(3).source()
    assert fuzz.write_program(3).source() != fuzz.write_program(4).source()


def program(*texts, mirrored=True):
    made = tuple(fuzz.Line(text, "line") for text in texts)
    return fuzz.Program(made, frozenset(made), mirrored)


MODEL = "net0 = fill(nn.Sequential(nn.Tanh(), nn.Linear(3, 3)), 1)"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("out = lamina.jit.__module__", "result"),
        ("net0[1].bias.data = jnp.full(3, len(lamina.jit.__module__))", "state"),
        ("jax.eval_shape(lambda x: kept.append(x), x4)\nout = kept", "tracer"),
        ("out = jnp.ones(3)\nout.delete()", "deleted"),
        ("out = 1 / 0", "raised ZeroDivisionError"),
        ("import warnings\nwarnings.warn('donated')", "raised UserWarning"),
        ("raise lamina.errors.ShapeError('sizes differ')", "refusal without a fix"),
    ],
)
def test_a_program_that_is_wrong_is_found_and_cut_down(line, kind):
    lines = ["kept = []", MODEL, "out = net0(x4)", "out = net0(x5)", line, "out = net0(x4)"]
    failure = fuzz.minimal(fuzz.failure_of(program(*lines)))
    assert failure.kind == kind
    assert len(failure.program.lines) <= 2
    assert line.splitlines()[0] in failure.report()


def test_an_array_that_changes_after_it_was_handed_out_is_found():
    lines = ["out = kept = jnp.ones(3)", MODEL, "out = net0(x4)", "kept.delete()", "out = net0(x4)"]
    failure = fuzz.minimal(fuzz.failure_of(program(*lines)))
    assert failure.kind == "deleted"
    assert "handed out earlier" in failure.text


def test_a_model_that_is_kept_alive_is_found():
    lines = [MODEL, "out = net0(x4)", "gc.kept_alive = net0"]
    try:
        assert fuzz.failure_of(program(*lines)).kind == "leak"
    finally:
        del fuzz.gc.kept_alive


def test_a_refusal_that_changes_something_is_found():
    refuse = "raise lamina.errors.ShapeError('sizes differ\\n    fix:  other sizes')"
    assert fuzz.failure_of(program(MODEL, refuse, "out = net0(x4)")) is None
    failure = fuzz.failure_of(program(MODEL, f"net0[1].bias.data = jnp.ones(3)\n{refuse}"))
    assert failure.kind == "state after a refusal"


def test_the_printed_program_runs(tmp_path, capsys):
    source = program(MODEL, "out = lamina.jit(net0)(x4)").source()
    exec(compile(source, "program", "exec"), {"__name__": "program"})
    assert capsys.readouterr().out.startswith("[[")
