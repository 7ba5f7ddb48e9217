"""The rooms of the design hold: who imports whom, what is optional, what is never used."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("calib_data", "toolchain", "detection", "deploy")  # each may import those before it
TOOLCHAIN = (
    "choices", "processes", "structure", "families", "networks", "scores", "planning", "surgery", "compensation",
    "training", "steps",
)  # fmt: skip
"""Rooms inside `toolchain/`: each may import those before it."""
DEPLOY = (
    "choices", "store", "machine", "graphs", "runtimes", "precision", "measure", "report", "speed", "recipe", "stages",
    "detectors", "handover", "predict", "inspection", "pipeline", "sweep", "cli",
)  # fmt: skip
"""Rooms inside `deploy/`, and its files that are rooms of their own: each may import those before it."""
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

# What may be missing on a user's machine. One file each may import it, inside a function.
OPTIONAL = (
    "tensorrt",
    "tensorrt_rtx",
    "onnxruntime",
    "openvino",
    "modelopt",
    "pynvml",
    "mmcv",
    "mmdet",
    "mmengine",
)
# These three are one library in three packages, at home in one file.
SAME_HOME = {"mmcv": "mmdet", "mmengine": "mmdet"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of everything that is imported anywhere below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from [f"upvits.{alias.name}" for alias in node.names] if node.module == "upvits" else [node.module]


def imported_when_loaded(tree: ast.Module) -> Iterator[str]:
    """Names imported by just importing the module: outside functions and `if TYPE_CHECKING`."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported(node)
        pending.extend(ast.iter_child_nodes(node))


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(ROOMS)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    names = [name.split(".") for name in imported(tree_of(path))]
    assert {first for first, *_ in names}.isdisjoint({*ROOMS, "benchmarks", "tests"})  # ours is imported as upvits
    reached = {rest[0] for first, *rest in names if first == "upvits" and rest}
    assert reached <= {*ROOMS[: ROOMS.index(room) + 1]}


def imports_up(package: str, order: tuple[str, ...]) -> dict[str, list[str]]:
    """Files of a package -> rooms of it that they import although they come later in the order."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        room = path.relative_to(ROOT / package).with_suffix("").parts[0]
        if room == "__init__":
            continue
        names = [name.split(".") for name in imported(tree_of(path))]
        reached = {rest[0] for first, *rest in (name[1:] for name in names if name[0] == "upvits") if first == package}
        later = reached & {*order[order.index(room) + 1 :]}
        if later:
            found[name_of(path)] = sorted(later)
    return found


@pytest.mark.parametrize(("package", "order"), [("toolchain", TOOLCHAIN), ("deploy", DEPLOY)])
def test_rooms_of_a_package_import_only_downwards(package: str, order: tuple[str, ...]) -> None:
    assert imports_up(package, order) == {}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_relative_import_never_hides_where_it_goes(path: Path) -> None:
    relative = [n.lineno for n in ast.walk(tree_of(path)) if isinstance(n, ast.ImportFrom) and n.level]
    assert relative == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_optional_libraries_are_imported_inside_functions(path: Path) -> None:
    reached = {name.split(".")[0] for name in imported_when_loaded(tree_of(path))}
    assert reached.isdisjoint(OPTIONAL)


def test_every_optional_library_is_at_home_in_one_file() -> None:
    homes: dict[str, set[str]] = {}
    for path in SOURCES:
        for name in imported(tree_of(path)):
            library = name.split(".")[0]
            if library in OPTIONAL:
                homes.setdefault(SAME_HOME.get(library, library), set()).add(name_of(path))
    assert {library: files for library, files in homes.items() if len(files) > 1} == {}


IMPORT_ALL = """
import sys
from importlib import import_module

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, path, target)

blocked, modules = sys.argv[1].split(","), sys.argv[2].split(",")
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in modules:
    import_module(name)
print(len(modules), "imported;", sorted(set(blocked) & {m.split(".")[0] for m in sys.modules}))
"""


def test_every_module_imports_without_the_optional_libraries() -> None:
    modules = [
        "upvits." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if path.name != "__main__.py"
    ]
    result = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", IMPORT_ALL, ",".join(OPTIONAL), ",".join(modules)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{len(modules)} imported; []"


def test_the_command_line_and_doctor_start_without_torch() -> None:
    # `--help` must not wait for it, and doctor must be able to say that it is broken.
    code = (
        "import sys, upvits.deploy.cli.app, upvits.deploy.machine.doctor; "
        "print(sorted({'torch', 'timm', 'onnx'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_pickled(path: Path) -> None:
    tree = tree_of(path)
    assert {name.split(".")[0] for name in imported(tree)}.isdisjoint({"cloudpickle", "dill", "shelve", "joblib"})
    used = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pickle"}
    assert used <= {"pickle.UnpicklingError"}  # the error that torch raises for a file with code in it
    assert "pickle" not in {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        if called == "torch.load":
            safe = [k for k in call.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            assert safe, f"{name_of(path)}:{call.lineno}: torch.load without weights_only=True runs code from the file"
        assert called not in ("torch.save", "numpy.save", "np.save"), f"{name_of(path)}:{call.lineno}: use safetensors"


PARSERS = ("json.load", "json.loads", "loads", "from_json", "tomllib.load", "tomllib.loads", "toml.load", "toml.loads")
PARSING = {
    "calib_data/documents.py": "the one reader",
    "toolchain/networks/catalogue.py": "sizes of timm's models, which are part of this package",
    "deploy/store/run_dir.py": "recipes, the only TOML, within the bounds of the reader",
    "deploy/cli/app.py": "a plan that this process wrote a moment ago",
    "deploy/machine/doctor.py": "answers of a process that it started",
    "deploy/runtimes/inspector.py": "what TensorRT says about an engine; whatever is unknown in it is left out",
    "deploy/runtimes/onnxruntime_facts.py": "the profile that ONNX Runtime wrote into a folder of this process",
}
"""Where JSON or TOML may be parsed, and why: anything else goes through `read_document`."""


def test_documents_are_parsed_in_one_place() -> None:
    parsing = set()
    for path in SOURCES:
        for call in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)):
            called = ast.unparse(call.func)
            if called in PARSERS or called.endswith((".model_validate_json", ".validate_json")):
                parsing.add(name_of(path))
    assert parsing == {*PARSING}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
    functions = [n for n in ast.walk(tree_of(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {f.name: length for f in functions if (length := body_lines(f)) > 75}
    assert long == {}


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function after its docstring."""
    first = function.body[1] if ast.get_docstring(function) is not None and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or 0) - first.lineno + 1


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree_of(path))


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_imported_by_the_one_name(room: str) -> None:
    assert (ROOT / room / "__init__.py").is_file()
    assert (ROOT / "upvits" / room).resolve() == ROOT / room
    assert os.readlink(ROOT / "upvits" / room) == f"../{room}"  # relative: a clone may lie anywhere


def test_types_are_shipped() -> None:
    assert (ROOT / "upvits/py.typed").is_file()
