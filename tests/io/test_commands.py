"""The file commands, run as a user runs them, and the page of the manual on files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lamina
import lamina.io
from lamina.io.commands import add_commands

ROOT = Path(__file__).parents[2]
RANDOM = np.random.default_rng(0)


def run(*words):
    """Run in this process; returns the status. Raises what lamina.cli words for the user."""
    import argparse

    parser = argparse.ArgumentParser(prog="lamina")
    add_commands(parser.add_subparsers(required=True))
    options = parser.parse_args([str(word) for word in words])
    return options.run(options)


def process(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "lamina", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


def state():
    table = RANDOM.standard_normal((7, 4), dtype="f4")
    return {
        "emb.weight": table,
        "enc.0.weight": RANDOM.standard_normal((4, 4), dtype="f4"),
        "enc.0.bias": np.array([0, 1, np.nan, -np.inf], "f4"),
        "enc.1.weight": RANDOM.standard_normal((4, 4)).astype(jnp.bfloat16),
        "steps": np.asarray(3, "i8"),
        "head.weight": table,
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    lamina.io.save(state(), path)
    return path


def test_as_processes(file, tmp_path):
    listed = process("ls", file)
    assert listed.returncode == 0 and listed.stderr == "" and "\x1b" not in listed.stdout
    assert "6 tensors (1 tied), 65 elements" in listed.stdout
    assert re.search(r"\n  weight +\(7, 4\) +float32 +(= emb.weight)\n", listed.stdout)
    missing = process("ls", tmp_path / "nothing")
    assert missing.returncode == 2 and missing.stdout == ""
    assert len(missing.stderr.splitlines()) == 1 and "nothing" in missing.stderr
    lamina.io.save(state(), tmp_path / "b.npz", format="npz")
    assert process("diff", file, tmp_path / "b.npz").returncode == 1


def test_closed_pipe_is_silent(tmp_path):
    lamina.io.save({f"{i}.weight": np.ones(1, "f4") for i in range(5000)}, tmp_path / "x")
    words = f"{sys.executable} -m lamina ls {tmp_path / 'x'} | head -1"
    done = subprocess.run(
        ["bash", "-c", f"{words}; exit ${{PIPESTATUS[0]}}"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 141 and done.stderr == "" and len(done.stdout.splitlines()) == 1


def test_ls(file, capsys):
    assert run("ls", file, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "safetensors" and found["total"]["tensors"] == 6
    assert found["total"]["bytes"] == 112 + 64 + 16 + 32 + 8
    rows = {row["name"]: row for row in found["tensors"]}
    assert rows["enc.1.weight"] == {
        "name": "enc.1.weight", "shape": [4, 4], "dtype": "bfloat16", "bytes": 32,
    }  # fmt: skip
    assert rows["head.weight"]["tied_to"] == "emb.weight"
    for words in (("ls", file, "--json", "enc.*"), ("ls", "--json", file, "enc.0.*", "enc.1.*")):
        assert run(*words) == 0
        assert len(json.loads(capsys.readouterr().out)["tensors"]) == 3
    with pytest.raises(lamina.io.native.FileError, match="no tensor matches 'ecn"):
        run("ls", file, "ecn.*")
    with pytest.raises(lamina.io.native.FileError, match="got no file"):
        run("ls")


@pytest.mark.parity
def test_ls_of_a_torch_file(tmp_path, capsys, torch):
    import argparse

    model = torch.nn.Linear(3, 2)
    torch.save(
        {"model": model.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=1)},
        tmp_path / "x.pt",
    )
    assert run("ls", tmp_path / "x.pt") == 0
    out = capsys.readouterr().out
    assert "epoch: 3" in out and "args: <argparse.Namespace>" in out and "torch-zip" in out
    assert run("check", tmp_path / "x.pt") == 0
    assert run("convert", tmp_path / "x.pt", tmp_path / "y.safetensors") == 0
    assert "left out, being no tensors: epoch, args" in capsys.readouterr().err
    from safetensors.numpy import load_file

    assert load_file(tmp_path / "y.safetensors").keys() == {"model.weight", "model.bias"}


def test_names_cannot_move_the_cursor(tmp_path, capsys):
    lamina.io.save({"a\x1b[2J": np.ones(1)}, tmp_path / "x")
    for command in ("ls", "stat"):
        assert run(command, tmp_path / "x") == 0
    assert "\x1b" not in capsys.readouterr().out


def test_stat(file, capsys):
    assert run("stat", file, "enc.0.*", "--json") == 0
    stats = json.loads(capsys.readouterr().out)["tensors"]
    assert stats["enc.0.bias"]["nan"] == 1 and stats["enc.0.bias"]["inf"] == 1
    assert stats["enc.0.bias"]["zeros"] == 1 and stats["enc.0.bias"]["max"] == 1
    assert run("stat", file) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 6 and "enc.1.weight" in out
    lamina.io.save({"x": np.array([np.nan])}, file)
    assert run("stat", file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["x"]["min"] is None


def test_diff(file, tmp_path, capsys):
    assert run("diff", file, file) == 0
    assert capsys.readouterr().out == "equal: 6 tensors\n"
    with lamina.io.open(file) as opened:
        other = {name: np.array(handle.read()) for name, handle in opened.items()}
    other["enc.0.weight"][1, 2] += 0.5
    other["more"] = np.ones(3)
    del other["steps"]
    lamina.io.save(other, tmp_path / "b", format="torch")
    assert run("diff", file, tmp_path / "b") == 1
    out = capsys.readouterr().out
    assert "- steps: () int64" in out and "+ more: (3,) float64" in out
    assert "~ enc.0.weight: 1 of 16 values, largest difference 0.5" in out
    assert "first at (1, 2)" in out and "4 equal, 3 different" in out
    assert run("diff", file, tmp_path / "b", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["same"] and found["different"][0]["first"] == [1, 2]


def test_diff_with_tolerance(tmp_path, capsys):
    # The first element is within atol only, the second within rtol only.
    first, second = np.array([1e-6, 1000.0, np.nan]), np.array([2e-6, 1000.5, np.nan])
    lamina.io.save({"x": first, "y": first.reshape(3, 1)}, tmp_path / "a")
    lamina.io.save({"x": second, "y": second.reshape(3, 1)}, tmp_path / "b")
    assert run("diff", tmp_path / "a", tmp_path / "b", "--rtol", "1e-3", "--atol", "1e-5") == 0
    assert run("diff", tmp_path / "a", tmp_path / "b", "--rtol", "1e-3") == 1
    assert run("diff", tmp_path / "a", tmp_path / "b", "--atol", "1e-5") == 1
    with pytest.raises(SystemExit):
        run("diff", tmp_path / "a", tmp_path / "b", "--atol", "-1")


def test_check(file, capsys):
    assert run("check", file) == 0
    assert "5 checksums agree" in capsys.readouterr().out
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(lamina.io.native.FileError, match="damaged"):
        run("check", file)
    lamina.io.save(state(), file, checksums=False)
    assert run("check", file) == 0
    assert "every byte read" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["safetensors", "npz", "pt"])
def test_convert_to_every_format_and_back(file, tmp_path, ending):
    assert run("convert", file, tmp_path / f"b.{ending}") == 0
    assert run("convert", tmp_path / f"b.{ending}", tmp_path / "c") == 0
    assert run("diff", file, tmp_path / "c") == 0
    with lamina.io.open(tmp_path / "c") as back:
        assert back.ties == {"head.weight": "emb.weight"}


@pytest.mark.parity
def test_convert_for_torch(file, tmp_path, torch):
    assert run("convert", file, tmp_path / "b.pt", "--dtype", "bf16") == 0
    loaded = torch.load(tmp_path / "b.pt", weights_only=True)
    assert loaded["emb.weight"].dtype == torch.bfloat16 and loaded["steps"].dtype == torch.int64
    assert loaded["emb.weight"].data_ptr() == loaded["head.weight"].data_ptr()


def test_convert_options(file, tmp_path, capsys):
    target = tmp_path / "b.safetensors"
    assert run("convert", file, target, "--only", "enc.*", "--rename", "enc.*.weight=e.{0}.w",
               "--dtype", "f16") == 0  # fmt: skip
    with lamina.io.open(target) as made:
        assert set(made) == {"e.0.w", "enc.0.bias", "e.1.w"}
        assert {handle.dtype for handle in made.values()} == {np.dtype("f2")}
    before = target.read_bytes()
    with pytest.raises(lamina.io.native.FileError, match="exists already; pass --force"):
        run("convert", file, target)
    assert target.read_bytes() == before
    assert run("convert", file, target, "--force", "--shard", "100") == 0
    assert not target.exists() and len(list(tmp_path.glob("b-*.safetensors"))) > 1
    assert run("diff", file, f"{target}.index.json") == 0
    assert run("convert", file, file, "--force", "--dtype", "bf16") == 0
    assert sorted(os.listdir(tmp_path))[0] == "a.safetensors"
    for words in (("--dtype", "int8"), ("--dtype", "bf17"), ("--shard", "many")):
        with pytest.raises(SystemExit):
            run("convert", file, target, "--force", *words)
    with pytest.raises(lamina.io.rename.RuleError, match="matches nothing"):
        run("convert", file, tmp_path / "new", "--rename", "x=y")
    with pytest.raises(lamina.io.rename.RuleError, match="both become"):
        run("convert", file, tmp_path / "new", "--rename", "enc.*.weight=w")
    with pytest.raises(lamina.io.native.FileError, match="--shard needs"):
        run("convert", file, tmp_path / "new.npz", "--shard", "1MB")
    assert not (tmp_path / "new").exists()
    capsys.readouterr()
    lamina.io.save({"x": np.array([1.0, 1e6, np.inf])}, tmp_path / "big")
    assert run("convert", tmp_path / "big", tmp_path / "small", "--dtype", "f16") == 0
    assert "1 values are too large for float16" in capsys.readouterr().err


def test_convert_keeps_the_structure(tmp_path):
    tree = {"model": {"w": np.ones(3, "f4")}, "history": [1, 2.5, None], "pair": (True, "x")}
    lamina.io.save(tree, tmp_path / "a")
    assert run("convert", tmp_path / "a", tmp_path / "b.npz") == 0
    back = lamina.io.load(tmp_path / "b.npz", numpy=True)
    assert back["history"] == [1, 2.5, None] and back["pair"] == (True, "x")


def test_convert_of_what_is_not_as_it_will_be_written(tmp_path):
    np.savez_compressed(
        tmp_path / "a.npz", big=np.arange(6, dtype=">f4"), turned=np.ones((3, 5)).T,
        empty=np.zeros((0, 3), "f4"), scalar=np.float32(3), packed=np.zeros(100_000, "f4"),
    )  # fmt: skip
    assert run("convert", tmp_path / "a.npz", tmp_path / "b") == 0
    assert run("diff", tmp_path / "a.npz", tmp_path / "b") == 0
    assert run("convert", tmp_path / "a.npz", tmp_path / "c", "--dtype", "f32") == 0
    with lamina.io.open(tmp_path / "c") as made:
        assert made["turned"].read().tolist() == np.ones((5, 3)).tolist()
        assert made["empty"].shape == (0, 3) and made["scalar"].read() == 3


def test_the_page_on_files(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 8
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "docs/files.md", "exec"), scope)
