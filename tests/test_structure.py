"""The shape of the package: arrows one way, no part reads another's private names, nothing grows too large."""

import ast
import inspect
from collections import Counter
from configparser import ConfigParser
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import hf_devft


ROOT = Path(hf_devft.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py"))
OUTSIDE = [
    path
    for name in ("benchmarks", "examples", "recipes")
    for path in sorted((Path(__file__).parents[1] / name).glob("*.py"))
]
# From the bottom to the top: a folder knows those before it. `stages` and `federation` do not know each other.
FOLDERS = (
    "embedded", "files", "tasks", "models", "stages", "federation", "configuration", "hub", "run", "trainer", "cli",
    "network",
)  # fmt: skip
STRANGERS = {frozenset(("stages", "federation")), frozenset(("stages", "hub")), frozenset(("federation", "hub"))}
LONGEST_CLASS, LONGEST_FUNCTION = 350, 60
# What takes a tenth of a start or more, and the modules that may have it from the first, as they are imported late.
SLOW = ("evaluate", "matplotlib", "flwr.superlink", "hf_devft.tasks.metrics", "hf_devft.run.plots")
LATE = {"hf_devft.tasks.metrics", "hf_devft.run.plots", "hf_devft.cli.compare"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def folder(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> list[str]:
    """The folders of ours that a module imports from as it runs, not for types alone."""
    for_types = {
        id(node)
        for block in ast.walk(tree(path))
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and id(node) not in for_types]
    return [node.module.split(".")[1] for node in nodes if (node.module or "").startswith("hf_devft.")]


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path) not in LATE], ids=name_of)
def test_what_is_slow_to_import_waits_until_it_is_needed(path):
    first = [node.module or "" for node in tree(path).body if isinstance(node, ast.ImportFrom)]
    first += [alias.name for node in tree(path).body if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in first if f"{name}.".startswith(tuple(f"{each}." for each in SLOW))]


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent != ROOT], ids=name_of)
def test_arrows_point_one_way(path):
    own = folder(path)
    for other in imported(path):
        assert FOLDERS.index(other) <= FOLDERS.index(own), f"{own} knows {other}"
        assert frozenset((own, other)) not in STRANGERS, f"{own} knows {other}"


def modules_imported(path: Path) -> set[str]:
    """The modules of ours that are run when a module is imported, but for the packages that it stands in."""
    own = name_of(path)
    known = {name_of(module) for module in MODULES}
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_devft."):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            parents = [".".join(node.module.split(".")[:depth]) for depth in range(2, node.module.count(".") + 1)]
            found |= {name for name in (*names, *parents) if name in known}
    return {name for name in found if not f"{own}.".startswith(f"{name}.")}


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path.stem)
def test_what_is_imported_from_outside_of_the_package_is_there(path):
    """Benchmarks are run seldom."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_devft":
            module = import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {name_of(path): modules_imported(path) for path in MODULES if path.parent != ROOT}

    def visit(name: str, way: list[str]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        for other in done.setdefault(name, graph.get(name, set())) if name not in done else ():
            visit(other, [*way, name])

    done: dict[str, set[str]] = {}
    for name in graph:
        visit(name, [])


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(node: ast.ClassDef) -> set[str]:
    """The private names that a class defines: methods, fields, and what its methods set on `self`."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            found.add(child.name)
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            found.add(child.target.id)
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            found.add(child.id)
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store) and of_self(child):
            found.add(child.attr)
    return {name for name in found if private(name)}


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


@cache
def own_classes() -> dict[str, set[str]]:
    """{a class of ours: the private names that it defines}."""
    return {
        node.name: defined(node) for path in MODULES for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)
    }


def of_a_library(module: str, name: str, attribute: str) -> bool:
    """Whether a class has a private name from a library that it extends: `Trainer`'s own hooks, say."""
    cls = getattr(import_module(module), name, None)
    if not isinstance(cls, type):
        return False
    classes = [cls, *subclasses(cls)]  # a mixin stands before the library's class
    bases = {base for one in classes for base in one.__mro__ if not base.__module__.startswith("hf_devft")} - {object}
    return any(attribute in vars(base) or attribute in source_of(base) for base in bases)


def subclasses(cls: type) -> list[type]:
    return [one for child in cls.__subclasses__() for one in (child, *subclasses(child))]


@cache
def source_of(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


# Private names of libraries for which there is nothing public.
OF_LIBRARIES = {
    "_commit_hash": "transformers: which commit of a repository a config was read from",
    "_hf_hook": "accelerate: where an offloaded parameter's values are",
    "_set_sync_gradients": "accelerate: `Trainer` sets it, too",
    "_per_optimizer_states": "torch: what a gradient scaler knows of a step that was not finished",
    "_cdata": "torch: which storage it is",
    "_parameters": "torch: of a module itself, not of its children",
    "_buffers": "torch: of a module itself, not of its children",
}


def crossing(path: Path) -> list[str]:
    """Private names that a module reads of something else than the class that defines them."""
    found, classes, module = [], own_classes(), name_of(path)
    own_names = {node.name for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}

    def visit(node: ast.AST, inside: str | None) -> None:
        if isinstance(node, ast.ClassDef):
            inside = node.name
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_devft"):
            found.extend(f"{module}:{node.lineno} imports {n.name}" for n in node.names if private(n.name))
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in OF_LIBRARIES:
            of_own_class = inside is not None and node.attr in classes[inside]
            inherited = inside is not None and of_self(node) and of_a_library(module, inside, node.attr)
            by_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            elsewhere = [name for name, names in classes.items() if node.attr in names and name != inside]
            if not (of_own_class or inherited or (by_super and not elsewhere) or node.attr in own_names):
                found.append(f"{module}:{node.lineno} {ast.unparse(node)}")
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree(path), None)
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_private_name_crosses_a_class_boundary(path):
    assert crossing(path) == []


def test_the_check_finds_what_crosses(tmp_path, monkeypatch):
    source = "class A:\n    _x = 1\n\nclass B:\n    def f(self, a):\n        return a._x + self._y\n"
    path = ROOT / "federation" / "crossing_example.py"
    tree_of = tree.__wrapped__
    monkeypatch.setattr(f"{__name__}.tree", lambda one: ast.parse(source) if one == path else tree_of(one))
    monkeypatch.setattr(f"{__name__}.own_classes", lambda: {"A": {"_x"}, "B": set()})
    monkeypatch.setattr(f"{__name__}.of_a_library", lambda *args: False)
    assert [line.split()[-1] for line in crossing(path)] == ["a._x", "self._y"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_too_long(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            limit = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
            assert lines <= limit, f"{node.name} has {lines} lines"


def test_every_package_is_in_the_wheel():
    """`packages` lists them, as the configs stand in another folder, where no search finds them."""
    config = ConfigParser()
    config.read(ROOT.parents[1] / "setup.cfg")
    listed = config["options"]["packages"].split()
    assert sorted(listed) == sorted([*map(name_of, ROOT.rglob("__init__.py")), "hf_devft.configs"])


def test_the_listing_is_short():
    every = {path.name for path in ROOT.iterdir()}
    names = every - {"__pycache__", "py.typed", "__init__.py", "__main__.py"}
    assert len(names) <= 12, sorted(names)


def test_every_file_of_tests_has_a_name_of_its_own():
    """Two of one name pass alone and fail together: pytest imports test files by their names."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]
