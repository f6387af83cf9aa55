"""The programs and scripts of the TFRecord recipe on simulated NPUs, with the CPU's results."""

import json
import shutil
import subprocess

import pytest

from ssd_resnet34.tfrecord.coco_to_tfrecord import convert
from tests import scripts
from tests.scripts import assert_same_state, losses
from tests.simulated_npu.programs import assert_same_detections, on_cpu

pytestmark = pytest.mark.npu_sim
TFRECORD = scripts.MODEL / "tfrecord"
SMALL = ("--recipe=small", "--batch_size=2", "--num_workers=0", "--amp=O0", "--log_interval=1",
         "--max_iters=4", "--save_interval=2", "--eval_batch_size=2")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Records of 8 training and 4 validation images, in two files each, and their JSON."""
    folder = scripts.subset(tmp_path_factory.mktemp("data") / "coco", train=8, val=4)
    for split in ("train2017", "val2017"):
        annotations = folder / f"annotations/instances_{split}.json"
        convert(folder / split, annotations, folder / f"records/{split}", 2)
    return folder


@pytest.fixture(scope="module")
def flags(data):
    """What to evaluate on."""
    return (
        f"--validation_file_pattern={data}/records/val2017*",
        f"--val_json_file={data}/annotations/instances_val2017.json",
    )


def launch(script, data, folder, **variables):
    """Run a script in a folder; the output folder of rank 0.

    `variables` are further ones of its environment.
    """
    folder.mkdir(exist_ok=True)
    paths = {"path_to_tfrecord": data / "records", "path_to_annotations": data / "annotations"}
    variables |= {name: str(path) for name, path in paths.items()}
    done = subprocess.run(
        ["bash", scripts.MODEL / script, *SMALL, "--resnet_checkpoint="],
        cwd=folder,
        env=scripts.environment() | variables,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    output = folder / "training/D0/result_npu"
    assert "device: npu:0 Ascend910B3" in (output / "train_0.log").read_text()
    return output


def test_two_ranks_of_a_rank_table_equal_two_over_gloo_and_resume(data, flags, tmp_path):
    table = json.loads((scripts.MODEL / "npu_config/8p.json").read_text())
    group = table["group_list"][0]
    group["instance_list"] = group["instance_list"][:2]
    group.update(device_num="2", instance_count="2")
    file = tmp_path / "2p.json"
    file.write_text(json.dumps(table))
    on_npu = launch("run_npu_8p.sh", data, tmp_path / "npu", RANK_TABLE_FILE=str(file))
    gloo = tmp_path / "gloo"
    training = f"--training_file_pattern={data}/records/train2017*"
    on_cpu(TFRECORD / "train.py", *SMALL, training, *flags, f"--model_dir={gloo}", ranks=2)
    assert list(losses(on_npu)) == [1, 2, 3, 4]
    assert losses(on_npu) == losses(gloo)
    assert_same_state(on_npu / "iter_4.pt", gloo / "iter_4.pt")
    assert_same_detections(on_npu / "eval", gloo / "eval")

    resumed = tmp_path / "resumed/training/D0/result_npu"
    resumed.mkdir(parents=True)
    shutil.copy(on_npu / "iter_2.pt", resumed)
    launch("run_npu_8p.sh", data, tmp_path / "resumed", RANK_TABLE_FILE=str(file))
    assert list(losses(resumed)) == [3, 4]
    assert_same_state(on_npu / "iter_4.pt", resumed / "iter_4.pt")
    assert_same_detections(on_npu / "eval", resumed / "eval")


def test_the_script_of_one_device_and_an_evaluation_on_a_cpu(data, flags, tmp_path):
    output = launch("run_npu_1p.sh", data, tmp_path)
    assert list(losses(output)) == [1, 2, 3, 4]
    on_npu = tmp_path / "npu"
    shutil.move(output / "eval", on_npu)
    on_cpu(TFRECORD / "evaluate.py", *SMALL, *flags, f"--model_dir={output}")
    assert_same_detections(on_npu, output / "eval")
