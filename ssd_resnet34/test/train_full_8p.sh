#!/usr/bin/env bash
# Accuracy on 8 devices: the 8p recipe, 90 epochs with evaluation.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 8 train.py --recipe=8p "$@"
