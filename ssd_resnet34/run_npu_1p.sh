#!/usr/bin/env bash
# Train and evaluate on one device, without a rank table:
# `bash run_npu_1p.sh [FLAGS of ssd_main.py]`. --device_id=N takes another device than the first. Set
# the paths in exec_main.sh. The output goes to training/D0 of the current folder.
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$folder/../common/npu/launch.sh"
choose_python "$folder/.."
export ONESTAGE_LAUNCH_TIME=${ONESTAGE_LAUNCH_TIME:-$(date +%s)}
unset RANK_TABLE_FILE
exec "$PYTHON" "$folder/tfrecord/launch.py" "$@"
