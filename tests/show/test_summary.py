import io
import json
import math
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import lamina
from lamina import nn
from lamina._core.bind import Frame
from lamina._core.fingerprint import plain_attributes
from lamina._core.random import DEFAULT
from lamina._core.walk import walk
from lamina.show import Summary, flops, summary
from lamina.show.summary import format_bytes, format_count


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def lazy_net():
    return nn.Sequential(
        nn.LazyConv2d(4, 3, padding=1),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(10),
    )


def counted_whole(net, *specs):
    """What XLA counts for the whole model in one program."""
    boxes = walk(net).boxes

    def run(values, *args):
        with Frame("test", abstract=True) as frame:
            frame.bind(boxes, values)
            return net(*args), frame.collect()

    values = [jax.ShapeDtypeStruct(box.shape, box.dtype) for box in boxes]
    return jax.jit(run).lower(values, *specs).cost_analysis()["flops"]


class Residual(nn.Module):
    def __init__(self, width):
        self.a = nn.LazyLinear(width)
        self.b = nn.LazyLinear(width)

    def forward(self, x):
        return x + self.b(nn.functional.relu(self.a(x))) * 2


class TestRows:
    def test_an_unshaped_model_needs_no_input(self):
        net = lazy_net()
        table = summary(net)
        row = table.rows[1]
        assert [box.shape for box in row.boxes] == [(4, None, 3, 3), (4,)]
        assert row.boxes[0].elements is None
        assert row.boxes[0].state == "unshaped"
        assert row.output is None
        assert table.flops is None
        assert table.record.total.size.unknown == 4
        assert "(4, ?, 3, 3)" in str(table)
        assert "FLOPs" not in str(table)
        assert net[0].weight.shape == (4, None, 3, 3)

    def test_an_input_gives_shapes_and_no_values(self):
        net = lazy_net()
        table = summary(net, spec(8, 1, 6, 6))
        assert [row.output for row in table.rows] == [
            "(8, 10)",
            "(8, 4, 6, 6)",
            "(8, 4, 6, 6)",
            "(8, 4, 6, 6)",
            "(8, 4, 3, 3)",
            "(8, 36)",
            "(8, 10)",
        ]
        assert net[5].weight.shape == (10, 36)
        assert not any(box.is_material for box in walk(net).boxes)
        assert table.parameters == sum(p.numel() for p in net.parameters()) == 418
        assert table.nbytes == 4 * (418 + 9)

    def test_an_array_is_an_input_too(self):
        assert summary(lazy_net(), np.ones((2, 1, 6, 6), np.float32)).rows[0].output == "(2, 10)"

    def test_a_material_model_keeps_its_values(self):
        net = nn.Linear(3, 2)
        before = net.weight.data
        row = summary(net, spec(1, 3)).rows[0].boxes[0]
        assert row.state == "material"
        assert net.weight.data is before

    def test_the_model_is_left_as_it_was(self):
        net = nn.Sequential(Residual(4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        lamina.materialize(net, spec(2, 4))
        mark = [(n, dict(plain_attributes(m))) for n, m in net.named_modules()]
        state = {name: np.array(value) for name, value in net.state_dict().items()}
        generator = {k: np.array(v) for k, v in DEFAULT.get_state().items()}
        summary(net, spec(2, 4))
        assert [(n, dict(plain_attributes(m))) for n, m in net.named_modules()] == mark
        for _, module in net.named_modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert "forward" not in module.__dict__
        for name, value in net.state_dict().items():
            np.testing.assert_array_equal(value, state[name])
        for k, v in DEFAULT.get_state().items():
            np.testing.assert_array_equal(v, generator[k])

    def test_compiled_functions_stay_compiled(self):
        net = nn.Sequential(Residual(4))
        traced = unittest.mock.Mock()

        @lamina.jit
        def run(net, x):
            traced()
            return net(x)

        run(net, jnp.ones((2, 4)))
        before = traced.call_count
        summary(net, spec(2, 4))
        run(net, jnp.ones((2, 4)))
        assert traced.call_count == before

    def test_hooks_and_a_forward_of_the_users_own_stay(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        seen = []
        net[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
        net[1].forward = lambda x: x * 2
        summary(net, spec(2, 3))
        assert seen
        assert set(seen) == {(2, 3)}
        assert len(net[0]._forward_hooks) == 1
        np.testing.assert_array_equal(net[1](jnp.ones(2)), [2, 2])

    def test_an_error_leaves_the_model_as_it_was(self):
        net = nn.Sequential(nn.LazyLinear(4), nn.Linear(5, 2))
        with pytest.raises(Exception, match="'1'") as caught:
            summary(net, spec(2, 3))
        assert "in module '1'" in "".join(caught.value.__notes__)
        assert net[0].weight.shape == (4, None)
        assert type(net[0]) is nn.LazyLinear
        assert not any(module._forward_hooks for module in net.modules())

    def test_what_is_no_module_is_refused(self):
        with pytest.raises(TypeError, match="expected a module, got list"):
            summary([nn.Linear(2, 2)])

    def test_ties_count_once(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        net[1].weight = net[0].weight
        table = summary(net, spec(2, 4))
        assert table.parameters == 20
        assert table.ties == {"1.weight": "0.weight"}
        row = table.rows[2].boxes[0]
        assert row.tied_to == "0.weight"
        assert "= 0.weight" in str(table)
        assert "ties        1, counted once" in str(table)

    def test_a_shared_module_is_marked(self):
        shared = nn.Linear(4, 4)
        table = summary(nn.Sequential(shared, nn.ReLU(), shared), spec(2, 4))
        assert table.rows[3].shared_with == "0"
        assert table.rows[1].calls == 2
        assert table.rows[1].flops == 2 * (2 * 2 * 4 * 4 + 2 * 4)
        text = str(table)
        assert "= module 0" in text
        assert "Linear, called 2 times" in text
        assert "2.weight" not in text
        assert table.parameters == 20

    def test_frozen_parameters(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        net[0].requires_grad_(False)
        table = summary(net)
        assert (table.parameters, table.trainable) == (30, 10)
        assert "parameters  30 (120 B), 10 trainable, 20 frozen" in str(table)
        assert "frozen" in next(line for line in str(table).split("\n") if "0.bias" in line)

    def test_buffers_come_last(self):
        lines = str(summary(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))).split("\n")
        place = lines.index("buffers")
        assert lines[place + 1].startswith("0.running_mean")
        assert any(line.startswith("1.bias") for line in lines[:place])

    def test_an_empty_buffer(self):
        class Cache(nn.Module):
            def __init__(self):
                self.register_buffer("last", None, persistent=False)

            def forward(self, x):
                return x

        table = summary(Cache(), spec(2))
        assert table.rows[0].boxes[0].state == "empty"
        assert "(empty)" in str(table)

    def test_a_parameter_of_which_nothing_is_known(self):
        class Free(nn.Module):
            def __init__(self):
                self.weight = nn.UninitializedParameter()

        table = summary(Free())
        assert table.rows[0].boxes[0].shape is None
        assert "(?)" in str(table)

    def test_half_precision_is_said(self):
        table = summary(nn.Linear(3, 2).to(jnp.bfloat16))
        assert "(2, 3) bfloat16" in str(table)
        assert table.nbytes == 16

    def test_recipes_of_the_users_own(self):
        net = nn.Linear(3, 2, bias=False)

        def small(key, shape, dtype):
            return jnp.zeros(shape, dtype)

        net.weight.init = small
        assert "small" in summary(net).rows[0].boxes[0].recipe
        net.weight = nn.Parameter(jnp.ones((2, 3)))
        assert "(value given)" in str(summary(net))

    def test_several_inputs_and_outputs(self):
        class Two(nn.Module):
            def forward(self, x, *, scale, times=1):
                return {"a": x * scale, "b": [x, None]}

        table = summary(Two(), spec(2, 3), scale=spec(), times=2)
        assert table.rows[0].output == "{a: (2, 3), b: [(2, 3), None]}"
        assert table.record.inputs == "(2, 3), scale=(), times=2"

    def test_depth_hides_rows_and_keeps_totals(self):
        net = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 2))
        table = summary(net, spec(1, 3), depth=1)
        assert [row.name for row in table.rows] == ["", "0", "1"]
        assert table.rows[1].size.parameters == 12
        assert table.parameters == 20

    def test_mode(self):
        net = nn.Dropout(0.5)
        assert "training mode" in str(summary(net, spec(4)))
        quiet = summary(net.eval(), spec(4))
        assert "evaluation mode" in str(quiet)
        assert quiet.flops == 0


class TestFlops:
    def test_a_linear_layer(self):
        assert summary(nn.Linear(5, 7), spec(3, 5)).flops == 2 * 3 * 5 * 7 + 3 * 7

    def test_off(self):
        table = summary(nn.Linear(5, 7), spec(3, 5), flops=False)
        assert table.flops is None
        assert table.rows[0].output == "(3, 7)"

    def test_the_sum_is_what_xla_counts_for_the_whole(self):
        net = nn.Sequential(lazy_net()[:4], nn.Flatten(), Residual(36), nn.LazyLinear(5))
        x = spec(2, 4, 6, 6)
        table = summary(net, x)
        assert table.flops == counted_whole(net, x)

    @pytest.mark.parametrize("how", ["vmap", "jax.vmap", "scan", "remat", "jit"])
    def test_children_under_transforms_are_counted_in_the_parent(self, how):
        class Inner(nn.Module):
            def __init__(self):
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                layer = self.layer
                if how == "vmap":
                    return lamina.vmap(lambda row: layer(row))(x)
                if how == "jax.vmap":
                    return jax.vmap(lambda row: layer(row))(x)
                if how == "scan":
                    return lamina.scan(lambda carry, row: (carry, layer(row)), 0.0, x)[1]
                if how == "remat":
                    return lamina.remat(lambda x: layer(x))(x)
                return lamina.jit(lambda x: layer(x))(x)

        net = nn.Sequential(nn.Linear(4, 4), Inner())
        table = summary(net, spec(3, 4))
        assert table.flops == counted_whole(net, spec(3, 4))
        assert [row.calls for row in table.rows] == [1, 1, 1, 1]

    def test_equal_layers_are_lowered_once(self, monkeypatch):
        lowered = []
        real = flops._lower
        monkeypatch.setattr(
            flops, "_lower", lambda call, replaced: lowered.append(call) or real(call, replaced)
        )
        net = nn.Sequential(*[Residual(8) for _ in range(50)])
        table = summary(net, spec(2, 8))
        assert len(lowered) == 3  # Linear, Residual, Sequential
        assert table.flops == 50 * table.rows[1].flops
        assert table.flops == counted_whole(net, spec(2, 8))

    def test_other_shapes_are_counted_anew(self):
        class Twice(nn.Module):
            def __init__(self):
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                return self.layer(x), self.layer(x[:1])

        table = summary(Twice(), spec(3, 4))
        assert table.rows[1].flops == 4 * (2 * 16 + 4)

    def test_a_list_of_modules_sums_its_children(self):
        class Net(nn.Module):
            def __init__(self):
                self.layers = [nn.Linear(4, 4), nn.Linear(4, 4)]

            def forward(self, x):
                for layer in self.layers:
                    x = layer(x)
                return x

        table = summary(Net(), spec(1, 4))
        assert table.rows[1].kind == "ModuleList"
        assert table.rows[1].calls == 0
        assert table.rows[1].flops == table.flops

    def test_integers_and_keys_as_inputs(self):
        net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
        assert summary(net, spec(2, 5, dtype=jnp.int32)).flops is not None

        class Noise(nn.Module):
            def __init__(self):
                self.inner = nn.Linear(3, 3)

            def forward(self, key):
                return self.inner(jax.random.normal(key, (2, 3)))

        key = jax.eval_shape(lambda: jax.random.key(0))
        assert summary(Noise(), key).rows[0].output == "(2, 3)"

    def test_what_can_not_be_lowered_alone_is_unknown(self):
        class Branch(nn.Module):
            def __init__(self):
                self.flag = nn.Buffer(jnp.asarray(1))
                self.layer = nn.Linear(3, 3)

            def forward(self, x):
                return self.layer(x) if int(self.flag) else x

        net = Branch()
        table = summary(net, spec(2, 3))
        assert table.rows[0].output == "(2, 3)"
        assert table.flops is None
        assert table.rows[1].flops == 2 * 2 * 9 + 6
        assert "?" in str(table).split("\n")[1]

    def test_a_model_larger_than_any_memory(self):
        net = nn.Sequential(*[nn.Linear(2**17, 2**17, bias=False) for _ in range(40)])
        table = summary(net, spec(1, 2**17))
        assert table.parameters == 40 * 2**34
        assert math.isclose(table.flops, 2 * table.parameters, rel_tol=1e-5)
        assert "TiB" in str(table)


class TestShapes:
    def test_text_is_aligned_and_plain(self):
        text = str(summary(lazy_net(), spec(8, 1, 6, 6)))
        lines = text.split("\n")
        assert lines[0].split("  ")[0] == "name"
        column = lines[0].index("layer, recipe")
        assert lines[1][column:].startswith("Sequential")
        assert lines[2][column:].startswith("Conv2d")
        assert "\x1b" not in text
        assert all(line == line.rstrip() for line in lines)

    def test_rich_draws_in_colour_and_within_the_width(self):
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=70, color_system="standard")
        console.print(summary(lazy_net(), spec(8, 1, 6, 6)))
        assert "\x1b[" in out.getvalue()
        plain = io.StringIO()
        Console(file=plain, force_terminal=True, width=70, color_system=None, no_color=True).print(
            summary(lazy_net(), spec(8, 1, 6, 6))
        )
        assert max(len(line.rstrip()) for line in plain.getvalue().split("\n")) <= 85
        assert "…" in plain.getvalue()

    def test_html(self):
        class Odd(nn.Module):
            def __init__(self):
                self.weight = nn.Parameter(shape=(2,), init=nn.init.Ones())

            def extra_repr(self):
                return "<&>"

        page = summary(nn.ModuleDict({"<b>": Odd()}))._repr_html_()
        assert "&lt;b&gt;.weight" in page
        assert "<b>" not in page
        assert page.count("<tr") == page.count("</tr>") == 4

    def test_dict_is_plain_data(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net[1].weight = net[0].weight
        found = json.loads(json.dumps(summary(net, spec(2, 4)).to_dict()))
        assert found["total"]["trainable"] == 24
        assert found["total"]["flops"] == 2 * (2 * 2 * 16 + 8)
        assert found["ties"] == {"1.weight": "0.weight"}
        assert found["modules"][1]["boxes"][0]["shape"] == [4, 4]
        assert found["modules"][1]["output"] == "(2, 4)"

    def test_repr_is_the_table(self):
        table = summary(nn.Linear(2, 2))
        assert isinstance(table, Summary)
        assert repr(table) == str(table)

    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.50 KiB"),
            (2**30, "1.00 GiB"),
            (2**50, "1024 TiB"),
        ],
    )
    def test_bytes(self, count, text):
        assert format_bytes(count) == text

    @pytest.mark.parametrize(
        ("count", "text"),
        [(0, "0"), (999, "999"), (1234, "1.23 k"), (56.7e6, "56.7 M"), (4e18, "4.00 E")],
    )
    def test_counts(self, count, text):
        assert format_count(count) == text


def test_parameters_as_torch_counts_them(torch):
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(8, 2)
    )
    ours = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    assert summary(ours).parameters == sum(p.numel() for p in theirs.parameters())
    assert summary(ours).record.total.size.state == sum(b.numel() for b in theirs.buffers())
