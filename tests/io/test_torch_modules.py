"""Whole modules and TorchScript archives, read as the state dicts they would give."""

import collections
import warnings

import pytest

from lamina.io.torch_legacy import open_torch_legacy
from lamina.io.torch_zip import open_torch_zip

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.children_first = torch.nn.Linear(2, 2)
        self.scale = torch.nn.Parameter(torch.full((2,), 2.0))
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("dropped", torch.arange(4.0), persistent=False)
        self.register_parameter("nothing", None)
        self.plain = torch.ones(9)

    def forward(self, x):
        return self.children_first(x) * self.scale


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.embed = torch.nn.Embedding(5, 2)
        self.head = torch.nn.Linear(2, 5, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.blocks[0]
        self.names = torch.nn.ModuleDict({"a": torch.nn.BatchNorm1d(2), "b": torch.nn.Identity()})
        self.several = torch.nn.ParameterList([torch.ones(1), torch.ones(2)])

    def forward(self, x):
        return self.head(self.blocks[1](self.again(self.names["a"](x))))


for kind in (Block, Net):
    globals()[kind.__name__] = kind

MANNERS = {
    "zip": (open_torch_zip, {}),
    "protocol 4": (open_torch_zip, {"pickle_protocol": 4}),
    "legacy": (open_torch_legacy, {"_use_new_zipfile_serialization": False}),
}


def nets():
    torch.manual_seed(0)
    recurrent = torch.nn.Sequential(
        collections.OrderedDict(rnn=torch.nn.LSTM(3, 4, num_layers=2), norm=torch.nn.LayerNorm(4))
    )
    with warnings.catch_warnings(action="ignore"):
        weighted = torch.nn.utils.weight_norm(torch.nn.Linear(2, 3))
    return {
        "linear": torch.nn.Linear(3, 2),
        "net": Net(),
        "recurrent": recurrent,
        "attention": torch.nn.TransformerEncoderLayer(8, 2, 16),
        "parallel": torch.nn.DataParallel(torch.nn.Linear(2, 2)),
        "weight norm": weighted,
        "spectral": torch.nn.utils.spectral_norm(torch.nn.Linear(2, 3)),
    }


NETS = nets()


def check(handles, expected):
    assert list(handles) == list(expected)
    for name, tensor in expected.items():
        assert handles[name].read().tobytes() == tensor.detach().numpy().tobytes(), name
        assert handles[name].shape == tuple(tensor.shape)


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("name", NETS)
def test_module_gives_its_state_dict(name, manner, tmp_path):
    opener, options = MANNERS[manner]
    torch.save(NETS[name], tmp_path / "x.pt", **options)
    with opener(tmp_path / "x.pt") as file:
        check(file, NETS[name].state_dict())
        check(file.tree, NETS[name].state_dict())


def test_ties_of_a_module(tmp_path):
    torch.save(NETS["net"], tmp_path / "x.pt")
    with open_torch_zip(tmp_path / "x.pt") as file:
        assert file.ties["head.weight"] == "embed.weight"
        assert file.ties["again.scale"] == "blocks.0.scale"


def test_modules_within_other_objects(tmp_path):
    net = NETS["linear"]
    torch.save({"epoch": 3, "nets": [net, NETS["net"]], "also": net}, tmp_path / "x.pt")
    with open_torch_zip(tmp_path / "x.pt") as file:
        assert file.tree["epoch"] == 3
        check(file.tree["nets"][1], NETS["net"].state_dict())
        assert list(file)[:2] == ["nets.0.weight", "nets.0.bias"]
        assert file.ties["also.weight"] == "nets.0.weight"


def test_whole_optimizer(tmp_path):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save({"net": net, "optimizer": optimizer}, tmp_path / "x.pt")
    with open_torch_zip(tmp_path / "x.pt") as file:
        assert repr(file.tree["optimizer"]) == "<torch.optim.adam.Adam>"
        step = file["optimizer.state.0.exp_avg"].read()
        assert step.tolist() == optimizer.state[net.weight]["exp_avg"].tolist()
        assert file.ties["optimizer.param_groups.0.params.0"] == "net.weight"


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_archive(how, tmp_path):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Sequential(torch.nn.ReLU())
    ).eval()
    example = torch.ones(1, 2, 5, 5)
    program = torch.jit.script(net) if how == "script" else torch.jit.trace(net, example)
    torch.jit.save(program, tmp_path / "x.pt")
    with open_torch_zip(tmp_path / "x.pt", verify=True) as file:
        check(file, program.state_dict())
        check(file.tree, net.state_dict())
        assert all(handle.offset % 64 == 0 for handle in file.values())


def test_torchscript_ties_and_attributes(tmp_path):
    class Scripted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 2, bias=False)
            self.b = torch.nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight
            self.numbers = [1, 2, 3]
            self.word = "x"

        def forward(self, x):
            return self.b(self.a(x)) + self.numbers[0]

    program = torch.jit.script(Scripted())
    torch.jit.save(program, tmp_path / "x.pt")
    with open_torch_zip(tmp_path / "x.pt") as file:
        check(file, program.state_dict())
        assert file.ties == {"b.weight": "a.weight"}


def test_program_of_torch_export_is_refused_by_name(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "x.pt2")
    with pytest.raises(ValueError, match=r"torch\.export"):
        open_torch_zip(tmp_path / "x.pt2")
