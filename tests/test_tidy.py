"""The house rules that neither ruff nor mypy knows: import directions, owners of heavy dependencies, sizes, names.

The rules are functions from parsed modules to complaints, so that the second half of this file can show that each of
them does complain.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE_ROOTS = {"cachetier": ROOT, "cachetier_connector": ROOT / "connector", "cachetier_blend": ROOT / "blend"}
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
MAY_PRINT = ("cachetier/cli/", "bench/")

# What each part of the house may import of ours, besides itself and the package root (which holds the version).
ALLOWED = {
    "cachetier": (),
    "cachetier.core": (),
    "cachetier.storage": ("cachetier.core",),
    "cachetier.store": ("cachetier.core", "cachetier.storage", "cachetier.remote"),
    "cachetier.remote": ("cachetier.core",),
    "cachetier.service": ("cachetier.core", "cachetier.store"),
    "cachetier.client": ("cachetier.core",),
    "cachetier.route": ("cachetier.core", "cachetier.client"),
    "cachetier.cli": (
        "cachetier.core",
        "cachetier.storage",
        "cachetier.store",
        "cachetier.remote",
        "cachetier.service",
        "cachetier.client",
        "cachetier.route",
        "cachetier_blend",
    ),
    "cachetier_blend": ("cachetier.core",),
    "cachetier_connector": ("cachetier.core", "cachetier.client", "cachetier_blend"),
}

# Heavy dependencies, and the only places that import them.
OWNERS = {
    "aiohttp": ("cachetier.service", "cachetier.route", "cachetier.cli"),
    "vllm": ("cachetier_connector", "cachetier_blend.blend_pass"),
    "kvikio": ("cachetier_connector",),
    "mooncake": ("cachetier.remote.mooncake_process",),
    "obstore": ("cachetier.remote.s3",),
    "torch": ("cachetier_connector", "cachetier_blend"),
    "triton": ("cachetier_connector.cuda",),
}

Modules = Mapping[str, ast.Module]


def is_within(module: str, place: str) -> bool:
    """Tell whether `module` is `place` or lies in it."""
    return module == place or module.startswith(place + ".")


def part_of(module: str) -> str:
    """Return the part of the house that `module` belongs to."""
    name, *rest = module.split(".")
    return f"{name}.{rest[0]}" if name == "cachetier" and rest else name


def imports_of(module: str, tree: ast.Module, modules: Modules) -> Iterator[str]:
    """Yield what `module` imports, anywhere in it; `from package import module` counts as that module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield f"relative import in line {node.lineno}"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules else str(node.module)


def wrong_directions(modules: Modules) -> list[str]:
    """Complain about imports between parts of the house that DESIGN does not allow."""
    complaints = []
    for module, tree in modules.items():
        part = part_of(module)
        if part not in ALLOWED:
            complaints.append(f"{module}: {part} is not in ALLOWED; say there what it may import")
            continue
        for name in imports_of(module, tree, modules):
            is_ours = part_of(name) in ALLOWED or name.split(".")[0] in PACKAGE_ROOTS
            if is_ours and name != "cachetier" and part_of(name) not in (part, *ALLOWED[part]):
                complaints.append(f"{module} imports {name}: {part} may not import {part_of(name)}")
            if name.startswith("relative"):
                complaints.append(f"{module}: {name}; write absolute ones")
    return complaints


def wrong_owners(modules: Modules) -> list[str]:
    """Complain about heavy dependencies outside the place that owns them."""
    return [
        f"{module} imports {name}, which only {' and '.join(owners)} may"
        for module, tree in modules.items()
        for name in imports_of(module, tree, modules)
        for package, owners in OWNERS.items()
        if is_within(name, package) and not any(is_within(module, owner) for owner in owners)
    ]


def cycles(modules: Modules) -> list[str]:
    """Complain about modules that import each other, directly or around corners, at import time or later."""
    graph = {
        module: sorted({name for name in imports_of(module, tree, modules) if name in modules} - {module})
        for module, tree in modules.items()
    }
    finished: set[str] = set()
    found = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" -> ".join((*path[path.index(module) :], module)))
        elif module not in finished:
            for name in graph[module]:
                visit(name, (*path, module))
            finished.add(module)

    for module in sorted(graph):
        visit(module, ())
    return found


def untidy(path: str, text: str) -> list[str]:
    """Complain about a file's size, its functions' sizes, a missing docstring, its name and its prints."""
    tree = ast.parse(text)
    complaints = []
    num_lines = text.count("\n")
    if num_lines > FILE_LINES_MAX:
        complaints.append(f"{path} has {num_lines} lines, over {FILE_LINES_MAX}")
    if not ast.get_docstring(tree):
        complaints.append(f"{path} has no docstring")
    if Path(path).name in ("utils.py", "util.py", "helpers.py", "misc.py"):
        complaints.append(f"{path}: name the file after what is in it")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                complaints.append(f"{path}:{node.lineno}: {node.name} has {length} lines, over {FUNCTION_LINES_MAX}")
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        if is_print and not path.startswith(MAY_PRINT):
            complaints.append(f"{path}:{node.lineno}: print; use logging")
    return complaints


def house() -> dict[str, ast.Module]:
    """Return the modules of the three packages by name."""
    found = {}
    for package, root in PACKAGE_ROOTS.items():
        for path in sorted((root / package).rglob("*.py")):
            names = path.relative_to(root).with_suffix("").parts
            found[".".join(names).removesuffix(".__init__")] = ast.parse(path.read_text())
    return found


def own_files() -> list[str]:
    """Return the paths of all Python files but the tests'."""
    folders = ("cachetier", "connector", "blend", "bench", "demo", "scripts", "tools")
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parsed(**sources: str) -> dict[str, ast.Module]:
    """Return modules made up for a test; two underscores stand for a dot."""
    return {name.replace("__", "."): ast.parse(source) for name, source in sources.items()}


class TestTheHouse:
    def test_imports_point_down(self) -> None:
        assert wrong_directions(house()) == []

    def test_each_heavy_dependency_has_one_owner(self) -> None:
        assert wrong_owners(house()) == []

    def test_no_modules_import_each_other(self) -> None:
        assert cycles(house()) == []

    def test_all_parts_are_seen(self) -> None:
        parts = {part_of(module) for module in house()}
        assert {"cachetier.core", "cachetier.storage", "cachetier.store", "cachetier.service"} <= parts
        assert {"cachetier.client", "cachetier.cli", "cachetier_connector"} <= parts

    @pytest.mark.parametrize("path", own_files())
    def test_files_are_tidy(self, path: str) -> None:
        assert untidy(path, (ROOT / path).read_text()) == []


class TestTheRules:
    @pytest.mark.parametrize(
        ("importer", "line"),
        [
            ("cachetier__core__keys", "from cachetier.storage import arena"),
            ("cachetier__core__keys", "import cachetier.client.client"),
            ("cachetier__storage__disk", "from cachetier.store.store import Store"),
            ("cachetier__store__store", "def f():\n    from cachetier.service.app import make"),
            ("cachetier__service__app", "from cachetier.client import client"),
            ("cachetier__client__client", "from cachetier.store import stats"),
            ("cachetier__cli__main", "import cachetier_connector"),
            ("cachetier__remote__s3", "from cachetier.storage import records"),
            ("cachetier_connector__worker", "from cachetier.storage.arena import Arena"),
            ("cachetier_connector__worker", "from cachetier import store"),
            ("cachetier_blend__match", "import cachetier_connector.worker"),
            ("cachetier__core__keys", "from . import layout"),
            ("cachetier__attic__old", "pass"),
        ],
    )
    def test_an_import_upwards_or_sideways_is_refused(self, importer: str, line: str) -> None:
        modules = parsed(**{importer: line, "cachetier__store": "", "cachetier__storage__arena": ""})
        assert len(wrong_directions(modules)) == 1

    @pytest.mark.parametrize(
        ("importer", "line"),
        [
            ("cachetier__core__keys", "import xxhash\nfrom cachetier.core.layout import Shard"),
            ("cachetier__service__app", "from cachetier import __version__"),
            ("cachetier__cli__main", "from cachetier.service import app\nfrom cachetier.client import client"),
            ("cachetier_connector__worker", "from cachetier.client.session import Session\nimport cachetier_blend"),
        ],
    )
    def test_an_import_downwards_is_allowed(self, importer: str, line: str) -> None:
        assert wrong_directions(parsed(**{importer: line})) == []

    @pytest.mark.parametrize("line", ["from aiohttp import web", "import torch.cuda", "import vllm"])
    def test_a_heavy_import_outside_its_owner_is_refused(self, line: str) -> None:
        assert len(wrong_owners(parsed(cachetier__storage__segments=line))) == 1

    def test_a_heavy_import_at_its_owner_is_allowed(self) -> None:
        sources = {"cachetier__service__app": "import aiohttp", "cachetier_connector__worker": "import torch, vllm"}
        assert wrong_owners(parsed(**sources)) == []

    def test_a_cycle_is_found_even_when_one_import_is_deferred(self) -> None:
        modules = parsed(a="import b", b="from c import x", c="def f():\n    import a")
        assert cycles(modules) == ["a -> b -> c -> a"]
        assert cycles(parsed(a="import b\nimport c", b="import c", c="")) == []

    @pytest.mark.parametrize(
        ("path", "text"),
        [
            ("cachetier/core/keys.py", "x = 1\n"),
            ("cachetier/core/utils.py", '"""Things."""\n'),
            ("cachetier/core/keys.py", '"""Keys."""\n' + "x = 1\n" * FILE_LINES_MAX),
            ("bench/match.py", '"""Match."""\ndef f():\n' + "    x = 1\n" * FUNCTION_LINES_MAX),
            ("cachetier/store/store.py", '"""Store."""\nprint(1)\n'),
        ],
    )
    def test_an_untidy_file_is_refused(self, path: str, text: str) -> None:
        assert len(untidy(path, text)) == 1

    @pytest.mark.parametrize("path", ["cachetier/cli/stats.py", "bench/match.py"])
    def test_commands_and_benches_may_print(self, path: str) -> None:
        assert untidy(path, '"""Show."""\nprint(1)\n') == []
