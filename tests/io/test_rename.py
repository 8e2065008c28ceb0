"""Rename rules: captures, order, both directions, and every mistake one can make in them."""

import hypothesis
import hypothesis.strategies as st
import pytest

from lamina._core.errors import RuleError
from lamina.io.rename import Renaming, renamed


def test_captures():
    rules = Renaming({
        "encoder.*.attn.[qk].weight": "enc.{0}.{1}_proj.weight",
        "layer?.bias": "{0}.b",
        "old.*": "new.{0}",
    })  # fmt: skip
    assert rules("encoder.3.attn.q.weight") == "enc.3.q_proj.weight"
    assert rules("encoder.3.attn.v.weight") == "encoder.3.attn.v.weight"
    assert rules("layer7.bias") == "7.b" and rules("layer77.bias") == "layer77.bias"
    assert rules("old.a.b.c") == "new.a.b.c"  # a star stands for dots too, as everywhere
    assert rules("x.old.a") == "x.old.a"


def test_forms():
    for rules in ({"a.*": "b.{0}"}, [("a.*", "b.{0}")], ["a.*=b.{0}"], Renaming({"a.*": "b.{0}"})):
        assert Renaming(rules)("a.w") == "b.w"
    assert Renaming(str.upper)("a.w") == "A.W"
    assert Renaming({"a.*": None, "b": "c"}).apply(["a.w", "b", "d"]) == {"b": "c", "d": "d"}


def test_first_rule_decides():
    rules = Renaming([("a.weight", "x"), ("a.*", "y.{0}")])
    assert rules.apply(["a.weight", "a.bias"]) == {"a.weight": "x", "a.bias": "y.bias"}


def test_inverse():
    rules = Renaming({"a.*.q.?": "{1}.b.{0}", "plain": "other", "drop.*": None})
    names = ["a.1.q.w", "a.x.y.q.b", "plain", "rest"]
    there = rules.apply([*names, "drop.it"])
    assert list(there.values()) == ["w.b.1", "b.b.x.y", "other", "rest"]
    assert list(rules.invert().apply(there.values()).values()) == names
    assert list(rules.invert().invert().apply([*names]).values()) == list(there.values())


def test_inverse_of_a_repeated_capture():
    back = Renaming({"a.*": "{0}.{0}"}).invert()
    assert back("x.x") == "a.x" and back("x.y") == "x.y"


def test_inverse_of_special_characters():
    back = Renaming({"a.*": "b?[{0}]"}).invert()
    assert back("b?[w]") == "a.w" and back("bx[w]") == "bx[w]"
    assert back.invert()("a.w") == "b?[w]"


parts = st.text(st.sampled_from("ab01"), min_size=1, max_size=3)


@hypothesis.given(st.lists(st.tuples(parts, parts), max_size=8))
def test_there_and_back(pairs):
    rules = Renaming({"m.*.w.*": "{1}.n.{0}"}, allow_unused=True)
    names = list(dict.fromkeys(f"m.{a}.w.{b}" for a, b in pairs))
    there = rules.apply(names)
    assert list(rules.invert().apply(there.values()).values()) == names


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"a": "b.*"}, r"wildcard in its target"),
        ({"a.*": "b.{1}"}, r"uses \{1\}, but the pattern has 1 wildcards"),
        (["nothing"], "not of the form PATTERN=TARGET"),
        ([("a", "b", "c")], "a pair"),
        ([3], "a pair"),
        ({"a": 3}, "a pair of strings"),
        (7, "a dict, a list of pairs or a function"),
        ("a=b", "a dict, a list of pairs or a function"),
    ],
)
def test_malformed_rules(rules, message):
    with pytest.raises(RuleError, match=message):
        Renaming(rules)


def test_no_inverse():
    with pytest.raises(RuleError, match="does not use {0}"):
        Renaming({"a.*": "b"}).invert()
    with pytest.raises(RuleError, match="no inverse"):
        Renaming(str.upper).invert()
    with pytest.raises(RuleError, match="str or None"):
        Renaming(lambda name: 3)("a")


def test_clashes_are_errors():
    with pytest.raises(RuleError, match="'a' and 'c' would both become 'b'"):
        Renaming({"a": "b", "c": "b"}).apply(["a", "c"])
    with pytest.raises(RuleError, match="both become"):
        Renaming({"a": "b"}).apply(["a", "b"])


def test_rules_without_effect_are_errors():
    with pytest.raises(RuleError, match=r"(?s)'encodr.x' -> 'e'.*Did you mean 'encoder.x'"):
        Renaming({"encodr.x": "e"}).apply(["encoder.x"])
    with pytest.raises(RuleError, match="put it before"):
        Renaming([("*", "{0}"), ("a", "b")]).apply(["a"])
    assert Renaming({"x": "y"}, allow_unused=True).apply(["a"]) == {"a": "a"}


def test_renamed_keeps_the_very_values():
    value = object()
    assert renamed({"a.w": value, "b": 1}, {"a.*": "c.{0}"})["c.w"] is value
