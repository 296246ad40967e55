"""Imports point downwards, heavy packages wait, and only the command line prints or exits.

Read from the source with ``ast``, so that imports inside functions count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import FORMATS, ROOT, environment

PACKAGE = ROOT / "qconvert"
DATA = (
    "errors",
    "exchange_schemes",
    "floors",
    "model",
    "schemes",
    "mixes",
    "mix_rules",
    "product_scales",
    "ranges",
    "report",
    "geometry",
    "mapper",
    "encoding",
    "ggml_types",
    "containers",
    "processor",
    "progress",
    "quantities",
    "roles",
    "interrupts",
    "roles",
    "tensor_classes",
    "words",
    "remedies",
    "limits",
)
# What each layer may import besides itself; `qconvert` alone is the version.
BELOW: dict[str, tuple[str, ...]] = {}
for layer, own in (
    ("data", ()),
    ("kernels", ()),
    ("codecs", ("kernels",)),
    ("files", ("codecs", "kernels")),
    ("architectures", ("files", "codecs", "kernels")),
    ("loading", ("files", "codecs", "kernels")),
    ("version", ("loading", "commands")),  # the public names, when they are asked for
    ("calibration", ("architectures", "files", "codecs", "kernels")),
    ("running", ("architectures", "files", "codecs", "kernels")),
    ("torch", ("training", "running", "files", "codecs", "kernels")),
    (
        "training",
        ("stages", "running", "calibration", "architectures", "files", "codecs", "kernels"),
    ),
    ("stages", ("running", "calibration", "architectures", "files", "codecs", "kernels")),
    ("commands", ("training", "stages", "calibration", "running")),
    ("page", ()),
    ("cli", ("commands", "page", "files")),
):
    BELOW[layer] = (layer, "data", "version", *own)
HEAVY = {
    *(
        "numpy",
        "rich",
        "pydantic",
        "gguf",
        "safetensors",
        "ml_dtypes",
        "torch",
        "transformers",
        "jinja2",
    ),
    "yaml",
}
# Run in a process of their own, whose output qconvert reads.
PROGRAMS = {"qconvert.architectures.library_tokens", "qconvert.running.llama_cpp"}
MODULES = sorted(PACKAGE.rglob("*.py"))
ids = {"ids": lambda p: str(p.relative_to(ROOT))}


def layer_of(module: str) -> str:
    """The layer of ``qconvert.x.y``."""
    parts = module.split(".")[1:]
    if not parts or parts[0] in ("__main__", "__version__"):
        return "cli" if parts == ["__main__"] else "version"
    return "data" if parts[0] in DATA else parts[0]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.AST, *, types: bool = True) -> Iterator[str]:
    """Modules that a file imports, functions included; without TYPE_CHECKING blocks if asked."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module
            yield node.module
            # `from qconvert import kernels` imports the layer, not the version.
            if node.module == "qconvert":
                yield from (f"qconvert.{alias.name}" for alias in node.names)
        elif is_type_checking(node) and not types:
            continue
        else:
            yield from imports(node, types=types)


@pytest.mark.parametrize("path", MODULES, **ids)
def test_a_module_imports_its_own_layer_and_those_below(path: Path) -> None:
    layer = layer_of(name_of(path))
    wanted = {m for m in imports(ast.parse(path.read_text())) if m.split(".")[0] == "qconvert"}
    above = {m for m in wanted if layer_of(m) not in BELOW[layer]}
    assert not above, f"{layer} imports {above}"


@pytest.mark.parametrize("path", MODULES, **ids)
def test_nothing_imports_formats(path: Path) -> None:
    tops = {m.split(".")[0] for m in imports(ast.parse(path.read_text()))}
    assert "formats" not in tops


def test_the_layers_are_all_there_are() -> None:
    found = {layer_of(name_of(p)) for p in MODULES}
    assert found == set(BELOW)


@pytest.mark.parametrize("path", sorted(FORMATS.rglob("*.py")), **ids)
def test_formats_import_only_the_standard_library(path: Path) -> None:
    tops = {m.split(".")[0] for m in imports(ast.parse(path.read_text()))}
    assert tops <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", DATA)
def test_data_modules_import_nothing_heavy(name: str) -> None:
    module = PACKAGE / name
    files = module.glob("*.py") if module.is_dir() else [module.with_suffix(".py")]
    trees = [ast.parse(file.read_text()) for file in files]
    tops = {m.split(".")[0] for tree in trees for m in imports(tree, types=False)}
    assert tops <= set(sys.stdlib_module_names) | {"qconvert"}


def test_data_modules_leave_numpy_unloaded() -> None:
    program = f"import sys, {', '.join(f'qconvert.{n}' for n in DATA)}\nprint(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], set()),
        (["--version"], set()),
        ([], set()),
        (["quantize", "--help"], {"pydantic"}),  # Typer's, for the options of a command
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str], allowed: set[str]) -> None:
    program = (
        "import sys\nfrom qconvert.cli.main import main\n"
        f"code = main({arguments})\nsys.stdout = sys.__stdout__\nprint('code', code, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    _, code, *loaded = done.stdout.splitlines()[-1].split()
    assert code == ("0" if arguments else "2")
    assert HEAVY & {m.split(".")[0] for m in loaded} <= allowed


@pytest.mark.parametrize("path", MODULES, **ids)
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    if layer_of(name_of(path)) == "cli" or name_of(path) in PROGRAMS:
        return
    calls = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    }
    forbidden = {"print", "input", "exit", "quit", "sys.exit", "os._exit"}
    assert not calls & forbidden
    assert not {c for c in calls if c.startswith(("sys.stdout.", "sys.stderr."))}
