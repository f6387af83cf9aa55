"""The demo script on real photos, and the class names it finds in a checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.coco.images import read_image
from common.coco.index import COCO_CLASSES
from common.coco.video import Video, VideoWriter, read_videos
from common.errors import UserError
from common.npu import checkpoint
from ssd_resnet34 import demo
from ssd_resnet34.config import Recipe
from ssd_resnet34.data import prepare_image
from ssd_resnet34.model import build_model
from ssd_resnet34.postprocess import detect
from ssd_resnet34.weights import class_names_of, num_classes_of

PHOTOS = sorted(Path(__file__).parents[1].glob("data/tiny_coco/val2017/*.jpg"))[:3]
RECIPE = Recipe(backbone="resnet18")
NAMES = ("cat", "dog", "émeu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(RECIPE, len(NAMES)).eval()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "iter_3.pt"
    kept = {"model": model.state_dict(), "classes": list(NAMES)}
    checkpoint.save(path, {**kept, "recipe": dataclasses.asdict(RECIPE)})
    return path


def flags(weights: Path, show_dir: Path, *more: str) -> list[str]:
    own = [f"--checkpoint={weights}", f"--show_dir={show_dir}"]
    return [*own, "--device=cpu", "--batch_size=2", *more]


def test_draws_what_detect_finds_and_goes_on_after_a_broken_file(weights, model, tmp_path, capsys):
    folder = tmp_path / "frames"
    folder.mkdir()
    expected = {}
    for photo in PHOTOS:
        shutil.copy(photo, folder)
        image = read_image(str(photo))
        with torch.no_grad():
            outputs = model(prepare_image(image, RECIPE).unsqueeze(0))
        (expected[photo.name],) = detect(outputs, torch.tensor([image.shape[:2]]), RECIPE)
    broken = folder / "000000000001.jpg"  # the first of its batch
    broken.write_bytes(PHOTOS[0].read_bytes()[:2000])
    # In the widest gap about the middle, where rounding moves no score across.
    scores = torch.cat([found.scores for found in expected.values()]).sort().values
    middle = scores[len(scores) // 4 : -len(scores) // 4]
    gap = middle.diff().argmax()
    min_score = middle[gap : gap + 2].mean().item()

    status = demo.main([str(folder), *flags(weights, tmp_path / "out", f"--min_score={min_score}")])

    assert status == 1
    out, err = capsys.readouterr()
    (skipped,) = [line for line in err.splitlines() if "skipped" in line]
    assert skipped.startswith(f"skipped: {broken}: cannot read the image (image file is truncated")
    assert "3 of 4 images" in out
    results = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert list(results) == list(expected)
    for name, found in expected.items():
        image = read_image(str(folder / name))
        height, width = image.shape[:2]
        keep = found.scores >= min_score
        boxes = found.boxes[keep].numpy().clip(0, (width, height, width, height))
        np.testing.assert_allclose(results[name]["boxes"], boxes, atol=0.02)
        np.testing.assert_allclose(results[name]["scores"], found.scores[keep], atol=1e-4)
        assert results[name]["classes"] == [NAMES[label] for label in found.labels[keep]]
        picture = np.asarray(Image.open(tmp_path / "out" / name), int)
        assert picture.shape == image.shape
        assert (np.abs(picture - image) > 60).any(), "nothing drawn"


def test_without_images_draws_the_sample_with_the_newest_checkpoint(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = f"--output_dir={weights.parent}"
    assert demo.main([run, "--device=cpu", "--score-thr=0.9"]) == 0
    pictures = sorted((tmp_path / "demo_output").glob("*.jpg"))
    results = json.loads((tmp_path / "demo_output/results.json").read_text())
    assert [picture.name for picture in pictures] == list(results)
    assert len(pictures) == 12


def test_old_flag_names(tmp_path):
    own = ["--img", str(PHOTOS[0]), "--show-dir", str(tmp_path), "--score-thr", "0.99"]
    args = demo.parse(own)
    assert (args.inputs, args.show_dir, args.min_score) == (
        [str(PHOTOS[0])],
        tmp_path,
        0.99,
    )


def test_upright_as_the_camera_meant_it(weights, tmp_path):
    turned = Image.open(PHOTOS[0])
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    demo.main([str(tmp_path / "turned.jpg"), *flags(weights, tmp_path / "out")])
    assert Image.open(tmp_path / "out/turned.jpg").size == turned.size[::-1]


def test_coco_names_are_those_of_the_annotation_file():
    file = PHOTOS[0].parents[1] / "annotations/instances_val2017.json"
    categories = json.loads(file.read_text())["categories"]
    by_id = sorted(categories, key=lambda category: category["id"])
    assert tuple(category["name"] for category in by_id) == COCO_CLASSES


def test_classes_of_a_checkpoint(weights):
    ours = checkpoint.load(weights)
    assert num_classes_of(ours) == len(NAMES)
    assert class_names_of(ours) == NAMES

    def port(classes: int) -> dict:
        return {"model": {"module.mbox.0.weight": torch.zeros(4 * (classes + 1 + 4), 256, 3, 3)}}

    assert num_classes_of(port(80)) == 80
    assert class_names_of(port(80)) == COCO_CLASSES
    assert class_names_of(port(2)) == ("class_0", "class_1")


def test_a_file_without_detection_heads_is_named():
    with pytest.raises(UserError) as error:
        num_classes_of({"conv1.weight": torch.zeros(64, 3, 7, 7), "path": "resnet34.pth"})
    message = str(error.value)
    assert message.startswith("resnet34.pth: ")
    assert "no detection heads" in message
    assert "conv1.weight" in message
    assert message.endswith("give a trained detector")


def test_a_video_becomes_a_video_of_its_detections(weights, model, tmp_path, capsys):
    image = np.asarray(Image.open(PHOTOS[0]).convert("RGB").resize((160, 120)))
    writer = VideoWriter(tmp_path / "clip.avi", rate=5, width=160, height=120)
    for _ in range(3):
        writer.write(image)
    writer.close()
    out = tmp_path / "out"
    inputs = [str(tmp_path / "clip.avi"), str(PHOTOS[1])]
    assert demo.main([*flags(weights, out, "--coco", "--min_score=0.2"), *inputs]) == 0
    assert "4 of 4 images drawn" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    frames = [f"clip.mp4/{number:06}" for number in (1, 2, 3)]
    assert list(results) == [PHOTOS[1].name, *frames]
    assert results[frames[0]]["boxes"]
    ((_, drawn),) = read_videos([Video(str(out / "clip.mp4"), "clip")], batch_size=4)
    assert len(drawn) == 3
    assert np.abs(drawn[0].astype(int) - image).max() > 60  # boxes are drawn in it
    ids = {one["image_id"] for one in json.loads((out / "results.bbox.json").read_text())}
    assert ids == {1, 2, 3, int(PHOTOS[1].stem)}
