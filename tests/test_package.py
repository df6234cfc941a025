"""The package as others use it: what an import loads, and a wheel in a project with folders of the same names."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import lm2_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DATA_STACK = (
    *("array_record", "grain", "matplotlib", "orbax", "pyarrow", "rich", "sentencepiece", "tensorboardX"),
    *("tensorflow_datasets", "tokenizers", "tyro"),
)


def python(code: str, cwd: Path, **environment: str) -> str:
    """Standard output of a program in a process of its own."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code: str) -> set[str]:
    """The packages of the data stack that a program loads."""
    return set(python(f"import sys\n{code}\nprint(*(m for m in {DATA_STACK} if m in sys.modules))", ROOT).split())


def test_an_import_loads_no_data_stack():
    assert loaded("import lm2_jax") == set()


@pytest.mark.parametrize(
    "use",
    [
        "lm2_jax.build_model(lm2_jax.ModelConfig()).init_state(2); lm2_jax.stream",
        "lm2_jax.build_model(lm2_jax.preset('lm2_tiny').model).init_state(2)",
    ],
)
def test_a_model_needs_no_data_stack(use):
    """Flax itself loads rich."""
    assert loaded(f"import lm2_jax\n{use}") <= loaded("import flax.linen")


def test_every_public_name_is_there():
    assert {"stream", "load_run", "preset", "PRESETS", "memory", "babilong", "UserError"} <= set(dir(lm2_jax))
    for name in dir(lm2_jax):
        assert getattr(lm2_jax, name) is not None or name.startswith("__")
    with pytest.raises(AttributeError, match="no attribute 'streem'"):
        lm2_jax.streem  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("extra", ["tpu", "cuda", "dev"])
def test_extras_are_the_requirements_files(extra):
    lines = [line.split("#")[0].strip() for line in (ROOT / f"requirements-{extra}.txt").read_text().splitlines()]
    listed = [line for line in lines if line and not line.startswith("-")]
    assert sorted(PROJECT["optional-dependencies"][extra]) == sorted(listed)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, made from a copy of the repository, and a wheel, made from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    backend, copy, unpacked = folder / "backend", folder / "copy", folder / "unpacked"
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--target", str(backend)]
    subprocess.run([*pip, *requires], check=True)
    ignored = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    build = "import setuptools.build_meta as backend; backend.build_{}({!r})"
    python(build.format("sdist", str(folder)), copy, PYTHONPATH=str(backend))
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(unpacked, filter="data")
    python(build.format("wheel", str(folder)), next(unpacked.iterdir()), PYTHONPATH=str(backend))
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path) -> Path:
    """A folder with what the wheel installs."""
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(dist / "installed")
    return dist / "installed"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A project with folders of its own that are called like some of ours."""
    for name in ("configs", "sharding"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    return tmp_path


@pytest.mark.slow
def test_a_wheel_installs_one_package(installed):
    version = lm2_jax.__version__
    assert {path.name for path in installed.iterdir()} == {"lm2_jax", f"lm2_jax-{version}.dist-info"}
    metadata = (installed / f"lm2_jax-{version}.dist-info" / "METADATA").read_text()
    assert f"\nVersion: {version}\n" in metadata
    assert set(re.findall(r"^Provides-Extra: (\w+)$", metadata, re.M)) == {
        "tpu",
        "cuda",
        "dev",
        "gguf",
        "rag",
        "embeddings",
        "hf",
        "wandb",
        "trackio",
    }
    assert "\nRequires-Dist: flax>=" in metadata
    files = {path.relative_to(ROOT) for path in (ROOT / "lm2_jax").rglob("*.py")}
    files |= {Path("lm2_jax/sharding") / path.name for path in (ROOT / "sharding").glob("*.py")}
    files |= {Path("lm2_jax/presets") / path.name for path in (ROOT / "configs").glob("*.py")}
    assert not [str(file) for file in sorted(files) if not (installed / file).is_file()]


@pytest.mark.slow
def test_it_works_in_a_project_with_folders_of_the_same_names(installed, foreign):
    code = """
import jax
import lm2_jax
model = lm2_jax.build_model(lm2_jax.preset("lm2_tiny").model)
lm2_jax.load_run
tokens, state = jax.numpy.zeros((1, 3), int), model.init_state(1)
params = jax.jit(model.init)(jax.random.key(0), jax.numpy.zeros((1, 32), int), state)["params"]
print(lm2_jax.__file__, lm2_jax.stream(model, params, tokens, state)[0].shape)
"""
    file, shape = python(code, foreign, PYTHONPATH=str(installed)).split(maxsplit=1)
    assert Path(file).is_relative_to(installed)
    assert shape.strip() == "(1, 3, 512)"


@pytest.mark.slow
def test_the_console_command_starts(installed, foreign):
    scripts = (next(installed.glob("*.dist-info")) / "entry_points.txt").read_text()
    assert "lm2 = lm2_jax.commands:main" in scripts
    if not (installed / "lm2_jax" / "commands").is_dir():
        pytest.skip("lm2_jax.commands is not there yet")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(installed)}
    words = [sys.executable, "-m", "lm2_jax", "--help"]
    done = subprocess.run(words, cwd=foreign, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, "train" in done.stdout) == (0, True), done.stderr
