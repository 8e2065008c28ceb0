"""Files that attack a reader of PyTorch's formats, made by hand, one for each hazard.

``CORPUS`` maps a name to ``(bytes, message)``: the bytes of a file and a pattern of the error that
must come, or ``None`` where the file must open and stay harmless. No PyTorch is needed. Run as a
script, it opens every file in the directory given, under limits on memory, with every import, call
and file access watched.
"""

import pickle
import resource
import struct
import sys
import time
import zlib
from pathlib import Path

CORPUS = {}


def row(name, content, message):
    assert name not in CORPUS
    CORPUS[name] = (content, message)


# Pickles, by their opcodes.


def glob(name):
    return b"c" + name.replace(":", "\n").encode() + b"\n"


def text(value):
    raw = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value):
    if 0 <= value < 256:
        return b"K" + bytes([value])
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def group(*parts):
    return b"(" + b"".join(parts) + b"t"


def call(name, *args):
    return glob(name) + group(*args) + b"R"


def binary(value):
    return b"B" + struct.pack("<I", len(value)) + value


def storage(numel, kind="torch:FloatStorage", key=None, extra=b""):
    key = text("0") if key is None else key
    return group(text("storage"), glob(kind), key, text("cpu"), integer(numel), extra) + b"Q"


HOOKS = call("collections:OrderedDict")


def sizes(numbers):
    return group(*(n if isinstance(n, bytes) else integer(n) for n in numbers))


def tensor(shape, stride, offset=0, source=None, name="_rebuild_tensor_v2", more=b""):
    source = storage(4) if source is None else source
    place = offset if isinstance(offset, bytes) else integer(offset)
    more = (b"\x89" + HOOKS + more) if name != "_rebuild_tensor" else b""
    return call(f"torch._utils:{name}", source, place, sizes(shape), sizes(stride), more)


def named(*items):
    """A dict of text keys, in turn with values."""
    return b"}(" + b"".join(text(i) if isinstance(i, str) else i for i in items) + b"u"


GOOD = tensor((2, 2), (2, 1))


# Zip files, with every field open to lies.


class Record:
    def __init__(self, name, content=b"", **lies):
        self.name = name.encode() if isinstance(name, str) else name
        self.content = content
        self.packed = content
        self.lies = lies
        if lies.get("method") == 8:
            engine = zlib.compressobj(9, zlib.DEFLATED, -15)
            self.packed = engine.compress(content) + engine.flush()


def zip_file(records, before=b"", between=b"", after=b"", **lies):
    out, entries = bytearray(before), bytearray()
    for record in records:
        lie = record.lies
        begin = lie.get("offset", len(out))
        name = lie.get("local_name", record.name)
        crc = zlib.crc32(record.content) if lie.get("crc") is None else lie["crc"]
        method, flags = lie.get("method", 0), lie.get("flags", 0)
        packed = lie.get("packed", len(record.packed))
        size = lie.get("size", len(record.content))
        numbers = (
            lie.get("local_method", method),
            0,
            0,
            crc,
            lie.get("local_packed", packed),
            size,
        )
        if "offset" not in lie:
            out += struct.pack("<4s5H3L2H", b"PK\3\4", 20, flags, *numbers, len(name), 0) + name
            out += record.packed
        numbers = (20, 20, flags, method, 0, 0, crc, packed, size)
        extra = lie.get("extra", b"")
        entries += struct.pack("<4s6H3L", b"PK\1\2", *numbers[:6], *numbers[6:])
        entries += struct.pack("<5H2L", len(record.name), len(extra), 0, 0, 0, 0, begin)
        entries += record.name + extra
    out += between
    start = lies.get("start", len(out))
    count = lies.get("count", len(records))
    out += entries
    if "wide" in lies:
        at = len(out)
        wide = {"count": count, "start": start, **lies["wide"]}
        numbers = (44, 45, 45, 0, 0, wide["count"], wide["count"], len(entries), wide["start"])
        out += struct.pack("<4sQ2H2L4Q", b"PK\6\6", *numbers)
        out += struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
    size = lies.get("directory", len(entries))
    disk = lies.get("disk", 0)
    out += struct.pack("<4s4H2LH", b"PK\5\6", disk, 0, count, count, size, start, 0)
    return bytes(out + after)


DATA = struct.pack("<4f", 1, 2, 3, 4)


def torch_zip(body, *records, data=DATA, proto=b"\x80\x02", **lies):
    content = proto + body + b"."
    parts = [Record("a/data.pkl", content), Record("a/data/0", data), Record("a/version", b"3\n")]
    return zip_file([*parts, *records], **lies)


# What must stay harmless: inert records, nothing called.

row("fine", torch_zip(GOOD), None)
RUN = [("os:system", text("touch CANARY")), ("posix:system", text("touch CANARY"))]
RUN += [("builtins:eval", text("open('CANARY','w')")), ("builtins:exec", text("import os"))]
RUN += [("subprocess:Popen", text("touch CANARY")), ("builtins:__import__", text("antigravity"))]
RUN += [("io:open", text("CANARY") + text("w")), ("webbrowser:open", text("http://localhost"))]
RUN += [("torch.hub:load", text("x/y")), ("torch.storage:_load_from_bytes", text("x"))]
RUN += [("runpy:_run_code", text("x")), ("operator:methodcaller", text("system"))]
RUN += [("numpy:save", text("CANARY")), ("pickle:loads", binary(b"x")), ("code:interact", b"")]
for target, argument in RUN:
    row(f"call {target}", torch_zip(call(target, argument)), None)
row("stack global", torch_zip(b"\x8c\x02os\x8c\x06system\x93" + group(text("x")) + b"R"), None)
row("new object", torch_zip(glob("os:system") + group(text("x")) + b"\x81"), None)
row(
    "call the result of a call", torch_zip(call("builtins:getattr") + group(text("x")) + b"R"), None
)
row(
    "subclass made by a foreign function",
    torch_zip(call("torch._tensor:_rebuild_from_type_v2", glob("os:system"), glob("a:b"),
                   group(text("touch CANARY")), b"N")),
    None,
)  # fmt: skip
row(
    "subclass within subclass within subclass",
    torch_zip(
        call("torch._tensor:_rebuild_from_type_v2", glob("torch._tensor:_rebuild_from_type_v2"),
             glob("a:b"), group(glob("os:system"), b"NN"), b"N")
    ),
    None,
)  # fmt: skip
row(
    "state for an unknown object",
    torch_zip(call("os:environ") + named("PATH", text("x")) + b"b"),
    None,
)
row("memo index of 2**31", torch_zip(b"K\1r\xff\xff\xff\x7fj\xff\xff\xff\x7f\x86"), None)
row("text with half a character", torch_zip(text(b"\xed\xa0\x80")), "not UTF-8")
row("name with terminal codes", torch_zip(named("\x1b[2J", GOOD)), None)
row("global with terminal codes", torch_zip(call("\x1b[2J:x")), None)
row("bytearray of a number", torch_zip(call("builtins:bytearray", integer(1 << 38))), None)
row("set of a number", torch_zip(call("builtins:set", integer(1 << 38))), "of something else")
row("list of a number", torch_zip(call("__builtin__:list", integer(1 << 38))), "of something else")
row("encode as rot13", torch_zip(call("_codecs:encode", text("x"), text("rot13"))), None)

# Pickles that ask for time or memory.

NEST = b"K\1" + b"q\0h\0\x86" * 60
row("key that is a nested tuple", torch_zip(b"}" + NEST + b"K\1s"), "tuple")
row("set item that is nested", torch_zip(b"\x8f(" + NEST + b"\x90"), "tuple")
row("set of sets", torch_zip(b"((K\1\x91\x91"), "key of type frozenset")
row("key that is a list", torch_zip(b"}]K\1s"), "key of type list")
many = b"".join(integer(i * ((1 << 61) - 1)) + b"N" for i in range(1, 20_000))
row("colliding integer keys", torch_zip(b"}(" + many + b"u"), "too many keys")
many = b"".join(group(integer(i), integer(-i)) + b"N" for i in range(20_000))
row("many tuples of numbers as keys", torch_zip(b"}(" + many + b"u"), "too many keys")
row("long integer announced", torch_zip(b"\x8b\xff\xff\xff\x7f"), "integer of 2147483647")
row("long integer", torch_zip(b"\x8b" + struct.pack("<I", 4096) + b"\1" * 4096), "integer of 4096")
row("negative long", torch_zip(b"\x8b\xff\xff\xff\xff"), "integer of 4294967295")
row("text of 4 GiB announced", torch_zip(b"X\xff\xff\xff\xffabc"), "cut off")
row("bytes of 2**62 announced", torch_zip(b"\x8e" + struct.pack("<Q", 1 << 62)), "cut off")
row(
    "frame of 2**62 announced",
    torch_zip(b"\x95" + struct.pack("<Q", 1 << 62), proto=b"\x80\4"),
    "cut off",
)
row("list in itself", torch_zip(b"]q\0h\0a"), "contains itself")
row("dict in itself", torch_zip(b"}q\0K\1h\0s"), "contains itself")
module = glob("torch.nn:Module") + b")\x81q\0" + named("_modules", named("m", b"h\0")) + b"b"
row("module in itself", torch_zip(module), "contains itself")
row(
    "object in its own attributes",
    torch_zip(glob("a:B") + b")\x81q\0" + named("me", b"h\0") + b"b"),
    None,
)
row("lists 100 000 deep", torch_zip(b"]" * 100_000 + b"a" * 99_999), "200 deep")
row("tuples 100 000 deep", torch_zip(b")" + b"\x85" * 100_000), "200 deep")
row("modules 1 000 deep", torch_zip(
    b"".join(glob("a:M") + b")\x81}(" + text("_modules") + b"}(" + text("m") for _ in range(1000))
    + b"N" + b"uub" * 1000), "200 deep")  # fmt: skip
row("objects 100 000 deep", torch_zip(glob("a:B") + b"q\0)\x81" + b"h\0)\x81" * 99_999
    + b"b" * 99_999), None)  # fmt: skip
laughs = b"]q\0(NNNNNNNNNNe" + b"".join(
    b"]q" + bytes([i + 1]) + b"(" + (b"h" + bytes([i])) * 10 + b"e" for i in range(30)
)
row("lists that repeat each other", torch_zip(b"(" + laughs + b"t"), "repeats its parts")
shared = GOOD + b"q\0" + b"0]q\1(" + b"h\0" * 1000 + b"e0](" + b"h\1" * 1000 + b"e"
row("one tensor a million times", torch_zip(shared), "repeats its parts")
big = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)
encode = b"q\0" + b"".join((glob("_codecs:encode"), b"q\1", text("latin1"), b"q\2"))
copies = big + encode + b"(" + b"h\1h\0h\2\x86R" * 2000 + b"t"
row("text encoded again and again", torch_zip(copies), "more work")
items = b"](" + b"N" * 100_000 + b"eq\0" + glob("builtins:list") + b"q\1"
row(
    "list copied again and again",
    torch_zip(items + b"(" + b"h\1h\0\x85R" * 1000 + b"t"),
    "more work",
)
row("six million operations", torch_zip(b"(" + b"N0" * 3_100_000 + b"t"), "more operations")
row("many open groups", torch_zip(b"(" * 3_000_000), "too many groups")
row(
    "many calls of an object",
    torch_zip(glob("a:b") + b")Rq\0" + b"0h\0)R" * 1_000_000),
    "more work|operations",
)
row("many empty sets", torch_zip(b"(" + b"\x8f" * 2_000_000 + b"t"), "more work")
key = b"X" + struct.pack("<I", 5000) + b"k" * 5000
row("name of a tensor too long", torch_zip(b"}" + key + GOOD + b"s"), "too long a name")
row("pickle of 65 MiB", zip_file([Record("a/data.pkl", bytes(65 << 20), method=8)]), "far too many")
row("one tensor thrice", torch_zip(GOOD + b"q\0" + b"0](" + b"h\0" * 3 + b"e"), None)

# Opcodes that PyTorch never writes, and pickles that do not add up.

for code in b"iol\x82\x83\x84P\x97\x98ILFSVgp2d":
    row(
        f"opcode {code:#x}",
        torch_zip(b"(" + bytes([code]) + b"os\nsystem\n"),
        "not there|do not fit",
    )
row("protocol 0", torch_zip(b"N", proto=b"\x80\0"), "protocol 0")
row("protocol 6", torch_zip(b"N", proto=b"\x80\6"), "protocol 6")
row("empty stack", torch_zip(b""), "exactly one")
row("two values", torch_zip(b"NN"), "exactly one")
row("open group", torch_zip(b"N("), "exactly one")
row("reduce nothing", torch_zip(b"R"), "not there")
row("call a number", torch_zip(b"K\1)R"), "not a global")
row("arguments that are a list", torch_zip(glob("a:b") + b"]R"), "not a tuple")
row("memo that is not there", torch_zip(b"h\7"), "not there")
row("state of a class", torch_zip(glob("os:environ") + b"}b"), "state of a class")
row("append to a dict", torch_zip(b"}K\1a"), "adds items to a dict")
row("key without a value", torch_zip(b"}(K\1u"), "without a value")
row("global without an end", torch_zip(b"cos"), "does not end")
row("more after the pickle", torch_zip(b"N.N"), "more data follows")
row("no end", zip_file([Record("a/data.pkl", b"\x80\2N")]), "cut off")
row("empty pickle", zip_file([Record("a/data.pkl", b"")]), "cut off")

# Tensors that reach out of their storage.

row("negative offset", torch_zip(tensor((2,), (1,), offset=b"\x8a\1\xff")), "not a size")
row("negative stride", torch_zip(tensor((2,), (b"\x8a\1\xff",))), "not a size")
row("negative size", torch_zip(tensor((b"\x8a\1\xff",), (1,))), "not a size")
row("size that is true", torch_zip(tensor((b"\x88",), (1,))), "not a size")
row("size that is a float", torch_zip(tensor((b"G" + bytes(8),), (1,))), "not a size")
row("size that is no tuple", torch_zip(call("torch._utils:_rebuild_tensor_v2", storage(4), integer(0),
    integer(2), integer(1), b"\x89", HOOKS)), "not a tuple")  # fmt: skip
row(
    "one element too many", torch_zip(tensor((5,), (1,))), "needs 20 bytes of a storage that has 16"
)
row("offset too far", torch_zip(tensor((4,), (1,), offset=1)), "needs 20 bytes")
row("stride too far", torch_zip(tensor((2, 2), (3, 1))), "needs 20 bytes")
row("sizes that overflow", torch_zip(tensor((1 << 32, 1 << 32), (1 << 32, 1))), "larger than")
row("strides that overflow", torch_zip(tensor((2, 2), (1 << 61, 1 << 61))), "needs")
row("offset that overflows", torch_zip(tensor((1,), (1,), offset=(1 << 64) - 4)), "not a size")
row("huge stride of one element", torch_zip(tensor((1, 4), ((1 << 62) - 1, 1))), None)
row("huge empty tensor", torch_zip(tensor((0, 1 << 40, 1 << 40), (1, 1, 1))), "larger than")
row("other number of strides", torch_zip(tensor((2, 2), (1,))), "2 sizes and 1 strides")
row("65 axes", torch_zip(tensor((1,) * 65, (1,) * 65)), "65 sizes")
row("100 000 axes", torch_zip(tensor((1,) * 100_000, (1,) * 100_000)), "100000 sizes")
row("expanded bomb", torch_zip(tensor((1 << 30,), (0,))), "would expand")
row("expanded to 64 MiB", torch_zip(named("a", tensor((1 << 24,), (0,)))), None)
many = b"".join(text(f"k{i}") + tensor((1 << 24, 1), (0, i)) for i in range(100))
row("expanded many times", torch_zip(b"}(" + many + b"u"), "far more than the file")
row("meta tensor of 65 axes", torch_zip(call("torch._utils:_rebuild_meta_tensor_no_storage",
    glob("torch:float32"), sizes((1,) * 65), sizes((1,) * 65), b"\x89")), "not a size")  # fmt: skip
row("sparse tensor without parts", torch_zip(call("torch._utils:_rebuild_sparse_tensor",
    text("sparse_coo"), group(b"NN"))), "without its parts")  # fmt: skip
row("negated booleans", torch_zip(tensor((16,), (1,), source=storage(16, "torch:BoolStorage"),
    more=named("neg", b"\x88"))), "negated")  # fmt: skip
row("tensor of a number", torch_zip(tensor((2,), (1,), source=integer(3))), "without a storage")
row("tensor of unknown type", torch_zip(tensor((2,), (1,), source=storage(16,
    "torch.storage:UntypedStorage"))), "unknown type")  # fmt: skip

# Storages.

row("storage longer than its record", torch_zip(tensor((5,), (1,), source=storage(5))), "16 bytes")
row("storage shorter than its record", torch_zip(tensor((2,), (1,), source=storage(2))), "16 bytes")
row("storage that is missing", torch_zip(storage(4, key=text("7"))), "missing")
row("key with NUL", torch_zip(storage(4, key=text("0\0"))), "missing")
row("key that climbs", torch_zip(storage(4, key=text("../version"))), "missing")
row("key that is absolute", torch_zip(storage(4, key=text("/etc/passwd"))), "missing")
row("key that is a tuple", torch_zip(storage(4, key=b")")), "key")
row("negative storage", torch_zip(storage(-1)), "without a size")
row("storage of 2**70 elements", torch_zip(storage(1 << 70)), "without a size")
row("storage of an unknown type", torch_zip(storage(4, "os:system")), "unknown type")
row("storage of no type", torch_zip(group(text("storage"), b"](]e", b"NNN") + b"Q"), "unknown type")
row(
    "storage of two types",
    torch_zip(b"(" + storage(4) + storage(4, "torch:IntStorage") + b"t"),
    "two types",
)
row("storage of two sizes", torch_zip(b"(" + storage(4) + storage(3) + b"t"), "two types or sizes")
row("persistent id that is text", torch_zip(text("0") + b"Q"), "no storage")
row(
    "persistent id of a module",
    torch_zip(group(text("module"), glob("os:system"), b"NN") + b"Q"),
    None,
)
row(
    "view outside of its storage",
    torch_zip(storage(4, extra=group(text("v"), integer(3), integer(2)))),
    "outside",
)

# numpy arrays and numbers in the pickle.

ARRAY = call("numpy.core.multiarray:_reconstruct", glob("numpy:ndarray"), sizes((0,)), binary(b"b"))


def numpy_dtype(spec, state=b""):
    return call("numpy:dtype", text(spec), b"\x89\x88") + state


def numpy_array(shape, spec, content):
    return ARRAY + group(integer(1), sizes(shape), numpy_dtype(spec), b"\x89", content) + b"b"


row("numpy array", torch_zip(numpy_array((2, 2), "f4", binary(DATA))), None)
row("numpy array too long", torch_zip(numpy_array((2, 3), "f4", binary(DATA))), "needs 24 bytes")
row("numpy array too short", torch_zip(numpy_array((1,), "f4", binary(DATA))), "16 bytes")
row("numpy array of objects", torch_zip(numpy_array((1,), "O", b"](Ne")), None)
row(
    "numpy array of negative size",
    torch_zip(numpy_array((-2, -2), "f4", binary(DATA))),
    "not a tuple",
)
row(
    "numpy array of 2**80",
    torch_zip(numpy_array((1 << 40, 1 << 40), "f4", binary(DATA))),
    "larger than",
)
row(
    "numpy array of huge empty",
    torch_zip(numpy_array((0, 1 << 62), "f4", binary(b""))),
    "not a size",
)
row("numpy dtype with a comma", torch_zip(numpy_array((1,), "f4,O", binary(DATA))), None)
row(
    "numpy number",
    torch_zip(call("numpy.core.multiarray:scalar", numpy_dtype("f8"), binary(bytes(8)))),
    None,
)
row("numpy number too short", torch_zip(call("numpy._core.multiarray:scalar", numpy_dtype("f8"),
    binary(b"x"))), "wrong size")  # fmt: skip
row("numpy state of an array", torch_zip(ARRAY + b")b"), "do not fit")

# Zip files with more than one meaning.

PICKLE = Record("a/data.pkl", b"\x80\2" + GOOD + b".")
ZERO = Record("a/data/0", DATA)
row("zip record twice", torch_zip(GOOD, Record("a/data/0", DATA)), "there twice")
row("zip pickle twice", torch_zip(GOOD, Record("a/data.pkl", b"\x80\2N.")), "there twice")
row("zip two roots", torch_zip(GOOD, Record("b/data.pkl", b"\x80\2N.")), "two records claim")
row("zip no pickle", zip_file([ZERO]), "no data.pkl")
row("zip pickle further down", zip_file([Record("a/b/data.pkl", b"\x80\2N.")]), "no data.pkl")
row("zip without records", zip_file([]), "no data.pkl")
row("zip encrypted", zip_file([PICKLE, Record("a/data/0", DATA, flags=1)]), "encrypted")
row(
    "zip other name inside",
    zip_file([PICKLE, Record("a/data/0", DATA, local_name=b"a/data/1")]),
    "differently",
)
row(
    "zip other method inside",
    zip_file([PICKLE, Record("a/data/0", DATA, local_method=8)]),
    "differently",
)
row(
    "zip other size inside",
    zip_file([PICKLE, Record("a/data/0", DATA, local_packed=15)]),
    "different sizes",
)
row(
    "zip method of a pickle unknown",
    zip_file([Record("a/data.pkl", b"\x80\2N.", method=12)]),
    "method 12",
)
row(
    "zip stored in another size",
    zip_file([PICKLE, Record("a/data/0", DATA, size=17)]),
    "another size",
)
row("zip checksum of the pickle", zip_file([Record("a/data.pkl", b"\x80\2N.", crc=1)]), "checksum")
row("zip checksum not recorded", zip_file([Record("a/data.pkl", b"\x80\2N.", crc=0)]), None)
row(
    "zip overlap",
    zip_file([PICKLE, ZERO, Record("a/data/0", DATA, offset=0, local_name=b"x")]),
    "there twice|differently",
)
row("zip data over the next record", zip_file([PICKLE, Record("a/data/0", DATA, packed=60, size=60), ZERO]),
    "there twice|overlaps")  # fmt: skip
row("zip overlap of records", zip_file([PICKLE, Record("a/data/0", DATA, packed=60, size=60, local_packed=60),
    Record("a/data/1", DATA)]), "overlaps")  # fmt: skip
row(
    "zip data past the directory",
    zip_file([PICKLE, Record("a/data/0", DATA, packed=5000, size=5000)]),
    "longer than",
)
row(
    "zip header past the directory",
    zip_file([PICKLE, Record("a/data/0", DATA, offset=1 << 31)]),
    "outside",
)
row("zip header in the data", zip_file([PICKLE, Record("a/data/0", DATA, offset=3)]), "differently")
row(
    "zip with NUL in a name",
    zip_file([PICKLE, ZERO, Record("a/data/0\0", DATA)]),
    "not every reader",
)
row("zip without a name", zip_file([PICKLE, ZERO, Record("", DATA)]), "not every reader")
row("zip with something in front", torch_zip(GOOD, before=b"MZ" * 40, start=0), "directory")
row("zip with something in front, offsets right", torch_zip(GOOD, before=b"MZ" * 40), None)
row("zip with something behind", torch_zip(GOOD, after=b"MZ" * 40), "follows")
row("zip with a gap", torch_zip(GOOD, between=b"x" * 99), None)
row("zip with two ends", torch_zip(GOOD, after=zip_file([])), "not where it should be|directory")
row("zip on several disks", torch_zip(GOOD, disk=1), "one part of several")
row("zip with too many entries", torch_zip(GOOD, count=60_000), "announces 60000")
row("zip with too few entries", torch_zip(GOOD, count=2), "more in it")
row("zip directory elsewhere", torch_zip(GOOD, start=0), "not where it should be")
row("zip64 marker without its field", zip_file([PICKLE, Record("a/data/0", DATA, packed=0xFFFFFFFF,
    size=0xFFFFFFFF)]), "zip64 field that is missing")  # fmt: skip
row("zip64 field too short", zip_file([PICKLE, Record("a/data/0", DATA, packed=0xFFFFFFFF, size=0xFFFFFFFF,
    extra=struct.pack("<2HQ", 1, 8, 16))]), "zip64 field that is missing")  # fmt: skip
row("zip64 field twice", zip_file([PICKLE, Record("a/data/0", DATA, size=0xFFFFFFFF, packed=0xFFFFFFFF,
    extra=struct.pack("<2H2Q", 1, 16, 16, 16) * 2)]), "two zip64")  # fmt: skip
row("zip64 field", zip_file([PICKLE, Record("a/data/0", DATA, size=0xFFFFFFFF, packed=0xFFFFFFFF,
    extra=struct.pack("<2H2Q", 1, 16, 16, 16))]), None)  # fmt: skip
row("zip64 field of 2**63", zip_file([PICKLE, Record("a/data/0", DATA, size=0xFFFFFFFF, packed=0xFFFFFFFF,
    extra=struct.pack("<2H2Q", 1, 16, 1 << 63, 1 << 63))]), "longer than the file")  # fmt: skip
row("zip64 directory", torch_zip(GOOD, wide={}), None)
row("zip64 directory that contradicts", torch_zip(GOOD, wide={"count": 2}), "contradict")
row(
    "zip64 directory of 2**60 entries",
    torch_zip(GOOD, wide={"count": 1 << 60}, count=0xFFFF),
    "announces",
)
row("zip64 directory announced", torch_zip(GOOD, count=0xFFFF), "announced but missing")
row("zip deflated", zip_file([Record("a/data.pkl", PICKLE.content, method=8),
    Record("a/data/0", DATA, method=8)]), None)  # fmt: skip
row(
    "zip inflates to less",
    zip_file([PICKLE, Record("a/data/0", DATA[:-1], method=8, size=16)]),
    "does not inflate",
)
row(
    "zip inflates to more",
    zip_file([PICKLE, Record("a/data/0", DATA + b"x", method=8, size=16)]),
    "does not inflate",
)
bomb = Record("a/data/0", bytes(1 << 27), method=8)
row("zip bomb", zip_file([Record("a/data.pkl", b"\x80\2" + tensor((1 << 25,), (1,),
    source=storage(1 << 25)) + b"."), bomb]), "would inflate")  # fmt: skip
row("zip byte order unknown", torch_zip(GOOD, Record("a/byteorder", b"middle")), "byte order")
row("zip big-endian", torch_zip(GOOD, Record("a/byteorder", b"big")), None)
row("zip program of torch.export", zip_file([Record("m/archive_format", b"pt2")]), "torch.export")


# The format before 1.6.

MAGIC = 0x1950A86A20F9469CFC6C
OLD = storage(4, extra=b"N")
LEGACY_DATA = struct.pack("<q", 4) + DATA


def legacy(body, keys=("0",), data=LEGACY_DATA, magic=MAGIC, version=1001, facts=b"}"):
    head = b"\x80\2" + integer(magic) + b".\x80\2" + integer(version) + b".\x80\2" + facts + b"."
    listed = keys if isinstance(keys, bytes) else pickle.dumps(list(keys), 2)
    return head + b"\x80\2" + body + b"." + listed + data


OLD_TENSOR = tensor((2, 2), (2, 1), source=OLD)
row("legacy", legacy(OLD_TENSOR), None)
row("legacy another magic number", legacy(OLD_TENSOR, magic=7), "plain pickle")
row("legacy another version", legacy(OLD_TENSOR, version=7), "version of this torch.save file is 7")
row(
    "legacy payload in the facts",
    legacy(OLD_TENSOR, facts=call("os:system", text("touch CANARY"))),
    None,
)
payload = b"\x80\2" + call("os:system", text("touch CANARY")) + b"."
row("legacy payload in the keys", legacy(OLD_TENSOR, keys=payload), "not a list")
row("legacy payload in the magic number", payload + legacy(OLD_TENSOR), "plain pickle")
row("legacy without storages", legacy(OLD_TENSOR, keys=(), data=b""), "not in the file")
row("legacy storage twice", legacy(OLD_TENSOR, keys=("0", "0")), "twice")
row("legacy storage nobody uses", legacy(OLD_TENSOR, keys=("1",)), "no tensor uses")
row("legacy key that is a list", legacy(OLD_TENSOR, keys=([],)), "no tensor uses")
row("legacy another size", legacy(OLD_TENSOR, data=struct.pack("<q", 3) + DATA), "3 elements")
row("legacy negative size", legacy(OLD_TENSOR, data=struct.pack("<q", -4) + DATA), "-4 elements")
row("legacy cut off", legacy(OLD_TENSOR)[:-1], "cut off")
row("legacy cut off early", legacy(OLD_TENSOR)[:-20], "cut off")
row(
    "legacy view",
    legacy(tensor((2,), (1,), source=storage(4, extra=group(text("v"), integer(2), integer(2))))),
    None,
)
row(
    "legacy view outside",
    legacy(storage(4, extra=group(text("v"), integer(3), integer(2)))),
    "outside",
)
row("legacy view that is a list", legacy(storage(4, extra=b"]")), "is not")
row("legacy huge storage", legacy(tensor((2,), (1,), source=storage(1 << 40, extra=b"N")),
    data=struct.pack("<q", 1 << 40)), "cut off")  # fmt: skip
row("legacy module", legacy(group(text("module"), glob("os:system"), text("x.py"), text("x")) + b"Q)\x81",
    keys=(), data=b""), None)  # fmt: skip
row("plain pickle", pickle.dumps({"a": 1}, 2), "plain pickle")


# The format before 0.1.10.


def member(name, content, size=None, kind=b"0", checksum=None):
    header = bytearray(512)
    header[: len(name)] = name.encode()
    header[124:136] = b"%011o\0" % (len(content) if size is None else size)
    header[156:157] = kind
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    total = sum(header) if checksum is None else checksum
    header[148:156] = b"%06o\0 " % total
    return bytes(header) + content + bytes(-len(content) % 512)


def small(value):
    return pickle.dumps(value, 2)


def tar_storages(count=1, numel=4, views=(), kind="torch:FloatStorage", data=DATA):
    entry = b"\x80\2" + group(integer(7), text("cpu"), glob(kind)) + b"."
    return small(count) + entry + struct.pack("<q", numel) + data + small(list(views))


def tar_tensors(count=1, rank=2, shape=(2, 2), stride=(2, 1), offset=0, source=7):
    entry = b"\x80\2" + group(integer(9), integer(source), glob("torch:FloatTensor")) + b"."
    entry += struct.pack("<i4x", rank) + struct.pack(f"<{len(shape)}q", *shape)
    return small(count) + entry + struct.pack(f"<{len(stride)}qq", *stride, offset)


def tar(storages=None, tensors=None, body=None, extra=b""):
    body = b"\x80\2" + (text("9") + b"Q" if body is None else body) + b"."
    parts = member("sys_info", small({"protocol_version": 1000}))
    parts += member("pickle", body) + member(
        "tensors", tar_tensors() if tensors is None else tensors
    )
    parts += member("storages", tar_storages() if storages is None else storages)
    return parts + extra + bytes(1024)


row("tar", tar(), None)
row("tar member that climbs", tar(extra=member("../../CANARY", b"x")), None)
row("tar member that is a link", tar(extra=member("CANARY", b"", kind=b"2")), None)
row("tar member twice", tar(extra=member("pickle", b"x")), "twice")
row(
    "tar renamed by an extended header",
    tar(extra=member("x", b"14 path=pickle\n", kind=b"x")),
    "renames",
)
row("tar wrong checksum", tar(extra=member("x", b"", checksum=1)), "damaged")
row("tar cut off", tar()[:3000], "cut off|has no")
row("tar member past the end", tar(extra=member("x", b"", size=1 << 30)), "cut off")
row("tar without tensors", member("pickle", small(1)) + bytes(1024), "has no storages")
row("tar with 2**60 storages", tar(storages=tar_storages(count=1 << 60)), "pickle|damaged")
row("tar count that is text", tar(storages=tar_storages(count="x")), "damaged")
row("tar storage too long", tar(storages=tar_storages(numel=1 << 50)), "longer than the file")
row("tar storage negative", tar(storages=tar_storages(numel=-1)), "longer than the file")
row("tar storage of no type", tar(storages=tar_storages(kind="os:system")), "unknown type")
row("tar view", tar(storages=tar_storages(views=[(8, 7, 2, 2)]), tensors=tar_tensors(
    rank=1, shape=(2,), stride=(1,), source=8)), None)  # fmt: skip
row("tar view outside", tar(storages=tar_storages(views=[(8, 7, 3, 2)])), "outside")
row("tar view of a list", tar(storages=tar_storages(views=[7])), "damaged")
row("tar view of nothing", tar(storages=tar_storages(views=[(8, 1, 0, 1)])), "not in the file")
row("tar key twice", tar(storages=tar_storages(views=[(7, 7, 0, 1)])), "have the key 7")
row("tar tensor of 1 000 axes", tar(tensors=tar_tensors(rank=1000)), "1000 axes")
row("tar tensor of -1 axes", tar(tensors=tar_tensors(rank=-1)), "-1 axes")
row("tar tensor outside", tar(tensors=tar_tensors(offset=1)), "needs 20 bytes")
row("tar tensor of nothing", tar(tensors=tar_tensors(source=1)), "not in the file")
row("tar reference to nothing", tar(body=text("1") + b"Q"), "not in the file")
row("tar payload", tar(body=call("os:system", text("touch CANARY"))), None)
row("tar all zeros", bytes(4096), "has no storages")


def opener(content):
    """The function that a file of this content is for."""
    from lamina.io import torch_legacy, torch_tar, torch_zip

    if b"ustar" in content[257:265] or not any(content):
        return torch_tar.open_torch_tar
    if content[:4] == b"PK\3\4" or content[-22:-18] == b"PK\5\6" or content[:2] == b"MZ":
        return torch_zip.open_torch_zip
    return torch_legacy.open_torch_legacy


def use(path, content):
    """Open a file, read all that can be read, and print everything."""
    from lamina._core.errors import FileError

    with opener(content)(path) as file:
        for handle in file.values():
            try:
                array = handle.read()
            except FileError:
                if not handle.refused:
                    raise
            else:
                assert array.shape == handle.shape and array.dtype == handle.dtype
        str(file.tree)
        return len(file)


FORBIDDEN = ("compile", "exec", "import", "os.", "subprocess.", "socket.", "shutil.", "ctypes.")
ALLOWED = ("os.listdir", "os.scandir", "os.putenv")


def main(directory):
    """Write and use every file; nothing may be imported, run, or opened but the file itself."""
    from lamina._core.errors import FileError

    use_first = Path(directory) / "first"
    use_first.write_bytes(CORPUS["fine"][0])
    use(use_first, CORPUS["fine"][0])
    watching = []

    def watch(event, arguments):
        if not watching:
            return
        if event == "open" and str(arguments[0]) != watching[0]:
            raise SystemExit(f"{watching[0]}: opened {arguments[0]}")
        if event.startswith(FORBIDDEN) and event not in ALLOWED:
            raise SystemExit(f"{watching[0]}: {event} {arguments}")

    sys.addaudithook(watch)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, hard))
    for i, (name, (content, message)) in enumerate(CORPUS.items()):
        path = Path(directory) / f"{i}.bin"
        path.write_bytes(content)
        start = time.perf_counter()
        watching.append(str(path))
        try:
            use(path, content)
            outcome = None
        except FileError as error:
            outcome = str(error)
        finally:
            watching.clear()
        seconds = time.perf_counter() - start
        if seconds > 20 or (outcome is None) != (message is None):
            raise SystemExit(f"{name}: {outcome} after {seconds:.1f} s, expected {message}")
    print(f"{len(CORPUS)} files, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")


if __name__ == "__main__":
    main(sys.argv[1])
