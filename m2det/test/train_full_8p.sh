#!/usr/bin/env bash
# Accuracy on 8 devices: 160 epochs at 512 x 512, then evaluation.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 8 train.py "--data_path=$HOME/data/coco" "$@"
