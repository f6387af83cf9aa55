#!/usr/bin/env bash
# Speed on one device: 1000 steps of the 1p recipe, no evaluation.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 train.py --recipe=1p --max_iters=1000 --kind=perf "$@"
