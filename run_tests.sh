#!/usr/bin/env bash
# Set up what the tests need, once, and run every test: bash run_tests.sh [pytest arguments]
#
#   bash run_tests.sh                      everything, as CI does
#   bash run_tests.sh -m "not slow"        the quick ones
#   bash run_tests.sh tests/common -k nms  some of them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source common/npu/venv.sh
find_python requirements.txt requirements-dev.txt
export TORCH_DEVICE_BACKEND_AUTOLOAD=0 PYTHON
# One thread a test process, as many processes as cores: faster than threads on small tensors.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" -m pytest -n "${TEST_PROCESSES:-auto}" --dist worksteal --durations=15 "$@"
