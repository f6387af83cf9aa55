#!/usr/bin/env bash
# Accuracy on one device: 160 epochs at 512 x 512, then evaluation.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 train.py "--data_path=$HOME/data/coco" "$@"
