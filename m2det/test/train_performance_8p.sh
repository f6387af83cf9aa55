#!/usr/bin/env bash
# Speed on 8 devices: one epoch, no evaluation.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 8 train.py --epochs=1 --kind=perf "--data_path=$HOME/data/coco" "$@"
