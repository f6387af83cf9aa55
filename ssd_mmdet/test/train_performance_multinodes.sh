#!/usr/bin/env bash
# Speed on several nodes of 8 devices: --nnodes=2 --node_rank=0 --local_addr=IP --master_addr=IP.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 8 train.py --recipe=8p --max_iters=1000 --kind=perf "$@"
