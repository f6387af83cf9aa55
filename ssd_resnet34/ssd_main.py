#!/usr/bin/env python3
"""The port's program name: `--mode=eval` runs tfrecord/evaluate.py, every other tfrecord/train.py.

    python3 ssd_main.py --mode=train_and_eval --training_file_pattern='tfrecord/train2017*' \\
        --validation_file_pattern='tfrecord/val2017*' --val_json_file=instances_val2017.json \\
        --resnet_checkpoint=pretrain/model.ckpt-28152 --model_dir=result_npu

`run_npu_1p.sh` and `run_npu_8p.sh` start it with the paths of exec_main.sh.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common.npu.interpreter  # noqa: F401 before torch

# isort: split

from common.npu import entry
from ssd_resnet34.tfrecord import evaluate, train
from ssd_resnet34.tfrecord.options import parse


def main(argv: list[str] | None = None) -> int | None:
    args = parse(argv, __doc__)
    if args.mode == "eval" and not args.check_data:
        return evaluate.main(argv)
    return train.main(argv)


if __name__ == "__main__":
    entry.run(main)
