"""GGUF files, made by hand after the public description of the format."""

import re
import runpy
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lamina._core.errors import FileError
from lamina.io.gguf import open_gguf

FUZZ = runpy.run_path(str(Path(__file__).with_name("fuzz_torch.py")))


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def fact(name, code, content):
    return text(name) + struct.pack("<I", code) + content


def info(name, sizes, code, offset):
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, code, offset)


def gguf(tensors=(), facts=(), version=3, counts=None, data=b"", alignment=32):
    """``tensors``: ``(name, sizes with the fastest first, type, offset)``."""
    counts = (len(tensors), len(facts)) if counts is None else counts
    head = b"GGUF" + struct.pack("<I2Q", version, *counts)
    head += b"".join(facts) + b"".join(info(*tensor) for tensor in tensors)
    return head + bytes(-len(head) % alignment) + data


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write


TYPES = [
    (0, "F32", np.float32),
    (1, "F16", np.float16),
    (24, "I8", np.int8),
    (25, "I16", np.int16),
    (26, "I32", np.int32),
    (27, "I64", np.int64),
    (28, "F64", np.float64),
    (30, "BF16", ml_dtypes.bfloat16),
]


@pytest.mark.parametrize(("code", "kind", "dtype"), TYPES)
def test_plain_types_in_row_major_order(code, kind, dtype, write):
    array = np.arange(24).astype(dtype).reshape(2, 3, 4)
    path = write(gguf([("w", (4, 3, 2), code, 0)], data=array.tobytes()))
    with open_gguf(path) as file:
        handle = file["w"]
        assert (handle.kind, handle.dtype, handle.shape) == (kind, np.dtype(dtype), (2, 3, 4))
        assert handle.read().tobytes() == array.tobytes()
        assert not handle.read().flags.owndata


def test_facts_as_text(write):
    words = struct.pack("<IQ", 8, 2) + text("a") + text("b")
    many = struct.pack("<IQ", 8, 100) + text("token") * 100
    facts = [
        fact("general.name", 8, text("häß")),
        fact("count", 4, struct.pack("<I", 7)),
        fact("rate", 6, struct.pack("<f", 0.5)),
        fact("flag", 7, b"\1"),
        fact("big", 10, struct.pack("<Q", 2**63)),
        fact("words", 9, words),
        fact("numbers", 9, struct.pack("<IQ3h", 3, 3, 1, -2, 3)),
        fact("tokens", 9, many),
        fact("scores", 9, struct.pack("<IQ", 6, 1000) + bytes(4000)),
        fact("lists", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 0, 2) + b"\1\2"),
    ]
    with open_gguf(write(gguf(facts=facts))) as file:
        assert file.metadata == {
            "general.name": "häß",
            "count": "7",
            "rate": "0.5",
            "flag": "true",
            "big": str(2**63),
            "words": '["a", "b"]',
            "numbers": "[1, -2, 3]",
            "tokens": "[100 strings]",
            "scores": "[1000 numbers]",
            "lists": "[[1, 2]]",
        }


def test_quantised_types_are_listed_and_refused_by_name(write):
    tensors = [("f", (4,), 0, 0), ("q8", (64, 2), 8, 32), ("q4k", (256,), 12, 192)]
    path = write(gguf(tensors, data=bytes(192 + 144)))
    with open_gguf(path) as file:
        assert {n: (h.kind, h.shape, h.nbytes) for n, h in file.items()} == {
            "f": ("F32", (4,), 16),
            "q8": ("Q8_0", (2, 64), 136),
            "q4k": ("Q4_K", (256,), 144),
        }
        with pytest.raises(FileError, match="'q8' is quantised as Q8_0"):
            file["q8"].read()
        assert file["f"].read().tolist() == [0, 0, 0, 0]


def test_alignment_is_taken_from_the_file(write):
    facts = [fact("general.alignment", 4, struct.pack("<I", 64))]
    tensors = [("a", (2,), 0, 0), ("b", (2,), 0, 64)]
    data = struct.pack("<2f", 1, 2).ljust(64, b"\0") + struct.pack("<2f", 3, 4)
    with open_gguf(write(gguf(tensors, facts, data=data, alignment=64))) as file:
        assert file["b"].read().tolist() == [3, 4]
        assert file["b"].offset % 64 == 0


BAD = [
    ("another magic", b"GGML" + bytes(20), "not a GGUF"),
    ("version 1", gguf(version=1), "version 1"),
    ("big-endian", gguf(version=3 << 24), "big-endian"),
    ("cut off", gguf([("w", (4,), 0, 0)], data=bytes(15)), "needs bytes"),
    ("cut off in the header", gguf(facts=[fact("a", 4, bytes(4))])[:30], "cut off|announces"),
    ("2**60 tensors", gguf(counts=(1 << 60, 0)), "announces 1152921504606846976 entries"),
    ("2**60 facts", gguf(counts=(0, 1 << 60)), "announces 1152921504606846976 entries"),
    (
        "long name",
        gguf(facts=[struct.pack("<Q", 1 << 62)]),
        "announces 4611686018427387904 bytes|entries",
    ),
    ("long list", gguf(facts=[fact("a", 9, struct.pack("<IQ", 4, 1 << 62))]), "announces"),
    (
        "long list of text",
        gguf(facts=[fact("a", 9, struct.pack("<IQ", 8, 1 << 62))]),
        "more than fit",
    ),
    ("deep lists", gguf(facts=[fact("a", 9, struct.pack("<IQ", 9, 1) * 500)]), "too deeply"),
    ("unknown fact", gguf(facts=[fact("a", 99, bytes(4))]), "unknown type 99"),
    ("fact twice", gguf(facts=[fact("a", 4, bytes(4))] * 2), "two facts"),
    ("tensor twice", gguf([("w", (1,), 0, 0)] * 2, data=bytes(99)), "two tensors"),
    ("too many axes", gguf([("w", (1,) * 9, 0, 0)], data=bytes(99)), "9 axes"),
    ("sizes that overflow", gguf([("w", (1 << 32, 1 << 32), 0, 0)]), "larger than"),
    ("huge and empty", gguf([("w", (0, 1 << 62), 0, 0)]), "larger than"),
    ("offset too far", gguf([("w", (1,), 0, 1 << 62)]), "needs bytes"),
    ("offset not aligned", gguf([("w", (1,), 0, 4)], data=bytes(99)), "not aligned"),
    ("overlap", gguf([("a", (16,), 0, 0), ("b", (1,), 0, 32)], data=bytes(99)), "overlap"),
    ("half a block", gguf([("w", (33,), 8, 0)], data=bytes(99)), "half a Q8_0 block"),
    ("alignment 0", gguf(facts=[fact("general.alignment", 4, bytes(4))]), "alignment of 0"),
    ("alignment text", gguf(facts=[fact("general.alignment", 8, text("x"))]), "alignment"),
    ("name not text", gguf(facts=[struct.pack("<Q", 2) + b"\xff\xff" + bytes(12)]), "UTF-8"),
]


@pytest.mark.parametrize(
    ("content", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_file(content, message, write):
    path = write(content)
    with pytest.raises(FileError) as caught:
        open_gguf(path)
    assert str(caught.value).startswith(str(path))
    assert re.search(message, str(caught.value)), str(caught.value)


def test_unknown_type_is_listed(write):
    with open_gguf(write(gguf([("w", (5,), 77, 0)], data=bytes(32)))) as file:
        assert file["w"].shape == (5,)
        with pytest.raises(FileError, match=r"not known here \(77\)"):
            file["w"].read()


def test_file_of_the_fuzzer(write):
    with open_gguf(write(FUZZ["gguf"]())) as file:
        assert file["w"].read().tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file.metadata["words"] == '["a", "b"]'
