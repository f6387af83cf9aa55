#!/usr/bin/env bash
# Run one rank: `bash exec_main.sh RANK SIZE FOLDER [FLAGS...]`, where FOLDER contains ssd_main.py.
# Set the paths and the mode here. Paths must be absolute, because a rank runs in training/D<RANK>.
# Flags of run_npu_*.sh come last and override those below.
path_to_tfrecord=${path_to_tfrecord:-/path/to/tfrecord}
path_to_pretrain=${path_to_pretrain:-/path/to/pretrain}
path_to_annotations=${path_to_annotations:-/path/to/annotations}

if [ $# -lt 3 ]; then
    echo "usage: bash exec_main.sh RANK SIZE FOLDER [FLAGS...]; run_npu_1p.sh and run_npu_8p.sh call it" >&2
    exit 2
fi
export RANK_ID=$1 RANK_SIZE=$2 DEVICE_ID=${DEVICE_ID:-$1}
source "$3/../common/npu/env_npu.sh"
source "$3/../common/npu/launch.sh"
choose_python "$3/.."
exec "$PYTHON" "$3/ssd_main.py" \
    --mode=train_and_eval \
    --train_batch_size=32 \
    --training_file_pattern="${path_to_tfrecord}/train2017*" \
    --resnet_checkpoint="${path_to_pretrain}/model.ckpt-28152" \
    --validation_file_pattern="${path_to_tfrecord}/val2017*" \
    --val_json_file="${path_to_annotations}/instances_val2017.json" \
    --eval_batch_size=32 \
    --model_dir=result_npu \
    "${@:4}"
