#!/usr/bin/env bash
# Accuracy on one device, batch 16: 12 epochs with evaluation; --recipe=gn (default), nogn, ...
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 train.py --batch_size=16 "$@"
