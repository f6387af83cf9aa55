"""Flags of MLPerf's SSD and of its Ascend port, beside those of all models."""

from common.parser import answered, needless, renamed

OLD_FLAGS = (
    *answered("--model-path", "--pretrained takes the backbone's ImageNet weights"),
    *answered("--iteration", "--resume=FILE goes on at the step at which a checkpoint was written"),
    *renamed("--use-fp16", "--amp=O1"),
    *needless("--input-size", value="300"),
    *answered("--input-size", "the anchors fit 300 pixels only; omit it"),
    *needless("--bn-group", value="1"),
    *answered("--bn-group", "batch norm works on the images of a process; omit it"),
    *needless("--allreduce-running-stats"),
    *answered(
        "--no-allreduce-running-stats",
        "an evaluation averages the running statistics of all processes; omit it",
    ),
    # Without effect in the port as well.
    *needless("--delay-allreduce --opt-loss --no-dali"),
    *answered(
        "--dali --dali-sync --dali-cache --use-nvjpeg --use-roi-decode --meta-files-path",
        "the loader works without DALI; omit it",
    ),
    *answered(
        "--input-batch-multiplier --jit --nhwc --pad-input --profile-start --profile-nvtx "
        "--profile-gc-off --profile-cudnn-get --profile-fake-optim",
        "NVIDIA's code has it, this one has no counterpart; omit it",
    ),
)
