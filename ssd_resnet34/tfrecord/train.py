"""Training of the TFRecord recipe: the first recipe's loop, this one's parts, the port's lines."""

import time
from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from common.coco.evaluation import Evaluation
from common.fps.window import LossWindow
from ssd_resnet34 import train
from ssd_resnet34.tfrecord.augment import augment
from ssd_resnet34.tfrecord.data import Batch
from ssd_resnet34.tfrecord.evaluate import announce, assess, detect_all
from ssd_resnet34.tfrecord.loss import DetectionLoss, decay_term
from ssd_resnet34.tfrecord.model import build_model
from ssd_resnet34.tfrecord.weights import load_weights


class Training(train.Training):
    """As the first recipe's; `train_set` and `val_set` are RecordIndex, `weights` paths.

    An epoch is what the schedule counts as one; the end of the records has no meaning here.
    """

    remedy = "start anew in another --model_dir, from its weights with --resnet_checkpoint"
    augment = staticmethod(augment)

    def __init__(self, args, *parts, **named):
        super().__init__(args, *parts, **named)
        self.log_interval = max(1, min(args.log_interval, self.end // 2))
        self.printed: dict[int, LossWindow] = {}  # by iteration, the loss that its line prints
        self.clock: tuple[int, float] | None = None  # iteration and time of the last line

    def lengths(self) -> tuple[int, int]:
        world_size = self.ranks.world_size
        return self.recipe.iters_per_epoch(world_size), self.recipe.total_steps(world_size)

    def build(
        self, weights: Sequence[str], resumed: dict | None
    ) -> tuple[nn.Module, DetectionLoss]:
        model = build_model(self.recipe, len(self.classes))
        for path in weights:
            self.log.info(f"{path}: {load_weights(model, path)}")
        if not (weights or resumed):
            self.log.info("weights: random; --resnet_checkpoint gives the backbone's", "WARNING")
        return model, DetectionLoss(self.recipe, len(self.classes))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        losses = super().losses(batch)
        if self.log_due(self.iteration + 1):
            decay = decay_term(self.model.parameters(), self.recipe.weight_decay)
            window = LossWindow(("loss",), self.device)
            window.add(self.iteration, {"loss": losses["loss"] + decay}, batch.image_ids)
            self.printed[self.iteration + 1] = window.fetch()
        return losses

    def log_due(self, iteration: int) -> bool:
        return iteration % self.log_interval == 0

    def report(self) -> None:
        """The run's log line, and on every rank the port's with its own loss of the last step."""
        due = self.pending
        super().report()
        if due is None:
            return
        iteration, now = due[0], time.perf_counter()
        printed = self.printed.pop(iteration)
        announce(f"global_step...{iteration}")
        if self.clock is not None:
            begun, since = self.clock
            images = (iteration - begun) * self.recipe.batch_size * self.ranks.world_size
            lr, loss = self.lr(iteration - 1), printed.means()["loss"]
            # As the port: six digits, and the shortest text of a float32.
            fps = f"FPS: {images / (now - since):g}"
            announce(f"{fps}, learning rate: {np.float32(lr)!s}, loss: {np.float32(loss)!s}")
        self.clock = iteration, now

    def figures(self) -> Evaluation | None:
        shared = (self.device, self.ranks, self.log.num_workers)
        rows = detect_all(self.model, self.recipe, self.val_set, *shared)
        return None if rows is None else assess(rows, len(self.val_set), self.args, self.log.info)
