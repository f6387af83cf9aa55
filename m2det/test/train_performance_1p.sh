#!/usr/bin/env bash
# Speed on one device: one epoch, no evaluation.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 train.py --epochs=1 --kind=perf "--data_path=$HOME/data/coco" "$@"
