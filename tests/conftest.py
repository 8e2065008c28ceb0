"""Settings that hold for every test.

Tests run on eight virtual CPU devices, so that sharding is tested everywhere. Implicit rank
promotion is an error, so that a broadcast that nobody meant is found here. Users are left with
JAX's defaults; the doctests run under those.
"""

import os

# Read once, when JAX starts its backend, and so set before the first import of jax. Tests compile
# thousands of small programs that run once: XLA is told to spend little on each.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_llvm_disable_expensive_passes=true"
).strip()

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module", autouse=True)
def _small_caches():
    """Drop compiled programs after each file: thousands of them slow everything down."""
    yield
    jax.clear_caches()


@pytest.fixture
def torch():
    """PyTorch, the oracle of the parity tests; the test is skipped where it is not installed."""
    return pytest.importorskip("torch")
