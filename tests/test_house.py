"""The house: packages and links, who may import whom, what a quick command loads, what a wheel holds."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOTS = ("kernels", "launch", "parallel")


def sources() -> list[tuple[str, Path]]:
    """Each file of ours with the name of its module, links not followed."""
    files = [path for name in ("nsa_dist", *ROOTS) for path in sorted((ROOT / name).rglob("*.py"))]
    return [(module_name(path), path) for path in files if not any(p.is_symlink() for p in path.parents)]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "nsa_dist" else ("nsa_dist", *parts)).removesuffix(".__init__")


def imports(name: str, path: Path) -> set[str]:
    """Names of all modules that a file imports, wherever in it, made absolute."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(parents if node.level else []), *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def inside(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def test_packages_are_the_folders_with_python_files() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    there = {module_name(path.parent / "__init__.py") for _, path in sources()}
    data = set(PROJECT["tool"]["setuptools"]["package-data"])
    assert there <= listed
    assert listed - there <= data


@pytest.mark.parametrize("name", ("configs", *ROOTS))
def test_links_serve_a_bare_checkout(name: str) -> None:
    link = ROOT / "nsa_dist" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


@pytest.mark.parametrize(("name", "path"), sources(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_keep_to_the_rules(name: str, path: Path) -> None:
    folders = {
        "nsa_dist.kernels": ["nsa_dist.kernels"],
        "nsa_dist.parallel": ["nsa_dist.kernels", "nsa_dist.parallel"],
    }
    for imported in imports(name, path):
        assert not inside(imported, *ROOTS), f"{imported}: must be imported below nsa_dist"
        if inside(imported, "ray"):
            assert inside(name, "nsa_dist.launch"), "only launch/ imports Ray"
        if inside(imported, "nsa_dist.launch"):
            assert inside(name, "nsa_dist.launch", "nsa_dist.cli"), "of nsa_dist only the command line imports launch"
        for folder, allowed in folders.items():
            if inside(name, folder) and inside(imported, "nsa_dist") and imported != "nsa_dist":
                assert inside(imported, *allowed), f"{folder} imports {imported}"


def test_help_is_quick() -> None:
    program = """
import json, sys
import nsa_dist.cli
try:
    nsa_dist.cli.main(["train", "--help"])
except SystemExit:
    print()
    print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "nsa_dist.cli" in loaded
    assert not [name for name in loaded if inside(name, "ray", "torch", "matplotlib", "tensorboard")]


def test_wheel_holds_every_module_and_the_data(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("nsa_dist", "configs", *ROOTS):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    words = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(tree)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        "/".join(("nsa_dist", *path.relative_to(ROOT).parts)).replace("nsa_dist/nsa_dist", "nsa_dist")
        for _, path in sources()
    }
    traces = {str(path.relative_to(ROOT)) for path in (ROOT / "nsa_dist/traces").iterdir() if path.suffix != ".py"}
    wanted = modules | {t for t in traces if "__pycache__" not in t} | {"nsa_dist/configs/cpu-demo.yaml"}
    assert wanted - held == set()
