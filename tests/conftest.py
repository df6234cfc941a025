"""Settings of all tests: eight CPU devices, strict promotion, checked annotations.

They must be in place before jax is asked for its devices and before lm2_jax is imported, so they stand here at the
top and not in fixtures.
"""

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA, see docs/sharding.md: with one for each device, devices that begin independent collectives in
# different orders wait for one another for ever.
os.environ.setdefault("NPROC", "64")

from pathlib import Path

import jax
import jaxtyping
import pytest

import tests.annotations  # noqa: F401  the import hook below finds it by name

ROOT = Path(__file__).parents[1]

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A second run of the suite finds its programs compiled, in another clone too: an entry's name says all it depends on.
if jax.config.values["jax_compilation_cache_dir"] is None:  # $JAX_COMPILATION_CACHE_DIR
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "lm2_jax" / "tests_of_one_device"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Shapes and types in the annotations of lm2_jax are checked at each call; outside the tests they cost nothing.
jaxtyping.install_import_hook("lm2_jax", "tests.annotations.check")


MOST_MAPS = 30_000

# Where programs run on several devices.
SPLIT = ("sharding", "aot", "interop", "parity", "e2e/test_elastic.py", "training/test_step.py")


@pytest.fixture(autouse=True, scope="module")
def nothing_split_is_cached(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs of several CPU devices are compiled each time.

    XLA keeps such a program without the order of its collectives: read back, it stands still until XLA aborts.
    """
    here = request.path.relative_to(ROOT / "tests").as_posix()
    seconds = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9 if here.startswith(SPLIT) else seconds)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


@pytest.fixture(autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """Drops all compiled programs before they take all the memory maps of this process, 65,530 on Linux.

    Each takes dozens for as long as it can be called; XLA crashes where there are no more.
    """
    yield
    if memory_maps() > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


def memory_maps() -> int:
    """Memory maps of this process; 0 where the system does not tell."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the files of tests/golden anew")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data (bAbI, books, tokenizers, ...): $LM2_JAX_DATA, or ../shared/data beside the repository."""
    folder = (ROOT / os.environ.get("LM2_JAX_DATA", "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist; set LM2_JAX_DATA to a folder that has it")
    return folder


@pytest.fixture
def wide_numbers() -> Iterator[None]:
    """What works on a run in float64 switches it on for the whole process, as a program should."""
    yield
    jax.config.update("jax_enable_x64", False)
