#!/usr/bin/env bash
# Train and evaluate on the devices of a rank table, npu_config/8p.json or RANK_TABLE_FILE:
# `bash run_npu_8p.sh [FLAGS of ssd_main.py]`. Set the paths in exec_main.sh. The output goes to
# training/D<rank> of the current folder.
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$folder/../common/npu/launch.sh"
choose_python "$folder/.."
export ONESTAGE_LAUNCH_TIME=${ONESTAGE_LAUNCH_TIME:-$(date +%s)}
export RANK_TABLE_FILE=${RANK_TABLE_FILE:-$folder/npu_config/8p.json}
exec "$PYTHON" "$folder/tfrecord/launch.py" "$@"
