"""The house rules: layers, sizes, bans, clean linters, a wheel that works."""

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "danlu"
FILES = sorted(SOURCE.rglob("*.py"))

# Packages on one line never import each other; imports point down only.
LAYERS = [["core"], ["text", "tokens", "data"], ["models", "objectives", "tasks"],
          ["train", "evals", "serve", "rollout"], ["pipeline"], ["cli"]]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WITHOUT_TORCH = {"core", "text", "tokens", "tasks"}

MAX_FILE, MAX_FUNCTION, MAX_FIELDS = 500, 60, 20
# The exceptions, by name; this list may only shrink.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
LARGE_CONFIGS: set[str] = set()

BANNED_IMPORTS = {"pickle", "marshal", "dill", "shelve", "cloudpickle", "joblib"}
BANNED_CALLS = {"eval", "exec", "compile"}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in FILES:
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "danlu")


def test_imports_point_down_only() -> None:
    wrong = []
    for path, tree in trees():
        own = package_of(path)
        for name in imported(tree):
            parts = name.split(".")
            if parts[0] == "danlu" and len(parts) > 1 and parts[1] in LEVEL and own in LEVEL:
                other = parts[1]
                if other != own and LEVEL[other] >= LEVEL[own]:
                    wrong.append(f"{name_of(path)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_package_has_its_place() -> None:
    packages = {package_of(path) for path in FILES} - {"__init__"}
    assert packages == set(LEVEL)


def test_the_text_side_needs_no_torch() -> None:
    wrong = [f"{name_of(path)} imports {name}" for path, tree in trees() if package_of(path) in WITHOUT_TORCH
             for name in imported(tree) if name.split(".")[0] == "torch"]
    assert not wrong, "\n".join(wrong)


def test_sizes() -> None:
    files = {name_of(path) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE}
    functions, configs = set(), set()
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if node.end_lineno - node.lineno + 1 > MAX_FUNCTION:
                    functions.add(f"{name_of(path)}:{node.name}")
            elif isinstance(node, ast.ClassDef):
                fields = sum(isinstance(item, ast.AnnAssign) for item in node.body)
                if fields > MAX_FIELDS:
                    configs.add(f"{name_of(path)}:{node.name}")
    assert files == LONG_FILES
    assert functions == LONG_FUNCTIONS
    assert configs == LARGE_CONFIGS


def test_no_settings_class_hides_a_parents_check() -> None:
    """pydantic keeps validators by name: one of the same name in a derived class silently replaces the parent's."""
    names: dict[str, str] = {}
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and any("_validator" in ast.unparse(item) for item in node.decorator_list):
                assert node.name not in names, f"{name_of(path)} and {names[node.name]} both define {node.name}"
                names[node.name] = name_of(path)
    assert len(names) > 3


def test_bans() -> None:
    wrong = []
    for path, tree in trees():
        wrong += [f"{name_of(path)} imports {name}" for name in imported(tree) if name.split(".")[0] in BANNED_IMPORTS]
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
                wrong.append(f"{name_of(path)}:{node.lineno} catches everything")
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in BANNED_CALLS or called in ("torch.load", "os.system", "yaml.load", "yaml.unsafe_load"):
                wrong.append(f"{name_of(path)}:{node.lineno} calls {called}")
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and \
                        ast.unparse(keyword.value) == "True":
                    wrong.append(f"{name_of(path)}:{node.lineno} passes {keyword.arg}=True")
    assert not wrong, "\n".join(wrong)


def test_nothing_listens() -> None:
    """No module opens a network listener."""
    servers = {"socketserver", "http.server", "uvicorn", "fastapi", "flask", "aiohttp"}
    wrong = [f"{name_of(path)} imports {name}" for path, tree in trees() for name in imported(tree) if name in servers]
    assert not wrong, "\n".join(wrong)


def test_every_module_and_public_function_is_documented() -> None:
    wrong = []
    for path, tree in trees():
        if not ast.get_docstring(tree):
            wrong.append(name_of(path))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and \
                    not ast.get_docstring(node):
                wrong.append(f"{name_of(path)}:{node.name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("command", [["ruff", "check", "src", "tests", "bench"], ["mypy"]], ids=["ruff", "mypy"])
def test_linters_are_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_layer_test_can_fail() -> None:
    tree = ast.parse("from danlu.pipeline.run import run\nimport danlu.train.step")
    assert {"danlu.pipeline.run", "danlu.train.step"} <= set(imported(tree))
    assert LEVEL["pipeline"] > LEVEL["core"]


def test_a_wheel_builds_and_works_without_the_checkout(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
                   check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    for path in FILES:
        assert f"danlu/{name_of(path)}" in names
    assert "danlu/py.typed" in names and "danlu/evals/report.html" in names
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel],
                   check=True, capture_output=True)
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import danlu.cli; assert 'site' in danlu.__file__; " \
           "danlu.cli.main()"
    done = subprocess.run([sys.executable, "-I", "-c", code, str(site), "--version"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "0.1.0" in done.stdout, done.stderr
