"""Sharded checkpoints: Hugging Face's layout, never outside the directory, replaced as one."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

import lamina.io
import lamina.io.sharded
from lamina._core.errors import FileError
from lamina.io.sharded import parse_size


def tensors(value=0):
    return {f"layer{i}.weight": np.full((10, 25), value + i, "f4") for i in range(5)}


def index_of(directory):
    return json.loads((directory / "model.safetensors.index.json").read_text())


def test_write_and_read(tmp_path):
    x = jnp.arange(250.0)
    obj = {**tensors(), "tie": x, "tied": x, "step": 3}
    lamina.io.save(
        obj, tmp_path / "model.safetensors", max_shard_size="2KB", metadata={"who": "me"}
    )
    names = sorted(os.listdir(tmp_path))
    assert names[0] == "model-00001-of-00003.safetensors" and len(names) == 4
    assert index_of(tmp_path)["metadata"]["total_size"] == 6000
    assert index_of(tmp_path)["metadata"]["who"] == "me"
    for place in (tmp_path, tmp_path / "model.safetensors.index.json"):
        loaded = lamina.io.load(place, verify=True)
        assert list(loaded) == list(obj) and loaded["step"] == 3
        assert loaded["tie"] is loaded["tied"]
        np.testing.assert_array_equal(loaded["layer4.weight"], obj["layer4.weight"])
    with lamina.io.open(tmp_path) as file:
        assert file.kind == "sharded" and file.ties == {"tied": "tie"} and file.nbytes == 6000
        assert file.verify() == 6


def test_other_libraries_read_each_shard(tmp_path):
    loader = pytest.importorskip("safetensors.numpy")
    lamina.io.save(tensors(), tmp_path / "model.safetensors", max_shard_size=2000)
    found = {}
    for shard in set(index_of(tmp_path)["weight_map"].values()):
        found.update(loader.load_file(tmp_path / shard))
    assert found.keys() == tensors().keys()


def test_saving_again_leaves_only_the_new(tmp_path):
    path = tmp_path / "model.safetensors"
    for value in range(3):
        lamina.io.save(tensors(value), path, max_shard_size=2000)
        assert len(os.listdir(tmp_path)) == 4
        assert float(lamina.io.load(tmp_path)["layer0.weight"][0, 0]) == value
    lamina.io.save(tensors(7), path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    lamina.io.save(tensors(8), path, max_shard_size="1 MiB")
    assert os.listdir(tmp_path) == ["model.safetensors"]
    lamina.io.save(tensors(9), path, max_shard_size=1)
    assert len(os.listdir(tmp_path)) == 6 and not path.exists()
    assert float(lamina.io.load(tmp_path)["layer0.weight"][0, 0]) == 9


def test_a_failed_save_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    lamina.io.save(tensors(1), path, max_shard_size=2000)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    write, calls = lamina.io.sharded.write_safetensors, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*args, **kwargs)

    monkeypatch.setattr(lamina.io.sharded, "write_safetensors", failing)
    with pytest.raises(KeyboardInterrupt):
        lamina.io.save(tensors(2), path, max_shard_size=2000)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_shards_of_a_killed_save_go_with_the_next_one(tmp_path):
    for name in ("model-00001-of-00009.safetensors", "model-0123abcd-00001-of-00002.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "model-other.safetensors").write_bytes(b"")
    lamina.io.save(tensors(), tmp_path / "model.safetensors", max_shard_size=2000)
    assert len(os.listdir(tmp_path)) == 5
    assert "model-other.safetensors" in os.listdir(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", "C:x", 3, None],
)
def test_no_path_leaves_the_directory(tmp_path, shard):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(FileError, match="not the name of a file beside the index"):
        lamina.io.load(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}, "metadata": 3}', "no weight_map"),
        ('{"weight_map": {"w": "a", "w": "b"}}', "occurs twice"),
        ('{"weight_map": {"w": "none.safetensors"}}', "'none.safetensors' is missing"),
        ('{"weight_map": {"w": "model.safetensors.index.json"}}', "index of shards itself"),
        ('{"weight_map": {"v": "x.safetensors"}}', "'v' is not in the shard"),
        ('{"weight_map": ' + "[" * 100_000, "nested too deeply|JSON"),
        ('{"weight_map": {"w": "x.safetensors"}', "JSON"),
    ],
)
def test_bad_indexes(tmp_path, index, message):
    lamina.io.save({"w": np.ones(2, "f4")}, tmp_path / "x.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(FileError, match=message):
        lamina.io.load(path)


def test_one_name_in_two_shards(tmp_path):
    lamina.io.save({"w": np.ones(2, "f4"), "v": np.ones(1, "f4")}, tmp_path / "a.safetensors")
    lamina.io.save({"v": np.zeros(1, "f4"), "u": np.ones(1, "f4")}, tmp_path / "b.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"w": "a.safetensors", "u": "b.safetensors"}}')
    with pytest.raises(FileError, match="'v' is in two shards"):
        lamina.io.load(path)
    path.write_text(
        '{"weight_map": {"w": "a.safetensors", "u": "b.safetensors", "v": "b.safetensors"}}'
    )
    assert float(lamina.io.load(path)["v"][0]) == 0


def test_directories(tmp_path):
    lamina.io.save({"w": np.ones(2, "f4")}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert list(lamina.io.load(tmp_path)) == ["w"]
    lamina.io.save({"w": np.ones(2, "f4")}, tmp_path / "other.safetensors")
    with pytest.raises(FileError, match="several checkpoints"):
        lamina.io.load(tmp_path)


def test_sizes():
    assert [parse_size(s) for s in (5, "5", "5GB", "1.5 KiB", "2mb")] == [
        5,
        5,
        5 * 10**9,
        1536,
        2 * 10**6,
    ]
    for bad in ("GB", "-1", "1 XB", 0, "0", "1e9"):
        with pytest.raises(ValueError, match="size|byte"):
            parse_size(bad)
