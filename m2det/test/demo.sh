#!/usr/bin/env bash
# Detect and draw: --img=FOLDER (default: sample images), --checkpoint_path=FILE.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 demo.py "--data_path=$HOME/data/coco" "$@"
