"""Files as old PyTorch versions wrote them, made by hand from the layout of those formats."""

import pickle
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest

from lamina._core.errors import FileError
from lamina.io.torch_legacy import open_torch_legacy
from lamina.io.torch_tar import open_torch_tar
from lamina.io.torch_zip import open_torch_zip

# The same small vocabulary of opcodes as for the hostile files.
MAKE = runpy.run_path(str(Path(__file__).with_name("hostile_torch.py")))
glob, text, group, integer, call = (MAKE[n] for n in ("glob", "text", "group", "integer", "call"))
named, tensor, storage, sizes = (MAKE[n] for n in ("named", "tensor", "storage", "sizes"))


def short(word):
    """Text as Python 2 pickled it."""
    return b"U" + bytes([len(word)]) + word


def write(tmp_path, content):
    path = tmp_path / "old.pth"
    path.write_bytes(content)
    return path


def test_tar(tmp_path):
    views = [(8, 7, 1, 3)]
    storages = MAKE["tar_storages"](views=views)
    first = MAKE["tar_tensors"]()
    entry = b"\x80\2" + group(integer(10), integer(8), glob("torch:FloatTensor")) + b"."
    entry += struct.pack("<i4xqqq", 1, 2, 2, 0)
    tensors = pickle.dumps(2, 2) + first[len(pickle.dumps(1, 2)) :] + entry
    body = named("whole", text("9") + b"Q", "steps", text("10") + b"Q", "also", text("9") + b"Q")
    path = write(tmp_path, MAKE["tar"](storages, tensors, body))
    with open_torch_tar(path) as file:
        assert list(file) == ["whole", "steps", "also"]
        assert file["whole"].read().tolist() == [[1, 2], [3, 4]]
        assert file["steps"].read().tolist() == [2, 4]
        assert file.ties == {"also": "whole"}
        assert file.kind == "torch-tar"


@pytest.mark.filterwarnings("ignore")
def test_torch_reads_the_tar_alike(tmp_path, torch):
    path = write(tmp_path, MAKE["tar"]())
    expected = torch.load(path, weights_only=False)
    with open_torch_tar(path) as file:
        assert file["array"].read().tolist() == expected.tolist()


def test_tar_of_a_class_with_its_source(tmp_path):
    module = group(glob("net:Net"), text("net.py"), text("class Net: ...")) + b"Q)\x81"
    module += named("_parameters", named("w", text("9") + b"Q"), "_modules", b"}") + b"b"
    with open_torch_tar(write(tmp_path, MAKE["tar"](body=module))) as file:
        assert file["w"].read().tolist() == [[1, 2], [3, 4]]


def test_tar_with_extended_headers_and_long_sizes(tmp_path):
    extended = b"24 mtime=1480000000.123\n"
    content = MAKE["member"]("pax", extended, kind=b"x") + MAKE["tar"]()
    size = b"11 size=16\n"
    content = content[:-1024] + MAKE["member"]("y", size, kind=b"x")
    content += MAKE["member"]("more", bytes(16), size=0) + bytes(1024)
    with open_torch_tar(write(tmp_path, content)) as file:
        assert len(file) == 1


def test_first_rebuild_function(tmp_path):
    body = tensor((2, 2), (1, 2), source=MAKE["OLD"], name="_rebuild_tensor")
    with open_torch_legacy(write(tmp_path, MAKE["legacy"](body))) as file:
        assert file["array"].read().tolist() == [[1, 3], [2, 4]]


def test_python_2_text(tmp_path):
    key = short(b"fc.weight")
    source = group(
        short(b"storage"), glob("torch.cuda:FloatStorage"), short(b"0"), short(b"cuda:0"),
        b"\x8a\1\4", b"N",
    ) + b"Q"  # fmt: skip
    latin = short("mü".encode("latin-1"))
    body = b"}(" + key + tensor((4,), (1,), source=source) + latin + b"K\1u"
    with open_torch_legacy(write(tmp_path, MAKE["legacy"](body))) as file:
        assert file["fc.weight"].read().tolist() == [1, 2, 3, 4]
        assert file.tree["mü"] == 1


def test_storages_that_are_views_are_shared(tmp_path):
    def part(start, count):
        view = group(text(f"v{start}"), integer(start), integer(count))
        return tensor((count,), (1,), source=storage(4, extra=view))

    body = b"(" + part(1, 2) + part(1, 2) + part(0, 4) + b"t"
    with open_torch_legacy(write(tmp_path, MAKE["legacy"](body))) as file:
        assert [handle.read().tolist() for handle in file.values()] == [
            [2, 3],
            [2, 3],
            [1, 2, 3, 4],
        ]
        assert file.ties == {"1": "0"}


def test_variable_and_parameter_of_0_1(tmp_path):
    data = tensor((4,), (1,), source=MAKE["OLD"], name="_rebuild_tensor")
    reduced = call("torch.autograd.variable:Variable", data, b"\x88", b"\x89", b"N")
    created = glob("torch.nn.parameter:Parameter") + b")\x81" + group(data, b"\x88", b"N") + b"b"
    modern = call("torch._utils:_rebuild_parameter", data, b"\x88", b"N")
    body = named("a", reduced, "b", created, "c", modern)
    with open_torch_legacy(write(tmp_path, MAKE["legacy"](body))) as file:
        for name in "abc":
            assert file[name].read().tolist() == [1, 2, 3, 4]


def test_data_is_little_endian_whatever_the_machine_was(tmp_path):
    facts = named("little_endian", b"\x89")
    content = MAKE["legacy"](MAKE["OLD_TENSOR"], facts=facts)
    with open_torch_legacy(write(tmp_path, content)) as file:
        assert file["array"].read().tolist() == [[1, 2], [3, 4]]


def test_float8_in_the_old_format(tmp_path):
    source = storage(16, kind="torch.storage:UntypedStorage", extra=b"N")
    body = tensor(
        (16,), (1,), source=source, name="_rebuild_tensor_v3", more=glob("torch:float8_e5m2")
    )
    data = struct.pack("<q", 16) + bytes(range(16))
    with open_torch_legacy(write(tmp_path, MAKE["legacy"](body, data=data))) as file:
        assert file["array"].read().tobytes() == bytes(range(16))
        assert file["array"].dtype.name == "float8_e5m2"


def test_zip_of_1_6_has_only_the_pickle_and_the_data(tmp_path):
    path = write(tmp_path, MAKE["torch_zip"](named("w", MAKE["GOOD"])))
    with open_torch_zip(path) as file:
        assert np.array_equal(file["w"].read(), [[1, 2], [3, 4]])


def test_one_dotted_name_twice_hides_nothing(tmp_path):
    good = MAKE["GOOD"]
    other = tensor((2,), (1,))
    body = named("a.b", good, "a", named("b", other))
    with open_torch_zip(write(tmp_path, MAKE["torch_zip"](body))) as file:
        assert {name: handle.shape for name, handle in file.items()} == {
            "a.b": (2, 2),
            "a.b~2": (2,),
        }


def test_legacy_file_read_to_its_last_byte(tmp_path):
    content = MAKE["legacy"](MAKE["OLD_TENSOR"])
    for length in (len(content) - 1, len(content) - 16, len(content) - 17):
        with pytest.raises(FileError, match="cut off"):
            open_torch_legacy(write(tmp_path, content[:length]))
