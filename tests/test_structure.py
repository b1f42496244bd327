"""The house of DESIGN.md, section 3: imports run downward, and nobody opens another's drawers."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    "errors",
    "printable",
    "durable",
    "clock",
    "signals",
    "lowrank",
    "quantize",
    "config",
    "schedule",
    "merge",
    "diagnostics",
    "compress",
    "wire",
    "nn",
    "optim",
    "models",
    "data",
    "transport",
    "relay",
    "track",
    "status",
    "server",
    "worker",
    "tasks",
    "team",
    "nested",
    "ranks",
    "recipes",
    "export",
    "ddp",
    "cost",
    "simulate",
    "inventory",
    "report",
    "launch",
    "cli",
]
"""Low to high. A module may import from its own floor and from those below.

`lte` itself, the names that `import lte` gives, lies on the worker's floor."""


def sources() -> dict[str, str]:
    """Module name -> text, of everything that is installed."""
    found = {}
    for path in sorted([*(ROOT / "lte").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


@cache
def nodes(text: str) -> list[ast.AST]:
    """All of a source's syntax."""
    return list(ast.walk(ast.parse(text)))


def floor_of(module: str) -> str:
    package, *below = module.split(".")
    if package == "launch":
        return "launch"
    if not below:
        return "worker"
    return "cli" if below[0] == "__main__" else below[0]


def imports(module: str, text: str, modules: Mapping[str, str]) -> Iterator[tuple[str, str, ast.stmt]]:
    """(module imported, name taken from it or '', the statement), where the project is imported from.

    `from lte import wire` imports the module lte.wire, not a name of lte.
    """
    for node in nodes(text):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole, "", node) if whole in modules else (str(node.module), alias.name, node)


def ours(module: str) -> bool:
    return module.split(".")[0] in ("lte", "launch")


def faults(modules: Mapping[str, str]) -> list[str]:
    """Everything in these sources that the house forbids."""
    found = []
    graph: dict[str, set[str]] = {}
    for module, text in modules.items():
        within = [
            node
            for function in nodes(text)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for node in ast.walk(function)
        ]
        inner = {(node.lineno, node.col_offset) for node in within if isinstance(node, ast.stmt)}
        taken = {}
        for target, name, statement in imports(module, text, modules):
            if target.split(".")[0] in ("tests", "benchmarks"):
                found.append(f"{module} imports from {target}")
            if not ours(target):
                continue
            if FLOORS.index(floor_of(target)) > FLOORS.index(floor_of(module)):
                found.append(f"{module} imports {target}, which is above it")
            if (statement.lineno, statement.col_offset) in inner:
                found.append(f"{module} imports {target} inside a function")
            if name.startswith("_") and not name.startswith("__"):
                found.append(f"{module} imports {name} of {target}")
            if not name:
                taken[target.split(".")[-1]] = target
            graph.setdefault(module, set()).add(target)
        found += [
            f"{module} uses {node.attr} of {taken[node.value.id]}"
            for node in nodes(text)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in taken
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
        ]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {' -> '.join(error.args[1])}")
    return found


def test_the_house_is_in_order() -> None:
    assert faults(sources()) == []


def test_every_module_has_a_floor_and_every_floor_a_module() -> None:
    assert {floor_of(module) for module in sources()} == set(FLOORS)


@pytest.mark.parametrize(
    ("module", "text", "fault"),
    [
        (
            "lte.wire",
            "from lte.server.rounds import step",
            "lte.wire imports lte.server.rounds, which is above it",
        ),
        ("lte.wire", "from lte import server", "lte.wire imports lte.server, which is above it"),
        ("lte.wire", "import lte.server.rounds", "lte.wire imports lte.server.rounds, which is above it"),
        ("lte.wire", "from lte import Server", "lte.wire imports lte, which is above it"),
        ("lte.tasks", "from launch import local", "lte.tasks imports launch.local, which is above it"),
        (
            "lte.wire",
            "if TYPE_CHECKING:\n    from lte.server import Server",
            "lte.wire imports lte.server, which is above it",
        ),
        (
            "lte.server.service",
            "def f():\n    from lte import wire",
            "lte.server.service imports lte.wire inside a function",
        ),
        (
            "lte.server.service",
            "class A:\n  async def f(self):\n    if 1:\n      import lte.wire",
            "lte.server.service imports lte.wire inside a function",
        ),
        ("lte.server.service", "from lte.wire import _view", "lte.server.service imports _view of lte.wire"),
        (
            "lte.server.service",
            "from lte import wire\nwire._view()",
            "lte.server.service uses _view of lte.wire",
        ),
        ("lte.cli", "from tests.simulation import recipe", "lte.cli imports from tests.simulation"),
        ("lte.cli", "import benchmarks.sweep", "lte.cli imports from benchmarks.sweep"),
        ("lte.nn.linear", "from lte.nn import convert", "a circle: "),
    ],
)
def test_disorder_is_found(module: str, text: str, fault: str) -> None:
    modules = sources()
    modules[module] = f"{modules[module]}\n{text}\n"
    assert any(met.startswith(fault) for met in faults(modules))


def test_importing_lte_imports_nothing_that_most_runs_do_not_need() -> None:
    """bitsandbytes takes 2 s, the others most of one. In a process of its own: here they may be loaded."""
    heavy = ("bitsandbytes", "wandb", "matplotlib", "transformers", "PIL")
    code = f"import sys, lte; print(lte.__name__, *(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.split(), done.stderr, done.returncode) == (["lte"], "", 0)
