"""Flags of M2Det's own programs and of their Ascend port, beside those of all models."""

from common.parser import answered, needless, renamed

OLD_FLAGS = (
    *renamed("-m --trained-model --resume-net", "--checkpoint"),
    *answered(
        "-c --c --config",
        "no config file is read; --recipe=512_vgg is m2det512_vgg.py, and 320_vgg, 704_vgg, "
        "800_vgg and 320_resnet101 are the others",
    ),
    *needless("--dataset", value="COCO"),
    *answered("--dataset", "only COCO's format is read, from the folder that --data names"),
    *answered(
        "--resume-epoch", "--resume=FILE goes on at the step at which a checkpoint was written"
    ),
    # Training always writes TensorBoard's events; with another value -t is the AP to stop at.
    *needless("-t", value="True"),
    *needless("--tensorboard", takes_value=True),
    *needless("--FusedSGD"),
    *answered("--performance", "--epochs=1 --kind=perf, as test/train_performance_1p.sh does"),
    *renamed("--test", "--format-only"),
    *renamed("-f --directory", "--img"),
    *answered("--video --cam", "give the file of the video, or the number of the camera"),
    *needless("--ngpu", value="1"),
    *answered(
        "--ngpu --gpu --device-list",
        "--device_id=N takes the card of one process, test/train_full_8p.sh --nproc_per_node=N "
        "starts N processes",
    ),
    *answered(
        "--world-size --dist-url --dist-backend --dist-rank --multiprocessing-distributed --addr",
        "processes are started by test/train_full_8p.sh, those of several nodes by "
        "test/train_performance_multinodes.sh, or by torchrun; omit it",
    ),
)
