"""What holds for the repository as a whole; each test prints all offenders."""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

import lm2_jax

ROOT = Path(__file__).parents[1]
PACKAGES = ("lm2_jax", "sharding", "configs")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

# Packages that another one imports without asking for them.
IMPORTED_FOR_US = {"importlib_resources": "tensorflow_datasets"}


def product_files() -> list[Path]:
    """The library and the programs."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return files + sorted(ROOT.glob("*.py"))


def trees(files: list[Path]) -> list[tuple[str, ast.Module]]:
    return [(str(file.relative_to(ROOT)), ast.parse(file.read_text(), str(file))) for file in files]


def imported_modules(tree: ast.Module) -> set[str]:
    """Full names of imported modules, `from a import b` as both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_files_are_short():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in product_files()}
    assert lengths, "no product files found"
    offenders = [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > MAX_FILE_LINES]
    assert not offenders, f"at most {MAX_FILE_LINES} lines a file:\n" + "\n".join(offenders)


def test_functions_are_short():
    offenders = []
    for name, tree in trees(product_files()):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    offenders.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    assert not offenders, f"at most {MAX_FUNCTION_LINES} lines a function:\n" + "\n".join(offenders)


def test_the_library_names_no_mesh_axis():
    """`lm2_jax` speaks of logical axes; meshes and partition specs are the business of `sharding`."""
    forbidden = {"PartitionSpec", "NamedSharding", "Mesh", "make_mesh", "set_mesh", "shard_map"}
    offenders = []
    for name, tree in trees(sorted((ROOT / "lm2_jax").rglob("*.py"))):
        if name.startswith(("lm2_jax/aot/", "lm2_jax/commands/")):  # compiles for meshes; programs
            continue
        if name != "lm2_jax/layout.py":  # gives the others the class `Layout`
            offenders += [f"{name}: imports {m}" for m in imported_modules(tree) if m.startswith("lm2_jax.sharding")]
        for node in ast.walk(tree):
            word = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}.get(type(node))
            if word and getattr(node, word) in forbidden:
                offenders.append(f"{name}:{getattr(node, 'lineno', '?')}: {getattr(node, word)}")
            elif isinstance(node, ast.Constant) and node.value == "fsdp":
                offenders.append(f"{name}:{node.lineno}: mesh axis 'fsdp'")
    assert not offenders, "\n".join(offenders)


CALLED_AS_MODULES = (
    *("lm2_jax/__main__.py", "lm2_jax/compare/__main__.py", "lm2_jax/data/convert.py"),
    *("lm2_jax/interop/export_hf.py", "lm2_jax/interop/import_hf.py"),
)


def test_only_programs_import_commands():
    offenders = [
        f"{name}: imports {module}"
        for name, tree in trees(sorted((ROOT / "lm2_jax").rglob("*.py")))
        for module in imported_modules(tree)
        if module.startswith("lm2_jax.commands") and not name.startswith(("lm2_jax/commands/", *CALLED_AS_MODULES))
    ]
    assert not offenders, "\n".join(offenders)


def requirement_names(file: str) -> list[str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    names = [re.match(r"[A-Za-z0-9._-]+", line) for line in lines if line and not line.startswith("-")]
    return [name.group() for name in names if name]


def modules_of(distribution: str) -> list[str]:
    """Top-level modules that a distribution installs; `orbax.checkpoint` for one that shares a namespace."""
    files = importlib.metadata.files(distribution) or []
    packages = {file.parts[:-1] for file in files if file.name == "__init__.py"}
    tops = {parts for parts in packages if parts and not any(parts[:n] in packages for n in range(1, len(parts)))}
    single = {(file.stem,) for file in files if len(file.parts) == 1 and file.suffix == ".py"}
    return [".".join(parts) for parts in sorted(tops | single)]


def test_every_requirement_is_used():
    used = set().union(*(imported_modules(tree) for _, tree in trees(product_files())))
    offenders = []
    for name in requirement_names("requirements.txt"):
        importer = IMPORTED_FOR_US.get(name)
        if importer is not None:
            package = importlib.util.find_spec(importer)
            assert package is not None
            assert package.origin is not None
            sources = Path(package.origin).parent.rglob("*.py")
            if any(f"import {name}" in file.read_text(errors="replace") for file in sources):
                continue
        modules = modules_of(name)
        if not any(module == m or module.startswith(f"{m}.") for m in modules for module in used):
            offenders.append(f"{name} (provides {modules}): imported nowhere in {', '.join(PACKAGES)} or *.py")
    assert not offenders, "\n".join(offenders)


def test_requirements_have_lower_bounds_only():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    offenders = [line for line in lines if line and not re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?>=[\d.]+", line)]
    assert not offenders, f"write name>=version: {offenders}"


def readme_commands() -> list[str]:
    blocks = re.findall(r"^```(?:bash|sh|shell|console)?\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = [line.split(" #")[0].strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_commands_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    commands, offenders = readme_commands(), []
    for command in commands:
        for target in re.findall(r"^make ([a-z-]+)", command):
            if target not in targets:
                offenders.append(f"{command}: the Makefile has no {target}")
        for script in re.findall(r"python(?:3)? ([\w/]+\.py)", command):
            if not (ROOT / script).is_file():
                offenders.append(f"{command}: there is no {script}")
        for preset in re.findall(r"python(?:3)? train\.py ([a-z]\w*)", command):
            if preset not in lm2_jax.PRESETS:
                offenders.append(f"{command}: there is no preset {preset}")
        for module in re.findall(r"python(?:3)? -m ((?:lm2_jax|benchmarks)[\w.]*)", command):
            if importlib.util.find_spec(module) is None:
                offenders.append(f"{command}: there is no {module}")
    assert {"make quickstart", "make test"} <= set(commands), "the README shows how to begin"
    assert not offenders, "\n".join(offenders)


def test_nothing_is_left_for_later():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"not a git work tree: {listed.stderr.strip()}")
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    offenders = []
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if file.is_file() and b"\0" not in (content := file.read_bytes()):
            lines = enumerate(content.decode(errors="replace").splitlines(), 1)
            offenders += [f"{name}:{number}: {line.strip()}" for number, line in lines if words.search(line)]
    assert not offenders, "\n".join(offenders)
