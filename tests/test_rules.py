"""Rules of the design that the sources themselves can break: what may be said where, and what may import what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dist_convert
from dist_convert.models import FAMILIES

PACKAGE = Path(dist_convert.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

COLLECTIVES, STORE_USER = "ranks/collectives.py", "ranks/channel.py"
STORES = {"DistError", "PrefixStore", "Store", "TCPStore"}
#: These name classes of torch.distributed.checkpoint as a pickle does; they are not imported.
PICKLED = ("read/restricted_pickle.py", "formats/dcp/pickled_metadata.py")
SPELLINGS = (
    "formats/megatron/names.py", "formats/torch_dist/names.py", "formats/huggingface/names.py", "formats/meta/names.py",
    "formats/dcp/names.py",
)  # fmt: skip
#: The tables, and the spellings of the names in them.
NAMES = [file for file in FILES if file.startswith("models/") or file in SPELLINGS]

#: What planning and reading headers consist of; all of it must run where there is no torch.
PLANNING = (
    "records.py", "formats/megatron/", "formats/megatron/geometry.py", "formats/torch/catalog.py", "errors.py",
    "formats/torch/target_shards.py", "formats/huggingface/catalog.py", "models/", "plan/",
)  # fmt: skip
HEADERS = ("formats/torch/shards.py", "read/restricted_pickle.py", "read/torch_file.py")
VERIFYING = ("compare/blocks.py", "compare/elements.py")
OTHERS = (*HEADERS, *VERIFYING, "formats/huggingface/files.py")
PURE = [f for f in FILES if f.startswith(PLANNING) or f in OTHERS]


def tree_of(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def dotted(node: ast.AST) -> str:
    """`torch.distributed.barrier` of an expression of names and attributes, "" of any other."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def uses_of_distributed(tree: ast.Module) -> Iterator[str]:
    """Every way to reach torch.distributed: imports, attributes of torch, and names to be imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("torch.distributed"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from (alias.name for alias in node.names if alias.name == "distributed")
        elif isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed":
            yield "torch.distributed"
        elif isinstance(node, ast.Constant) and str(node.value).startswith("torch.distributed"):
            yield str(node.value)


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_gather",
        "from torch.distributed.nn import functional",
        "import torch\ntorch.distributed.barrier()",
        "import importlib\nimportlib.import_module('torch.distributed')",
    ],
)
def test_a_use_of_torch_distributed_is_found_however_it_is_written(source: str) -> None:
    assert list(uses_of_distributed(ast.parse(source)))


def test_collectives_are_in_one_file_and_the_store_is_known_to_the_channel_only() -> None:
    used = {file: set(uses_of_distributed(tree_of(file))) for file in FILES if file not in (COLLECTIVES, *PICKLED)}
    assert {file: names for file, names in used.items() if names} == {STORE_USER: STORES}


def test_collectives_is_where_the_collectives_are() -> None:
    called = {dotted(node.func) for node in ast.walk(tree_of(COLLECTIVES)) if isinstance(node, ast.Call)}
    assert {"dist.all_gather_object", "dist.new_group", "dist.init_process_group"} <= called


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every string constant that is not a docstring."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def tensor_words() -> set[str]:
    """Components of tensor names, of all tables and spellings, that no other kind of string has."""
    rows = [row for f in FAMILIES.values() for row in (*f.before, *f.layer, *f.dense, *f.moe, *f.after)]
    names = [row.megatron for row in rows] + [part.name for row in rows for part in row.parts]
    names += [text for _, text in strings(tree_of(SPELLINGS[0])) if "." in text and " " not in text]
    components = {component for name in names for component in re.split(r"[.{}]+", name)}
    words = {component for component in components if "_" in component.strip("_")} | {"decoder.layers", "model.layers"}
    return words - {"capacity_bins"}  # also a flag, and a file of the target


def test_the_words_of_tensor_names_come_from_the_tables() -> None:
    some = {"word_embeddings", "linear_qkv", "self_attn", "block_sparse_moe", "input_layernorm", "layer_norm_weight"}
    assert some <= tensor_words()


def test_tensor_names_are_in_the_tables_and_the_formats_names_alone() -> None:
    words = re.compile(rf"(?<![A-Za-z0-9_])({'|'.join(map(re.escape, sorted(tensor_words())))})(?![A-Za-z0-9_])")
    others = [(file, *found) for file in FILES if file not in NAMES for found in strings(tree_of(file))]
    assert [f"{file}:{line}: {text}" for file, line, text in others if words.search(text)] == []


def test_names_are_generated_and_looked_up_and_never_matched_by_patterns() -> None:
    for file in NAMES:
        imports = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Import)]
        assert {alias.name for node in imports for alias in node.names}.isdisjoint({"re", "regex", "fnmatch"}), file


def imported_by(*modules: str) -> set[str]:
    """The heavy packages that importing modules brings in, in a process of its own."""
    code = f"import sys, {', '.join(modules)}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    heavy = {"torch", "numpy", "transformers", "megatron", "habana_frameworks", "safetensors", "yaml", "tqdm"}
    return heavy & set(done.stdout.split())


def module_of(file: str) -> str:
    return "dist_convert." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports_of(file: str) -> set[str]:
    """The files of the package that a file imports: modules, or what it takes of them."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dist_convert."):
            path = (node.module or "").removeprefix("dist_convert.").replace(".", "/")
            for alias in node.names:
                places = (f"{path}/{alias.name}.py", f"{path}.py", f"{path}/__init__.py")
                found.add(next(place for place in places if place in FILES))
    return found


def test_no_imports_go_in_a_circle() -> None:
    left = {file: imports_of(file) for file in FILES}
    while free := {file for file, imports in left.items() if imports.isdisjoint(left)}:
        left = {file: imports for file, imports in left.items() if file not in free}
    assert left == {}


#: What lies on what: an entry of the package imports itself and those in lines above its own.
LAYERS = (
    {"errors"}, {"records", "options"}, {"models", "ranks"}, {"plan", "read"}, {"write"}, {"formats"},
    {"compare", "move"}, {"cli", "__init__", "__main__"},
)  # fmt: skip
#: Within their layer: the whole conversion compares at its end, and the command line and the functions are one surface.
WITHIN = {("move", "compare"), ("__main__", "cli"), ("__init__", "cli"), ("cli", "__init__")}


def test_the_package_has_at_most_fifteen_entries() -> None:
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert len(entries) <= 15
    assert entries - {"py.typed"} == {f"{e}.py" if (PACKAGE / f"{e}.py").is_file() else e for e in set().union(*LAYERS)}


def test_the_package_has_eight_layers_and_imports_go_down() -> None:
    layer_of = {entry: number for number, layer in enumerate(LAYERS) for entry in layer}
    wrong = []
    for file in FILES:
        entry = file.partition("/")[0].removesuffix(".py")
        for imported in {one.partition("/")[0].removesuffix(".py") for one in imports_of(file)} - {entry}:
            if layer_of[imported] >= layer_of[entry] and (entry, imported) not in WITHIN:
                wrong.append((file, imported))
    assert wrong == []


def test_the_planner_knows_catalogs_and_no_format() -> None:
    planner = {file: imports_of(file) for file in FILES if file.startswith("plan/")}
    allowed = {"errors.py", "models/catalog.py", "records.py", *planner}
    assert {file: imports - allowed for file, imports in planner.items() if imports - allowed} == {}


def test_what_verifies_uses_nothing_of_a_conversions_plan() -> None:
    reached, new = set[str](), set(VERIFYING)
    while new:
        reached |= new
        new = {imported for file in new for imported in imports_of(file)} - reached
    assert [file for file in sorted(reached) if file.startswith(("plan/", "move/"))] == []


def test_planning_and_reading_headers_import_no_torch() -> None:
    assert "plan/plan.py" in PURE
    assert imported_by(*map(module_of, PURE)) == set()


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported_by("dist_convert") == set()


def test_everything_can_be_imported_without_transformers_and_megatron() -> None:
    found = imported_by(*(module_of(file) for file in FILES if file != "__main__.py"))
    assert "torch" in found
    assert found.isdisjoint({"transformers", "megatron", "habana_frameworks"})


def test_every_file_says_what_it_is_for() -> None:
    assert [file for file in FILES if not ast.get_docstring(tree_of(file))] == []
