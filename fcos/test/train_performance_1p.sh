#!/usr/bin/env bash
# Speed on one device: 2000 steps of batch 2, no evaluation; --recipe=gn (default), nogn, ...
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 train.py --epochs=1 --kind=perf --max_iters=2000 "$@"
