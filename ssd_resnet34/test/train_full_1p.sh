#!/usr/bin/env bash
# Accuracy on one device: the 1p recipe, 90 epochs with evaluation.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 train.py --recipe=1p "$@"
