#!/usr/bin/env bash
# Accuracy on one device: the 1p recipe, 24 epochs of 5 passes, evaluation after each.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 train.py --recipe=1p "$@"
