#!/usr/bin/env bash
# Accuracy on 8 devices: the 8p recipe, 24 epochs of 5 passes, evaluation after each.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 8 train.py --recipe=8p "$@"
