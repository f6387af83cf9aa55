#!/usr/bin/env bash
# Evaluate --checkpoint_path=FILE (default: the newest) on one device.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 evaluate.py "$@"
