"""Settings that hold for every test.

Tests run on eight virtual CPU devices, so that sharding is tested everywhere. Implicit rank
promotion is an error, so that a broadcast that nobody meant is found here. Users are left with
JAX's defaults; the doctests run under those.
"""

import os

# Both are read once, when JAX starts its backend, and so are set before the first import of jax.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def torch():
    """PyTorch, the oracle of the parity tests; the test is skipped where it is not installed."""
    return pytest.importorskip("torch")
