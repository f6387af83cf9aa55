#!/usr/bin/env bash
# Accuracy on 8 devices, batch 2 each: 12 epochs with evaluation; --recipe=gn (default), nogn, ...
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 8 train.py "$@"
