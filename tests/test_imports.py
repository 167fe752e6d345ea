"""Imports of the package: each runs down the list of layers, and none form a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "toolx_kernels"
# Each layer imports only from itself and from the layers before it.
LAYERS = (
    "versions", "errors", "files", "pictures", "progress", "settings", "loss_config", "reference", "toolcall", "ops",
    "models", "engine", "rollout", "evaluate", "train", "compare", "cli",
)  # fmt: skip

# Files that may exceed 350 lines, because each has a single subject.
LONG = {"reference.py", "ops/lm_head/sweep_triton.py"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in (ROOT / PACKAGE).rglob("*.py")}


def imports_of(source: str) -> set[str]:
    """The package's modules that ``source`` imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inside}
    return found & MODULES.keys()


# The package's own ``__init__`` is left out: it lists the public names and imports them on first use.
IMPORTS = {name: imports_of(path.read_text()) for name, path in MODULES.items() if name != PACKAGE}


def layer_of(module: str) -> int:
    return LAYERS.index(module.split(".")[1])


def wrong_ways(imports: dict[str, set[str]]) -> list[str]:
    return sorted(
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others
        if other == PACKAGE or layer_of(other) > layer_of(module)
    )


def circle(imports: dict[str, set[str]]) -> list[str]:
    """A circle of imports, from a module back to itself; empty if there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_runs_back_up():
    assert wrong_ways(IMPORTS) == []


def test_no_imports_form_a_circle():
    assert circle(IMPORTS) == []


def test_both_are_found():
    up = {"toolx_kernels.ops.picks": imports_of("def f():\n    from toolx_kernels.train import trainer")}
    assert wrong_ways(up) == ["toolx_kernels.ops.picks imports toolx_kernels.train.trainer"]
    assert wrong_ways({"toolx_kernels.ops.picks": imports_of("import toolx_kernels")})
    ring = {"a": {"b"}, "b": {"c"}, "c": {"a"}}
    assert len(circle(ring)) == 4
    assert not wrong_ways({"toolx_kernels.train.rounds": {"toolx_kernels.ops.picks"}})


def test_no_folder_is_crowded_and_no_file_is_long():
    folders = [folder for top in (PACKAGE, "tests", "bench") for folder in [ROOT / top, *(ROOT / top).rglob("*/")]]
    crowded = {folder.name: n for folder in folders if (n := len(list(folder.glob("*.py")))) > 20}
    assert crowded == {}
    lines = {str(path.relative_to(ROOT / PACKAGE)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert {name for name, n in lines.items() if n > 350} == LONG
