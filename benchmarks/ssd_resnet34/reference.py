"""What the original does, re-implemented from its description: the peer of the measurements.

Not the original's code, and no part of the product. The same algorithm and the same division of
work: everything on PIL images in the loader's worker, dense targets encoded there image by image,
`F.cross_entropy` over all priors with ranks from two sorts, NMS in plain Python class by class.
"""

import random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from common.coco.index import CocoIndex
from ssd_resnet34.anchors import make_anchors, to_cxcywh, to_xyxy
from ssd_resnet34.config import Recipe


def iou(boxes_ltrb: Tensor, others_ltrb: Tensor) -> Tensor:
    """IoU (n, m) of boxes (n, 4) and (m, 4), by way of (n, m, 4) copies of both."""
    shape = (len(boxes_ltrb), len(others_ltrb), 4)
    first = boxes_ltrb.unsqueeze(1).expand(shape).contiguous()
    second = others_ltrb.unsqueeze(0).expand(shape).contiguous()
    low = torch.max(first[..., :2], second[..., :2])
    high = torch.min(first[..., 2:], second[..., 2:])
    sides = (high - low).clamp(min=0)
    overlap = sides[..., 0] * sides[..., 1]
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (first, second)]
    return overlap / (areas[0] + areas[1] - overlap)


class Encoder:
    """Ground truth of one image to dense targets, one for each of P priors."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.priors = make_anchors(recipe)
        self.priors_ltrb = to_xyxy(self.priors)

    def __call__(self, boxes_ltrb: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (n, 4), labels (n,) from 1, to matched boxes (P, 4) cxcywh and labels (P,)."""
        overlap = iou(boxes_ltrb, self.priors_ltrb)
        best, matched = overlap.max(dim=0)
        for box, prior in enumerate(overlap.argmax(dim=1)):
            best[prior], matched[prior] = 2.0, box
        positive = best > self.recipe.match_iou
        dense_labels = torch.zeros(len(self.priors), dtype=torch.long)
        dense_labels[positive] = labels[matched[positive]]
        dense = self.priors_ltrb.clone()
        dense[positive] = boxes_ltrb[matched[positive]]
        return to_cxcywh(dense), dense_labels


class ReferenceSet:
    """`dataset[record]`: image (3, 300, 300) float32, dense boxes (P, 4) and labels (P,)."""

    def __init__(self, records: CocoIndex, truth, recipe: Recipe):
        """`truth(record)` gives normalised ltrb boxes and 0-based labels."""
        self.records, self.truth, self.recipe = records, truth, recipe
        self.encoder = Encoder(recipe)
        side = recipe.image_size
        self.finish = v2.Compose(
            [
                v2.Resize((side, side)),
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
        boxes, labels = map(torch.from_numpy, self.truth(record))
        image, boxes, labels = self.crop(image, boxes, labels + 1)
        if random.random() < self.recipe.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes[:, 0], boxes[:, 2] = 1 - boxes[:, 2], 1 - boxes[:, 0]
        return self.finish(image), *self.encoder(boxes, labels)

    def crop(self, image: Image.Image, boxes_ltrb: Tensor, labels: Tensor):
        while True:
            limit = random.choice(self.recipe.crop_ious)
            if limit is None:
                return image, boxes_ltrb, labels
            w, h = (random.uniform(*self.recipe.crop_scale) for _ in range(2))
            if not self.recipe.crop_ratio[0] <= w / h <= self.recipe.crop_ratio[1]:
                continue
            left, top = random.uniform(0, 1 - w), random.uniform(0, 1 - h)
            window = torch.tensor([left, top, left + w, top + h])
            if not (iou(boxes_ltrb, window.unsqueeze(0)) > limit).all():
                continue
            center = (boxes_ltrb[:, :2] + boxes_ltrb[:, 2:]) / 2
            inside = ((center > window[:2]) & (center < window[2:])).all(dim=1)
            if not inside.any():
                continue
            corner = window[:2].repeat(2)
            boxes = torch.max(torch.min(boxes_ltrb[inside], window[2:].repeat(2)), corner)
            boxes = (boxes - corner) / torch.tensor([w, h, w, h])
            scale = (image.width, image.height) * 2
            pixels = [int(side * size) for side, size in zip(window.tolist(), scale, strict=True)]
            return image.crop(pixels), boxes, labels[inside]


class ReferenceLoss:
    """Loss of raw outputs against dense targets."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.priors = make_anchors(recipe).T.unsqueeze(0)  # (1, 4, P) cxcywh

    def __call__(
        self, outputs: tuple[Tensor, Tensor], boxes_cxcywh: Tensor, labels: Tensor
    ) -> Tensor:
        """Offsets (N, 4, P) and logits (N, C, P); boxes (N, P, 4), labels (N, P), 0 background."""
        offsets, logits = outputs
        recipe, truth = self.recipe, boxes_cxcywh.transpose(1, 2).contiguous()
        shift = (truth[:, :2] - self.priors[:, :2]) / self.priors[:, 2:] / recipe.center_variance
        scale = (truth[:, 2:] / self.priors[:, 2:]).log() / recipe.size_variance
        target = torch.cat([shift, scale], dim=1)

        positive = labels > 0
        positives = positive.sum(dim=1)
        box_loss = F.smooth_l1_loss(offsets, target, reduction="none").sum(dim=1)
        box_loss = (positive.float() * box_loss).sum(dim=1)

        entropy = F.cross_entropy(logits, labels, reduction="none")
        ranked = entropy.detach().clone()
        ranked[positive] = 0
        rank = ranked.sort(dim=1, descending=True).indices.sort(dim=1).indices
        hardest = (recipe.negative_ratio * positives).clamp(max=labels.shape[1])
        negative = rank < hardest.unsqueeze(1)
        class_loss = (entropy * (positive.float() + negative.float())).sum(dim=1)

        weight = (positives > 0).float() / positives.float().clamp(min=1e-6)
        return ((box_loss + class_loss) * weight).mean()


def reference_detect(outputs: tuple[Tensor, Tensor], recipe: Recipe) -> list[tuple]:
    """Per image boxes (n, 4) normalised ltrb, scores and 0-based labels, best first."""
    priors = make_anchors(recipe)
    offsets, logits = (output.transpose(1, 2) for output in outputs)
    center = recipe.center_variance * offsets[..., :2] * priors[:, 2:] + priors[:, :2]
    size = (recipe.size_variance * offsets[..., 2:]).exp() * priors[:, 2:]
    boxes = to_xyxy(torch.cat([center, size], dim=-1))
    pairs = zip(boxes, logits.softmax(dim=-1), strict=True)
    return [_detect_image(*pair, recipe) for pair in pairs]


def _detect_image(boxes_ltrb: Tensor, scores: Tensor, recipe: Recipe) -> tuple:
    found_boxes, found_scores, found_labels = [], [], []
    for label in range(1, scores.shape[1]):
        passed = scores[:, label] > recipe.score_threshold
        candidates, score = boxes_ltrb[passed], scores[passed, label]
        order = score.argsort()[-recipe.max_per_class :]
        kept = []
        while len(order):
            best = order[-1].item()
            kept.append(best)
            order = order[:-1]
            overlap = iou(candidates[order], candidates[best : best + 1]).squeeze(1)
            order = order[overlap < recipe.nms_iou]
        found_boxes.append(candidates[kept])
        found_scores.append(score[kept])
        found_labels += [label - 1] * len(kept)
    boxes, scores, labels = torch.cat(found_boxes), torch.cat(found_scores), found_labels
    best = scores.argsort(descending=True)[: recipe.max_detections]
    return boxes[best], scores[best], torch.tensor(labels, dtype=torch.long)[best]
