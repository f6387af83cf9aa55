"""`--sync_bn`: several processes have the batch norm of one process with all their images."""

import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.errors import UserError
from common.npu import accumulation, checkpoint, distributed
from common.npu.distributed import Ranks
from common.npu.freezing import FrozenBatchNorm2d, freeze_stages
from common.npu.sync_bn import SyncBatchNorm2d, synchronise_norms
from tests import scripts
from tests.small_models import module, small_recipe
from tests.watch import Watch

BACKWARD = "aten::native_batch_norm_backward"
CHANGES = {"ssd_resnet34": {"backbone": "resnet10"}, "m2det": {"planes": 16}}


def on_two_ranks(function, *arguments):
    """What a function returns on each of two processes with gloo."""
    context = multiprocessing.get_context("spawn")
    port = scripts.free_port()
    queue = context.Queue()
    members = []
    for rank in (0, 1):
        members.append(
            context.Process(target=member, args=(rank, port, queue, function, arguments))
        )
    for process in members:
        process.start()
    results = dict(queue.get(timeout=300) for _ in members)
    for process in members:
        process.join(60)
        assert process.exitcode == 0
    return results[0], results[1]


def member(rank, port, queue, function, arguments):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = Ranks(rank, rank, 2, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    distributed.start(torch.device("cpu"), ranks, timeout_seconds=100)
    queue.put((rank, function(ranks, *arguments)))
    ranks.barrier()
    torch.distributed.destroy_process_group()


def of_a_norm(ranks, sizes, shape, dtype):
    """Outputs, gradients and statistics of one batch norm, and the names of operators that wait."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, momentum=0.3)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    x = (torch.randn(sum(sizes), 6, *shape) * 3 + 1).to(dtype)
    gradient = torch.randn(x.shape).to(dtype)
    if ranks.world_size > 1:
        assert synchronise_norms(norm) == 1
        x = x.split(sizes)[ranks.rank]
        gradient = gradient.split(sizes)[ranks.rank]
    x.requires_grad_()
    with Watch() as watch:
        y = norm(x)
        y.backward(gradient)
    if ranks.world_size > 1:
        [given] = [given for name, *given in watch.calls if name == BACKWARD]
        assert len(given) == 7  # CUDA's kernel refuses a call without the saved statistics
    assert y.dtype == x.grad.dtype == dtype
    tensors = [y.detach(), x.grad, norm.weight.grad, norm.bias.grad]
    tensors += [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    return [tensor.double().numpy() for tensor in tensors]


@pytest.mark.parametrize(
    ("sizes", "shape", "dtype"),
    [
        ((2, 3), (5, 4), torch.float32),
        ((1, 1), (1, 1), torch.float32),  # M2Det's smallest map with one image a process
        ((2, 3), (5, 4), torch.bfloat16),
    ],
)
def test_a_norm_over_two_ranks_is_that_of_all_images_and_waits_for_nothing(sizes, shape, dtype):
    y, x_grad, weight_grad, bias_grad, *statistics = of_a_norm(Ranks(), sizes, shape, dtype)
    first, second = on_two_ranks(of_a_norm, sizes, shape, dtype)
    close = {"rtol": 1e-5, "atol": 1e-5}
    if dtype is torch.bfloat16:
        close = {"rtol": 2**-7, "atol": 2**-7}
    np.testing.assert_allclose(np.concatenate([first[0], second[0]]), y, **close)
    np.testing.assert_allclose(np.concatenate([first[1], second[1]]), x_grad, **close)
    np.testing.assert_allclose(first[2] + second[2], weight_grad, **close)
    np.testing.assert_allclose(first[3] + second[3], bias_grad, **close)
    for of_first, of_second, expected in zip(first[4:], second[4:], statistics, strict=True):
        np.testing.assert_array_equal(of_first, of_second)
        np.testing.assert_allclose(of_first, expected, rtol=1e-5, atol=1e-6)


def photographs(side, count):
    """Real images (N, 3, side, side), float64."""
    images = []
    for path in sorted((scripts.TINY / "train2017").glob("*.jpg"))[:count]:
        pixels = np.asarray(Image.open(path).convert("RGB").resize((side, side)))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1) / 128 - 1)
    return torch.stack(images).double()


def of_a_network(ranks, model):
    """Outputs, running statistics and gradients of a step in float64, parallel as in training."""
    torch.manual_seed(0)
    recipe = replace(small_recipe(model), **CHANGES[model])
    network = module(model, "model").build_model(recipe, 3).double()
    images = photographs(recipe.image_size, 4)
    parallel = network
    if ranks.world_size > 1:
        assert synchronise_norms(network) > 5
        parallel = distributed.parallel(network, None)
        images = images[ranks.rank :: 2]
    parallel.train()
    outputs = parallel(images)
    loss = sum((output * output.detach().cos()).mean() for output in outputs)
    loss.backward()
    gradients = {name: value.grad.numpy() for name, value in network.named_parameters()}
    buffers = {name: value.numpy() for name, value in network.named_buffers()}
    return [output.detach().numpy() for output in outputs], buffers, gradients


@pytest.mark.parametrize("model", ["ssd_resnet34", "m2det"])
def test_two_ranks_have_the_outputs_statistics_and_gradients_of_one_with_all_images(model):
    outputs, buffers, gradients = of_a_network(Ranks(), model)
    of_ranks = on_two_ranks(of_a_network, model)
    for rank, (found_outputs, found_buffers, found_gradients) in enumerate(of_ranks):
        for found, expected in zip(found_outputs, outputs, strict=True):
            np.testing.assert_allclose(found, expected[rank::2], rtol=1e-6, atol=1e-9)
        for name, expected in buffers.items():
            np.testing.assert_allclose(found_buffers[name], expected, rtol=1e-6, err_msg=name)
        for name, expected in gradients.items():
            limit = 1e-6 * np.abs(expected).max()
            np.testing.assert_allclose(
                found_gradients[name], expected, rtol=1e-6, atol=limit, err_msg=name
            )


def test_norms_that_do_not_train_stay_as_they_are():
    network = module("ssd_resnet34", "model").build_model(small_recipe("ssd_resnet34"), 3)
    names = list(network.state_dict())
    freeze_stages(module("ssd_resnet34", "model").backbone_stages(network)[:1])
    assert synchronise_norms(network) > 0
    kinds = {type(layer) for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)}
    assert kinds == {FrozenBatchNorm2d, SyncBatchNorm2d}
    assert list(network.state_dict()) == names
    line = accumulation.description(network, batch_size=8, count=4)
    assert line.endswith("; batch norm sees 2 images of each process at a time")
    fcos = module("fcos", "model").build_model(small_recipe("fcos"), 3)
    fcos.backbone.freeze()
    assert synchronise_norms(fcos) == 0
    assert (
        synchronise_norms(module("ssd_mmdet", "model").build_model(small_recipe("ssd_mmdet"), 3))
        == 0
    )


def launch(model, output, data, *flags, ranks=1):
    """Run a model's train.py to its end; return its log."""
    words = [f"--data={data}", f"--output_dir={output}", "--device=cpu", "--amp=O0", "--kind=perf"]
    words += ["--num_workers=0", "--log_interval=1", "--max_iters=3", "--save_interval=2", *flags]
    scripts.run(f"../{model}/train.py", *words, ranks=ranks, own_process=True)
    return (output / "train_0.log").read_text()


@pytest.mark.slow
@pytest.mark.again
def test_a_run_of_two_processes_is_that_of_one_with_their_batch(tmp_path):
    data = scripts.subset(tmp_path / "coco", train=8, val=2)
    flags = ("--backbone=resnet10", "--threshold=0", "--sync_bn")
    log = launch("ssd_resnet34", tmp_path / "two", data, *flags, "--batch_size=2", ranks=2)
    assert "batch norms see the images of all processes" in log
    log = launch("ssd_resnet34", tmp_path / "one", data, *flags, "--batch_size=4")
    assert "--sync_bn: has no effect on a single process" in log
    expected = scripts.losses(tmp_path / "one")
    for step, losses in scripts.losses(tmp_path / "two").items():
        assert losses == pytest.approx(expected[step], rel=1e-3)
    one = checkpoint.load(tmp_path / "one/iter_2.pt")
    two = checkpoint.load(tmp_path / "two/iter_2.pt")
    assert one["model"].keys() == two["model"].keys()
    for name, value in two["buffers"][0].items():
        assert torch.equal(value, two["buffers"][1][name])
        torch.testing.assert_close(value, one["model"][name], rtol=1e-3, atol=1e-5)
    # A killed run goes on exactly.
    rest = tmp_path / "rest"
    resume = f"--resume={tmp_path}/two/iter_2.pt"
    launch("ssd_resnet34", rest, data, *flags, "--batch_size=2", resume, ranks=2)
    scripts.assert_same_state(tmp_path / "two/iter_3.pt", rest / "iter_3.pt")


@pytest.mark.slow
def test_m2det_trains_on_one_image_a_process(tmp_path):
    data = scripts.subset(tmp_path / "coco", train=4, val=2)
    flags = ("--recipe=quickstart", "--batch_size=1", "--sync_bn")
    with pytest.raises(UserError, match="BN on the 1 x 1 map needs at least 2 images"):
        module("m2det", "train").main(
            [f"--data={data}", f"--output_dir={tmp_path}/one", "--device=cpu", *flags]
        )
    log = launch("m2det", tmp_path / "two", data, *flags, ranks=2)
    assert "batch norms see the images of all processes" in log
    assert len(scripts.losses(tmp_path / "two")) == 3
