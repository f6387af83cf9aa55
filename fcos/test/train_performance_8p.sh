#!/usr/bin/env bash
# Speed on 8 devices, batch 2 each: one epoch, no evaluation; --recipe=gn (default), nogn, ...
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 8 train.py --epochs=1 --kind=perf "$@"
