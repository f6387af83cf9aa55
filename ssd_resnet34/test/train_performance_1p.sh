#!/usr/bin/env bash
# Speed on one device: one epoch of the 1p recipe, no evaluation.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 train.py --recipe=1p --epochs=1 --kind=perf "$@"
