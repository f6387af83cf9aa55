"""What the original does, re-implemented from its description: the peer of the measurements.

It is not the original's code, and no part of the product. It has the same algorithm and the same
division of work: the loader's worker does everything on PIL images and encodes dense targets image
by image; the loss is `F.cross_entropy` over all anchors, with ranks from two sorts; NMS is plain
Python, class by class.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from common.coco.index import CocoIndex
from ssd_resnet34.anchors import make_anchors, to_cxcywh, to_xyxy
from ssd_resnet34.config import Recipe

CLAIMED_IOU = 2.0  # in place of an IoU: above all of them


def pairwise_iou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """Return the IoU (n, m) of boxes (n, 4) and (m, 4), by way of (n, m, 4) copies of both."""
    shape = (len(boxes_xyxy), len(others_xyxy), 4)
    boxes = boxes_xyxy.unsqueeze(1).expand(shape).contiguous()
    others = others_xyxy.unsqueeze(0).expand(shape).contiguous()
    top_left = torch.max(boxes[..., :2], others[..., :2])
    bottom_right = torch.min(boxes[..., 2:], others[..., 2:])
    sides = (bottom_right - top_left).clamp(min=0)
    overlap = sides[..., 0] * sides[..., 1]
    return overlap / (areas(boxes) + areas(others) - overlap)


def areas(boxes_xyxy: Tensor) -> Tensor:
    width = boxes_xyxy[..., 2] - boxes_xyxy[..., 0]
    height = boxes_xyxy[..., 3] - boxes_xyxy[..., 1]
    return width * height


class Encoder:
    """Turns the ground truth of one image into dense targets, one for each of P anchors."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.anchors = make_anchors(recipe)
        self.anchors_xyxy = to_xyxy(self.anchors)

    def __call__(self, boxes_xyxy: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return matched boxes (P, 4) cxcywh and labels (P,) of boxes (n, 4) and labels (n,).

        Labels count from 1; 0 is background.
        """
        iou = pairwise_iou(boxes_xyxy, self.anchors_xyxy)
        best_iou, matched = iou.max(dim=0)
        for box, anchor in enumerate(iou.argmax(dim=1)):
            best_iou[anchor] = CLAIMED_IOU
            matched[anchor] = box
        positive = best_iou > self.recipe.match_iou
        dense_labels = torch.zeros(len(self.anchors), dtype=torch.int64)
        dense_labels[positive] = labels[matched[positive]]
        dense_boxes = self.anchors_xyxy.clone()
        dense_boxes[positive] = boxes_xyxy[matched[positive]]
        return to_cxcywh(dense_boxes), dense_labels


class ReferenceSet:
    """`dataset[record]`: image (3, 300, 300) float32, dense boxes (P, 4) and labels (P,)."""

    def __init__(
        self,
        records: CocoIndex,
        ground_truth: Callable[[int], tuple[np.ndarray, np.ndarray]],
        recipe: Recipe,
    ):
        """`ground_truth(record)` returns boxes (n, 4) normalised xyxy and 0-based labels (n,)."""
        self.records = records
        self.ground_truth = ground_truth
        self.recipe = recipe
        self.encoder = Encoder(recipe)
        self.transform = v2.Compose(
            [
                v2.Resize((recipe.image_size, recipe.image_size)),
                v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(recipe.mean, recipe.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, record: int) -> tuple[Tensor, Tensor, Tensor]:
        image = Image.open(self.records.path(record)).convert("RGB")
        gt_boxes, gt_labels = self.ground_truth(record)
        boxes = torch.from_numpy(gt_boxes)
        labels = torch.from_numpy(gt_labels) + 1
        image, boxes, labels = self.crop(image, boxes, labels)
        if random.random() < self.recipe.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left, top, right, bottom = boxes.unbind(1)
            boxes = torch.stack([1 - right, top, 1 - left, bottom], dim=1)
        dense_boxes, dense_labels = self.encoder(boxes, labels)
        return self.transform(image), dense_boxes, dense_labels

    def crop(
        self, image: Image.Image, boxes_xyxy: Tensor, labels: Tensor
    ) -> tuple[Image.Image, Tensor, Tensor]:
        """Cut image, boxes (n, 4) and labels (n,) to a random window, or leave them as they are."""
        min_ratio, max_ratio = self.recipe.crop_ratio
        while True:
            min_iou = random.choice(self.recipe.crop_ious)
            if min_iou is None:
                return image, boxes_xyxy, labels
            width = random.uniform(*self.recipe.crop_scale)
            height = random.uniform(*self.recipe.crop_scale)
            if not min_ratio <= width / height <= max_ratio:
                continue
            left = random.uniform(0, 1 - width)
            top = random.uniform(0, 1 - height)
            window = torch.tensor([left, top, left + width, top + height])
            if not (pairwise_iou(boxes_xyxy, window.unsqueeze(0)) > min_iou).all():
                continue
            center = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
            inside = ((center > window[:2]) & (center < window[2:])).all(dim=1)
            if inside.any():
                break

        top_left = window[:2].repeat(2)
        bottom_right = window[2:].repeat(2)
        boxes = torch.max(torch.min(boxes_xyxy[inside], bottom_right), top_left)
        boxes = (boxes - top_left) / torch.tensor([width, height, width, height])
        scale = torch.tensor([image.width, image.height, image.width, image.height])
        pixels = (window * scale).int().tolist()
        return image.crop(pixels), boxes, labels[inside]


class ReferenceLoss:
    """The loss of raw outputs against dense targets."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        anchors = make_anchors(recipe).T.unsqueeze(0)  # (1, 4, P) cxcywh
        self.anchor_centers = anchors[:, :2]
        self.anchor_sizes = anchors[:, 2:]

    def __call__(
        self, outputs: tuple[Tensor, Tensor], boxes_cxcywh: Tensor, labels: Tensor
    ) -> Tensor:
        """Return the loss of deltas (N, 4, P) and logits (N, C, P).

        Boxes are (N, P, 4), labels (N, P); label 0 is background.
        """
        deltas, logits = outputs
        positive = labels > 0
        num_positives = positive.sum(dim=1)
        smooth_l1 = F.smooth_l1_loss(deltas, self.encode(boxes_cxcywh), reduction="none")
        box_loss = (positive.float() * smooth_l1.sum(dim=1)).sum(dim=1)

        cross_entropy = F.cross_entropy(logits, labels, reduction="none")
        negative_loss = cross_entropy.detach().clone()
        negative_loss[positive] = 0
        rank = negative_loss.sort(dim=1, descending=True).indices.sort(dim=1).indices
        num_negatives = (self.recipe.negative_ratio * num_positives).clamp(max=labels.shape[1])
        negative = rank < num_negatives.unsqueeze(1)
        class_loss = (cross_entropy * (positive.float() + negative.float())).sum(dim=1)

        weight = (num_positives > 0).float() / num_positives.float().clamp(min=1e-6)
        return ((box_loss + class_loss) * weight).mean()

    def encode(self, boxes_cxcywh: Tensor) -> Tensor:
        """Return the deltas (N, 4, P) of boxes (N, P, 4)."""
        boxes = boxes_cxcywh.transpose(1, 2).contiguous()
        shift = (boxes[:, :2] - self.anchor_centers) / self.anchor_sizes
        log_scale = (boxes[:, 2:] / self.anchor_sizes).log()
        return torch.cat(
            [shift / self.recipe.center_variance, log_scale / self.recipe.size_variance], dim=1
        )


def reference_detect(outputs: tuple[Tensor, Tensor], recipe: Recipe) -> list[tuple]:
    """Return boxes (n, 4) normalised xyxy, scores and 0-based labels of each image, best first."""
    deltas, logits = outputs
    deltas = deltas.transpose(1, 2)
    scores = logits.transpose(1, 2).softmax(dim=-1)
    anchors = make_anchors(recipe)
    center = recipe.center_variance * deltas[..., :2] * anchors[:, 2:] + anchors[:, :2]
    size = (recipe.size_variance * deltas[..., 2:]).exp() * anchors[:, 2:]
    boxes = to_xyxy(torch.cat([center, size], dim=-1))
    detections = []
    for image_boxes, image_scores in zip(boxes, scores, strict=True):
        detections.append(detect_in_image(image_boxes, image_scores, recipe))
    return detections


def detect_in_image(
    boxes_xyxy: Tensor, scores: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes, scores and labels of boxes (P, 4) and scores (P, C), channel 0 background."""
    kept_boxes = []
    kept_scores = []
    kept_labels = []
    for channel in range(1, scores.shape[1]):
        passes = scores[:, channel] > recipe.score_threshold
        class_boxes = boxes_xyxy[passes]
        class_scores = scores[passes, channel]
        kept = greedy_nms(class_boxes, class_scores, recipe)
        kept_boxes.append(class_boxes[kept])
        kept_scores.append(class_scores[kept])
        kept_labels.append(torch.full((len(kept),), channel - 1))
    boxes = torch.cat(kept_boxes)
    all_scores = torch.cat(kept_scores)
    labels = torch.cat(kept_labels)
    best = all_scores.argsort(descending=True)[: recipe.max_detections]
    return boxes[best], all_scores[best], labels[best]


def greedy_nms(boxes_xyxy: Tensor, scores: Tensor, recipe: Recipe) -> list[int]:
    """Return the indices of the boxes (n, 4) of one class that survive."""
    kept = []
    order = scores.argsort()[-recipe.max_per_class :]
    while len(order):
        best = order[-1].item()
        kept.append(best)
        order = order[:-1]
        iou = pairwise_iou(boxes_xyxy[order], boxes_xyxy[best : best + 1]).squeeze(1)
        order = order[iou < recipe.nms_iou]
    return kept
