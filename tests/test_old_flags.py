"""The flags of the programs that these ones replace: each works, or is answered in one line."""

import importlib
from pathlib import Path

import pytest

MODELS = ("ssd_mmdet", "ssd_resnet34", "m2det", "fcos")


def parse(program: str, words: list[str]):
    """Parse a command line of `program`, such as "fcos.train"."""
    return importlib.import_module(program).parse(words)


def answer(program: str, words: list[str], capsys) -> str:
    """Return the line in which a program ends that does not take a command line."""
    with pytest.raises(SystemExit) as ended:
        parse(program, words)
    assert ended.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    return errors.removeprefix("error: ")


# Of MMDetection's tools/train.py and the Ascend ports' copies of it.
TRAIN_FLAGS_THAT_WORK = {
    "--learning_rate=0.5": ("lr", 0.5),
    "--learning-rate 0.5": ("lr", 0.5),
    "--work-dir runs/a_b": ("output_dir", Path("runs/a_b")),
    "--resume-from epoch_1.pth": ("resume", "epoch_1.pth"),
    "--resume_from=epoch_1.pth": ("resume", "epoch_1.pth"),
    "--resume": ("resume", "auto"),
    "--resume --seed=1": ("resume", "auto"),
    "--resume=auto": ("resume", "auto"),
    "--auto-resume": ("resume", "auto"),
    "--load_from a.pth": ("checkpoint", "a.pth"),
    "--no-validate": ("kind", "perf"),
    "--max_steps=7": ("max_iters", 7),
    "--seed 3": ("seed", 3),
    "--deterministic": ("deterministic", True),
    "--opt-level O1": ("amp", "O1"),
    "--opt_level=O2": ("amp", "O2"),
    "--amp --opt_level=O1": ("amp", "O1"),
    "--opt_level=O1 --amp": ("amp", "O1"),
    "--amp=O0": ("amp", "O0"),
    "--loss-scale 32.0": ("loss_scale", "32.0"),
    "--launcher pytorch --seed=3": ("seed", 3),
    "--launcher=none": ("seed", 0),
    "--local_rank=3": ("local_rank", 3),
    "--data_url=a/b": ("data", "a/b"),
    "--train_url a/b": ("output_dir", Path("a/b")),
}
TRAIN_FLAGS_THAT_ARE_ANSWERED = {
    "--cfg-options optimizer.lr=0.1": "each number of the recipe has a flag of its own",
    "--options data.samples_per_gpu=4": "each number of the recipe has a flag of its own",
    "--gpus 2": "--device_id=N takes the card of one process",
    "--gpu-ids 0 1": "--device_id=N takes the card of one process",
    "--npus=1": "--device_id=N takes the card of one process",
    "--npu-ids 3": "--device_id=N takes the card of one process",
    "--launcher slurm": "start the processes with torchrun",
    "configs/ssd/ssd300_coco.py": "no config file is read; --recipe takes a preset by its name",
    "configs/a.py --work-dir x": "configs/a.py: no config file is read",
}


@pytest.mark.parametrize("model", MODELS)
def test_training_takes_mmdetections_flags(model):
    for words, (name, value) in TRAIN_FLAGS_THAT_WORK.items():
        args = parse(f"{model}.train", words.split())
        assert getattr(args, name) == value, words


@pytest.mark.parametrize("model", MODELS)
def test_training_answers_mmdetections_flags(model, capsys):
    for words, advice in TRAIN_FLAGS_THAT_ARE_ANSWERED.items():
        assert advice in answer(f"{model}.train", words.split(), capsys), words


@pytest.mark.parametrize("model", MODELS)
def test_a_level_alone_is_the_recipes(model):
    assert not hasattr(parse(f"{model}.train", ["--amp"]), "amp")
    assert not hasattr(parse(f"{model}.evaluate", ["--amp", "--device=cpu"]), "amp")


@pytest.mark.parametrize("model", MODELS)
def test_evaluation_takes_or_answers_mmdetections_flags(model, capsys):
    program = f"{model}.evaluate"
    args = parse(program, ["--eval", "bbox", "--format-only", "--launcher", "pytorch"])
    assert args.format_only
    assert parse(program, ["--eval=bbox", "--tag=a_b"]).tag == "a_b"
    answers = {
        "configs/a.py latest.pth --eval bbox": "configs/a.py: no config file is read",
        "latest.pth": "latest.pth: write --checkpoint=latest.pth",
        "--eval proposal": "COCO's metrics of boxes are always computed",
        "--out a.pkl": "results.bbox.json",
        "--show": "demo.py draws",
        "--show-dir=a": "demo.py draws",
        "--show-score-thr 0.3": "demo.py draws",
        "--fuse-conv-bn": "omit it",
        "--gpu-collect": "omit it",
        "--tmpdir=a": "omit it",
        "--cfg-options a=b": "each number of the recipe has a flag of its own",
        "--eval-options a=b": "--per_class and --format_only",
    }
    for words, advice in answers.items():
        assert advice in answer(program, words.split(), capsys), words


@pytest.mark.parametrize("model", MODELS)
def test_a_demo_takes_what_the_others_take(model):
    demo = f"{model}.demo"
    args = parse(demo, ["a.pth", "one.jpg", "two", "--show", "--score-thr=0.5", "--show-dir=x_y"])
    assert args.checkpoint == "a.pth"
    assert args.inputs == ["one.jpg", "two"]
    assert (args.min_score, args.show_dir) == (0.5, Path("x_y"))
    args = parse(demo, ["--img", "one.jpg", "two", "--device=npu:1", "--batch_size=3"])
    assert args.inputs == ["one.jpg", "two"]
    assert (args.device, args.device_id, args.batch_size, args.checkpoint) == ("npu", 1, 3, "")


M2DET = {
    "-m=weights/a_b.pth": ("checkpoint", "weights/a_b.pth"),
    "-m weights/a_b.pth": ("checkpoint", "weights/a_b.pth"),
    "--trained_model=a.pth": ("checkpoint", "a.pth"),
}
M2DET_TRAIN = {
    "--resume_net=a.pth": ("checkpoint", "a.pth"),
    "--pth_path=a.pth": ("checkpoint", "a.pth"),
    "--amp --opt_level=O1 --loss_scale=32.0": ("loss_scale", "32.0"),
    "--amp --opt_level=O1 --ngpu=1": ("amp", "O1"),
    "-t True --seed=49": ("threshold", None),
    "-t=True": ("threshold", None),
    "--tensorboard True --seed=49": ("seed", 49),
    "-t 0.3": ("threshold", 0.3),
    "--dataset COCO --seed=49 --FusedSGD": ("seed", 49),
    "-d data/coco": ("data", "data/coco"),
}
M2DET_ANSWERS = {
    "-c configs/m2det512_vgg.py": "-c: no config file is read; --recipe=512_vgg is m2det512_vgg.py",
    "-c=configs/m2det512_vgg.py": "--recipe=512_vgg is m2det512_vgg.py",
    "--c=configs/m2det512_vgg.py": "--recipe=512_vgg is m2det512_vgg.py",
    "--config configs/m2det512_vgg.py": "--recipe=512_vgg is m2det512_vgg.py",
    "--dataset VOC": "only COCO's format is read",
    "--ngpu 8": "test/train_full_8p.sh",
    "--gpu 0": "test/train_full_8p.sh",
    "--device_list=0,1": "test/train_full_8p.sh",
    "--resume_epoch 10": "--resume=FILE",
    "--performance": "--epochs=1 --kind=perf",
    "--world_size=1": "started by test/train_full_8p.sh",
    "--dist-url=tcp://127.0.0.1:30003": "started by test/train_full_8p.sh",
    "--dist_backend=hccl": "started by test/train_full_8p.sh",
    "--dist_rank=0": "started by test/train_full_8p.sh",
    "--multiprocessing_distributed": "started by test/train_full_8p.sh",
    "--addr=10.0.0.1": "started by test/train_full_8p.sh",
}


def test_m2det_takes_its_own_flags():
    for program in ("train", "evaluate", "demo", "pthtar2onnx"):
        for words, (name, value) in M2DET.items():
            assert getattr(parse(f"m2det.{program}", words.split()), name) == value, words
    for words, (name, value) in M2DET_TRAIN.items():
        assert getattr(parse("m2det.train", words.split()), name, None) == value, words
    assert parse("m2det.evaluate", ["--test", "-m=a.pth"]).format_only
    assert parse("m2det.demo", ["-f", "imgs/"]).inputs == ["imgs/"]
    assert parse("m2det.demo", ["--directory=imgs/"]).inputs == ["imgs/"]


def test_m2det_answers_its_own_flags(capsys):
    for words, advice in M2DET_ANSWERS.items():
        assert advice in answer("m2det.train", words.split(), capsys), words
    for words in ("--video True", "--cam=0"):
        assert "give the file of the video" in answer("m2det.demo", words.split(), capsys)
    several = answer("m2det.train", ["-c=a.py", "--ngpu=8", "--seed=1"], capsys)
    assert "-c=a.py: no config file is read" in several
    assert "--ngpu=8: --device_id=N" in several


SSD_RESNET34 = {
    "--use-fp16": ("amp", "O1"),
    "--input-size 300 --seed 2": ("seed", 2),
    "--bn-group=1": ("seed", 0),
    "--allreduce-running-stats --seed 2": ("seed", 2),
    "--delay-allreduce --opt-loss --no-dali -s 2": ("seed", 2),
    "--profile 5": ("profile", 5),
    "--print-interval=3": ("log_interval", 3),
    "--tag a_b": ("tag", "a_b"),
    "--evaluation": ("evaluation", []),
    "-t 0.3": ("threshold", 0.3),
}
SSD_RESNET34_ANSWERS = {
    "--model-path=./vgg16n.pth": "--pretrained",
    "--iteration 5": "--resume=FILE",
    "--input-size=512": "the anchors fit 300 pixels only",
    "--bn-group 2": "batch norm works on the images of a process",
    "--no-allreduce-running-stats": "averages the running statistics",
}
NVIDIAS = (
    "--dali --dali-sync --dali-cache=0 --use-nvjpeg --use-roi-decode --meta_files_path=a "
    "--input-batch-multiplier=2 --jit --nhwc --pad-input --profile-start=3 --profile-nvtx "
    "--profile-gc-off --profile-cudnn-get --profile-fake-optim"
)


def test_ssd_resnet34_takes_or_answers_its_own_flags(capsys):
    for words, (name, value) in SSD_RESNET34.items():
        assert getattr(parse("ssd_resnet34.train", words.split()), name) == value, words
    for words, advice in SSD_RESNET34_ANSWERS.items():
        assert advice in answer("ssd_resnet34.train", words.split(), capsys), words
    for word in NVIDIAS.split():
        assert "omit it" in answer("ssd_resnet34.train", [word], capsys), word


def test_the_mmdetection_ports_take_or_answer_their_own_flags(capsys):
    assert parse("ssd_mmdet.train", ["--train_epochs=3"]).epochs == 3
    assert "omit it" in answer("fcos.train", ["--bin=False"], capsys)
    assert "PYTHON=" in answer("fcos.train", ["--conda_name=py1"], capsys)
    export = "--input-img a.jpg --output-file tmp.onnx --opset-version 18 --verify --shape 64 64"
    args = parse("fcos.pthtar2onx", ["CONFIG.py", "a.pth", *export.split(), "--dataset", "coco"])
    assert (args.checkpoint, args.opset, args.shape) == ("a.pth", 18, [64, 64])
    for words in ("--dataset voc", "--view", "--mean 1 2 3", "--std=1", "--show"):
        answer("fcos.pthtar2onx", words.split(), capsys)


def test_the_tfrecord_recipe_takes_the_tensorflow_ports_flags():
    words = (
        "--mode=train --train_batch_size=4 --training_file_pattern=a* --resnet_checkpoint=b "
        "--validation_file_pattern=c* --val_json_file=d --eval_batch_size=2 --model_dir=e "
        "--num_epochs=3 --num_examples_per_epoch=10 --eval_samples=5000 --keep_checkpoint_max=32"
    )
    for program in ("train", "evaluate"):
        module = importlib.import_module(f"ssd_resnet34.tfrecord.{program}")
        args = module.parse(words.split(), "Description.")
        assert (args.batch_size, args.eval_batch_size, args.epochs, args.keep) == (4, 2, 3, 32)
        assert args.model_dir == args.output_dir == Path("e")
        assert module.parse(["--learning_rate=0.5"], "Description.").lr == 0.5


def test_help_says_that_old_flags_work(capsys):
    with pytest.raises(SystemExit):
        parse("fcos.train", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Flags of the programs that this one replaces work too" in text
    assert "--work-dir" not in text
