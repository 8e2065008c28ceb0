"""Checkpoints: what is restored, what is kept, what survives kills, full disks and damage."""

import contextlib
import errno
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lamina
import lamina.io
from lamina import nn
from lamina._core.errors import FileError, ForeignTransformError, LoadError, TypeMismatchError
from lamina.io import checkpoints as module
from lamina.io import step_files
from lamina.io.checkpoints import Checkpoints

HERE = Path(__file__).parent
SOURCE = str(Path(lamina.io.__file__).parents[2])
PAGE = HERE.parents[1] / "docs" / "checkpoints.md"


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": SOURCE, "XLA_FLAGS": "", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def training(width=3):
    net = nn.Sequential(nn.LazyLinear(width), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    return net, lamina.Optimizer(net, optax.adam(0.1))


def trained(width=3, steps=1):
    net, opt = training(width)
    for _ in range(steps):
        loss = lamina.backward(lambda: (net(jnp.ones((4, 2))) ** 2).mean())
        opt.step()
        opt.zero_grad()
    assert loss is not None
    return net, opt


def values(net, opt):
    state = {**net.state_dict(), **opt.state_dict()}
    return {name: np.asarray(value).tobytes() for name, value in state.items()}


def listing(directory):
    return sorted(name for name in os.listdir(directory) if name != ".lock")


# What comes back.


def test_a_restored_run_continues_bit_for_bit(tmp_path):
    script = HERE / "train_script.py"
    with ThreadPoolExecutor(2) as pool:
        first = pool.map(
            lambda run: python(script, tmp_path / run[0], 0, run[1]), [("whole", 6), ("parts", 3)]
        )
    runs = [*first, python(script, tmp_path / "parts", 3, 6)]
    assert not any(run.returncode for run in runs), "".join(run.stderr for run in runs)
    assert runs[0].stdout == runs[2].stdout != runs[1].stdout
    assert runs[0].stdout.count("\n") == 25
    for name in ("model", "optimizer", "position"):
        one, two = (
            tmp_path / run / f"step_00000006/{name}.safetensors" for run in ("whole", "parts")
        )
        assert one.read_bytes() == two.read_bytes()


def test_everything_comes_back(tmp_path):
    net, opt = trained()
    order = np.arange(5)
    data = {"order": order, "epoch": 2, "big": 2**100, "pair": (1, None), "key": jnp.ones(2)}
    lamina.manual_seed(3)
    lamina.next_key()
    with Checkpoints(tmp_path / "new" / "run") as checkpoints:
        assert checkpoints.save(
            10, net, opt, data=data, metrics={"loss": jnp.float32(0.1), "nan": np.nan},
            metadata={"note": "ä", "rates": [0.1, 1e-300], "none": None},
        )  # fmt: skip
        order[:] = 0  # after the snapshot
    expected = np.asarray(jax.random.key_data(lamina.next_key()))
    before = values(net, opt)
    fresh, fresh_opt = training()
    lamina.infer(fresh, jnp.ones((4, 2)))
    found = Checkpoints(tmp_path / "new" / "run").restore(fresh, fresh_opt)
    assert values(fresh, fresh_opt) == before
    assert found.step == 10 and found.path == str(tmp_path / "new/run/step_00000010")
    assert found.data["order"].tolist() == [0, 1, 2, 3, 4] and found.data["order"].flags.writeable
    assert found.data["order"].dtype == np.int64 and found.data["pair"] == (1, None)
    assert found.data["big"] == 2**100 and found.data["key"].tolist() == [1, 1]
    assert found.metrics["loss"] == float(np.float32(0.1)) and np.isnan(found.metrics["nan"])
    assert found.metadata == {"note": "ä", "rates": [0.1, 1e-300], "none": None}
    np.testing.assert_array_equal(jax.random.key_data(lamina.next_key()), expected)


def test_an_unshaped_model_makes_no_random_values(tmp_path):
    net, opt = trained()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, net, opt)

    def never(key, shape, dtype):
        raise AssertionError("a random value was made")

    fresh, fresh_opt = training()
    for parameter in fresh.parameters():
        parameter.init = never
    assert checkpoints.restore(fresh, fresh_opt).step == 0
    assert values(fresh, fresh_opt) == values(net, opt)
    np.testing.assert_array_equal(fresh.eval()(jnp.ones((1, 2))), net.eval()(jnp.ones((1, 2))))


def test_a_snapshot_is_of_its_moment(tmp_path, monkeypatch):
    """Training goes on, compiled and with donation, while the writer has not begun."""
    net, opt = trained()
    begin = threading.Event()
    write = module.write_step
    monkeypatch.setattr(module, "write_step", lambda *a: begin.wait() and write(*a))

    @lamina.jit
    def train_step(net, opt):
        _, grads = lamina.value_and_grad(lambda net: (net(jnp.ones((4, 2))) ** 2).mean())(net)
        opt.step(grads)

    train_step(net, opt)
    checkpoints = Checkpoints(tmp_path)
    before = values(net, opt)
    train_step(net, opt)
    train_step(net, opt)
    before = values(net, opt)
    checkpoints.save(1, net, opt)
    for _ in range(3):
        train_step(net, opt)
    begin.set()
    fresh, fresh_opt = training()
    checkpoints.restore(fresh, fresh_opt)
    assert values(fresh, fresh_opt) == before != values(net, opt)


def test_the_files_are_ordinary(tmp_path):
    from safetensors.numpy import load_file

    net, opt = trained()
    net[2].register_parameter("again", net[0].bias)  # a tie
    Checkpoints(tmp_path, background=False).save(5, net, opt)
    path = tmp_path / "step_00000005"
    assert listing(path) == [
        "checkpoint.json", "model.safetensors", "optimizer.safetensors", "position.safetensors"
    ]  # fmt: skip
    loaded = load_file(path / "model.safetensors")
    np.testing.assert_array_equal(loaded["0.weight"], net[0].weight)
    assert loaded["1.num_batches_tracked"].dtype == np.int64 and "2.again" not in loaded
    assert json.loads((path / "checkpoint.json").read_text())["step"] == 5
    fresh = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    fresh[2].register_parameter("again", fresh[0].bias)
    Checkpoints(tmp_path).restore(fresh)
    np.testing.assert_array_equal(fresh[2].again, net[0].bias)


# Which steps there are.


def test_keep_every_and_force(tmp_path):
    net, _ = trained()
    with Checkpoints(tmp_path, keep=2, every=5) as checkpoints:
        saved = [step for step in range(21) if checkpoints.save(step, net)]
        assert saved == [0, 5, 10, 15, 20] and checkpoints.steps() == [15, 20]
        assert checkpoints.save(np.int64(22), net, force=True)
        assert checkpoints.latest() == 22 and checkpoints.steps() == [20, 22]
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for step in range(23, 27):
            checkpoints.save(step)
        assert len(checkpoints.steps()) == 6


def test_best_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep=1, best="val_loss") as checkpoints:
        for step, loss in enumerate([0.5, 0.2, np.nan, 0.4, 0.2, 0.3]):
            checkpoints.save(step, metrics={"val_loss": loss})
        assert checkpoints.best() == 4 and checkpoints.steps() == [4, 5]
        assert checkpoints.restore(step="best").metrics == {"val_loss": 0.2}
        checkpoints.save(6)
        assert checkpoints.best() == 4
        with pytest.raises(ValueError, match="Did you mean 'val_los'"):
            checkpoints.save(7, metrics={"val_los": 1})
    assert Checkpoints(tmp_path, best="max:val_loss").best() == 4


def test_best_of_step_zero(tmp_path):
    with Checkpoints(tmp_path, keep=1, best="max:accuracy") as checkpoints:
        for step in range(3):
            checkpoints.save(step, metrics={"accuracy": -step})
        assert checkpoints.best() == 0 and checkpoints.steps() == [0, 2]


def test_which_direction():
    for best in ("elbo", "max:", "least:loss", "max_loss_x"):
        with pytest.raises(ValueError, match='"min:.*" or "max:'):
            Checkpoints("never", best=best)
    with pytest.raises(ValueError, match="which metric"):
        Checkpoints("never").best()
    assert not os.path.exists("never")


def test_a_step_is_replaced(tmp_path):
    checkpoints = Checkpoints(tmp_path, background=False)
    for part in (1, 2):
        checkpoints.save(7, data=part)
    assert checkpoints.steps() == [7] and listing(tmp_path) == ["step_00000007"]
    assert checkpoints.restore().data == 2


def test_an_older_step_that_is_saved_again_is_not_removed_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, background=False)
    checkpoints.save(9)
    checkpoints.save(3)
    assert checkpoints.steps() == [3, 9]


@pytest.mark.parametrize("moment", ["both there", "old one hidden"])
def test_a_replacement_that_was_cut_off_is_finished(tmp_path, moment):
    checkpoints = Checkpoints(tmp_path, background=False)
    checkpoints.save(7, data="old")
    step_files.write_step(str(tmp_path), 8, {}, {}, None)
    other = Checkpoints(tmp_path / "other", background=False)
    other.save(7, data="new")
    os.rename(tmp_path / "other" / "step_00000007", tmp_path / "step_00000007.new")
    if moment == "old one hidden":
        os.rename(tmp_path / "step_00000007", tmp_path / ".step_00000007.00ff.old")
    assert checkpoints.restore(step=7).data == "new"  # before it is finished
    assert Checkpoints(tmp_path).restore(step=7).data == "new"
    assert listing(tmp_path) == ["other", "step_00000007", "step_00000008"]


def test_other_names_are_left_alone(tmp_path):
    for name in ("step_7", "step_0000000x", "notes.txt", ".step_00000001.zz.tmp", "step_000000007"):
        (tmp_path / name).mkdir()
    assert Checkpoints(tmp_path).steps() == []
    assert len(listing(tmp_path)) == 5


# Errors.


def test_wrong_use(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint, there are none at all"):
        checkpoints.restore()
    assert checkpoints.latest() is None and Checkpoints(tmp_path / "none").steps() == []
    checkpoints.save(1, rng=False)
    with pytest.raises(FileNotFoundError, match=r"no step 2, there are \[1\]"):
        checkpoints.restore(step=2)
    with pytest.raises(LoadError, match=r"saved without model, there is no model\.safetensors"):
        checkpoints.restore(nn.Linear(1, 1))
    for step in (-1, 1.5, True, "x"):
        with pytest.raises(ValueError, match="whole number"):
            checkpoints.save(step)
    with pytest.raises(ValueError, match="keep has to be 1 or more"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(TypeError, match="expected a module for net, got dict"):
        checkpoints.save(1, {})
    with pytest.raises(TypeMismatchError, match=r"data\.x\.1: cannot save an object of type set"):
        checkpoints.save(1, data={"x": [1, {2}]})
    for metadata in ({1: 2}, (1,), {"x": np.ones(1)}, float("nan"), 10**30):
        with pytest.raises(TypeMismatchError, match="metadata"):
            checkpoints.save(1, metadata=metadata)
    with pytest.raises(ForeignTransformError, match="inside a transform"):
        lamina.jit(lambda x: checkpoints.save(1) and x)(jnp.ones(1))
    assert checkpoints.steps() == [1]


def test_all_or_nothing(tmp_path):
    """The model fits and the optimizer does not: neither changes, nor the generator."""
    net, opt = trained()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, net, opt)
    other, _ = trained(steps=2)
    wrong = lamina.Optimizer(other, optax.sgd(0.1, momentum=0.9))
    wrong.state_dict()
    handed_out = other[0].weight.data
    lamina.manual_seed(1234)
    before, generator = values(other, wrong), lamina.manual_seed(1234).get_state()
    with pytest.raises(LoadError, match=r"missing: 0\.trace.*0\.weight"):
        checkpoints.restore(other, wrong)
    assert values(other, wrong) == before
    now = lamina._core.random.DEFAULT.get_state()
    assert now["seed"].tolist() == generator["seed"].tolist()

    @lamina.jit
    def train_step(net, opt):
        _, grads = lamina.value_and_grad(lambda net: (net(jnp.ones((4, 2))) ** 2).mean())(net)
        opt.step(grads)

    train_step(other, wrong)
    assert not handed_out.is_deleted()

    unshaped, _ = training()
    with pytest.raises(LoadError, match="nothing was loaded"):
        checkpoints.restore(unshaped, lamina.Optimizer(unshaped, optax.lion(0.1)))
    assert unshaped[0].weight.shape == (3, None)
    small, small_opt = training(width=2)
    with pytest.raises(LoadError, match=r"0\.bias: expected shape \(2,\), got \(3,\)"):
        checkpoints.restore(small, small_opt)


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[-3] ^= 4
        path.write_bytes(data)
    elif how == "header":
        path.write_bytes(bytes(data).replace(b'"F32"', b'"I32"', 1))
    elif how == "truncate":
        path.write_bytes(data[:-5])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "other":
        path.write_bytes((path.parents[1] / "step_00000001" / path.name).read_bytes())
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "header", "truncate", "empty", "other", "missing"])
@pytest.mark.parametrize("name", ["model", "position"])
def test_damage(tmp_path, how, name):
    net, _ = trained()
    checkpoints = Checkpoints(tmp_path, background=False)
    for step in (1, 2):
        checkpoints.save(step, net, data=np.full(3, step, "f4"))
        net[0].bias.fill_(step)
    path = tmp_path / "step_00000002" / f"{name}.safetensors"
    damage(path, how)
    fresh, _ = training()
    with pytest.raises(FileError, match=re.escape(str(path))) as caught:
        checkpoints.restore(fresh)
    assert "step 2 can't be restored" in str(caught.value)
    assert "checkpoints.restore(net, opt, step=1)" in str(caught.value)
    assert not fresh[2].bias.is_material
    with pytest.warns(UserWarning, match="trying step 1"):
        assert checkpoints.restore(fresh, fallback=True).step == 1
    damage(tmp_path / "step_00000001" / f"{name}.safetensors", "missing")
    with (
        pytest.warns(UserWarning, match="trying step 1"),
        pytest.raises(FileError, match="there is no older step"),
    ):
        checkpoints.restore(fresh, fallback=True)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"step": 3', '"step": 4', "was edited"),
        ('"version": 1', '"version": 2', "was edited"),
        ("}", "", "not valid JSON"),
        ("{", "[", "not valid JSON"),
        (None, "[]", "was edited"),
        (None, '{"crc32": "ff", "crc32": "ff"}', "occurs twice"),
    ],
)
def test_a_damaged_record(tmp_path, old, new, reason):
    Checkpoints(tmp_path, background=False, best="loss").save(3, metrics={"loss": 1})
    path = tmp_path / "step_00000003" / "checkpoint.json"
    path.write_text(new if old is None else path.read_text().replace(old, new, 1))
    with pytest.raises(FileError, match=f"checkpoint.json: .*{reason}"):
        Checkpoints(tmp_path).restore()
    assert Checkpoints(tmp_path, best="loss").best() is None


def test_a_directory_in_the_wrong_place(tmp_path):
    Checkpoints(tmp_path, background=False).save(3)
    os.rename(tmp_path / "step_00000003", tmp_path / "step_00000004")
    with pytest.raises(FileError, match="is of step 3, expected 4"):
        Checkpoints(tmp_path).restore()


# Writing in the background, and when it fails.


def fail(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_background_errors_are_raised(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1)
    checkpoints.wait()
    monkeypatch.setattr(module, "write_step", fail)
    for ask in (checkpoints.wait, checkpoints.close, lambda: checkpoints.save(3)):
        checkpoints.save(2)
        checkpoints.steps()
        with pytest.raises(OSError, match="No space") as caught:
            ask()
        assert caught.value.__notes__ == [f"while step 2 was saved to {tmp_path}"]
        checkpoints.wait()  # told once
    with pytest.raises(OSError, match="No space"), checkpoints:
        checkpoints.save(2)
    with pytest.raises(KeyError, match="own"), checkpoints:
        checkpoints.save(2)
        raise KeyError("own")
    checkpoints._errors.clear()
    monkeypatch.undo()
    assert checkpoints.save(2) and checkpoints.steps() == [1, 2]


def test_saving_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    write = module.write_step
    monkeypatch.setattr(module, "write_step", lambda *a: (time.sleep(0.5), write(*a)))
    checkpoints = Checkpoints(tmp_path)
    started = time.perf_counter()
    checkpoints.save(1, data=np.ones(10))
    assert time.perf_counter() - started < 0.4
    checkpoints.save(2)  # waits for the one before
    assert time.perf_counter() - started >= 0.5
    assert checkpoints.steps() == [1, 2]


def test_the_process_waits_at_its_end(tmp_path):
    code = (
        "import sys, time, numpy as np, lamina.io.checkpoints as module\n"
        "write = module.write_step\n"
        "module.write_step = lambda *a: (time.sleep(0.5), write(*a))\n"
        "module.Checkpoints(sys.argv[1]).save(1, data=np.ones(3))\n"
        "sys.exit(5)\n"
    )
    out = python("-c", code, tmp_path)
    assert out.returncode == 5 and not out.stderr and Checkpoints(tmp_path).steps() == [1]
    code = code.replace("write(*a)", "1 / 0")
    out = python("-c", code, tmp_path / "failed")
    assert "ZeroDivisionError" in out.stderr and "while step 1 was saved" in out.stderr


def test_full_disk(tmp_path):
    net, opt = trained()
    checkpoints = Checkpoints(tmp_path, background=False)
    checkpoints.save(1, net, opt)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.save(2, net, opt, data=np.ones(50_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(tmp_path) == ["step_00000001"] and checkpoints.restore(net, opt).step == 1


def test_a_small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "lamina-test", str(disk)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("cannot mount a small file system")
    try:
        checkpoints = Checkpoints(disk)
        checkpoints.save(1, data=np.ones(60_000))
        checkpoints.save(2, data=np.ones(90_000))
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
        assert listing(disk) == ["step_00000001"]
        assert checkpoints.restore().data.sum() == 60_000
        assert checkpoints.save(2, data=np.ones(10)) and checkpoints.steps() == [1, 2]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Several writers, and dead ones.


def test_kill(tmp_path):
    """A few rounds of the longer script."""
    process = python(HERE / "kill_checkpoints.py", "--kills", 3, tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "3 kills" in process.stdout


def test_leftovers_of_the_dead_are_cleaned_up(tmp_path):
    code = (
        "import os, signal, sys, lamina.io.step_files as step_files\n"
        "from lamina.io.checkpoints import Checkpoints\n"
        "checkpoints = Checkpoints(sys.argv[1], keep=1, background=False)\n"
        "checkpoints.save(1)\n"
        "setattr(step_files.{0}, 'rmtree' if '{0}' == 'shutil' else 'rename',\n"
        "        lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))\n"
        "checkpoints.save(2)\n"
    )
    for what, left in (
        ("os", r"\.step_00000002\.\w+\.tmp"),
        ("shutil", r"\.step_00000001\.\w+\.old"),
    ):
        directory = tmp_path / what
        assert python("-c", code.format(what), directory).returncode == -9
        assert re.fullmatch(left, listing(directory)[0])
        with step_files.locked(str(directory), 0):  # a live writer: nothing is touched
            Checkpoints(directory)
            assert len(listing(directory)) == 2
        assert Checkpoints(directory).steps() == listing_steps(directory)
        assert len(listing(directory)) == 1


def listing_steps(directory):
    return [int(name.removeprefix("step_")) for name in listing(directory)]


def test_another_process_has_the_lock(tmp_path, monkeypatch):
    code = (
        "import sys, lamina.io.step_files as step_files\n"
        "with step_files.locked(sys.argv[1], 0):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"held\n"
        (tmp_path / ".step_00000001.00ff.tmp").mkdir()
        checkpoints = Checkpoints(tmp_path, background=False)
        assert listing(tmp_path) == [".step_00000001.00ff.tmp"]
        monkeypatch.setattr(module, "_PATIENCE", 0.05)
        with pytest.raises(TimeoutError, match="another writer"):
            checkpoints.save(1)
        process.kill()
    checkpoints.save(1)
    assert listing(tmp_path) == ["step_00000001"]


def test_two_writers(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from lamina.io.checkpoints import Checkpoints\n"
        "with Checkpoints(sys.argv[1], keep=2) as checkpoints:\n"
        "    for step in range(30):\n"
        "        checkpoints.save(step // 2, data=np.full(1000, step // 2))\n"
        "        found = checkpoints.restore()\n"
        "        assert (found.data == found.step).all()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    both = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 14 and all(n.startswith("step_") for n in listing(tmp_path))


def test_two_threads(tmp_path):
    both = [Checkpoints(tmp_path, keep=2) for _ in range(2)]
    for step in range(8):
        for checkpoints in both:
            checkpoints.save(step, data=step)
    for checkpoints in both:
        checkpoints.wait()
    assert both[0].steps() == [6, 7] and both[0].restore().data == 7


def test_a_step_that_is_removed_while_it_is_read(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, background=False)
    checkpoints.save(1)
    checkpoints.save(2)
    read = module.restore_step

    def remove_first(step, path, *rest):
        if step == 2:
            step_files.remove_step(path)
        return read(step, path, *rest)

    monkeypatch.setattr(module, "restore_step", remove_first)
    assert checkpoints.restore().step == 1


def test_the_page_of_the_documentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) >= 4
    names = {}
    for block in blocks:
        if "lamina.export" in block:
            pytest.importorskip("flatbuffers")  # JAX reads and writes programs with it
        exec(compile(block, str(PAGE), "exec"), names)
