#!/usr/bin/env bash
# Train and evaluate on one device, without a rank table: `bash run_npu_1p.sh [FLAGS of ssd_main.py]`,
# --device_id=N for another than the first. Set the paths in exec_main.sh. Output: training/D0.
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ -n "${PYTHON:-}" ] || { PYTHON=$folder/../.venv/bin/python && [ -x "$PYTHON" ] || PYTHON=python3; }
export ONESTAGE_LAUNCH_TIME=${ONESTAGE_LAUNCH_TIME:-$(date +%s)}
unset RANK_TABLE_FILE
exec "$PYTHON" "$folder/tfrecord/launch.py" "$@"
