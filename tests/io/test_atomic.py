"""A save happens completely or not at all: full disks, kills, modes, links, mapped files."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lamina.io
import lamina.io.atomic
from lamina._core.errors import FileError
from lamina.io.atomic import replacing, write_at

KILL_SCRIPT = Path(__file__).with_name("kill_script.py")
SOURCE = str(Path(lamina.io.__file__).parents[2])


@pytest.fixture(params=["nameless", "temporary"])
def way(request, monkeypatch):
    """Both ways to write: a file without a name, and where that does not exist a temporary one."""
    if request.param == "temporary":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return request.param


def put(path, data, **options):
    with replacing(path, len(data), **options) as fd:
        write_at(fd, 0, [np.frombuffer(data, np.uint8)])


def test_writes_and_replaces(tmp_path, way):
    path = tmp_path / "x"
    for data in (b"first", b"second one", b""):
        put(path, data)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["x"]


def test_new_files_follow_umask_and_old_ones_keep_their_mode(tmp_path, way):
    before = os.umask(0o027)
    try:
        put(tmp_path / "new", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    put(tmp_path / "new", b"y")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_error_leaves_the_old_file(tmp_path, way, error):
    path = tmp_path / "x"
    put(path, b"old")
    with pytest.raises(error), replacing(path, 10) as fd:
        write_at(fd, 0, [np.ones(5, np.uint8)])
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_a_failed_rename_leaves_nothing(tmp_path, way, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="broken"):
        put(tmp_path / "x", b"data")
    assert os.listdir(tmp_path) == []


def test_links_are_followed(tmp_path, way):
    (tmp_path / "real").mkdir()
    put(tmp_path / "real" / "x", b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "x")
    put(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_bytes() == b"new"
    os.link(tmp_path / "real" / "x", tmp_path / "hard")
    put(tmp_path / "real" / "x", b"newer")
    assert (tmp_path / "hard").read_bytes() == b"new"


def test_long_names(tmp_path, way):
    name = "ü" * 127
    put(tmp_path / name, b"x")
    assert os.listdir(tmp_path) == [name]


def test_wrong_targets(tmp_path):
    with pytest.raises(FileError, match="over a directory"):
        put(tmp_path, b"x")
    with pytest.raises(FileError, match="not a regular file"):
        put("/dev/null", b"x")
    with pytest.raises(FileNotFoundError, match="directory does not exist"):
        put(tmp_path / "none" / "x", b"x")


def test_read_only(tmp_path):
    """Root may write anywhere, so the rule is tried as another user."""
    (tmp_path / "dir").mkdir()
    path = tmp_path / "dir" / "x"
    put(path, b"old")
    path.chmod(0o444)
    (tmp_path / "dir").chmod(0o555)
    code = (
        "import os, sys\n"
        "from lamina.io.atomic import replacing\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for name in ('x', 'new'):\n"
        "    try:\n"
        "        with replacing(os.path.join(sys.argv[1], name), 3): pass\n"
        "    except PermissionError as error: print(error)\n"
    )
    parents = [p for p in path.parents if p != Path("/") and not p.stat().st_mode & 0o001]
    modes = [(p, p.stat().st_mode) for p in parents]
    try:
        for parent in parents:
            parent.chmod(0o755)
        out = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "dir")],
            env={**os.environ, "PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        for parent, mode in modes:
            parent.chmod(stat.S_IMODE(mode))
        (tmp_path / "dir").chmod(0o755)
    if "PermissionError" in out.stderr and "lamina" not in out.stdout:
        pytest.skip("another user cannot read the interpreter here")
    assert "the file is read-only" in out.stdout, out.stderr
    assert out.stdout.count("Permission denied") >= 1 or out.stdout.count("\n") == 2
    assert path.read_bytes() == b"old" and os.listdir(tmp_path / "dir") == ["x"]


def test_a_limit_on_file_size(tmp_path, way):
    """The kernel refuses the space when it is reserved, before a byte is written."""
    path = tmp_path / "x"
    lamina.io.save({"w": jnp.ones(10)}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            lamina.io.save({"w": jnp.ones(100_000)}, path)
        with pytest.raises(OSError, match="File too large"):
            lamina.io.save({"w": jnp.ones(100_000)}, path, format="npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x"]


@pytest.fixture
def small_disk():
    """A file system of 2 MiB."""
    directory = tempfile.mkdtemp()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "lamina-test", directory], capture_output=True
    )
    if mounted.returncode:
        os.rmdir(directory)
        pytest.skip("cannot mount a small file system: " + mounted.stderr.decode().strip())
    yield Path(directory)
    subprocess.run(["umount", directory], check=True)
    os.rmdir(directory)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
@pytest.mark.parametrize("format", ["safetensors", "npz"])
def test_full_disk(small_disk, way, format):
    path = small_disk / "x"
    old = {"w": jnp.ones(300_000)}
    lamina.io.save(old, path, format=format)
    with pytest.raises(OSError, match="No space left") as caught:
        lamina.io.save({"w": jnp.zeros(300_000)}, path, format=format)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(small_disk) == ["x"]
    assert float(lamina.io.load(path, copy=True)["w"].sum()) == 300_000
    # The failed save gave its space back.
    lamina.io.save({"w": jnp.zeros(100_000)}, small_disk / "y", format=format)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command")
def test_full_disk_sharded(small_disk):
    path = small_disk / "model.safetensors"
    lamina.io.save({f"w{i}": jnp.ones(50_000) for i in range(6)}, path, max_shard_size="500KB")
    before = set(os.listdir(small_disk))
    with pytest.raises(OSError, match="No space left"):
        lamina.io.save({f"w{i}": jnp.zeros(50_000) for i in range(6)}, path, max_shard_size="500KB")
    assert set(os.listdir(small_disk)) == before
    assert float(lamina.io.load(small_disk, copy=True)["w5"][0]) == 1


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, buffers, at: real(fd, [memoryview(buffers[0])[:7]], at)
    )
    pieces = [np.arange(i, i + 20, dtype=np.uint8) for i in range(5)]
    with open(tmp_path / "x", "wb") as file:
        write_at(file.fileno(), 3, pieces)
    assert (tmp_path / "x").read_bytes()[3:] == b"".join(p.tobytes() for p in pieces)


def test_short_writes_inside_a_batch(tmp_path, monkeypatch):
    real, sizes = os.pwritev, iter([1, 20, 21, 59, 7] + [1000] * 9)

    def short(fd, buffers, at):
        data = b"".join(memoryview(b).tobytes() for b in buffers)
        return real(fd, [data[: next(sizes)]], at)

    monkeypatch.setattr(os, "pwritev", short)
    pieces = [np.arange(i, i + 20, dtype=np.uint8) for i in range(30)]
    with open(tmp_path / "x", "wb") as file:
        write_at(file.fileno(), 0, pieces)
    assert (tmp_path / "x").read_bytes() == b"".join(p.tobytes() for p in pieces)


def test_short_reads_are_continued(tmp_path, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:7]], at))
    tensors = {f"w{i}": np.arange(i, i + 11, dtype="f4") for i in range(20)}
    lamina.io.save(tensors, tmp_path / "x")
    for name, array in lamina.io.load(tmp_path / "x", copy=True, numpy=True).items():
        np.testing.assert_array_equal(array, tensors[name])


def test_replaced_and_removed_while_mapped(tmp_path):
    path = tmp_path / "x"
    lamina.io.save({"w": jnp.arange(50000.0)}, path)
    with lamina.io.open(path) as file:
        mapped = file["w"].read()
        loaded = lamina.io.load(path)["w"]
        lamina.io.save({"w": jnp.zeros(10)}, path)
        np.testing.assert_array_equal(file["w"].read(slice(10)), np.arange(10.0))
        path.unlink()
        assert mapped[-1] == loaded[-1] == 49999


def test_truncated_while_open(tmp_path):
    path = tmp_path / "x"
    lamina.io.save({"w": jnp.arange(50000.0), "v": jnp.ones(3)}, path)
    with lamina.io.open(path) as file:
        os.truncate(path, 1000)
        for read in (file["w"].read, lambda: list(file["w"].chunks()), file.verify):
            with pytest.raises(FileError, match="truncated while it was open"):
                read()


@pytest.mark.parametrize("method", ["nameless", "temporary", "sharded", "npz"])
def test_kill(tmp_path, method):
    """A few rounds of the longer script: whatever the moment, one whole checkpoint is there."""
    process = subprocess.run(
        [sys.executable, str(KILL_SCRIPT), "--kills", "5", "--method", method, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "5 kills" in process.stdout


def test_interrupt_during_a_save(tmp_path):
    code = (
        "import sys, numpy as np, lamina.io\n"
        "big = {'w': np.ones(200_000_000, 'u1')}\n"
        "print('ready', flush=True)\n"
        "while True: lamina.io.save(big, sys.argv[1])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "x")],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with contextlib.closing(process.stdout):
        process.stdout.readline()
        time.sleep(0.15)
        process.send_signal(signal.SIGINT)
        process.wait(30)
    assert set(os.listdir(tmp_path)) <= {"x"}


def test_a_disk_that_accepts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: 0)
    with pytest.raises(OSError, match="accepts no more data"):
        lamina.io.save({"w": jnp.ones(10)}, tmp_path / "x")
    assert os.listdir(tmp_path) == []
