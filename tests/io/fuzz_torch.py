"""Damage real files at random: each must give an error of lamina's, or tensors of the right size.

``python tests/io/fuzz_torch.py SECONDS [SEED]`` runs for as long as asked and prints what it did;
``test_torch_fuzz.py`` runs a little of it.
"""

import io
import random
import runpy
import struct
import sys
import tempfile
import time
import zipfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

import numpy as np

from lamina._core.errors import FileError
from lamina.io.gguf import open_gguf
from lamina.io.torch_legacy import open_torch_legacy
from lamina.io.torch_tar import open_torch_tar
from lamina.io.torch_write import save_torch
from lamina.io.torch_zip import open_torch_zip

HOSTILE = runpy.run_path(str(Path(__file__).with_name("hostile_torch.py")))
# No single damaged file may take longer.
MOST_SECONDS = 5.0
OPCODES = b"\x80\x95(01c\x93QR\x81\x92bqr\x94hjN\x88\x89JKM\x8a\x8bG\x8cX\x8dUTCB\x8e\x96)\x85\x86\x87t]ae}su\x8f\x90\x91."
GLOBALS = [
    *("torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_tensor_v3"),
    *("torch._utils\n_rebuild_parameter", "torch._tensor\n_rebuild_from_type_v2"),
    *("torch._utils\n_rebuild_sparse_tensor", "torch._utils\n_rebuild_meta_tensor_no_storage"),
    *("torch\nFloatStorage", "torch\nSize", "torch\nfloat8_e5m2", "torch.nn.parameter\nParameter"),
    *("collections\nOrderedDict", "collections\ndefaultdict", "_codecs\nencode"),
    *("builtins\nset", "builtins\nlist", "builtins\ndict", "builtins\nbytearray"),
    *("numpy\ndtype", "numpy\nndarray", "numpy.core.multiarray\n_reconstruct"),
    *("numpy.core.multiarray\nscalar", "numpy.core.numeric\n_frombuffer", "os\nsystem"),
    *("copyreg\n_reconstructor", "a\nB"),
]


def seeds():
    """Valid files of every kind: ``{name: (opener, bytes)}``."""
    corpus = HOSTILE["CORPUS"]
    found = {
        "zip by hand": (open_torch_zip, corpus["fine"][0]),
        "deflated": (open_torch_zip, corpus["zip deflated"][0]),
        "zip64": (open_torch_zip, corpus["zip64 directory"][0]),
        "numpy": (open_torch_zip, corpus["numpy array"][0]),
        "legacy by hand": (open_torch_legacy, corpus["legacy"][0]),
        "legacy view": (open_torch_legacy, corpus["legacy view"][0]),
        "tar": (open_torch_tar, corpus["tar view"][0]),
        "gguf": (open_gguf, gguf()),
    }
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x"
        array = np.arange(12, dtype=np.float32).reshape(3, 4)
        save_torch({"model": {"w": array, "v": array, "b": array[0]}, "lr": [0.1, "x", None]}, path)
        found["ours"] = (open_torch_zip, path.read_bytes())
        try:
            import torch
        except ImportError:
            return found
        net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        saved = {"net": net, "state": net.state_dict(), "t": torch.ones(2, 3).t(), "n": np.ones(2)}
        torch.save(saved, path)
        found["torch zip"] = (open_torch_zip, path.read_bytes())
        torch.save(saved, path, pickle_protocol=4)
        found["torch zip 4"] = (open_torch_zip, path.read_bytes())
        torch.save(saved, path, _use_new_zipfile_serialization=False)
        found["torch legacy"] = (open_torch_legacy, path.read_bytes())
    return found


def gguf():
    """A small GGUF file with facts of every shape and three tensors."""

    def name(text):
        return struct.pack("<Q", len(text)) + text.encode()

    facts = name("general.alignment") + struct.pack("<2I", 4, 32)
    facts += name("general.name") + struct.pack("<I", 8) + name("tiny")
    facts += name("list") + struct.pack("<2IQ3f", 9, 6, 3, 1, 2, 3)
    facts += name("words") + struct.pack("<2IQ", 9, 8, 2) + name("a") + name("b")
    infos = name("w") + struct.pack("<I2QIQ", 2, 3, 2, 0, 0)
    infos += name("b") + struct.pack("<IQIQ", 1, 4, 30, 32)
    infos += name("q") + struct.pack("<IQIQ", 1, 32, 8, 64)
    header = b"GGUF" + struct.pack("<I2Q", 3, 3, 4) + facts + infos
    data = struct.pack("<6f", *range(6)).ljust(32, b"\0") + bytes(32) + bytes(34)
    return header + bytes(-len(header) % 32) + data


def damage(content, rng):
    """Cut, flip, overwrite, repeat or move a few bytes."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not content:
            break
        at = rng.randrange(len(content))
        kind = rng.randrange(7)
        if kind == 0:
            del content[at:]
        elif kind == 1:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            content[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, *OPCODES))
        elif kind == 3:
            content[at : at + 4] = rng.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f")
            )
        elif kind == 4:
            content[at : at + 8] = struct.pack(
                "<q", rng.choice((-1, 1 << 62, (1 << 63) - 1, 1 << 40))
            )
        elif kind == 5:
            content[at:at] = content[at : at + rng.randrange(1, 200)]
        else:
            del content[at : at + rng.randrange(1, 20)]
    return bytes(content)


def damage_inside(content, rng):
    """Damage only the pickle of a zip file and pack it again, so that the checksums fit."""
    source = zipfile.ZipFile(io.BytesIO(content))
    record = HOSTILE["Record"]
    parts = []
    for info in source.infolist():
        inner = source.read(info)
        if info.filename.endswith("data.pkl"):
            inner = damage(inner, rng)
        parts.append(record(info.filename, inner))
    return HOSTILE["zip_file"](parts)


def random_pickle(rng):
    """Opcodes in any order, with arguments that fit them."""
    out = bytearray(b"\x80\2")
    for _ in range(rng.randrange(1, 60)):
        code = rng.choice(OPCODES)
        if code in b"\x80\x95.":
            continue
        if code == ord("c"):
            out += b"c" + rng.choice(GLOBALS).encode() + b"\n"
        elif code in b"X\x8cU":
            text = rng.choice((b"0", b"storage", b"cpu", b"latin1", b"f4", b"O", b"_modules", b"<"))
            out += bytes([code]) + (
                struct.pack("<I", len(text)) if code == ord("X") else bytes([len(text)])
            )
            out += text
        elif code in b"qhK":
            out += bytes([code, rng.randrange(6)])
        else:
            out += bytes([code])
            if code in b"rjJBT\x8bX":
                out += struct.pack("<I", rng.choice((0, 1, 4, 0xFFFFFFFF)))
    return bytes(out) + b"."


def open_pickle(content):
    record = HOSTILE["Record"]
    data = record("a/data/0", HOSTILE["DATA"])
    return HOSTILE["zip_file"]([record("a/data.pkl", content), data])


def use(opener, content, path):
    """Open and read; return whether it opened, or raise what should never be raised."""
    path.write_bytes(content)
    start = time.perf_counter()
    try:
        with opener(path) as file:
            for handle in file.values():
                if handle.refused:
                    continue
                array = handle.read()
                assert array.shape == handle.shape
                assert array.dtype == handle.dtype
                assert array.tobytes() is not None
            str(file.tree), str(file.metadata)
        failure = None
    except FileError as error:
        failure = str(error)
    seconds = time.perf_counter() - start
    assert failure is None or failure.startswith(str(path)), failure
    assert seconds < MOST_SECONDS, f"took {seconds:.1f} s"
    return failure is None


def one(rng, valid, path):
    """Make one damaged file and use it; return whether it opened."""
    name = rng.choice(list(valid))
    opener, content = valid[name]
    kind = rng.randrange(4)
    if kind == 0:
        opener, content = open_torch_zip, open_pickle(random_pickle(rng))
    elif kind == 1 and opener is open_torch_zip:
        content = damage_inside(content, rng)
    else:
        content = damage(content, rng)
    try:
        return use(opener, content, path)
    except Exception:
        kept = Path(tempfile.gettempdir()) / f"fuzz-{name.replace(' ', '-')}.bin"
        kept.write_bytes(content)
        print(f"kept as {kept}", file=sys.stderr)
        raise


def main(seconds, seed=0):
    valid = seeds()
    rng = random.Random(seed)
    count = opened = 0
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as directory:
        while time.monotonic() < end:
            opened += one(rng, valid, Path(directory) / "x")
            count += 1
    print(f"{count} damaged files, {opened} of them could be read")


if __name__ == "__main__":
    main(float(sys.argv[1]), *map(int, sys.argv[2:]))
