import errno
import os
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from lamina import nn
from lamina.show import image, save_image

PAPER = [216, 219, 224]


def read_png(path):
    """Decode what the PNG specification says, checking everything on the way."""
    with open(path, "rb") as file:
        content = file.read()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, []
    while place < len(content):
        (size,) = struct.unpack_from(">I", content, place)
        kind, body = content[place + 4 : place + 8], content[place + 8 : place + 8 + size]
        (checksum,) = struct.unpack_from(">I", content, place + 8 + size)
        assert checksum == zlib.crc32(kind + body)
        chunks.append((kind, body))
        place += 12 + size
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(chunks[1][1]), np.uint8).reshape(height, 1 + 3 * width)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


def test_signed_values_diverge_from_white(tmp_path):
    path = tmp_path / "a.png"
    assert save_image(np.array([[-2.0, 0.0, 2.0]]), path, scale=4) == (12, 4)
    pixels = read_png(path).astype(int)
    low, zero, high = pixels[0, 0], pixels[0, 4], pixels[0, 8]
    assert zero.min() > 240
    assert low[2] > low[0]
    assert high[0] > high[2]
    assert low.sum() < 150
    assert high.sum() < 150
    assert (pixels[:, :4] == low).all()


def test_colours_are_symmetric_in_lightness_order(tmp_path):
    path = tmp_path / "a.png"
    save_image(np.linspace(-1, 1, 201)[None], path, scale=1)
    lightness = read_png(path)[0].astype(int) @ [299, 587, 114]
    assert (np.diff(lightness[:101]) >= 0).all()
    assert (np.diff(lightness[100:]) <= 0).all()


def test_unsigned_values_go_from_white_to_dark(tmp_path):
    path = tmp_path / "a.png"
    save_image(np.array([[0, 1, 2]]), path, scale=1)
    sums = read_png(path)[0].astype(int).sum(axis=1)
    assert sums[0] > 740
    assert sums[0] > sums[1] > sums[2]


@pytest.mark.parametrize(
    ("shape", "options", "size"),
    [
        ((6, 1, 5, 5), {"scale": 10, "columns": 3}, (166, 112)),
        ((6, 1, 5, 5), {"scale": 1}, (3 * 7 + 2, 2 * 7 + 2)),
        ((4, 3, 2, 2), {"scale": 1}, (3 * 4 + 2, 4 * 4 + 2)),
        ((5, 2, 2), {"scale": 1, "columns": 99}, (5 * 4 + 2, 4 + 2)),
        ((3, 8), {"scale": 2}, (16, 6)),
    ],
)
def test_layout(tmp_path, shape, options, size):
    path = tmp_path / "a.png"
    assert save_image(np.ones(shape), path, **options) == size
    assert read_png(path).shape == (size[1], size[0], 3)


def test_tiles_lie_where_they_belong(tmp_path):
    path = tmp_path / "a.png"
    tiles = np.zeros((3, 2, 2))
    tiles[2] = 1
    save_image(tiles, path, scale=1, columns=2)
    pixels = read_png(path)
    assert pixels[0, 0].tolist() == PAPER
    assert (pixels[6:8, 2:4].astype(int).sum(axis=-1) < 150).all()
    assert (pixels[6:8, 6:8] == PAPER).all()
    assert (pixels[2:4, 2:4] > 240).all()


def test_the_default_scale_makes_a_picture_of_a_good_size(tmp_path):
    width, height = save_image(nn.Conv2d(1, 16, 5).weight, tmp_path / "a.png")
    assert 400 < width <= 800
    assert 400 < height <= 800
    assert save_image(np.zeros((3, 2000)), tmp_path / "b.png") == (2000, 3)


def test_odd_numbers(tmp_path):
    path = tmp_path / "a.png"
    save_image(np.array([[np.nan, np.inf, -np.inf, 1.0]]), path, scale=1)
    pixels = read_png(path)[0]
    assert pixels[0].tolist() == [255, 0, 255]
    assert (pixels[1] == pixels[3]).all()
    save_image(np.zeros((2, 2)), path, scale=1)
    assert (read_png(path) > 240).all()
    save_image(np.full((2, 2), np.nan), path)
    save_image(jnp.ones((2, 2), jnp.bfloat16), path)
    save_image(np.array([[1j, 2]]), path)
    save_image(np.array([[True, False]]), path)


def test_limit_fixes_the_scale(tmp_path):
    path = tmp_path / "a.png"
    save_image(np.array([[-1.0, 1.0]]), path, scale=1, limit=2.0)
    half = read_png(path)[0]
    save_image(np.array([[-2.0, -1.0, 1.0, 2.0]]), path, scale=1)
    assert (read_png(path)[0, 1:3] == half).all()


def test_a_parameter_is_drawn_as_it_is(tmp_path):
    net = nn.Conv2d(1, 4, 3)
    save_image(net.weight, tmp_path / "a.png")
    save_image(net.weight.data, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3, 4, 5), (0, 3)])
def test_what_is_no_picture_is_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="expected a shape of two to four sizes"):
        save_image(np.zeros(shape), tmp_path / "a.png")
    assert not os.listdir(tmp_path)


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="expected scale >= 1, got 0"):
        save_image(np.zeros((2, 2)), tmp_path / "a.png", scale=0)


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(pixels):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(image, "encode_png", full)
    with pytest.raises(OSError, match="full"):
        save_image(np.zeros((2, 2)), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_picture_that_others_can_read(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    save_image(np.random.default_rng(0).normal(size=(4, 3, 3)), path)
    with pillow.open(path) as picture:
        picture.verify()
    with pillow.open(path) as picture:
        assert (np.asarray(picture) == read_png(path)).all()
