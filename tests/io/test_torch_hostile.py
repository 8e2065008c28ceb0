"""The hostile files of PyTorch's formats: each ends in a clear error, or opens and does nothing."""

import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lamina.io
from lamina._core.errors import FileError

SCRIPT = Path(__file__).with_name("hostile_torch.py")
HOSTILE = runpy.run_path(str(SCRIPT))
CORPUS = HOSTILE["CORPUS"]


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_file(name, tmp_path, monkeypatch):
    content, message = CORPUS[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    start = time.perf_counter()
    if message is None:
        HOSTILE["use"](path, content)
    else:
        with pytest.raises(FileError) as caught:
            HOSTILE["use"](path, content)
        text = str(caught.value)
        assert text.startswith(str(path))
        assert re.search(message, text), text
        assert text.isprintable()
        assert len(text) < 1000
    # Far above what any row takes; a hang or a bomb would pass it by orders of magnitude.
    assert time.perf_counter() - start < 30
    assert [child.name for child in tmp_path.iterdir()] == ["model.pt"]


def test_whole_corpus_under_watch(tmp_path):
    """Nothing is imported, run or opened, and memory stays within a limit."""
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    path = {"PYTHONPATH": str(Path(lamina.io.__file__).parents[2])}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(CORPUS)} files" in done.stdout
    assert not (tmp_path / "CANARY").exists()
