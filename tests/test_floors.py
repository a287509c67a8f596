"""Imports go down only, without cycles, and every heavy or dangerous third party has one door.

The floors are those of CONTRIBUTING.md. The checker reads the code (`ast`), so it also sees the imports that
no test executes: in functions, in except branches, under TYPE_CHECKING, by a literal name through importlib.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "holoray"
DASHBOARDS = PACKAGE.with_name("dashboards")

FLOORS = {"kernels": 1, "pipelines": 2, "actors": 3, "cli": 4}
GROUND, ROOF = 0, 4
GROUND_PACKAGES = {"codecs", "formats", "stores"}
LAZY = ("ray", "cupy", "numba", "scipy")


@dataclass(frozen=True)
class Door:
    """Third parties, and which modules of ours may import them."""

    packages: tuple[str, ...]
    where: str
    opens_to: Callable[[Module], bool]


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    @property
    def is_facade(self) -> bool:
        return self.name in ("holoray", "holoray.__main__")

    @property
    def floor(self) -> int:
        if self.is_facade:
            return ROOF
        return FLOORS.get(self.name.split(".")[1], GROUND)


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    deferred: bool = False  # inside a function
    typing_only: bool = False  # under `if TYPE_CHECKING:`


DOORS = (
    Door(("ray",), "in holoray.actors only", lambda module: module.floor == FLOORS["actors"]),
    Door(
        ("cupy", "cupyx", "cupy_backends"),
        "in holoray.kernels.xp only",
        lambda module: module.name == "holoray.kernels.xp",
    ),
    Door(
        ("numba", "llvmlite", "scipy"),
        "in holoray.kernels and above only",
        lambda module: module.floor >= FLOORS["kernels"],
    ),
    Door(("prometheus_client",), "in holoray.metrics only", lambda module: module.name == "holoray.metrics"),
    Door(
        ("typer", "click", "rich", "plotille", "matplotlib"),
        "in holoray.cli only",
        lambda module: module.floor == FLOORS["cli"],
    ),
    Door(
        ("pyeclib",), "in holoray.stores.reed_solomon only", lambda module: module.name == "holoray.stores.reed_solomon"
    ),
    Door(("urllib3", "fsspec"), "in holoray.stores only", lambda module: module.name.startswith("holoray.stores.")),
    Door(("pickle", "cloudpickle", "dill", "marshal", "shelve"), "nowhere", lambda module: False),
)


def violations(package: Path) -> list[str]:
    """Every line under `package` that breaks a rule, as `path:line: what is wrong`."""
    modules = {module.name: module for module in read_modules(package)}
    found = []
    for module in modules.values():
        where = module.path.relative_to(package.parent)
        found += [f"{where}:{line}: {what}" for line, what in sorted(faults(module, modules))]
    return found + cycles(modules)


def read_modules(package: Path) -> Iterator[Module]:
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield Module(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path)))


def faults(module: Module, modules: dict[str, Module]) -> Iterator[tuple[int, str]]:
    for found in imports(module, modules):
        for door in DOORS:
            if found.target.partition(".")[0] in door.packages and not door.opens_to(module):
                yield found.line, f"imports {found.target}, allowed {door.where}"
        ours = owner(found.target, modules)
        if ours is not None and ours.floor > module.floor:
            name = "the façade (import the module itself)" if ours.is_facade else ours.name
            yield found.line, f"floor {module.floor} imports upward: {name} is on floor {ours.floor}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and (what := dangerous(node)):
            yield node.lineno, what


def dangerous(call: ast.Call) -> str | None:
    if isinstance(call.func, ast.Name) and call.func.id in ("eval", "exec"):
        return f"calls {call.func.id}"
    for keyword in call.keywords:
        allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg == "allow_pickle" and not allowed:
            return "allows pickle"
    return None


def cycles(modules: dict[str, Module]) -> list[str]:
    """The import cycles: at most one, which is enough to be red.

    An import inside a function counts, since that is how a cycle is hidden; in the façade it is the point.
    """
    graph: dict[str, set[str]] = {}
    for module in modules.values():
        needed = [
            owner(found.target, modules)
            for found in imports(module, modules)
            if not found.typing_only and not (found.deferred and module.is_facade)
        ]
        graph[module.name] = {other.name for other in needed if other is not None} - {module.name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["import cycle: " + " -> ".join(reversed(error.args[1]))]
    return []


def owner(target: str, modules: dict[str, Module]) -> Module | None:
    """The module of ours that `target` names: the module itself, or the one that holds the attribute."""
    while target:
        if target in modules:
            return modules[target]
        target = target.rpartition(".")[0]
    return None


def imports(module: Module, modules: dict[str, Module]) -> Iterator[Import]:
    """The imports of `module` that count for the floors: for the façade, not those of its functions."""
    for found in scan(module.tree, module.package):
        lazy = found.deferred or found.typing_only
        if not (module.is_facade and lazy and owner(found.target, modules)):
            yield found


def scan(node: ast.AST, package: str, *, deferred: bool = False, typing_only: bool = False) -> Iterator[Import]:
    for target in targets(node, package):
        yield Import(target, getattr(node, "lineno", 0), deferred, typing_only)
    if isinstance(node, ast.If) and is_type_checking(node.test):
        for statement in node.body:
            yield from scan(statement, package, deferred=deferred, typing_only=True)
        for statement in node.orelse:
            yield from scan(statement, package, deferred=deferred, typing_only=typing_only)
        return
    deferred = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from scan(child, package, deferred=deferred, typing_only=typing_only)


def targets(node: ast.AST, package: str) -> list[str]:
    """The absolute dotted names that this one node imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = absolute(node.module or "", node.level, package)
        return [base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__") and node.args:
        name = node.args[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            bare = name.value.lstrip(".")
            return [absolute(bare, len(name.value) - len(bare), package)]
    return []


def absolute(name: str, level: int, package: str) -> str:
    if level == 0:
        return name
    parents = package.split(".")[: len(package.split(".")) - level + 1]
    return ".".join([*parents, name] if name else parents)


def called_name(call: ast.Call) -> str | None:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else None


def is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


@pytest.mark.fault("code")
def test_holoray_keeps_its_floors() -> None:
    assert violations(PACKAGE) == []


def test_every_package_has_a_floor() -> None:
    names = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    assert {"codecs", "kernels"} <= names <= GROUND_PACKAGES | FLOORS.keys()


def test_dashboards_know_the_catalogue_and_nobody_knows_them() -> None:
    ours = {module.name: module for module in read_modules(DASHBOARDS)}
    assert cycles(ours) == []
    for module in ours.values():
        for found in imports(module, ours):
            top = found.target.partition(".")[0]
            assert top in {"dashboards", "yaml", *sys.stdlib_module_names} or found.target.startswith(
                "holoray.metrics."
            )
    for module in read_modules(PACKAGE):
        assert not any(found.target.partition(".")[0] == "dashboards" for found in imports(module, {}))


def test_import_holoray_is_light() -> None:
    code = f"import sys, holoray; print([name for name in {LAZY!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


# The checker itself: it must go red on each planted violation, and stay green on what is allowed.


def plant(root: Path, files: dict[str, str]) -> Path:
    """A small, well-behaved package under `root`, with `files` added or replaced."""
    package = root / "holoray"
    house = dict.fromkeys(("__init__", *(f"{name}/__init__" for name in (*FLOORS, "codecs"))), "")
    house |= {
        "errors": "class HolorayError(Exception): ...",
        "metrics": "import prometheus_client",
        "codecs/raw": "import numpy\nfrom holoray.errors import HolorayError",
        "kernels/xp": "try:\n    import cupy\nexcept ImportError:\n    cupy = None",
        "kernels/decode": "import numba, scipy.fft\nfrom holoray.codecs import raw\nfrom . import xp",
        "pipelines/load": "from holoray import errors\nfrom holoray.kernels.decode import anything",
        "actors/worker": "import ray\nfrom holoray.pipelines import load",
        "cli/main": "import typer, rich.table\nimport holoray\nfrom holoray.actors import worker",
    }
    for name, text in (house | files).items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return package


ALLOWED = {
    "a well-behaved package": {},
    "the façade is lazy": {
        "__init__": """
            from typing import TYPE_CHECKING
            from holoray.errors import HolorayError
            if TYPE_CHECKING:
                from holoray.actors.worker import warm_up
            def __getattr__(name):
                import importlib
                from holoray.actors import worker
                return importlib.import_module("holoray.cli.main")
        """,
        "__main__": "def main():\n    from holoray.cli.main import main",
    },
    "a type from the same floor, in a circle": {
        "codecs/a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from holoray.codecs.b import B",
        "codecs/b": "import holoray.codecs.a",
    },
    "a name that is only alike": {"stores/local": "import rayon, pickletools"},
    "numpy without pickle": {"stores/local": "import numpy\nnumpy.load('x', allow_pickle=False)"},
    "a method called eval": {"quality": "model.eval()"},
}

PLANTED = {
    "upward": ({"errors": "from holoray.kernels import xp"}, "errors.py:1: floor 0 imports upward"),
    "upward by a plain import": ({"kernels/a": "import holoray.pipelines.load"}, "kernels/a.py:1: floor 1"),
    "upward from a subpackage": ({"codecs/raw": "import holoray.actors"}, "codecs/raw.py:1: floor 0"),
    "upward by a relative import": ({"kernels/a": "from ..pipelines import load"}, "kernels/a.py:1: floor 1"),
    "upward in a function": (
        {"pipelines/a": "def f():\n    import holoray.actors.worker"},
        "pipelines/a.py:2: floor 2 imports upward: holoray.actors.worker is on floor 3",
    ),
    "upward for a type": (
        {"quality": "import typing\nif typing.TYPE_CHECKING:\n    from holoray.kernels.xp import Array"},
        "quality.py:3: floor 0 imports upward",
    ),
    "upward by importlib": (
        {"stores/a": "import importlib\nimportlib.import_module('holoray.actors.worker')"},
        "stores/a.py:2: floor 0 imports upward",
    ),
    "the façade from inside": ({"kernels/a": "from holoray import encode"}, "kernels/a.py:1: floor 1"),
    "an eager façade that is imported back": (
        {"__init__": "from holoray.cli import main"},
        "import cycle: ",
    ),
    "a cycle": (
        {"codecs/a": "from . import b", "codecs/b": "from holoray.codecs.a import x"},
        "import cycle: holoray.codecs.",
    ),
    "a cycle hidden in a function": (
        {"codecs/a": "import holoray.codecs.b", "codecs/b": "def f():\n    import holoray.codecs.a"},
        "import cycle: holoray.codecs.",
    ),
    "ray below": ({"pipelines/a": "import ray.util"}, "imports ray.util, allowed in holoray.actors only"),
    "ray above": ({"cli/a": "from ray import init"}, "cli/a.py:1: imports ray.init"),
    "ray for a type": (
        {"pipelines/a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray"},
        "pipelines/a.py:3: imports ray",
    ),
    "ray in the façade": ({"__init__": "def f():\n    import ray"}, "__init__.py:2: imports ray"),
    "cupy beside its door": (
        {"kernels/a": "import cupy as cp"},
        "imports cupy, allowed in holoray.kernels.xp only",
    ),
    "cupyx": ({"actors/a": "def f():\n    import cupyx.scipy"}, "actors/a.py:2: imports cupyx.scipy"),
    "numba on the ground": ({"codecs/a": "from numba import njit"}, "imports numba.njit"),
    "scipy on the ground": ({"codecs/a": "from scipy.fft import dctn"}, "imports scipy.fft.dctn"),
    "a second registry": (
        {"kernels/a": "import prometheus_client"},
        "prometheus_client, allowed in holoray.metrics only",
    ),
    "a terminal below": (
        {"actors/a": "from rich.progress import track"},
        "rich.progress.track, allowed in holoray.cli only",
    ),
    "a drawing below": ({"pipelines/a": "def f():\n    import matplotlib"}, "a.py:2: imports matplotlib, allowed in"),
    "pickle": ({"stores/a": "import pickle"}, "stores/a.py:1: imports pickle, allowed nowhere"),
    "numpy's pickle": ({"stores/a": "import numpy\nnumpy.load('x', allow_pickle=True)"}, "a.py:2: allows"),
    "eval": ({"cli/a": "x = eval('1')"}, "cli/a.py:1: calls eval"),
    "exec": ({"errors": "def f():\n    exec('x = 1')"}, "errors.py:2: calls exec"),
}


@pytest.mark.parametrize("files", ALLOWED.values(), ids=ALLOWED)
def test_the_checker_is_green_on(files: dict[str, str], tmp_path: Path) -> None:
    assert violations(plant(tmp_path, files)) == []


@pytest.mark.fault("code")
@pytest.mark.parametrize(("files", "expected"), PLANTED.values(), ids=PLANTED)
def test_the_checker_goes_red_on(files: dict[str, str], expected: str, tmp_path: Path) -> None:
    found = violations(plant(tmp_path, files))
    assert any(expected in violation for violation in found), found
