"""Quirks of COCO-format files that people export: read right, or refused with the reason."""

import gzip
import json
import struct
import unicodedata

import numpy as np
import pytest
from PIL import Image

from common.coco.evaluation import evaluate
from common.coco.images import ImageReader, read_image
from common.coco.index import Findings, Rule, Severity, read_annotations, read_index
from common.coco.trained import trained_boxes_line
from common.errors import UserError

ORIENTATION = 0x0112
HEIGHT = 30
WIDTH = 40
BOX = (24, 4, 10, 14)  # xywh, pixels of the upright picture


def picture(box=BOX, size=(HEIGHT, WIDTH)) -> Image.Image:
    """A dark picture in which the pixels of a box xywh are bright."""
    pixels = np.zeros((*size, 3), np.uint8)
    x, y, width, height = box
    pixels[y : y + height, x : x + width] = 255
    return Image.fromarray(pixels)


def save(folder, image, name="a.png", orientation=None):
    folder.mkdir(exist_ok=True)
    options = {}
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    image.save(folder / name, **options)


def write(folder, images=None, annotations=None, categories=None, name="a.json"):
    """Write an annotation file of one picture with one box; return it and the image folder."""
    if images is None:
        images = [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}]
    if annotations is None:
        annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": list(BOX)}]
    if categories is None:
        categories = [{"id": 1, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / name).write_text(json.dumps(content))
    (folder / "images").mkdir(exist_ok=True)
    return str(folder / name), str(folder / "images")


def box_iou(pixels, box) -> float:
    """The IoU of the bright pixels with a box xywh."""
    bright = pixels[:, :, 0] > 127
    x, y, width, height = np.round(box).astype(int)
    inside = np.zeros_like(bright)
    inside[y : y + height, x : x + width] = True
    return (bright & inside).sum() / (bright | inside).sum()


# ---- sizes and orientations


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_the_upright_picture_fit_whatever_the_orientation(tmp_path, orientation):
    """The camera stores the picture turned; the annotations are for the upright one."""
    upright = picture()
    turns = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for turn in turns[orientation]:
        stored = stored.transpose(turn)
    save(tmp_path / "images", stored, orientation=orientation)
    index = read_index(*write(tmp_path))
    reader = ImageReader(index, turns_if_both_fit=True)
    assert box_iou(reader.read(0), index.table.box_xywh[0]) == 1
    assert reader.is_turned.tolist() == [orientation != 1]
    keeps = ImageReader(index, turns_if_both_fit=False)
    assert box_iou(keeps.read(0), index.table.box_xywh[0]) == 1 or orientation in (2, 3, 4)


def test_boxes_of_the_stored_pixels_fit_as_well(tmp_path):
    save(tmp_path / "images", picture(), orientation=6)
    index = read_index(*write(tmp_path))
    for turns in (True, False):
        reader = ImageReader(index, turns)
        assert box_iou(reader.read(0), index.table.box_xywh[0]) == 1
        assert not reader.is_turned.any()


@pytest.mark.parametrize("size", [(HEIGHT // 2, WIDTH // 2), (WIDTH, HEIGHT)])
def test_another_size_is_refused_with_both(tmp_path, size):
    save(tmp_path / "images", picture(size=size, box=(1, 1, 3, 3)))
    index = read_index(*write(tmp_path))
    with pytest.raises(UserError) as raised:
        ImageReader(index, True).read(0)
    message = str(raised.value)
    assert f"a.png: is {size[1]} x {size[0]} pixels, 40 x 30 in the annotation file" in message


def test_upright_boxes_with_stored_sizes_are_explained(tmp_path):
    """Label Studio's export of a photograph that its EXIF orientation turns."""
    save(tmp_path / "images", picture(box=(3, 3, 5, 5)), orientation=6)
    low = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 25, 20, 14]}]
    index = read_index(*write(tmp_path, annotations=low))
    for turns in (True, False):
        with pytest.raises(UserError, match=r"Label Studio.*; exchange width and height"):
            ImageReader(index, turns).read(0)


def test_boxes_of_the_stored_pixels_with_the_upright_size_are_explained(tmp_path):
    save(tmp_path / "images", picture(box=(3, 3, 5, 5)), orientation=6)
    right = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [25, 4, 14, 20]}]
    image = {"id": 1, "file_name": "a.png", "height": WIDTH, "width": HEIGHT}
    index = read_index(*write(tmp_path, images=[image], annotations=right))
    for turns in (True, False):
        with pytest.raises(UserError, match=r"for the stored pixels.*; exchange width and height"):
            ImageReader(index, turns).read(0)


def test_a_box_a_little_over_the_edge_is_no_sign_of_another_position(tmp_path):
    save(tmp_path / "images", picture(box=(3, 3, 5, 5)), orientation=6)
    over = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 25, 20, 6.5]}]
    index = read_index(*write(tmp_path, annotations=over))
    assert ImageReader(index, True).read(0).shape == (HEIGHT, WIDTH, 3)


def test_a_tiff_is_turned_by_pillow_itself(tmp_path):
    stored = picture().transpose(Image.Transpose.ROTATE_90)
    save(tmp_path / "images", stored, name="a.tif", orientation=6)
    image = {"id": 1, "file_name": "a.tif", "height": HEIGHT, "width": WIDTH}
    index = read_index(*write(tmp_path, images=[image]))
    assert box_iou(ImageReader(index, True).read(0), index.table.box_xywh[0]) == 1
    as_stored = read_index(*write(tmp_path, images=[{**image, "height": WIDTH, "width": HEIGHT}]))
    with pytest.raises(UserError, match=r"is 40 x 30 pixels, 30 x 40 in the annotation file"):
        ImageReader(as_stored, True).read(0)


# ---- pixels


def test_of_16_bits_the_upper_8_are_kept(tmp_path):
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 50
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        expected = np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        np.testing.assert_array_equal(read_image(tmp_path / name), expected)


def test_pixels_that_8_bits_do_not_hold_are_refused_by_name(tmp_path):
    Image.fromarray(np.ones((3, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif: has pixels of Pillow's mode F"):
        read_image(tmp_path / "float.tif")
    for value in (2**20, 60000, 200):
        Image.fromarray(np.full((3, 4), value, np.int32)).save(tmp_path / "32_bits.tif")
        with pytest.raises(UserError, match=r"32_bits\.tif: has pixels of Pillow's mode I,"):
            read_image(tmp_path / "32_bits.tif")


def test_a_16_bit_pgm_is_read_however_dark(tmp_path):
    header = b"P5 4 3 65535\n"
    (tmp_path / "dark.pgm").write_bytes(header + b"\x02\x00" * 12)
    assert (read_image(tmp_path / "dark.pgm") == 2).all()


@pytest.mark.parametrize(
    "other_entry",
    [
        struct.pack("<HHI4s", 0x011A, 2, 3, b"72"),  # XResolution as a text
        struct.pack("<HHI4s", 0x0128, 2, 3, b"in"),  # ResolutionUnit as a text
        struct.pack("<HHII", 0x0131, 3, 1, 7),  # Software as a number
    ],
)
def test_other_exif_tags_do_not_matter(tmp_path, other_entry):
    orientation = struct.pack("<HHII", ORIENTATION, 3, 1, 6)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + orientation + other_entry + bytes(4)
    stored = picture().transpose(Image.Transpose.ROTATE_90)
    (tmp_path / "images").mkdir()
    stored.save(tmp_path / "images/a.jpg", exif=exif, quality=95)
    image = {"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}
    index = read_index(*write(tmp_path, images=[image]))
    assert box_iou(ImageReader(index, True).read(0), index.table.box_xywh[0]) > 0.9


def test_what_is_there_instead_of_an_image_is_told(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="the image file is empty"):
        read_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(UserError, match="Git LFS's pointer to it; git lfs pull"):
        read_image(tmp_path / "a.jpg")
    (tmp_path / "a.tif").write_bytes(bytes.fromhex("49492a00080000000100000102000100000041000000"))
    with pytest.raises(UserError, match=r"a\.tif: cannot read the image"):
        read_image(tmp_path / "a.tif")


def test_what_pillow_says_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(UserError, match="HEIC only with a plug-in"):
        read_image(tmp_path / "a.heic")
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"exceeds limit.*; make it smaller"):
        read_image(tmp_path / "a.png")


# ---- annotation files


def read(folder, **changes):
    save(folder / "images", picture())
    return read_index(*write(folder, **changes))


def annotation(number=1, **changes):
    return {"id": number, "image_id": 1, "category_id": 1, "bbox": list(BOX)} | changes


def test_area_0_of_a_box_with_a_size_is_as_if_it_were_missing(tmp_path):
    index = read(tmp_path, annotations=[annotation(area=0)])
    assert np.isnan(index.table.area[0])
    assert index.lines() == [
        "note: area 0 of a box with a size, taken as width times height: 1 "
        "(image 1 annotation 1 category 1: area 0)"
    ]
    rows = np.array([[1, *BOX, 0.9, 1]], dtype=np.float64)
    assert evaluate(index.annotation_file, rows).stats["AP"] == pytest.approx(1)


def test_numbers_that_are_texts_are_numbers(tmp_path):
    texts = annotation(image_id="1", category_id="1", bbox=[24, 4, "10.000", "14"], iscrowd="0")
    images = [{"id": "1", "file_name": "a.png", "height": "30", "width": "40"}]
    index = read(tmp_path, images=images, annotations=[texts])
    assert index.table.box_xywh.tolist() == [list(BOX)]
    assert index.image_ids.tolist() == [1]
    assert index.lines() == []


def test_ids_that_are_equal_as_numbers_are_refused(tmp_path):
    image = {"file_name": "a.png", "height": HEIGHT, "width": WIDTH}
    with pytest.raises(UserError, match="image id of several images: 1"):
        read(tmp_path, images=[{**image, "id": 1}, {**image, "id": "1"}])


def test_normalised_boxes_are_refused(tmp_path):
    with pytest.raises(UserError, match="boxes lie between 0 and 1: they are normalised"):
        read(tmp_path, annotations=[annotation(bbox=[0.6, 0.13, 0.25, 0.46])])


@pytest.mark.parametrize("odd", [[-0.001, 0.2, 0.3, 0.5], [0.1, 0.1, 1.6, 0.2]])
def test_normalised_boxes_are_refused_in_spite_of_odd_ones(tmp_path, odd):
    boxes = [annotation(number, bbox=[0.6, 0.2, 0.3, 0.5]) for number in range(20)]
    with pytest.raises(UserError, match="they are normalised"):
        read(tmp_path, annotations=[*boxes, annotation(20, bbox=odd)])


def test_a_few_specks_are_not_called_normalised(tmp_path):
    speck = annotation(2, bbox=[0, 0, 1, 1])
    assert len(read(tmp_path, annotations=[annotation(), speck]).table) == 2


def test_a_repeated_annotation_id_is_a_note(tmp_path):
    index = read(tmp_path, annotations=[annotation(7), annotation(7, bbox=[1, 2, 3, 4])])
    assert len(index.table) == 2
    assert index.lines()[0].startswith("note: annotation id of several annotations, kept: 1 (")


@pytest.mark.parametrize("changes", [{"id": "8d5e-1f"}, {"id": None}, {"id": -1}, {"id": 1.5}])
def test_an_annotation_id_is_not_needed(tmp_path, changes):
    index = read(tmp_path, annotations=[annotation() | changes])
    assert index.table.id.tolist() == [-1]
    (line,) = index.lines()
    assert line.startswith(
        "note: annotation id that is no whole number from 0 to 2**53, not needed: 1 ("
    )
    rows = np.array([[1, *BOX, 0.9, 1]], dtype=np.float64)
    assert evaluate(index.annotation_file, rows).stats["AP"] == pytest.approx(1)


def test_null_is_as_if_the_key_were_missing(tmp_path):
    index = read(tmp_path, annotations=[annotation(area=None, iscrowd=None, ignore=None)])
    assert np.isnan(index.table.area[0])
    assert not index.table.crowd[0]
    assert not index.table.ignore[0]
    assert index.lines() == []


def test_of_many_notes_only_some_are_described(tmp_path):
    boxes = [annotation(number, area=0) for number in range(1000)]
    path, _ = write(tmp_path, annotations=boxes)
    report = read_annotations(path).broken_rules()
    ((count, examples),) = report.values()
    assert count == 1000
    assert len(examples) < 100
    ((_, examples),) = read_annotations(path, examples=None).broken_rules().values()
    assert len(examples) == 1000


def test_a_box_of_infinities_without_area_is_skipped(tmp_path):
    infinite = annotation(2, bbox=[float("inf"), float("inf"), float("-inf"), 3], area=0)
    index = read(tmp_path, annotations=[annotation(1), infinite])
    assert index.table.id.tolist() == [1]
    with pytest.raises(UserError, match="not 4 finite numbers"):
        read(tmp_path, annotations=[{**infinite, "area": 3}])


ROOT = {"id": 0, "name": "animals", "supercategory": "none"}
DOG = {"id": 1, "name": "dog", "supercategory": "animals"}
CATS = [{"id": 2, "name": "cat"}, {"id": 3, "name": "cat"}]


@pytest.mark.parametrize(
    ("categories", "names", "note"),
    [
        (
            [ROOT, DOG],
            ("dog",),
            "others lie under, left out: 1 (entry 0 with id 0: name 'animals')",
        ),
        ([{**ROOT, "name": "dog"}, DOG], ("dog",), "name of another, left out: 1 (entry 0"),
        ([DOG, *CATS], ("dog", "cat"), "name of another, left out: 1 (entry 2"),
        ([DOG, DOG], ("dog",), "category listed again, taken once: 1 (entry 1"),
        ([DOG, {"id": 2, "name": "cat"}], ("dog", "cat"), ""),
        ([{**DOG, "supercategory": "dog"}], ("dog",), ""),  # as COCO's person
    ],
)
def test_categories_that_are_no_classes_are_left_out(tmp_path, categories, names, note):
    index = read(tmp_path, categories=categories)
    assert index.class_names == names
    assert note in "".join(index.lines())
    assert index.table.label.tolist() == [names.index("dog")]


def test_of_unused_namesakes_the_root_is_left_out(tmp_path):
    root = {"id": 0, "name": "dog", "supercategory": "none"}
    dog = {"id": 1, "name": "dog", "supercategory": "dog"}
    cat = {"id": 2, "name": "cat", "supercategory": "dog"}
    index = read(tmp_path, annotations=[annotation(category_id=2)], categories=[root, dog, cat])
    assert index.category_ids == (1, 2)


def test_a_root_that_the_checkpoint_knows_stays(tmp_path):
    save(tmp_path / "images", picture())
    files = write(tmp_path, categories=[ROOT, DOG])
    index = read_index(*files, classes=("animals", "dog"))
    assert index.category_ids == (0, 1)
    assert index.table.label.tolist() == [1]


def test_a_root_of_the_classs_name_is_left_out_for_a_checkpoint_too(tmp_path):
    save(tmp_path / "images", picture())
    files = write(tmp_path, categories=[{**ROOT, "name": "dog"}, DOG])
    index = read_index(*files, classes=("dog",))
    assert index.category_ids == (1,)


def test_detections_of_a_root_that_val_does_not_use_are_evaluated(tmp_path):
    path, _ = write(tmp_path, categories=[ROOT, DOG])
    rows = np.array([[1, *BOX, 0.9, 1], [1, *BOX, 0.8, 0]], dtype=np.float64)
    assert evaluate(path, rows, classes=("animals", "dog")).stats["AP"] == pytest.approx(1)


def test_a_supercategory_that_is_no_text_is_passed_over(tmp_path):
    index = read(tmp_path, categories=[{**DOG, "supercategory": ["animals"]}])
    assert index.class_names == ("dog",)


def test_a_text_with_an_underscore_is_no_number(tmp_path):
    with pytest.raises(UserError, match="image width or height that is no number above 0"):
        read(tmp_path, images=[{"id": 1, "file_name": "a.png", "height": "3_0", "width": 40}])


def test_images_with_texts_as_ids_are_numbered(tmp_path):
    """As COCO Camera Traps has them."""
    save(tmp_path / "images", picture())
    image = {"file_name": "a.png", "height": HEIGHT, "width": WIDTH}
    images = [{**image, "id": "IMG_2"}, {**image, "id": "IMG_1"}]
    annotations = [annotation(image_id="IMG_1"), annotation(2, image_id="IMG_3")]
    index = read_index(*write(tmp_path, images=images, annotations=annotations))
    assert index.image_ids.tolist() == [1, 2]
    assert index.table.image_id.tolist() == [2]
    assert "image id that is a text: the images are numbered" in index.lines()[0]
    assert "annotation of an unknown image, not trained on: 1" in index.lines()[1]
    rows = np.array([[2, *BOX, 0.9, 1]], dtype=np.float64)
    assert evaluate(index.annotation_file, rows).stats["AP"] == pytest.approx(1)


def test_an_image_that_is_listed_again_is_taken_once(tmp_path):
    image = {"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}
    index = read(tmp_path, images=[image, dict(image)])
    assert len(index) == 1
    assert index.lines()[0].startswith("note: image listed again, taken once: 1 (")


def test_an_area_below_0_is_as_if_it_were_missing(tmp_path):
    index = read(tmp_path, annotations=[annotation(area=-250)])
    assert np.isnan(index.table.area[0])
    assert index.lines()[0].startswith("note: area below 0, taken as width times height: 1 (")


def test_a_damaged_gzip_file_is_told(tmp_path):
    packed = bytearray(gzip.compress(b"{}" * 1000))
    packed[15:25] = bytes(10)
    (tmp_path / "a.json.gz").write_bytes(packed)
    with pytest.raises(UserError, match=r"a\.json\.gz: .*instances_\*\.json"):
        read_annotations(str(tmp_path / "a.json.gz"))


def test_placeholder_boxes_are_not_called_normalised(tmp_path):
    index = read(tmp_path, annotations=[annotation(bbox=[0, 0, 0, 0])])
    assert "zero-size box, not trained on" in index.lines()[0]


def test_an_unused_category_that_only_val_has_is_a_note(tmp_path):
    save(tmp_path / "images", picture())
    files = write(tmp_path, categories=[{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}])
    index = read_index(*files, classes=("dog",))
    assert index.class_names == ("dog",)
    assert "note: category not among the 1 classes trained on, no box uses it" in index.lines()[0]


def test_the_order_of_a_checkpoint_is_taken_for_the_same_names(tmp_path):
    save(tmp_path / "images", picture())
    files = write(tmp_path, categories=[{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}])
    assert read_index(*files, usual_order=("cat", "dog")).class_names == ("cat", "dog")
    assert read_index(*files, usual_order=("cat", "cow")).class_names == ("dog", "cat")


def test_lvis_has_an_address_instead_of_a_file_name(tmp_path):
    image = {"id": 1, "height": HEIGHT, "width": WIDTH, "coco_url": "http://x/val2017/a.png"}
    index = read(tmp_path, images=[image])
    assert index.path(0).endswith("images/a.png")
    assert "note: image without file_name, the end of its coco_url is taken" in index.lines()[0]


@pytest.mark.parametrize(
    ("on_disk", "in_file"),
    [
        ("a.png", "A.PNG"),
        (unicodedata.normalize("NFD", "é.png"), unicodedata.normalize("NFC", "é.png")),
    ],
)
def test_a_file_of_another_spelling_is_found_and_said(tmp_path, on_disk, in_file):
    save(tmp_path / "images", picture(), name=on_disk)
    image = {"id": 1, "file_name": in_file, "height": HEIGHT, "width": WIDTH}
    index = read_index(*write(tmp_path, images=[image]))
    assert read_image(index.path(0)).shape == (HEIGHT, WIDTH, 3)
    assert "note: image file found under another spelling: 1 (" in index.lines()[0]


def test_a_backslash_separates_folders(tmp_path):
    (tmp_path / "images").mkdir()
    save(tmp_path / "images" / "sub", picture())
    image = {"id": 1, "file_name": "sub\\a.png", "height": HEIGHT, "width": WIDTH}
    index = read_index(*write(tmp_path, images=[image]))
    assert index.path(0).endswith("images/sub/a.png")


def test_folders_of_another_spelling_are_found(tmp_path):
    (tmp_path / "images").mkdir()
    save(tmp_path / "images" / "Sub", picture())
    image = {"id": 1, "file_name": "sub/A.png", "height": HEIGHT, "width": WIDTH}
    index = read_index(*write(tmp_path, images=[image]))
    assert index.path(0).endswith("images/Sub/a.png")


def test_a_file_is_not_found_for_two_entries(tmp_path):
    save(tmp_path / "images", picture())
    images = []
    for number, name in enumerate(("A.PNG", "a.png")):
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
    with pytest.raises(UserError, match=r"image file missing: 1 \(.*/images/A\.PNG\)"):
        read_index(*write(tmp_path, images=images))


def test_an_image_without_a_name_is_said(tmp_path):
    with pytest.raises(UserError, match=r"image without file_name: 1 \(entry 0 with id 1"):
        read(tmp_path, images=[{"id": 1, "height": HEIGHT, "width": WIDTH}])


def test_two_spellings_that_are_there_are_not_guessed_at(tmp_path):
    for name in ("a.PNG", "A.png"):
        save(tmp_path / "images", picture(), name=name)
    with pytest.raises(UserError, match="image file missing: 1"):
        read_index(*write(tmp_path))


def test_gzip_and_gbk_are_read(tmp_path):
    save(tmp_path / "images", picture())
    path, images = write(tmp_path, categories=[{"id": 1, "name": "狗"}])
    content = json.loads((tmp_path / "a.json").read_text())
    text = json.dumps(content, ensure_ascii=False)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(text.encode()))
    assert read_index(str(tmp_path / "a.json.gz"), images).class_names == ("狗",)
    (tmp_path / "a.json").write_bytes(text.encode("gbk"))
    index = read_index(path, images)
    assert index.class_names == ("狗",)
    assert "note: file is not UTF-8 and was read as GBK" in index.lines()[0]
    (tmp_path / "a.json").write_bytes(text.replace("a.png", "狗.png").encode("gbk"))
    with pytest.raises(UserError, match=r"was read as GBK: 1 .*image file missing: 1"):
        read_index(path, images)


def test_another_encoding_is_told(tmp_path):
    (tmp_path / "a.json").write_bytes('{"name": "café"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"not a text in UTF-8 .* none in GBK; save it in UTF-8"):
        read_annotations(str(tmp_path / "a.json"))


def test_the_position_of_a_json_error_is_that_of_the_file(tmp_path):
    polygon = '"segmentation": [[1, 2, 3, 4, 5, 6]],\n'
    (tmp_path / "a.json").write_text('{"annotations": [{' + polygon + '"id": 1 "x": 2}]}')
    with pytest.raises(UserError, match="line 2 column 9"):
        read_annotations(str(tmp_path / "a.json"))


# ---- what is trained on


def test_boxes_that_are_trained_on_are_counted_with_the_reasons(tmp_path):
    boxes = [annotation(k) for k in range(4)]
    boxes += [annotation(4, iscrowd=1), annotation(5, bbox=[1, 2, 0, 3])]
    index = read(tmp_path, annotations=boxes)
    crowd = {"iscrowd": index.table.crowd}
    assert trained_boxes_line(index, crowd) == (
        "4 of 6 boxes are trained on; left out: 1 zero-size box, 1 iscrowd"
    )
    two_files = {}
    for file in ("a.json", "b.json"):
        two_files[Rule("skipped", Severity.SKIP, file)] = Findings.of(["a"])
    index.report.update(two_files)
    assert "2 skipped" in trained_boxes_line(index, crowd)
    for rule in two_files:
        del index.report[rule]
    with pytest.raises(UserError, match=r"0 of 6 boxes .*; there is nothing to train on"):
        trained_boxes_line(index, {"all": np.ones(5, bool)})
