"""Truncations, bit flips and random opcodes: an error of lamina's, or tensors of the right size."""

import random
import runpy
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

FUZZ = runpy.run_path(str(Path(__file__).with_name("fuzz_torch.py")))
SEEDS = FUZZ["seeds"]()
QUICK = hypothesis.settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("name", SEEDS)
def test_every_truncation(name, tmp_path):
    opener, content = SEEDS[name]
    step = max(1, len(content) // 200)
    assert FUZZ["use"](opener, content, tmp_path / "x")
    for length in range(0, len(content), step):
        FUZZ["use"](opener, content[:length], tmp_path / "x")


@QUICK
@hypothesis.given(
    name=st.sampled_from(sorted(SEEDS)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1),
)
def test_flipped_bits(name, flips, tmp_path):
    opener, content = SEEDS[name]
    damaged = bytearray(content)
    for where, bit in flips:
        damaged[int(where * len(damaged))] ^= 1 << bit
    FUZZ["use"](opener, bytes(damaged), tmp_path / "x")


@QUICK
@hypothesis.given(body=st.binary(max_size=200))
def test_any_bytes_as_a_pickle(body, tmp_path):
    opener, _ = SEEDS["zip by hand"]
    FUZZ["use"](opener, FUZZ["open_pickle"](b"\x80\x02" + body + b"."), tmp_path / "x")


@pytest.mark.parametrize("seed", range(4))
def test_damage_of_all_kinds(seed, tmp_path):
    rng = random.Random(seed)
    opened = [FUZZ["one"](rng, SEEDS, tmp_path / "x") for _ in range(300)]
    assert 0 < sum(opened) < len(opened)
