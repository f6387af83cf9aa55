#!/usr/bin/env bash
# Finetune --pth_path=FILE on one device; --epochs=N sets its length and its schedule.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 train.py --recipe=finetune "--data_path=$HOME/data/coco" "$@"
