"""The quirks of people's own data, through the programs of all four models."""

import importlib
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.coco.detections import Detections
from common.coco.index import COCO_CLASSES
from common.coco.trained import trained_boxes_line
from common.errors import UserError
from common.npu import checkpoint
from tests import scripts

MODELS = ("ssd_resnet34", "ssd_mmdet", "m2det", "fcos")
SMALL = {
    "ssd_resnet34": ("--backbone=resnet10", "--threshold=0"),
    "ssd_mmdet": ("--width=0.0625", "--repeat=1"),
    "m2det": ("--recipe=quickstart",),
    "fcos": ("--recipe=quickstart", "--tower_convs=1", "--img_scale=96,160"),
}
SHORT = ("--device=cpu", "--amp=O0", "--num_workers=0", "--batch_size=2", "--max_iters=2")
ORIENTATION = 0x0112
HEIGHT = 200
WIDTH = 300
BOX = (180, 30, 90, 110)  # xywh, pixels of the upright picture


def picture(box=BOX):
    """A black picture with a white box."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    x, y, width, height = box
    pixels[y : y + height, x : x + width] = 255
    return Image.fromarray(pixels)


def save(path, orientation=None):
    """Save the picture; with an EXIF orientation of 6 or 3 as a camera stores it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture()
    exif = Image.Exif()
    if orientation == 6:
        image = image.transpose(Image.Transpose.ROTATE_90)
    elif orientation == 3:
        image = image.transpose(Image.Transpose.ROTATE_180)
    if orientation is not None:
        exif[ORIENTATION] = orientation
    image.save(path, exif=exif, quality=95)


def entries(count, **changes):
    """Images 1 to `count`, and a box for each."""
    images = []
    annotations = []
    for number in range(1, count + 1):
        images.append(
            {"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH}
        )
        box = {"id": number, "image_id": number, "category_id": 1, "bbox": list(BOX)}
        annotations.append({**box, "area": 9000, "iscrowd": 0, **changes})
    return images, annotations


def write(folder, images, annotations, categories=None):
    """Write the same set as train and val in COCO's layout; return the folder as text."""
    content = {
        "images": images,
        "annotations": annotations,
        "categories": categories or [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
    }
    for split in ("train", "val"):
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        text = json.dumps(content)
        (folder / f"annotations/instances_{split}2017.json").write_text(text)
        for image in images:
            path = folder / f"{split}2017" / image["file_name"]
            if not path.exists():
                save(path)
    return str(folder)


def module(model, name):
    return importlib.import_module(f"{model}.{name}")


def train(model, data, output, *flags):
    module(model, "train").main(
        [*SMALL[model], *SHORT, f"--data={data}", f"--output_dir={output}", *flags]
    )


def small_recipe(model):
    """The recipe of the tests' flags, without augmentation."""
    config = module(model, "config")
    if model in ("m2det", "fcos"):
        return replace(config.RECIPES["quickstart"], augment=False)
    return replace(config.RECIPES["1p"], augment=False)


def read(model, data):
    """The training set of a folder, as train.py reads it."""
    layout = importlib.import_module("common.coco.layout")
    index = importlib.import_module("common.coco.index")
    files = layout.find_coco(data, "train")
    return index.read_index(files.annotation_file, files.image_dir)


def training_input(model, index):
    """The first sample of a training set: brightness (H, W) and its boxes xyxy in pixels of it."""
    data = module(model, "data")
    dataset = data.TrainingSet(index, small_recipe(model), seed=0)
    sample = dataset[0, 0, 0]
    if model == "fcos":
        return sample.image.float().mean(dim=2), torch.from_numpy(sample.boxes)
    boxes = sample.boxes[sample.valid]
    images = sample.images.float()
    if model == "m2det":
        images = images.permute(2, 0, 1)  # from column, channel, row
    brightness = images.mean(dim=2)
    if model in ("m2det", "ssd_resnet34"):
        boxes = boxes * brightness.shape[0]
    return brightness, boxes


def iou_of_white(brightness, box):
    white = brightness > 127
    left, top, right, bottom = box.round().int().tolist()
    inside = torch.zeros_like(white)
    inside[top:bottom, left:right] = True
    return ((white & inside).sum() / (white | inside).sum()).item()


@pytest.mark.parametrize("orientation", [None, 6, 3])
@pytest.mark.parametrize("model", MODELS)
def test_the_box_is_on_its_object_in_the_networks_input(model, orientation, tmp_path):
    save(tmp_path / "train2017/1.jpg", orientation)
    index = read(model, write(tmp_path, *entries(1)))
    brightness, boxes = training_input(model, index)
    # The original of this recipe ignores the orientation, and a half turn keeps the size.
    is_missed = model == "ssd_resnet34" and orientation == 3
    assert (iou_of_white(brightness, boxes[0]) > 0.9) != is_missed


@pytest.mark.parametrize("model", MODELS)
def test_evaluation_sees_the_upright_picture_too(model, tmp_path):
    save(tmp_path / "train2017/1.jpg", orientation=6)
    index = read(model, write(tmp_path, *entries(1)))
    data = module(model, "data")
    recipe = small_recipe(model)
    if model == "fcos":
        recipe = data.evaluation_recipe(recipe, torch.device("cpu"))
    images = next(iter(data.build_loader(recipe, index, training=False)))[0][0].float()
    if images.shape[1] == 3:
        images = images.permute(2, 0, 1)
    white = (images.mean(dim=2) > 127).nonzero().float()
    center = white.mean(dim=0)
    # Right of the middle and above it, as in the upright picture; the canvas of fcos is padded.
    assert center[1] > images.shape[1] / 2
    assert center[0] < images.shape[0] / 2


@pytest.mark.parametrize("model", MODELS)
def test_another_size_ends_a_run_as_bad_data_does(model, tmp_path):
    images, annotations = entries(4)
    images[2]["width"] += 10
    data = write(tmp_path / "data", images, annotations)
    with pytest.raises(UserError, match=r"3\.jpg: is 300 x 200 pixels, 310 x 200 in the annot"):
        train(model, data, tmp_path / "out", "--kind=perf", "--epochs=3", "--max_iters=6")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_set_of_quirks_trains_and_is_told(model, tmp_path):
    """Turned photographs, 16 bits, areas of 0, a crowd, texts as ids, a root without boxes."""
    images, annotations = entries(6, area=0)
    for number in (1, 2):
        for split in ("train", "val"):
            save(tmp_path / f"data/{split}2017/{number}.jpg", orientation=6)
    images[2]["file_name"] = "3.png"
    for split in ("train", "val"):
        grey = np.asarray(picture().convert("L"), np.uint16) * 256
        Image.fromarray(grey).save(tmp_path / f"data/{split}2017/3.png")
    annotations[3]["image_id"] = "4"
    annotations.append({**annotations[4], "id": 4, "iscrowd": 1})  # the id comes again
    categories = [
        {"id": 0, "name": "animals", "supercategory": "none"},
        {"id": 1, "name": "dog", "supercategory": "animals"},
    ]
    data = write(tmp_path / "data", images, annotations, categories)
    output = tmp_path / "out"
    train(model, data, output, "--max_iters=4", "--epochs=1", "--save_interval=1")
    log = (output / "train_0.log").read_text()
    trained_crowd = model in ("ssd_resnet34", "m2det")
    boxes = "7 of 7 boxes" if trained_crowd else "6 of 7 boxes"
    assert f"{boxes} are trained on" in log
    assert ("left out: 1 iscrowd" in log) != trained_crowd
    assert "data: 2 of 6 images were turned by their EXIF orientation" in log
    assert "area 0 of a box with a size, taken as width times height: 7 (" in log
    assert "annotation id of several annotations, kept: 1 (" in log
    assert "category that no box uses and others lie under, left out: 1 (" in log
    assert "6 images, 1 classes" in log
    assert checkpoint.load(output / "best.pt")["classes"] == ["dog"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bbox": [0.6, 0.15, 0.3, 0.55]}, "they are normalised"),
        ({"image_id": 99}, "0 of 2 boxes are trained on; left out: 2 annotation of"),
        ({"bbox": [5, 5, 0, 3]}, "0 of 2 boxes are trained on; left out: 2 zero-size box"),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_nothing_to_train_on_is_an_error_that_says_why(model, changes, words, tmp_path):
    data = write(tmp_path / "data", *entries(2, **changes))
    with pytest.raises(UserError, match=words):
        train(model, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", MODELS)
def test_a_training_file_without_annotations_is_an_error(model, tmp_path):
    images, _ = entries(2)
    data = write(tmp_path / "data", images, [])
    with pytest.raises(UserError, match="0 of 0 boxes are trained on; there is nothing to train"):
        train(model, data, tmp_path / "out")


@pytest.mark.parametrize("model", ["ssd_mmdet", "fcos"])
def test_crowds_alone_are_nothing_to_train_on(model, tmp_path):
    data = write(tmp_path / "data", *entries(2, iscrowd=1))
    with pytest.raises(UserError, match="0 of 2 boxes are trained on; left out: 2 iscrowd"):
        train(model, data, tmp_path / "out")


def is_in_a_sample(model, index, recipe):
    """Whether any of 60 draws of the only image has its box."""
    dataset = module(model, "data").TrainingSet(index, recipe, seed=0)
    for position in range(60):
        sample = dataset[0, position, 0]
        if model == "fcos":
            if len(sample.boxes):
                return True
        elif sample.valid.any():
            return True
    return False


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("width", [0.5, 1, 1.5, 2, 40])
@pytest.mark.parametrize("model", MODELS)
def test_a_box_counts_as_trained_on_if_samples_have_it(model, width, augment, tmp_path):
    index = read(model, write(tmp_path, *entries(1, bbox=[50, 40, width, 40])))
    recipe = replace(small_recipe(model), augment=augment)
    data = module(model, "data")
    if model == "m2det":
        untrained = data.untrained_boxes(index, recipe)
    else:
        untrained = data.untrained_boxes(index)
    is_left_out = any(mask.any() for mask in untrained.values())
    assert is_in_a_sample(model, index, recipe) != is_left_out
    if is_left_out:
        with pytest.raises(UserError, match=r"0 of 1 boxes are trained on; left out: 1 with a si"):
            trained_boxes_line(index, untrained)


def test_a_thin_box_in_a_small_image_is_trained_on(tmp_path):
    """There m2det's smallest box is less than a pixel."""
    images = [{"id": 1, "file_name": "1.png", "height": 40, "width": 60}]
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [30, 10, 1.8, 20]}]
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        Image.new("RGB", (60, 40)).save(tmp_path / f"{split}2017/1.png")
    index = read("m2det", write(tmp_path, images, boxes))
    recipe = replace(small_recipe("m2det"), augment=True)
    data = module("m2det", "data")
    assert is_in_a_sample("m2det", index, recipe)
    line = trained_boxes_line(index, data.untrained_boxes(index, recipe))
    assert line == "1 of 1 boxes are trained on"


def test_check_data_knows_the_boxes_that_are_too_thin(tmp_path, capsys):
    data = write(tmp_path, *entries(1, bbox=[50, 40, 1, 40]))
    assert module("m2det", "train").main([*SMALL["m2det"], f"--data={data}", "--check_data"]) == 1
    assert "0 of 1 boxes are trained on; left out: 1 with a side below 2 pixels" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("model", ["ssd_mmdet", "fcos"])
def test_small_images_are_named(model, tmp_path, capsys):
    images, annotations = entries(3)
    tiny = {"id": 9, "file_name": "tiny.png", "height": 20, "width": 40}
    box = {**annotations[0], "id": 9, "image_id": 9, "bbox": [1, 2, 10, 10]}
    for split in ("train", "val"):
        path = tmp_path / f"data/{split}2017/tiny.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (40, 20)).save(path)
    data = write(tmp_path / "data", [*images, tiny], [*annotations, box])
    train(model, data, tmp_path / "out", "--kind=perf", "--no-save", "--max_iters=1")
    log = (tmp_path / "out" / "train_0.log").read_text()
    assert "1 images are too small to be trained on: " in log
    assert "3 of 4 boxes are trained on; left out: 1 in an image with a side below 32" in log


@pytest.mark.parametrize("model", MODELS)
def test_a_val_set_without_annotations_is_refused_before_the_first_step(model, tmp_path):
    images, annotations = entries(2)
    data = write(tmp_path / "data", images, annotations)
    val = tmp_path / "data/annotations/instances_val2017.json"
    content = json.loads(val.read_text())
    val.write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(UserError, match=r"val2017\.json: no annotation to evaluate against"):
        train(model, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", MODELS)
def test_check_data_counts(model, tmp_path, capsys):
    save(tmp_path / "data/train2017/1.jpg", orientation=6)
    data = write(tmp_path / "data", *entries(2))
    program = module(model, "train")
    command = [*SMALL[model], f"--data={data}", f"--output_dir={tmp_path}/run", "--check_data"]
    assert not program.main(command)
    printed = capsys.readouterr().out
    assert "1 of 2 images were turned by their EXIF orientation" in printed
    assert "2 of 2 boxes are trained on" in printed
    assert "boxes an image: 1 to 1, median 1" in printed
    *_, last = printed.splitlines()
    assert last.startswith("advice: ")
    assert (tmp_path / "run_check_data.png").is_file()


# ---- classes


def detect_perfectly(started, sizes, recipe):
    """The box of `picture` in images of these (height, width), as the first class of COCO."""
    x, y, width, height = BOX
    detections = []
    for image_height, image_width in sizes.tolist():
        scale = torch.tensor([image_width / WIDTH, image_height / HEIGHT]).repeat(2)
        box = torch.tensor([[x, y, x + width, y + height]]) * scale
        detections.append(Detections(box, scores=torch.ones(1), labels=torch.zeros(1)))
    return detections


@pytest.mark.parametrize("model", MODELS)
def test_perfect_detections_have_an_ap_of_1(model, tmp_path, monkeypatch, capsys):
    """Turned photographs, areas of 0, and weights without names for COCO's classes by alphabet."""
    images, annotations = entries(3, area=0)
    categories = [{"id": k, "name": name} for k, name in enumerate(sorted(COCO_CLASSES))]
    for annotation in annotations:
        annotation["category_id"] = sorted(COCO_CLASSES).index(COCO_CLASSES[0])
    for number in (1, 2):
        save(tmp_path / f"data/val2017/{number}.jpg", orientation=6)
    data = write(tmp_path / "data", images, annotations, categories)
    network, recipe = build(model, len(COCO_CLASSES), seed=0)
    weights = {"model": network.state_dict(), "recipe": asdict(recipe)}
    torch.save(weights, tmp_path / "nameless.pt")
    evaluate = module(model, "evaluate")
    monkeypatch.setattr(evaluate, "finish_detect", detect_perfectly)
    flags = (f"--checkpoint={tmp_path}/nameless.pt", f"--output_dir={tmp_path}/out")
    evaluate.main([f"--data={data}", *flags, "--device=cpu", "--num_workers=0"])
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["AP"] == pytest.approx(1)
    assert "data: 2 of 3 images were turned by their EXIF orientation" in capsys.readouterr().out


def build(model, num_classes, seed):
    torch.manual_seed(seed)
    recipe = small_recipe(model)
    if model == "ssd_resnet34":
        recipe = replace(recipe, backbone="resnet10")
    if model == "ssd_mmdet":
        recipe = replace(recipe, width=0.0625)
    return module(model, "model").build_model(recipe, num_classes).eval(), recipe


def class_logits(model, network, recipe):
    """The raw logits of a random image, (..., classes) without background."""
    size = 128 if model == "fcos" else recipe.image_size
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = network(torch.randn(1, 3, size, size))
    if model == "fcos":
        return outputs.logits[0].permute(0, 2, 3, 1)
    logits = outputs[1]
    if model == "ssd_resnet34":
        logits = logits.transpose(1, 2)
    if model == "ssd_mmdet":
        return logits[..., :-1]  # background comes last
    return logits[..., 1:]


@pytest.mark.parametrize("model", MODELS)
def test_classes_of_the_same_name_keep_their_weights(model):
    trained, recipe = build(model, 3, seed=1)
    state = {
        "model": trained.state_dict(),
        "classes": ["dog", "cat", "cow"],
        "recipe": {},
        "path": "a.pt",
    }
    network, _ = build(model, 2, seed=2)
    report = module(model, "weights").load_weights(network, state, ("cow", "hat"))
    assert "1 classes of the same name keep their weights: cow" in str(report)
    assert "1 initialised anew: hat" in str(report)
    assert not report.reinitialised
    before = class_logits(model, trained, recipe)
    after = class_logits(model, network, recipe)
    assert before.shape[-1] == 3
    torch.testing.assert_close(after[..., 0], before[..., 2])
    assert not torch.allclose(after[..., 1], before[..., 1])


@pytest.mark.parametrize("model", MODELS)
def test_more_names_than_the_head_has_classes_are_an_error(model):
    trained, _ = build(model, 3, seed=1)
    names = [f"name {number}" for number in range(80)]
    state = {"model": trained.state_dict(), "classes": names, "recipe": {}, "path": "a.pt"}
    network, _ = build(model, 2, seed=2)
    with pytest.raises(
        UserError, match=r"^a\.pt names 80 classes, its heads have 3 classes; correct"
    ):
        module(model, "weights").load_weights(network, state, ("cow", "hat"))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_finetuning_keeps_the_order_of_the_checkpoints_classes(model, tmp_path):
    """The same categories in another order: the labels follow the checkpoint, not the file."""
    images, annotations = entries(4)
    dog, cat = {"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}
    first = write(tmp_path / "first", images, annotations, [dog, cat])
    second = write(tmp_path / "second", images, annotations, [cat, dog])
    train(model, first, tmp_path / "one", "--max_iters=1", "--kind=perf", "--save_interval=1")
    start = f"--checkpoint={tmp_path}/one/iter_1.pt"
    train(model, second, tmp_path / "two", "--max_iters=1", "--kind=perf", start, "--no-save")
    log = (tmp_path / "two" / "train_0.log").read_text()
    assert "re-initialised" not in log
    assert "initialised anew" not in log
    train(model, second, tmp_path / "three", "--max_iters=1", "--kind=perf", start)
    assert checkpoint.load(tmp_path / "three/iter_1.pt")["classes"] == ["dog", "cat"]


def test_evaluate_says_what_it_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(scripts, "MODEL", scripts.ROOT / "ssd_resnet34")
    images, annotations = entries(3)
    annotations.append({**annotations[0], "id": 9, "bbox": [1, 2, 0, 3]})
    data = write(tmp_path / "data", images, annotations)
    train("ssd_resnet34", data, tmp_path / "out", "--kind=perf", "--save_interval=2")
    done = scripts.run("evaluate.py", f"--data={data}", f"--output_dir={tmp_path}/out", *SHORT[:1])
    assert "note: zero-size box, not trained on: 1 (image 1 annotation 9" in done.stdout
    val = tmp_path / "data/annotations/instances_val2017.json"
    content = json.loads(val.read_text())
    val.write_text(json.dumps({**content, "annotations": [annotations[-1]]}))
    flags = (f"--data={data}", f"--output_dir={tmp_path}/out", *SHORT[:1])
    done = scripts.run("evaluate.py", *flags, status=1)
    assert "no annotation to evaluate against; note: zero-size box" in done.stderr
    scripts.run("evaluate.py", *flags, "--format_only")
