"""``lamina demo``: two models on handwritten digits, from no sizes at all to files on disk.

Read it as an example: it uses nothing but the public interface.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from . import nn
from ._core.errors import LaminaError
from ._core.materialize import infer
from ._core.module import Module
from ._core.random import manual_seed
from .func import backward, grad, jit, value_and_grad
from .io import load, save
from .nn import functional as F
from .optim import Optimizer
from .show import describe, save_image, summary

__all__ = ["Digits", "add_arguments", "conv_net", "digits", "mlp", "run"]

HELP = "train two small models on handwritten digits and show what lamina does"
_BATCH = 64
_IMAGES = jax.ShapeDtypeStruct((_BATCH, 1, 8, 8), jnp.float32)
_PIPED_WIDTH = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--seed", type=int, default=0, help="of all randomness (default: 0)")
    parser.add_argument("--epochs", type=_positive, default=30, help="default: 30")
    parser.add_argument(
        "--out", metavar="DIR", default="lamina-demo", help="where files go (default: lamina-demo)"
    )
    parser.add_argument("--quiet", action="store_true", help="print the results only")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def conv_net() -> nn.Sequential:
    """Return a small convolutional net for 8 x 8 images; no input size is given."""
    return nn.Sequential(
        nn.LazyConv2d(16, 5, padding=2), nn.LazyBatchNorm2d(), nn.ReLU(),
        nn.LazyConv2d(32, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.MaxPool2d(2),
        nn.LazyConv2d(64, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(10),
    )  # fmt: skip


def mlp() -> nn.Sequential:
    """Return a net of linear layers; no input size is given."""
    return nn.Sequential(
        nn.Flatten(),
        nn.LazyLinear(64), nn.ReLU(),
        nn.LazyLinear(64), nn.ReLU(),
        nn.LazyLinear(64), nn.ReLU(),
        nn.LazyLinear(10),
    )  # fmt: skip


# Data.


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images ``(n, 1, 8, 8)`` from 0 to 1, and labels ``(n,)``, for training and for testing."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def digits() -> Digits:
    """Return the 1,797 handwritten digits of scikit-learn; a fifth of each class is for testing.

    Raises:
        LaminaError: if scikit-learn is not installed.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
    Learning Repository, https://doi.org/10.24432/C50P49
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise LaminaError(
            "lamina demo takes its digits from scikit-learn, which is not installed\n"
            '    fix: pip install "lamina[demo]"'
        ) from None
    data: Any = load_digits()
    images = (data.images[:, None] / 16).astype(np.float32)
    labels = data.target.astype(np.int32)
    rng = np.random.default_rng(0)  # the same split whatever the seed
    is_test = np.zeros(len(labels), bool)
    for digit in range(10):
        places = rng.permutation(np.flatnonzero(labels == digit))
        is_test[places[: round(len(places) / 5)]] = True
    return Digits(images[~is_test], labels[~is_test], images[is_test], labels[is_test])


def _wobble(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate, scale and shift each image a little, with bilinear interpolation."""
    count, _, height, width = images.shape
    angle = rng.uniform(-0.2, 0.2, count)
    scale = np.exp(rng.uniform(-0.12, 0.12, count))
    shift = rng.uniform(-0.8, 0.8, (2, count, 1, 1))
    cos, sin = (scale * np.cos(angle))[:, None, None], (scale * np.sin(angle))[:, None, None]
    y, x = np.mgrid[:height, :width] - (height - 1) / 2
    rows = cos * y - sin * x + shift[0] + (height - 1) / 2
    columns = sin * y + cos * x + shift[1] + (width - 1) / 2
    margin = 3
    padded = np.pad(images[:, 0], ((0, 0), (margin, margin), (margin, margin)))
    rows = np.clip(rows + margin, 0, height + 2 * margin - 1.001)
    columns = np.clip(columns + margin, 0, width + 2 * margin - 1.001)
    top, left = rows.astype(int), columns.astype(int)
    down, right = rows - top, columns - left
    each = np.arange(count)[:, None, None]
    upper = padded[each, top, left] * (1 - right) + padded[each, top, left + 1] * right
    lower = padded[each, top + 1, left] * (1 - right) + padded[each, top + 1, left + 1] * right
    return (upper * (1 - down) + lower * down).astype(np.float32)[:, None]


# Training.


@jit
def _train_step(net: Module, opt: Optimizer, x: Any, y: Any) -> tuple[Any, Any]:
    """Update the model once; return the loss and the share of right answers."""

    def loss_of(net: Module) -> tuple[Any, Any]:
        scores = net(x)
        return F.cross_entropy(scores, y), scores

    (loss, scores), grads = value_and_grad(loss_of, has_aux=True)(net)
    opt.step(grads)
    return loss, (scores.argmax(-1) == y).mean()


@jit
def _fill_gradients(net: Module, x: Any, y: Any) -> None:
    """Put the gradient of the loss into each parameter's ``.grad``."""
    backward(lambda: F.cross_entropy(net(x), y))


@jit
def _predict(net: Module, x: Any) -> Any:
    return net(x).argmax(-1)


def _accuracy(net: Module, data: Digits) -> float:
    net.eval()
    return float((np.asarray(_predict(net, data.test_images)) == data.test_labels).mean())


def _train(
    net: Module, data: Digits, epochs: int, seed: int, console: Console, title: str
) -> Optimizer:
    """Train with AdamW on slightly distorted images, and show how it goes."""
    steps = len(data.labels) // _BATCH
    rate = optax.cosine_onecycle_schedule(epochs * steps, 4e-3)
    opt = Optimizer(net, optax.adamw(rate, weight_decay=1e-3))
    rng = np.random.default_rng(seed)
    net.train()
    with _Bar(console, title, epochs, steps) as bar:
        for epoch in range(1, epochs + 1):
            images, order = _wobble(data.images, rng), rng.permutation(len(data.labels))
            results = []
            for step in range(steps):
                chosen = order[step * _BATCH : (step + 1) * _BATCH]
                results.append(_train_step(net, opt, images[chosen], data.labels[chosen]))
                bar.advance(results[-1][0])
            loss, accuracy = np.asarray(jax.device_get(results), np.float64).mean(axis=0)
            bar.report(epoch, loss, accuracy)
    return opt


class _Bar:
    """Progress: a bar in a terminal, a few lines of text elsewhere."""

    def __init__(self, console: Console, title: str, epochs: int, steps: int) -> None:
        self.console, self.title, self.epochs, self.steps = console, title, epochs, steps
        self.done = 0
        self.start = 0.0
        self.progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self.task = self.progress.add_task(title, total=epochs * steps, news="compiling ...")

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, loss: Any) -> None:
        """Count one step; the clock starts after the first, which is compiled."""
        if not self.done:
            jax.block_until_ready(loss)
            self.start = time.perf_counter()
        self.done += 1
        self.progress.advance(self.task)

    def report(self, epoch: int, loss: float, accuracy: float) -> None:
        """Show how an epoch went."""
        speed = (self.done - 1) / (time.perf_counter() - self.start)
        news = f"loss {loss:.4f}  accuracy {accuracy:6.1%}  {speed:,.0f} steps/s"
        self.progress.update(self.task, news=news)
        every = max(1, self.epochs // 5)
        if not self.console.is_terminal and (epoch % every == 0 or epoch == self.epochs):
            self.console.print(f"  {self.title}: epoch {epoch:3}/{self.epochs}  {news}")


# The story.


def run(options: argparse.Namespace) -> int:
    """Run the demo; return the exit status."""
    _make_directory(options.out)
    piped = not sys.stdout.isatty()
    console = Console(quiet=options.quiet, highlight=False, width=_PIPED_WIDTH if piped else None)
    started = time.perf_counter()
    manual_seed(options.seed)
    data = digits()
    conv, plain = conv_net(), mlp()

    _introduce(console, data, options.seed)
    _show_shapes(console, conv, plain)
    _initialise(console, conv, plain)

    _title(console, 4, "Training, compiled", "lamina.jit, lamina.value_and_grad, lamina.Optimizer")
    _train(conv, data, options.epochs, options.seed, console, "conv net")
    conv_accuracy = _accuracy(conv, data)
    console.print(f"  test accuracy of the conv net: [bold]{conv_accuracy:.2%}[/]")

    _show_parameter(console, conv, data)
    plain_accuracy = _tie(console, plain, data, options)
    files = _save_and_load(console, conv, plain, data, options.out)

    seconds = time.perf_counter() - started
    _conclude(Console(highlight=False), options, conv_accuracy, plain_accuracy, files, seconds)
    return 0


def _title(console: Console, number: int, text: str, code: str = "") -> None:
    console.print(f"\n[bold cyan]{number}  {text}[/]" + (code and f"  [dim]{escape(code)}[/]"))


def _introduce(console: Console, data: Digits, seed: int) -> None:
    device = jax.devices()[0]
    console.print(f"[bold]lamina[/] on JAX {jax.__version__} ({device.platform}), seed {seed}")
    _title(console, 1, "Handwritten digits", "scikit-learn's load_digits, nothing is downloaded")
    shown = [data.images[np.flatnonzero(data.labels == digit)[0], 0] for digit in range(10)]
    shades = " ░▒▓█"
    for row in zip(*shown, strict=True):
        line = "  ".join(
            "".join(shades[min(4, int(pixel * 5))] * 2 for pixel in pixels) for pixels in row[:5]
        )
        console.print(f"  {line}".rstrip())
    counts = f"{len(data.labels):,} for training, {len(data.test_labels)} for testing"
    console.print(f"  {counts}, 8 x 8 pixels, the same share of every class in both")


def _show_shapes(console: Console, conv: Module, plain: Module) -> None:
    _title(console, 2, "Two models, no sizes given", "nn.LazyConv2d(16, 5), nn.LazyLinear(64) ...")
    console.print("  Sizes that nobody knows yet are shown as ?; no memory is used.\n")
    _table(console, summary(conv))
    for net in (conv, plain):
        infer(net, _IMAGES)
    console.print(
        "\n  Sizes follow from the shape of an input; still nothing has been computed:"
        "  [dim]lamina.summary(net, ShapeDtypeStruct((64, 1, 8, 8)))[/]\n"
    )
    _table(console, summary(conv, _IMAGES))
    console.print()
    _table(console, summary(plain, _IMAGES))


def _initialise(console: Console, conv: Module, plain: Module) -> None:
    _title(console, 3, "Initialised by rule", "nn.init.rules(net, {...})")
    rules = {
        nn.Conv2d: nn.init.Normal(std=0.05),
        nn.Linear: nn.init.XavierUniform(),
        "*.bias": nn.init.Zeros(),
    }
    _table(console, nn.init.rules(conv, rules))
    console.print()
    # Small at first, the first layer's weights show what they learn, not what they were.
    by_name = {"1.weight": nn.init.Normal(std=0.01), "*.bias": nn.init.Zeros()}
    _table(console, nn.init.rules(plain, {nn.Linear: nn.init.XavierUniform(), **by_name}))


def _table(console: Console, table: Any) -> None:
    """Print a table: fitted to the terminal, or whole."""
    if console.is_terminal and hasattr(table, "__rich_console__"):
        console.print(table)
    else:
        console.print(escape(str(table)), soft_wrap=True)


def _show_parameter(console: Console, conv: Any, data: Digits) -> None:
    _title(console, 5, "One parameter", "net[0].weight, lamina.backward, lamina.show.describe")
    weight = conv[0].weight
    _fill_gradients(conv, data.test_images[:_BATCH], data.test_labels[:_BATCH])
    with np.printoptions(precision=3, suppress=True):
        console.print("  net[0].weight.data[0, 0] =")
        console.print(_indented(np.asarray(weight.data[0, 0])))
        console.print("  net[0].weight.grad[0, 0] =")
        console.print(_indented(np.asarray(weight.grad[0, 0])))
    console.print(_indented(describe(weight)))
    conv.zero_grad()


def _indented(thing: Any) -> str:
    return "\n".join(f"  {line}" for line in escape(str(thing)).split("\n"))


def _tie(console: Console, plain: Any, data: Digits, options: argparse.Namespace) -> float:
    _title(console, 6, "Two layers become one", "mlp[5].weight = mlp[3].weight")
    plain[5].weight = plain[3].weight
    plain[5].bias = plain[3].bias
    _table(console, summary(plain, _IMAGES))

    untied = copy.deepcopy(plain)
    untied[5].weight = nn.Parameter(untied[3].weight.data)
    untied[5].bias = nn.Parameter(untied[3].bias.data)
    x, y = jnp.asarray(data.test_images), jnp.asarray(data.test_labels)
    gradients_of = jit(grad(lambda net: F.cross_entropy(net(x), y)))
    grads, apart = gradients_of(plain), gradients_of(untied)
    total = apart["3.weight"] + apart["5.weight"]
    difference = float(jnp.abs(grads["3.weight"] - total).max() / jnp.abs(total).max())
    console.print(
        f"\n  its gradient is the sum of what two separate layers would get: they differ by "
        f"{difference:.0e} of the largest element"
    )
    opt = _train(plain, data, options.epochs, options.seed, console, "MLP, tied")
    moments = [name for name in opt.state_dict() if name.endswith((".3.weight", ".5.weight"))]
    accuracy = _accuracy(plain, data)
    console.print(f"  test accuracy of the tied MLP: [bold]{accuracy:.2%}[/]")
    console.print(f"  the optimizer keeps one state for both: {', '.join(moments)}")
    console.print(f"  after training, mlp[5].weight is mlp[3].weight: {_same(plain)}")
    return accuracy


def _same(plain: Any) -> bool:
    return plain[5].weight is plain[3].weight


@dataclasses.dataclass(frozen=True)
class _Files:
    """What was written, and whether reading it back gave the same."""

    models: list[str]
    pictures: list[str]
    names: int


def _save_and_load(console: Console, conv: Any, plain: Any, data: Digits, directory: str) -> _Files:
    _title(console, 7, "Saved, and loaded into fresh clones", "lamina.save, lamina.load")
    files = _Files([], [], len(conv.state_dict()) + len(plain.state_dict()))
    for net, name in ((conv, "conv"), (plain, "mlp")):
        path = os.path.join(directory, f"{name}.safetensors")
        with _undisturbed():
            save(net, path)
        fresh = net.clone().eval()
        before = _agreement(net, fresh, data)
        fresh.load_state_dict(load(path))
        _prove_equal(net, fresh, path)
        after = _agreement(net, fresh, data)
        console.print(
            f"  {name}: all {len(net.state_dict())} arrays equal, bit for bit; equal predictions "
            f"on {before:.0%} of the test images before loading, [bold]{after:.0%}[/] after"
        )
        files.models.append(path)
    pictures = {
        "filters.png": conv[0].weight.data,
        "templates.png": plain[1].weight.data.reshape(-1, 8, 8),
    }
    for name, values in pictures.items():
        path = os.path.join(directory, name)
        with _undisturbed():
            save_image(values, path, limit=float(np.quantile(np.abs(values), 0.99)))
        files.pictures.append(path)
    return files


def _agreement(one: Module, other: Module, data: Digits) -> float:
    same = np.asarray(_predict(one, data.test_images)) == np.asarray(
        _predict(other, data.test_images)
    )
    return float(same.mean())


def _prove_equal(net: Module, fresh: Module, path: str) -> None:
    expected, got = net.state_dict(), fresh.state_dict()
    different = [
        name
        for name in expected
        if np.asarray(expected[name]).tobytes() != np.asarray(got[name]).tobytes()
    ]
    if different or net.ties() != fresh.ties():
        raise LaminaError(f"{path}: what was loaded is not what was saved: {different}")


def _conclude(
    console: Console,
    options: argparse.Namespace,
    conv_accuracy: float,
    plain_accuracy: float,
    files: _Files,
    seconds: float,
) -> None:
    if not options.quiet:
        _title(console, 8, f"Done in {seconds:.0f} s")
    lines = [
        f"test accuracy  conv net {conv_accuracy:.2%}, tied MLP {plain_accuracy:.2%}",
        f"models         {', '.join(files.models)}",
        f"pictures       {', '.join(files.pictures)}",
    ]
    console.print("\n".join(f"  {escape(line)}" for line in lines), soft_wrap=True)
    if options.quiet:
        return
    path = files.models[0]
    console.print("\n  [bold]What to try next[/]")
    console.print(
        escape(
            f"    lamina demo --seed {options.seed + 1} --epochs 10\n"
            "    python\n"
            "    >>> import lamina, lamina.demo\n"
            "    >>> net = lamina.demo.conv_net().eval()\n"
            f"    >>> net.load_state_dict(lamina.load({path!r}))\n"
            "    >>> net(lamina.demo.digits().test_images[:1]).argmax()\n"
            "    and the same file in PyTorch, under the same names:\n"
            f"    >>> safetensors.torch.load_file({path!r})"
        ),
        soft_wrap=True,
    )


def _make_directory(path: str) -> None:
    """Make the directory for the files now, so that a wrong one is found before training."""
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "is not a directory", path) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "is not writable", path)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let an interrupt wait until a file is complete."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *received: waiting.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting and callable(before):
        before(*waiting[0])
