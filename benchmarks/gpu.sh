#!/usr/bin/env bash
# Measure all models on one GPU in at most 520 seconds: bash benchmarks/gpu.sh [FILE]
# The tables for RESULTS.md are in FILE (default: gpu.md). Further flags: gpu.py --help.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/npu/venv.sh
find_python requirements.txt requirements-dev.txt
exec "$PYTHON" benchmarks/gpu.py "$@"
