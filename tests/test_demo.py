import os
import re
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

import lamina
from lamina import demo, nn
from lamina.cli import main

DEMO = [sys.executable, "-m", "_lamina_entry", "demo"]


def environment():
    """One device, as users have it, and this very package whatever the directory."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(lamina.__file__)))
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": package}


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """One run with nothing but the defaults, in an empty directory."""
    place = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        DEMO, cwd=place, env=environment(), capture_output=True, text=True, timeout=300
    )
    return place, done


@pytest.mark.slow
class TestFullRun:
    def test_it_succeeds_in_silence(self, full_run):
        _, done = full_run
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""

    def test_piped_output_is_plain_text(self, full_run):
        _, done = full_run
        assert "\x1b" not in done.stdout
        assert "\r" not in done.stdout

    def test_accuracy(self, full_run):
        _, done = full_run
        found = re.search(r"test accuracy of the conv net: ([\d.]+)%", done.stdout)
        assert float(found[1]) >= 97

    def test_it_tells_the_whole_story(self, full_run):
        _, done = full_run
        for part in (
            "(16, ?, 5, 5)",  # before sizes are known
            "(16, 1, 5, 5)",  # and after
            "(64, 16, 8, 8)",  # outputs
            "FLOPs",
            "Normal(mean=0.0, std=0.05)",
            "*.bias",
            "steps/s",
            "net[0].weight.grad[0, 0]",
            "gradient  ",
            "= 3.weight",
            "0.mu.3.weight, 0.nu.3.weight",
            "bit for bit",
            "100% after",
            "lamina-demo/filters.png",
            "What to try next",
        ):
            assert part in done.stdout, part

    def test_the_gradient_of_a_tie_adds_up(self, full_run):
        _, done = full_run
        difference = re.search(r"they differ by (\S+) of the largest", done.stdout)
        assert float(difference[1]) < 1e-5

    def test_the_files_hold_what_was_trained(self, full_run):
        place, _ = full_run
        out = place / "lamina-demo"
        assert sorted(os.listdir(out)) == [
            "conv.safetensors", "filters.png", "mlp.safetensors", "templates.png",
        ]  # fmt: skip
        net = demo.conv_net().eval()
        net.load_state_dict(lamina.load(out / "conv.safetensors"))
        data = demo.digits()
        right = np.asarray(net(jnp.asarray(data.test_images)).argmax(-1)) == data.test_labels
        assert right.mean() >= 0.97
        for name in ("filters.png", "templates.png"):
            assert (out / name).read_bytes()[-8:-4] == b"IEND"

    def test_torch_reads_the_model(self, full_run, torch):
        load_file = pytest.importorskip("safetensors.torch").load_file
        place, _ = full_run
        state = load_file(place / "lamina-demo" / "conv.safetensors")
        tn = torch.nn
        net = tn.Sequential(
            tn.Conv2d(1, 16, 5, padding=2), tn.BatchNorm2d(16), tn.ReLU(),
            tn.Conv2d(16, 32, 3, padding=1), tn.BatchNorm2d(32), tn.ReLU(), tn.MaxPool2d(2),
            tn.Conv2d(32, 64, 3, padding=1), tn.BatchNorm2d(64), tn.ReLU(), tn.MaxPool2d(2),
            tn.Flatten(), tn.Dropout(0.3), tn.Linear(256, 10),
        )  # fmt: skip
        net.load_state_dict(state)
        data = demo.digits()
        with torch.no_grad():
            chosen = net.eval()(torch.from_numpy(data.test_images)).argmax(-1).numpy()
        assert (chosen == data.test_labels).mean() >= 0.97


def test_quiet(tmp_path, monkeypatch, capsys):
    def small():
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))

    monkeypatch.setattr(demo, "conv_net", small)
    out = tmp_path / "new" / "place"
    assert main(["demo", "--quiet", "--epochs", "1", "--seed", "3", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["test", "models", "pictures"]
    assert len(os.listdir(out)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.1, 2.0, 4.5])
def test_an_interrupt_while_it_works(delay, tmp_path):
    process = subprocess.Popen(
        [*DEMO, "--epochs", "1000", "--out", tmp_path / "out"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors == b"lamina: interrupted\n"
    assert os.listdir(tmp_path / "out") == []


def test_an_interrupt_waits_until_a_file_is_complete(tmp_path):
    order = []

    def handler(*_):
        order.append("interrupted")

    before = signal.signal(signal.SIGINT, handler)
    try:
        with demo._undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            order.append("complete")
        assert order == ["complete", "interrupted"]
        assert signal.getsignal(signal.SIGINT) is handler
        with demo._undisturbed():
            pass
        assert len(order) == 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_runs_in_a_thread_as_well():
    entered = []

    def work():
        with demo._undisturbed():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered


def test_the_split():
    data = demo.digits()
    assert data.images.shape == (1438, 1, 8, 8)
    assert data.test_images.shape == (359, 1, 8, 8)
    shares = np.bincount(data.test_labels) / np.bincount(data.labels)
    assert shares.min() > 0.24
    assert shares.max() < 0.26
    again = demo.digits()
    np.testing.assert_array_equal(again.test_images, data.test_images)


def test_distortion_keeps_the_digit():
    data = demo.digits()
    images = demo._wobble(data.images, np.random.default_rng(0))
    assert images.shape == data.images.shape
    assert images.dtype == np.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert np.corrcoef(images.ravel(), data.images.ravel())[0, 1] > 0.7

    class Still:
        def uniform(self, low, high, shape):
            return np.zeros(shape)

    np.testing.assert_allclose(demo._wobble(data.images, Still()), data.images, atol=1e-6)
