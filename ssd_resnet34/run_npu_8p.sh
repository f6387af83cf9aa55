#!/usr/bin/env bash
# Train and evaluate on the devices of a rank table, npu_config/8p.json or RANK_TABLE_FILE:
# `bash run_npu_8p.sh [FLAGS of ssd_main.py]`. Set the paths in exec_main.sh. Output: training/D<rank>.
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -n "${PYTHON:-}" ] || { PYTHON=$folder/../.venv/bin/python && [ -x "$PYTHON" ] || PYTHON=python3; }
export ONESTAGE_LAUNCH_TIME=${ONESTAGE_LAUNCH_TIME:-$(date +%s)}
export RANK_TABLE_FILE=${RANK_TABLE_FILE:-$folder/npu_config/8p.json}
exec "$PYTHON" "$folder/tfrecord/launch.py" "$@"
