#!/usr/bin/env bash
# Speed on 8 devices: 1000 steps of the 8p recipe, no evaluation.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 8 train.py --recipe=8p --max_iters=1000 --kind=perf "$@"
