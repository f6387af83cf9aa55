#!/usr/bin/env bash
# Finetune --pth_path=FILE on one device (at most 1000 steps), then evaluate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 train.py --recipe=finetune --max_iters=1000 "--data_path=$HOME/data/coco" "$@"
