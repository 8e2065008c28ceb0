"""The arrows between the packages, read off the imports, and the few rules that go with them."""

import ast
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1] / "src"
PACKAGE = "lamina"
MAXIMUM_LINES = 600
LONGER = {
    # One class is one file; most of it is the documentation of a module's public methods.
    "_core/module.py": 800,
}
MOST_PRIVATE_USES = 60

MIDDLE = {"nn", "func", "io", "show", "shard", "optim"}
ARROWS = {
    "_core": set(),
    **{name: {"_core"} for name in MIDDLE},
    "train": {"_core", *MIDDLE},
    # A model for another environment is a pure function (func) together with a file (io).
    "interchange": {"_core", "func", "io"},
    "testing": {"_core", "train", "cli", *MIDDLE},
    "demo": {"_core", "train", *MIDDLE},
    "cli": {"_core", "_version", "train", "testing", "demo", "interchange", *MIDDLE},
    "__main__": {"cli"},
    "_version": set(),
    "_replaced": set(),
    "errors": {"_core"},
}
# (package, other package): why it may know its sibling.
SIBLINGS: dict[tuple[str, str], str] = {
    ("show", "io"): "pictures are written as safely as models: all or nothing",
    ("nn", "func"): "Module.compile compiles every call",
}

# Imported inside functions, so that lamina works and starts fast without them.
OPTIONAL = {
    "IPython": "notebooks",
    "jax2onnx": "the onnx extra",
    "matplotlib": "plots",
    "onnxruntime": "the onnx extra",
    "rich": "takes time to import, needed only where something is shown",
    "sklearn": "the demo extra",
}

# The only places that may know of tracers; all others ask these.
TRACING = ("_core/bind.py", "func/")
TRACING_NAMES = {"Tracer", "get_opaque_trace_state", "trace_ctx", "find_top_trace"}


class Import(NamedTuple):
    module: str
    line: int
    in_function: bool
    for_types_only: bool


@functools.cache
def files():
    return {
        path.relative_to(ROOT / PACKAGE).as_posix(): path for path in (ROOT / PACKAGE).rglob("*.py")
    }


@functools.cache
def tree(name):
    return ast.parse(files()[name].read_text(encoding="utf-8"))


def dotted(name):
    """``_core/bind.py`` -> ``lamina._core.bind``."""
    parts = [PACKAGE, *name.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(name):
    """Return what a file imports, as absolute module names."""
    package = dotted(name) if name.endswith("__init__.py") else dotted(name).rpartition(".")[0]
    found = []

    def visit(node, in_function, for_types_only):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            targets = [submodule(base, alias.name) for alias in node.names]
        else:
            targets = []
        found.extend(Import(target, node.lineno, in_function, for_types_only) for target in targets)
        inner = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types = for_types_only or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        for child in ast.iter_child_nodes(node):
            visit(child, inner, types)

    visit(tree(name), False, False)
    return found


def submodule(base, name):
    """``from lamina.nn import init`` imports ``lamina.nn.init``; other names are attributes."""
    path = (ROOT / base.replace(".", "/")) / name
    exists = path.with_suffix(".py").exists() or path.is_dir()
    return f"{base}.{name}" if base.startswith(PACKAGE) and exists else base


def part(module):
    """``lamina.nn.conv`` -> ``nn``; empty for the top level."""
    names = module.split(".")
    return names[1] if names[0] == PACKAGE and len(names) > 1 else ""


def report(problems):
    assert not problems, "\n" + "\n".join(problems)


def test_there_are_files():
    assert "_core/bind.py" in files()


def test_every_package_has_its_arrows():
    parts = {part(dotted(name)) for name in files()} - {""}
    report([f"{name}: add it to ARROWS" for name in sorted(parts - ARROWS.keys())])


def test_arrows():
    problems = []
    for name in files():
        own = part(dotted(name))
        if not own:
            continue  # the top level re-exports everything
        for found in imports(name):
            other = part(found.module)
            inside = found.module.split(".")[0] == PACKAGE
            if inside and not other:
                problems.append(f"{name}:{found.line}: imports from the top level of {PACKAGE}")
            elif inside and other not in {own, *ARROWS.get(own, ())}:
                if (own, other) not in SIBLINGS:
                    problems.append(f"{name}:{found.line}: {own} must not know {other}")
    report(problems)


def test_sibling_arrows_are_used():
    used = {(part(dotted(name)), part(found.module)) for name in files() for found in imports(name)}
    report([f"{own} -> {other}: no longer needed" for own, other in SIBLINGS.keys() - used])


def test_no_cycles():
    modules = {dotted(name): name for name in files()}
    graph = {
        module: {
            found.module
            for found in imports(name)
            if found.module in modules and found.module != module
        }
        for module, name in modules.items()
    }
    # A package's __init__ re-exports its modules; a module that needs a sibling imports the sibling.
    state = {}
    cycles = []

    def visit(module, path):
        if state.get(module) == "done":
            return
        if module in path:
            cycles.append(" -> ".join([*path[path.index(module) :], module]))
            return
        for other in sorted(graph[module]):
            visit(other, [*path, module])
        state[module] = "done"

    for module in sorted(graph):
        visit(module, [])
    report(cycles)


def test_no_imports_inside_functions_except_optional_ones():
    problems = []
    for name in files():
        for found in imports(name):
            top = found.module.split(".")[0]
            if found.in_function and top not in OPTIONAL:
                problems.append(f"{name}:{found.line}: import {found.module} inside a function")
    report(problems)


def test_the_core_imports_jax_and_numpy_only():
    allowed = {PACKAGE, "jax", "numpy", *sys.stdlib_module_names}
    problems = [
        f"{name}:{found.line}: {found.module}"
        for name in files()
        if name.startswith("_core/")
        for found in imports(name)
        if found.module.split(".")[0] not in allowed
    ]
    report(problems)


def test_only_public_jax():
    problems = []
    for name in files():
        problems += [
            f"{name}:{found.line}: {found.module}"
            for found in imports(name)
            if found.module.startswith("jax") and "._" in found.module
        ]
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Attribute) and node.attr == "_src":
                problems.append(f"{name}:{node.lineno}: _src")
    report(problems)


def test_only_binding_touches_tracers():
    problems = []
    for name in files():
        if name.startswith(TRACING):
            continue
        for node in ast.walk(tree(name)):
            identifiers = set()
            if isinstance(node, ast.Attribute):
                identifiers = {node.attr}
                if isinstance(node.value, ast.Name) and (node.value.id, node.attr) == (
                    "jax",
                    "core",
                ):
                    identifiers.add("Tracer")
            elif isinstance(node, ast.Name):
                identifiers = {node.id}
            elif isinstance(node, ast.ImportFrom):
                identifiers = {alias.name for alias in node.names}
            if identifiers & TRACING_NAMES:
                problems.append(f"{name}:{node.lineno}: ask lamina._core.bind instead")
    report(sorted(set(problems)))


@pytest.mark.parametrize("name", sorted(files()))
def test_files_are_short(name):
    lines = files()[name].read_text(encoding="utf-8").count("\n")
    assert lines <= LONGER.get(name, MAXIMUM_LINES), f"{name} has {lines} lines: it is two files"


def private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names(name):
    """Return what a file defines: functions, classes, attributes that it assigns, slots."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Assign) and "__slots__" in ast.dump(node.targets[0]):
            found.update(ast.literal_eval(node.value))
    return found


def test_few_private_attributes_are_used_in_other_files():
    uses = [
        f"{name}:{node.lineno}: {ast.unparse(node)}"
        for name in files()
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Attribute)
        and private(node.attr)
        and node.attr not in own_names(name)
        and ast.unparse(node.value) not in ("self", "cls")
    ]
    assert len(uses) < MOST_PRIVATE_USES, f"{len(uses)} uses:\n" + "\n".join(uses)


def test_only_the_gate_sets_values():
    """A cell's value is read and written in ``bind.py``, and nowhere else by its slot."""
    report(
        [
            f"{name}:{node.lineno}: {ast.unparse(node)}"
            for name in files()
            if name != "_core/bind.py"
            for node in ast.walk(tree(name))
            if (isinstance(node, ast.Attribute) and node.attr == "_value")
            or (isinstance(node, ast.Constant) and node.value == "_value")
        ]
    )


def test_nothing_is_injected_at_import():
    """No module sets an attribute of another module's class or module while it is imported."""
    problems = []
    for name in files():
        imported = {
            alias.asname or alias.name
            for node in tree(name).body
            if isinstance(node, ast.ImportFrom) and (node.level or "lamina" in (node.module or ""))
            for alias in node.names
        }
        for node in tree(name).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            problems += [
                f"{name}:{node.lineno}: {ast.unparse(node)}"
                for target in targets
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) in imported
            ]
    report(problems)
