"""Who may know whom: the rules of the layers, read from the sources. CONTRIBUTING.md says where things go."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "longctx"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OPS = PACKAGE / "compiler" / "ops"

# A room of the package -> the modules of the repository that it may import.
MAY_IMPORT = {
    "compiler": ("longctx.compiler", "longctx.errors", "longctx.flops", "longctx.schema"),
    "compiler/ops": (
        "longctx.compiler.ops",
        "longctx.compiler.annotation",
        "longctx.compiler.ir",
        "longctx.compiler.placement",
        "longctx.compiler.work",
        "longctx.errors",
    ),
    "kernels": (
        "longctx.kernels",
        "longctx.compiler.ops",
        "longctx.compiler.ir",
        "longctx.compiler.work",
        "longctx.errors",
        "chunk_linear_cross_entropy",
    ),
    "huggingface": (
        "longctx.huggingface",
        "longctx.kernels",
        "longctx.data.rows",
        "longctx.errors",
        "longctx.schema",
        "chunk_linear_cross_entropy",
    ),
    "data": ("longctx.data", "longctx.errors", "longctx.schema", "longctx.seal"),
    "runtime": (
        "longctx.runtime",
        "longctx.devices",
        "longctx.data",
        "longctx.job",
        "longctx.compiled",
        "longctx.flops",
        "longctx.errors",
        "longctx.atomic",
        "longctx.schema",
        "longctx.seal",
        "longctx.torchrun",
    ),
}

# A room or file -> the libraries that it may import, besides Python's own.
MAY_USE = {
    "longctx/compiler": ("torch", "numpy", "scipy"),
    "longctx/kernels": ("torch", "flash_attn", "apex", "fla", "causal_conv1d", "mamba_ssm"),
    "longctx/runtime/collectives.py": ("torch",),
    "chunk_linear_cross_entropy.py": ("torch", "triton"),
}

# These name options: they declare them, or they are programs with a command line of their own.
NAME_OPTIONS = ("job.py", "options.py", "command_line.py", "engines/nnscaler/options.py", "measure.py")
OF_OTHER_PROGRAMS = {"--no-build-isolation", "--nproc_per_node", "--isolated", "--line-length"}  # pip, torchrun, ruff
IN_GENERATED_CODE = {"compiler/codegen.py names --run_mode"}  # its docstring says by which command it was written

# These name the engine nnscaler: its own room, the names and tables of the engines, and the options.
NAME_NNSCALER = (
    "engines/nnscaler/",
    "engines/__init__.py",
    "engines/table.py",
    "engines/checkpoints.py",
    "job.py",
    "options.py",
)


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def files_in(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imports(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it; of `from a import b` it is a.b, which may be a module."""
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where they lead"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def texts(file: Path, *, docstrings: bool) -> Iterator[ast.Constant]:
    """The strings of a file's code, the literal parts of f-strings included."""
    with_docstrings = (ast.Module, ast.ClassDef, ast.FunctionDef)
    owners = [node for node in ast.walk(tree_of(file)) if isinstance(node, with_docstrings) and ast.get_docstring(node)]
    left_out = set() if docstrings else {owner.body[0].value for owner in owners}
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in left_out:
            yield node


def at(file: Path, node: ast.AST) -> str:
    return f"{relative(file)}:{node.lineno}"


# --- imports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_no_other_rooms_than_it_may(room):
    is_ours = ("longctx", *(script.stem for script in ROOT.glob("*.py")))
    wrong = {
        f"{relative(file)} imports {module}"
        for file in files_in(f"longctx/{room}")
        for module in imports(file)
        if is_within(module, is_ours) and not is_within(module, MAY_IMPORT[room])
    }
    assert not wrong


def test_compiler_and_runtime_never_import_each_other():
    for room, other in (("compiler", "longctx.runtime"), ("runtime", "longctx.compiler")):
        for file in files_in(f"longctx/{room}"):
            assert not [module for module in imports(file) if is_within(module, (other,))], file


@pytest.mark.parametrize("place", MAY_USE)
def test_a_room_uses_no_other_libraries_than_it_may(place):
    allowed = (*sys.stdlib_module_names, *MAY_USE[place], "longctx", "chunk_linear_cross_entropy")
    for file in files_in(place):
        assert not [module for module in imports(file) if not is_within(module, allowed)], file


def test_a_rank_can_be_told_its_job_without_transformers():
    program = "import sys, longctx.job; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_loss_can_be_lifted_out_of_the_repository_as_one_file():
    loss = ROOT / "chunk_linear_cross_entropy.py"
    assert not [module for module in imports(loss) if is_within(module, ("longctx",))]


def test_the_compiler_knows_nothing_of_process_groups():
    for file in files_in("longctx/compiler"):
        assert not [module for module in imports(file) if is_within(module, ("torch.distributed",))], file


# --- words -----------------------------------------------------------------------------------------------------------


def test_no_option_is_named_below_the_scripts_and_their_options():
    named = {
        f"{relative(file)} names {option}"
        for file in SOURCES
        if relative(file) not in NAME_OPTIONS
        for text in texts(file, docstrings=True)
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text.value)
        if option not in OF_OTHER_PROGRAMS
    }
    assert named <= IN_GENERATED_CODE


def test_only_its_engine_the_tables_of_engines_and_the_options_name_nnscaler():
    wrong = set()
    for file in SOURCES:
        if not relative(file).startswith(NAME_NNSCALER):
            names = [node for node in ast.walk(tree_of(file)) if isinstance(node, (ast.Name, ast.Attribute, ast.alias))]
            wrong |= {at(file, node) for node in names if "nnscaler" in ast.unparse(node).lower()}
            wrong |= {at(file, text) for text in texts(file, docstrings=False) if "nnscaler" in text.value.lower()}
    assert not wrong


# --- operators -------------------------------------------------------------------------------------------------------


def test_only_ops_names_operators_of_aten():
    named = {
        at(file, text)
        for file in SOURCES
        if OPS not in file.parents
        for text in texts(file, docstrings=False)
        if "aten." in text.value
    }
    assert not named


def test_only_ops_takes_the_target_of_an_op_apart():
    methods = {"split", "rsplit", "partition", "rpartition", "startswith", "endswith", "removeprefix", "removesuffix"}
    wrong = {
        at(file, node)
        for file in SOURCES
        if OPS not in file.parents
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Attribute)
        and node.attr in methods
        and (getattr(node.value, "attr", None) == "target" or getattr(node.value, "id", None) == "target")
    }
    assert not wrong


@pytest.mark.parametrize("name", ["OpSpec", "register_op", "REGISTERED_OPS", "ATEN", "RESHARDS"])
def test_what_is_known_of_operators_is_defined_in_ops_alone(name):
    places = set()
    for file in SOURCES:
        for node in tree_of(file).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            defined = {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}
            if name in defined:
                places.add(file.parent)
    assert places == {OPS}
