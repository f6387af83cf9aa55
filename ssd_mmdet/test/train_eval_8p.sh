#!/usr/bin/env bash
# Evaluate --checkpoint_path=FILE (default: the newest) on 8 devices.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 8 evaluate.py "$@"
