"""`--look` and `--replay`: the very batches of a run, through the programs of all recipes."""

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.fps import replay
from common.npu.distributed import Ranks
from ssd_resnet34.tfrecord.coco_to_tfrecord import convert
from tests import poisoned, scripts
from tests.small_models import ALL, TFRECORD, module
from tests.test_own_data import (
    HEIGHT,
    ORIENTATION,
    SMALL,
    WIDTH,
    entries,
    iou_of_white,
    picture,
    save,
    write,
)

SHORT = ("--device=cpu", "--amp=O0", "--batch_size=2", "--seed=3", "--log_interval=1")


def once(first, others):
    """The models of a test of which all but the first are for `--all`."""
    return [*first, *[pytest.param(model, marks=pytest.mark.again) for model in others]]


RESUMED = once(["ssd_resnet34", "fcos"], ["ssd_mmdet", "m2det", TFRECORD])
TWO_RANKS = once(["ssd_resnet34"], ["ssd_mmdet", "m2det", "fcos"])
POISONED = once(["ssd_mmdet", "m2det"], ["ssd_resnet34", "fcos", TFRECORD])
EXACT_TERMS = ("loss_cls", "loss_bbox", "loss")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten images for training and two for validation, as COCO files and as records."""
    folder = scripts.subset(tmp_path_factory.mktemp("data") / "coco", train=10, val=2)
    for split in ("train", "val"):
        annotations = folder / f"annotations/instances_{split}2017.json"
        convert(folder / f"{split}2017", annotations, folder / f"records/{split}2017", 2)
    return folder


def flags_of(model, data, *words):
    """The flags of a short run of a small network on the images of a folder."""
    if model == TFRECORD:
        records = f"--training_file_pattern={data}/records/train2017*"
        small = ("--recipe=small", "--resnet_checkpoint=", "--mode=train", records)
    else:
        small = (*SMALL[model], f"--data={data}", "--num_workers=0", "--kind=perf")
    return [*small, *SHORT, *map(str, words)]


def train(model, data, *words):
    module(model, "train").main(flags_of(model, data, *words))


@pytest.fixture
def drawn(monkeypatch):
    """The samples that were drawn, and all batches with what `augment` made of them."""
    samples = []
    draw_pages = replay.draw_pages

    def note_samples(drawn_samples, *arguments):
        samples.extend(drawn_samples)
        return draw_pages(samples, *arguments)

    monkeypatch.setattr(replay, "draw_pages", note_samples)
    return samples


@pytest.fixture
def inputs(monkeypatch):
    """`inputs(model)`: a list of (batch, images, boxes, recipe) of every call of `augment`."""

    def note(model):
        calls = []
        program = module(model, "train")
        augment = program.augment

        def note_call(batch, recipe):
            images, boxes = augment(batch, recipe)
            calls.append((batch, images, boxes, recipe))
            return images, boxes

        monkeypatch.setattr(program, "augment", note_call)
        return calls

    return note


def network_input(model, image, batch, recipe):
    """The network input (3, H, W) of an image (H, W, 3) uint8 as the model normalises it."""
    image = torch.from_numpy(image).unsqueeze(0)
    data = importlib.import_module("ssd_resnet34.data") if model == TFRECORD else None
    data = data or module(model, "data")
    if model == "fcos":
        return data.normalise(image, batch.resized_sizes, recipe)[0]
    return data.normalise(image, recipe)[0]


def targets(model, criterion, images, boxes, batch, recipe):
    """What the loss learns: positive anchors (N, P), their classes (N, P), and the anchors."""
    if model == "fcos":
        anchors = module(model, "anchors")
        sizes = anchors.map_sizes(recipe, *images.shape[2:])
        positive, label, _ = criterion.targets(sizes, boxes, batch.labels, batch.valid)
        return positive, label, anchors.make_anchors(recipe, sizes)
    positive, _, channels = criterion.targets(boxes, batch.labels, batch.valid)
    if model == "ssd_mmdet":
        return positive, channels, criterion.anchors
    return positive, channels - 1, criterion.anchors_xyxy * recipe.image_size


@pytest.mark.slow
@pytest.mark.parametrize("model", ALL)
def test_look_shows_what_training_gets(model, data, tmp_path, drawn, inputs, capsys):
    output = tmp_path / "run"
    calls = inputs(model)
    train(model, data, f"--output_dir={output}", "--max_iters=2")
    trained = list(calls)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert len(trained) == 2
    calls.clear()
    capsys.readouterr()

    train(model, data, f"--output_dir={output}", "--look=3")
    assert len(drawn) == 3
    position = 0
    for batch, images, boxes, recipe in trained:
        criterion = module(model, "loss").DetectionLoss(recipe, num_classes=80)
        positive, label, anchors = targets(model, criterion, images, boxes, batch, recipe)
        for i in range(2):
            if position == len(drawn):
                break
            sample = drawn[position]
            position += 1
            assert sample.image_id == batch.image_ids[i]
            one = type(batch)(*[field[i : i + 1] for field in batch])
            level = network_input(model, np.full_like(sample.image, 1), one, recipe)
            level -= network_input(model, np.full_like(sample.image, 0), one, recipe)
            lowest = network_input(model, np.full_like(sample.image, 0), one, recipe)
            highest = network_input(model, np.full_like(sample.image, 255), one, recipe)
            expected = images[i].clamp(lowest, highest)
            actual = network_input(model, sample.image, one, recipe)
            assert ((actual - expected).abs() <= level).all()
            labels_of_matches = []
            matches = []
            for box_label, of_box in zip(sample.labels, sample.matches, strict=True):
                labels_of_matches += [box_label] * len(of_box)
                matches += of_box.tolist()
            assert len(matches) > 0
            learned_labels = label[i][positive[i]].tolist()
            learned_anchors = anchors[positive[i]].tolist()
            of_matches = sorted(zip(labels_of_matches, matches, strict=True))
            assert of_matches == sorted(zip(learned_labels, learned_anchors, strict=True))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    page = tmp_path / "run_look" / "epoch_1_1.jpg"
    printed = capsys.readouterr().out
    assert f"written: {page}\n" in printed
    assert f"image {drawn[0].image_id}; " in printed
    with Image.open(page) as opened:
        assert opened.width > 1000


@pytest.mark.parametrize("model", ALL)
def test_look_at_another_epoch_has_its_order(model, data, tmp_path, drawn):
    """Of more images than an epoch has, those of the epoch."""
    words = ["--look=100", "--epoch=2", f"--output_dir={tmp_path}/run"]
    if model == TFRECORD:
        words.append("--num_examples_per_epoch=10")
    train(model, data, *words)
    ids = [sample.image_id for sample in drawn]
    # Each orientation fills whole batches in these two.
    assert len(ids) == (12 if model in ("ssd_mmdet", "fcos") else 10)
    assert len(set(ids)) == 10
    assert (tmp_path / "run_look" / "epoch_2_1.jpg").exists()
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        UserError, match=r"^--epoch 1000: a run of this recipe has \d+ epochs; give"
    ):
        train(model, data, "--look=1", "--epoch=1000", f"--output_dir={tmp_path}/run")


def test_look_needs_no_annotations_to_evaluate_against(data, tmp_path, drawn):
    content = json.loads((data / "annotations/instances_val2017.json").read_text())
    path = tmp_path / "val.json"
    path.write_text(json.dumps({**content, "annotations": []}))
    files = (f"--val_annotations={path}", f"--val_images={data}/val2017")
    words = ("--look=1", "--kind=acc", "--patience=2", f"--output_dir={tmp_path}/run")
    train("ssd_mmdet", data, *files, *words)
    assert len(drawn) == 1


# ---- the pictures of people


def look_at_picture(model, folder, drawn, *words):
    """Draw the training sample of a folder of one image, without augmentation."""
    if model == TFRECORD:
        annotations = folder / "annotations/instances_train2017.json"
        convert(folder / "train2017", annotations, folder / "records/train2017", 1)
    words = ("--look=1", "--no-augment", f"--output_dir={folder}/run", *words)
    train(model, folder, *words)
    sample = drawn[0]
    brightness = torch.from_numpy(sample.image).float().mean(dim=2)
    return brightness, torch.from_numpy(sample.boxes_xyxy)


@pytest.mark.parametrize("orientation", [None, 6, 3])
@pytest.mark.parametrize("model", ALL)
def test_the_box_is_on_its_object_in_the_picture(model, orientation, tmp_path, drawn):
    save(tmp_path / "train2017/1.jpg", orientation)
    write(tmp_path, *entries(1))
    brightness, boxes = look_at_picture(model, tmp_path, drawn)
    # The originals of these recipes ignore the orientation, and a half turn keeps the size.
    is_missed = model in ("ssd_resnet34", TFRECORD) and orientation == 3
    assert (iou_of_white(brightness, boxes[0]) > 0.9) != is_missed


@pytest.mark.parametrize("model", ["ssd_mmdet", "ssd_resnet34"])
def test_a_square_picture_is_turned_as_in_training(model, tmp_path, drawn):
    """One recipe turns it and the other does not, as their originals."""
    square = picture().crop((0, 0, HEIGHT, HEIGHT)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    (tmp_path / "train2017").mkdir()
    square.save(tmp_path / "train2017/1.jpg", exif=exif, quality=95)
    images, annotations = entries(1, bbox=[180, 30, 20, 110])
    images[0]["width"] = HEIGHT
    write(tmp_path, images, annotations)
    brightness, boxes = look_at_picture(model, tmp_path, drawn)
    assert (iou_of_white(brightness, boxes[0]) > 0.8) == (model == "ssd_mmdet")


@pytest.mark.parametrize("model", ALL)
def test_a_picture_of_another_size_than_declared_is_refused(model, tmp_path, drawn):
    images, annotations = entries(1)
    write(tmp_path, images, annotations)
    if model == TFRECORD:
        look_at_picture(model, tmp_path, drawn)  # the converter has declared the actual size
        return
    images[0]["width"] += 10
    write(tmp_path, images, annotations)
    message = rf"1\.jpg: is {WIDTH} x {HEIGHT} pixels, {WIDTH + 10} x {HEIGHT} in the annot"
    with pytest.raises(UserError, match=message):
        look_at_picture(model, tmp_path, drawn)
    assert not (tmp_path / "run_look").exists()


# ---- a step again


def batch_losses(printed):
    """The loss terms of each rank's batch, as `--replay` prints them."""
    losses = []
    for line in re.findall(r"losses of its batch: (.+)", printed):
        terms = [term.split() for term in line.split(", ")]
        losses.append({name: float(value) for name, value in terms})
    return losses


def logged_losses(output, step):
    return next(line for line in scripts.train_lines(output) if line["step"] == step)


def ids_of_order(model, data, step, world_size):
    """The image ids of a step, from 1, rank after rank, by the order of training."""
    program = module(model, "data")
    calls = []
    for rank in range(world_size):
        records, recipe = read_training_set(model, data)
        recipe = replace(recipe, batch_size=2)
        ranks = Ranks(rank=rank, world_size=world_size)
        order = program.TrainingOrder(records, recipe, ranks, 3, step - 1, step)
        calls += [int(records.image_ids[record]) for _, _, record in next(iter(order))]
    return calls


def read_training_set(model, data):
    config = module(model, "config")
    if model == TFRECORD:
        index = module(model, "index").read_index(f"{data}/records/train2017*", "--pattern")
        return module(model, "data").training_records(index), config.RECIPES["small"]
    index = importlib.import_module("common.coco.index").read_index(
        f"{data}/annotations/instances_train2017.json", f"{data}/train2017"
    )
    recipe = next(iter(config.RECIPES.values()))
    if model == "ssd_mmdet":
        recipe = replace(recipe, repeat=1)
    return index, recipe


@pytest.mark.slow
@pytest.mark.parametrize("model", RESUMED)
def test_a_step_of_a_resumed_run_is_replayed(model, data, tmp_path, drawn, capsys):
    output = tmp_path / "run"
    keep = (f"--output_dir={output}", "--save_interval=1", "--keep=9")
    train(model, data, *keep, "--max_iters=2", "--epochs=2")
    train(model, data, *keep, "--max_iters=4", "--epochs=2", "--resume=auto")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    capsys.readouterr()
    train(model, data, *keep, "--max_iters=4", "--epochs=2", "--replay=4")
    printed = capsys.readouterr().out
    assert f"weights: {output}/iter_3.pt, those of the step\n" in printed
    ids = ids_of_order(model, data, step=4, world_size=1)
    assert [sample.image_id for sample in drawn] == ids
    [losses] = batch_losses(printed)
    logged = logged_losses(output, 4)
    for name in EXACT_TERMS:
        assert losses[name] == pytest.approx(logged[name], rel=2e-3)
    for sample in drawn:
        assert set(sample.losses) >= set(EXACT_TERMS)
    assert "the losses of every image are finite under these weights" in printed
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before

    # The mean over images is that of the batch where each is divided by its own number.
    if model in ("ssd_resnet34", TFRECORD):
        for name in EXACT_TERMS:
            mean = np.mean([sample.losses[name] for sample in drawn])
            assert mean == pytest.approx(losses[name], rel=2e-3)

    for step in (4, 3, 2):
        (output / f"iter_{step}.pt").unlink(missing_ok=True)
    train(model, data, *keep, "--max_iters=4", "--epochs=2", "--replay=4")
    printed = capsys.readouterr().out
    assert f"weights: {output}/iter_1.pt, 2 steps before those of the step\n" in printed
    (output / "iter_1.pt").unlink()
    train(model, data, *keep, "--max_iters=4", "--epochs=2", "--replay=1")
    printed = capsys.readouterr().out
    assert f"weights: no checkpoint in {output} is of an earlier step: those that" in printed
    [losses] = batch_losses(printed)
    assert losses["loss"] == pytest.approx(logged_losses(output, 1)["loss"], rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("model", TWO_RANKS)
def test_a_step_of_two_ranks_is_replayed_in_one_process(
    model, data, tmp_path, drawn, capsys, monkeypatch
):
    monkeypatch.setattr(scripts, "MODEL", scripts.ROOT / model)
    output = tmp_path / "run"
    words = (f"--output_dir={output}", "--save_interval=1", "--max_iters=2", "--device_id=2")
    scripts.run("train.py", *flags_of(model, data, *words), ranks=2)
    header = scripts.json_lines(output)[0]
    assert header["ranks"] == 2
    assert header["first_step"] == 1
    train(model, data, *words, "--replay=2", "--device_id=0")
    printed = capsys.readouterr().out
    assert "step 2 (epoch 1) of the run, ranks: 2" in printed
    assert [sample.image_id for sample in drawn] == ids_of_order(model, data, 2, world_size=2)
    of_ranks = batch_losses(printed)
    assert len(of_ranks) == 2
    if model != "fcos":  # whose divisor is the mean over ranks
        mean = np.mean([losses["loss"] for losses in of_ranks])
        assert mean == pytest.approx(logged_losses(output, 2)["loss"], rel=2e-3)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run of two steps."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train("ssd_resnet34", data, f"--output_dir={output}", "--max_iters=2")
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--replay=1000"], r"^--replay 1000: the run has 450 steps; give one of them"),
        (["--replay=1", "--seed=4"], r"was another one: seed \(3 before, 4 now\); give the flags"),
        (["--replay=1", "--batch_size=1"], r"another one: batch_size \(2 before, 1 now\)"),
        (["--replay=1", "--no-augment"], r"another one: augment \(True before, False now\)"),
        (["--replay=1", "--output_dir=none"], "none has neither a log nor a checkpoint before"),
    ],
)
def test_a_step_that_cannot_be_drawn_again_is_refused(words, message, finished, data):
    with pytest.raises(UserError, match=message):
        train("ssd_resnet34", data, f"--output_dir={finished}", *words)
    assert not finished.with_name("run_look").exists()


# ---- the message on a loss that is not finite


@pytest.mark.slow
@pytest.mark.parametrize("model", POISONED)
def test_the_command_of_the_message_shows_the_image_that_spoils_the_loss(model, data, tmp_path):
    [bad, other] = ids_of_order(model, data, step=2, world_size=1)
    program = Path(poisoned.__file__)
    output = tmp_path / "the run"  # the command quotes it, and goes to the folder
    environment = {
        **scripts.environment(),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        poisoned.MODEL: model,
        poisoned.IMAGE: str(bad),
    }
    words = flags_of(model, data, "--output_dir=the run", "--save_interval=1", "--epochs=1")
    done = subprocess.run(
        [sys.executable, program, *words],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert "is not finite, first at iteration 2 (epoch 1) on rank 0, learning rate" in message
    assert f"images [{bad}, {other}]" in message
    assert "last good checkpoint: the run/iter_1.pt" in message
    log = next(output.glob("train_*.log")).read_text()
    [command] = re.findall(r"to draw the images of this step: (.+)", log)
    assert message.endswith(command)
    assert command.endswith(" --replay=2")

    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "weights: the run/iter_1.pt, those of the step" in lines
    [line_of_bad] = [line for line in lines if line.startswith(f"image {bad}; ")]
    assert "loss nan not finite" in line_of_bad
    [line_of_other] = [line for line in lines if line.startswith(f"image {other}; ")]
    if "not finite" in line_of_other:  # by the statistics of the batch
        assert lines[-1].endswith(f"an image alone, these are not finite: [{bad}]")
    else:
        assert f"losses that are not finite: images [{bad}]" in lines
    assert (tmp_path / "the run_look" / "step_2_1.jpg").exists()


@pytest.mark.slow
@pytest.mark.again
def test_the_command_of_a_launch_scripts_message_runs_in_one_process(data, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts, "MODEL", scripts.ROOT / "ssd_resnet34")
    where = (f"--data_path={data}", f"--output_dir={tmp_path}/run", "--save_interval=1")
    small = ("--backbone=resnet10", "--batch_size=2", "--amp=O0", "--kind=perf", "--num_workers=0")
    blown_up = ("--lr=1e30", "--lr_step=0", "--log_interval=1", "--seed=3", "--threshold=0")
    words = (*where, *small, *blown_up, "--device=cpu", "--nproc_per_node=2")
    done = scripts.run("train_full_8p.sh", *words, status=1)
    [message] = set(re.findall(r"[a-z_]+ is not finite, first at iteration .+", done.stderr))
    step = int(re.search(r"iteration (\d+)", message)[1])
    command = message.partition("to draw the images of this step: ")[2]
    assert command.endswith(f" --replay={step} --device_id=0")
    done = subprocess.run(
        ["bash", "-c", command],
        env=scripts.environment(),
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert f"step {step} (epoch 1) of the run, ranks: 2" in done.stdout
    ids = ids_of_order("ssd_resnet34", data, step, world_size=2)
    assert re.findall(r"^image (\d+); ", done.stdout, re.MULTILINE) == list(map(str, ids))


@pytest.mark.slow
@pytest.mark.again
def test_the_command_of_a_rank_tables_run_goes_to_the_folder_of_the_main_rank(data, tmp_path):
    folder = scripts.ROOT / "ssd_resnet34"
    table = json.loads((folder / "npu_config/8p.json").read_text())
    group = table["group_list"][0]
    group["instance_list"] = group["instance_list"][:2]
    group.update(device_num="2", instance_count="2")
    (tmp_path / "2p.json").write_text(json.dumps(table))
    environment = {**scripts.environment(), "path_to_tfrecord": str(data / "records")}
    small = ("--recipe=small", "--resnet_checkpoint=", "--train_batch_size=2", "--mode=train")
    blown_up = ("--lr=1e35", "--save_interval=1", *SHORT[:2], *SHORT[3:])
    done = subprocess.run(
        ["bash", folder / "run_npu_8p.sh", *small, *blown_up],
        cwd=tmp_path,
        env={**environment, "RANK_TABLE_FILE": "2p.json"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    log = (tmp_path / "training/D1/train_1.log").read_text()
    command = re.findall(r"to draw the images of this step: (.+)", log)[-1]
    assert command.startswith(f"cd {tmp_path}/training/D0 && ")
    step = int(re.search(r"--replay=(\d+) --device_id=0$", command)[1])
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert f"step {step} (epoch 1) of the run, ranks: 2" in done.stdout
    ids = ids_of_order(TFRECORD, data, step, world_size=2)
    assert re.findall(r"^image (\d+); ", done.stdout, re.MULTILINE) == list(map(str, ids))
    assert (tmp_path / f"training/D0/result_npu_look/step_{step}_1.jpg").exists()
