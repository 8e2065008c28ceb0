#!/usr/bin/env bash
# The whole CI on one's own machine.
#
#   ./check.sh              everything
#   ./check.sh lint types   only these parts: lint, types, doctest, test, parity
#
# Needs the extras `test` and `dev`. Uses .venv if there is one; PYTHON=... chooses another.
set -euo pipefail
cd "$(dirname "$0")"

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

lint() {
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m ruff check .
}

types() {
    "$PYTHON" -m pyright --project pyproject.toml --pythonpath "$("$PYTHON" -c 'import sys; print(sys.executable)')"
}

# Examples run under the settings a user has, and not under those of tests/conftest.py; several
# devices are there because some examples show sharding.
doctest() {
    JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" XLA_FLAGS="--xla_force_host_platform_device_count=8" \
        "$PYTHON" -m pytest --doctest-modules src
}

test() {
    "$PYTHON" -m pytest -m "not parity"
}

parity() {
    # Without torch these tests would all be skipped, and pass.
    "$PYTHON" -c "import torch" || {
        echo "check.sh parity: needs PyTorch: pip install -e '.[test]'" >&2
        return 1
    }
    "$PYTHON" -m pytest -m parity
}

parts=("$@")
[[ $# -gt 0 ]] || parts=(lint types doctest test parity)
for part in "${parts[@]}"; do
    case "$part" in
        lint | types | doctest | test | parity) ;;
        *)
            echo "usage: ./check.sh [lint|types|doctest|test|parity ...]" >&2
            exit 2
            ;;
    esac
done
for part in "${parts[@]}"; do
    echo "== $part"
    "$part"
done
echo "== all passed: ${parts[*]}"
