#!/usr/bin/env bash
# Finetune --checkpoint_path=FILE on one device; the classes come from the annotation file.
source "$(dirname "${BASH_SOURCE[0]}")/../../common/npu/launch.sh"
launch 1 train.py --recipe=finetune "$@"
