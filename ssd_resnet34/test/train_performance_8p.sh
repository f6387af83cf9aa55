#!/usr/bin/env bash
# Speed on 8 devices: one epoch of the 8p recipe, no evaluation.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 8 train.py --recipe=8p --epochs=1 --kind=perf "$@"
