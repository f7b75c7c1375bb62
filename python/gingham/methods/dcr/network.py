"""DCR: a detector, and a second classifier that looks at each of its boxes near the input and corrects their scores.

Paper: Cheng et al., Revisiting RCNN, https://arxiv.org/abs/1803.06799 (V1) and Decoupled Classification Refinement,
https://arxiv.org/abs/1810.04002 (V2), with the layers of the official code for V2. The boxes stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gingham.data.detection import Detections
from gingham.methods.dcr.detector import BaseOutput, Detector, build_base
from gingham.methods.dcr.objective import (
    SamplingRule,
    candidates,
    detections,
    fuse,
    highest_scored,
    refinement_loss,
    sample_boxes,
)
from gingham.nn.pretrained import PretrainedModel
from gingham.nn.roi_pool import RoIPool

Fusion = Literal["product", "base", "refined"]


class RefinementBranch(nn.Module):
    """Classifies boxes from early features: RoI max pooling to one size, later stages of a network, mean, classifier.

    Whatever the size of a box, the stages see it at that of an image which they were pretrained on: their receptive
    field adapts to the box. No gradient goes to the features.

    Args:
        stages: [N, C', size, size] -> [N, C'', h, w]; used as they are, so give copies of what others use.
        num_classes: C; background comes on top.
        stride: pixels of the image per pixel of the features.
        pool_size: bins down and across that a box is pooled to, 1 or more.
        channels: C', of the features.
        decoupled: whether the features are taken without gradient; otherwise the loss trains the stage before, too.

    Shape:
        features [B, C', h, w], boxes of each image [n, 4] -> logits [N, C + 1].

    Raises:
        ValueError: a number outside its range.

    Source: paper (V2), section 4, and the official code: res2 features, 56x56 bins, res3 to res5, mean, classifier.

    Example:
        >>> branch = RefinementBranch(nn.Conv2d(8, 16, 3, stride=2), num_classes=3, stride=4, pool_size=7, channels=8)
        >>> branch(torch.randn(2, 8, 16, 24), [torch.tensor([[0.0, 0, 30, 40]]), torch.zeros(0, 4)]).shape
        torch.Size([1, 4])
    """

    def __init__(
        self,
        stages: nn.Module,
        num_classes: int,
        *,
        stride: int,
        channels: int,
        pool_size: int = 56,
        decoupled: bool = True,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.pool = RoIPool(pool_size, 1 / stride)
        self.stages = stages
        self.channels, self.decoupled = channels, decoupled
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # whoever has a branch trains the detector alike
            training = stages.training
            width = stages.eval()(torch.zeros(1, channels, pool_size, pool_size)).shape[1]
            stages.train(training)
            self.classifier = nn.Linear(width, num_classes + 1)
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        if self.decoupled:
            features = features.detach()
        return self._classify(self.pool(features, self._pixels(features, boxes)))

    def probabilities(self, features: Tensor, boxes: Sequence[Tensor], *, max_bytes: int) -> Tensor:
        """Softmax [N, C + 1] of the boxes, which are pooled and classified in parts.

        Args:
            features: [B, C', h, w].
            boxes: of each image [n, 4], (x1, y1, x2, y2) in pixels of the image.
            max_bytes: most bytes of the pooled features of a part, at least those of one box.

        Raises:
            ValueError: `max_bytes` is less than one box takes.
        """
        done = []
        for _, pooled in self.pool.chunks(features, self._pixels(features, boxes), max_bytes=max_bytes):
            done.append(self._classify(pooled).float().softmax(dim=1))
            del pooled  # before the next part is made
        return torch.cat(done) if done else features.new_zeros((0, self.classifier.out_features), dtype=torch.float32)

    def _pixels(self, features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """[N, 5] with the image in front; RoI pooling counts the last pixel in, which is one less than the edge."""
        rows = [torch.cat([box.new_full((len(box), 1), i), box], dim=1) for i, box in enumerate(boxes)]
        joined = torch.cat(rows).detach().to(torch.float64 if features.dtype == torch.float64 else torch.float32)
        joined[:, 3:] -= 1
        return joined

    def _classify(self, pooled: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.stages(pooled).mean(dim=(2, 3)))
        return logits


class RefinedDetector(nn.Module):
    """Any detector whose boxes a branch classifies anew, from which both scores are multiplied.

    Args:
        detector: gives `gingham.methods.dcr.detector.BaseOutput`; its boxes come before suppression.
        branch: that refines, or None for the detector alone.
        top: the share of an image's boxes that is refined, those with the highest scores, 0 to 1; others keep the
            detector's scores.
        fusion: "product", or for comparison the scores of the "base" or the "refined" ones alone.
        sampling: which boxes the branch learns from.
        threshold: scores have to be above it, 0 or more.
        overlap: IoU above which the lower score of a class is suppressed, 0 to 1.
        most: detections kept in an image, 1 or more; those that tie with the last are kept, too.
        max_mib: most mebibytes of pooled features at a time when detecting, at least what one box takes.

    Attributes:
        num_classes: C, without background, if the branch or the detector says so.
        sampling_state: of the random numbers that samples are drawn with, uint8 on the CPU, to go on from; None
            before the first.

    Raises:
        ValueError: an argument outside its range, or a share below 1 with the refined scores alone: the boxes that
            are left out have none.

    Source: the official code's tester; fusion is section 3 of the paper (V1).
    """

    def __init__(
        self,
        detector: Detector,
        branch: RefinementBranch | None,
        *,
        top: float = 1.0,
        fusion: Fusion = "product",
        sampling: SamplingRule | None = None,
        threshold: float = 0.001,
        overlap: float = 0.5,
        most: int = 100,
        max_mib: int = 32,
    ) -> None:
        super().__init__()
        for name, value in (("top", top), ("overlap", overlap)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {value}")
        if fusion not in ("product", "base", "refined"):
            raise ValueError(f"fusion must be 'product', 'base' or 'refined', got {fusion!r}")
        if fusion == "refined" and top < 1:
            raise ValueError(
                f"top must be 1 with fusion 'refined', as boxes without refinement have no score, got {top}"
            )
        for name, number, least in (("threshold", threshold, 0), ("most", most, 1), ("max_mib", max_mib, 1)):
            if number < least:
                raise ValueError(f"{name} must be {least} or more, got {number}")
        if branch is not None:
            size = branch.pool.output_size
            needed = 4 * branch.channels * size[0] * size[1] / 2**20
            if max_mib < needed:
                raise ValueError(
                    f"max_mib must be at least {math.ceil(needed)}, got {max_mib}: one box of {branch.channels} "
                    f"channels takes that at pool_size {size[0]}"
                )
        self.detector: Any = detector
        self.branch = branch
        self.top, self.fusion, self.sampling = top, fusion, sampling or SamplingRule()
        self.threshold, self.overlap, self.most, self.max_mib = threshold, overlap, most, max_mib
        known = getattr(detector, "num_classes", None)
        self.num_classes: int | None = known if branch is None else branch.classifier.out_features - 1
        self.sampling_state: Tensor | None = None

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses of a batch, in training mode: those of the detector, and the branch's as ``loss_refinement``.

        The branch's samples are drawn from a generator of its own, seeded by torch's on the CPU, which is left as it
        was: the detector trains to the same weights as without a branch.

        Args:
            images: [3, H, W] of float, 0 to 1, any sizes.
            targets: of each image, "boxes" [g, 4], each with an area, and "labels" [g], 1 to C.

        Raises:
            ValueError: targets that are not that.
        """
        for target in targets:
            _require_objects(target["boxes"], target["labels"], self.num_classes)
        output: BaseOutput = self.detector(images, targets)
        if self.branch is None:
            return dict(output.losses)
        generator = self._generator()
        drawn = []
        for boxes, scores, objects, target in zip(output.boxes, output.scores, output.objects, targets, strict=True):
            found = candidates(boxes, scores, objects, target["labels"], overlap=self.sampling.overlap)
            drawn.append(sample_boxes(found, self.sampling, generator))
        self.sampling_state = generator.get_state()
        logits = self.branch(output.features, [samples.boxes for samples in drawn])
        loss = refinement_loss(logits, torch.cat([samples.labels for samples in drawn]))
        return {**output.losses, "loss_refinement": loss}

    def _generator(self) -> torch.Generator:
        """Of the branch's samples, where it was after the last step."""
        generator = torch.Generator()
        if self.sampling_state is not None:
            generator.set_state(self.sampling_state)
        else:
            with torch.random.fork_rng(devices=[]):
                generator.manual_seed(int(torch.randint(2**62, ())))
        return generator

    def forward(self, images: list[Tensor]) -> list[Detections]:
        """The detections in each image [3, H, W] of float, 0 to 1, in evaluation mode."""
        output: BaseOutput = self.detector(images)
        return self.detect(output, self.fused_scores(output), [(x.shape[-2], x.shape[-1]) for x in images])

    def fused_scores(self, output: BaseOutput) -> list[Tensor]:
        """The scores [m, C + 1] of each image's boxes after refinement."""
        if self.branch is None or self.fusion == "base" or self.top == 0:
            return list(output.scores)
        which = [highest_scored(scores, self.top) for scores in output.scores]
        boxes = [box[index] for box, index in zip(output.boxes, which, strict=True)]
        refined = self.branch.probabilities(output.features, boxes, max_bytes=self.max_mib * 2**20)
        result = []
        for scores, index, part in zip(output.scores, which, refined.split([len(x) for x in which]), strict=True):
            own = torch.ones_like(scores) if self.fusion == "refined" else scores
            result.append(fuse(own, part, index))
        return result

    def detect(
        self, output: BaseOutput, scores: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """The detections of each image by these scores [m, C + 1], in pixels of images of these sizes (H, W)."""
        results = []
        for boxes, score, seen, size in zip(output.boxes, scores, output.sizes, sizes, strict=True):
            scale = boxes.new_tensor([size[1] / seen[1], size[0] / seen[0]]).repeat(2)
            found = detections(boxes * scale, score, threshold=self.threshold, overlap=self.overlap, most=self.most)
            results.append(found)
        return results


def _require_objects(boxes: Tensor, labels: Tensor, num_classes: int | None) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise ValueError(
            f"targets must have boxes [g, 4] and labels [g], got {list(boxes.shape)} and {list(labels.shape)}"
        )
    if len(wrong := boxes[~(torch.isfinite(boxes).all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1))]):
        raise ValueError(f"boxes of targets must be finite, with x2 above x1 and y2 above y1, got {wrong[0].tolist()}")
    outside = labels[(labels < 1) | (labels > (labels if num_classes is None else num_classes))]
    if len(outside):
        most = "C" if num_classes is None else num_classes
        raise ValueError(f"labels of targets must be 1 to {most}, got {outside[0].item()}")


class DCR(
    PretrainedModel,
    RefinedDetector,
    repo_url="https://github.com/SHI-Labs/Decoupled-Classification-Refinement",
    paper_url="https://arxiv.org/abs/1810.04002",
    pipeline_tag="object-detection",
):
    """A Faster R-CNN of torchvision whose scores a branch corrects, which is a copy of its backbone's later stages.

    Args:
        base: "small", a ResNet of torchvision ("resnet101"), with an FPN around it, or one of its detectors
            ("fasterrcnn_resnet50_fpn").
        num_classes: C, without background.
        refine: whether there is a branch; without, it is the base detector alone.
        fork: the child of the backbone after which the branch takes its features, by name or number: by default
            "layer1", at stride 4; "layer3" for the control that the branch needs early ones.
        pool_size: bins down and across that the branch sees of a box, 1 or more. 56 at stride 4 is what an image of
            224x224 pixels has there.
        decoupled: whether the branch's loss stays out of the stage that it takes its features from.
        top: see `RefinedDetector`.
        fusion: see `RefinedDetector`.
        threshold: see `RefinedDetector`.
        overlap: see `RefinedDetector`.
        most: see `RefinedDetector`.
        max_mib: see `RefinedDetector`.
        sampling: options of `gingham.methods.dcr.objective.SamplingRule`.
        frozen_norm: whether batch norm in the backbone and the branch is a fixed scale and shift, as pretrained.
        freeze_stem: whether a ResNet up to "layer1", or another backbone up to the fork, stays as pretrained, its batch
            norms included.
        box_pool: how the box head pools, "max" as the official code, or "align"; torchvision's detectors keep theirs.
        backbone_weights: None, a file, or a tag of torchvision's weights such as "DEFAULT": ImageNet's for a ResNet,
            COCO's for a detector.
        base_options: of torchvision's FasterRCNN, such as ``min_size``; see `gingham.methods.dcr.detector.build_base`.

    Shape:
        images [3, H, W], a list, any sizes -> a list of `gingham.data.detection.Detections`.

    Raises:
        DetectorError: a base that does not exist or does not have an option.
        CheckpointError: weights that cannot be found or do not fit.
        ValueError: an argument outside its range.

    Example:
        >>> model = DCR("small", num_classes=5, pool_size=16, frozen_norm=False, base_options={"min_size": 96})
        >>> found = model.eval()([torch.rand(3, 96, 128)])
        >>> found[0].boxes.shape[1]
        4
    """

    def __init__(
        self,
        base: str = "resnet101",
        num_classes: int = 80,
        refine: bool = True,
        fork: str | int | None = None,
        pool_size: int = 56,
        decoupled: bool = True,
        top: float = 1.0,
        fusion: Fusion = "product",
        sampling: Mapping[str, Any] | None = None,
        threshold: float = 0.001,
        overlap: float = 0.5,
        most: int = 100,
        max_mib: int = 32,
        frozen_norm: bool = True,
        freeze_stem: bool = True,
        box_pool: Literal["max", "align"] = "max",
        backbone_weights: str | None = None,
        base_options: Mapping[str, Any] | None = None,
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if box_pool not in ("max", "align"):
            raise ValueError(f"box_pool must be 'max' or 'align', got {box_pool!r}")
        sampling = dict(sampling or {})
        rules = [field.name for field in fields(SamplingRule)]
        if unknown := sorted(sampling.keys() - set(rules)):
            raise ValueError(f"sampling has no option {unknown[0]!r}: there are {', '.join(rules)}")
        detector = build_base(
            base,
            num_classes,
            fork=None if fork is None else str(fork),
            weights=backbone_weights,
            freeze_stem=freeze_stem,
            frozen_norm=frozen_norm,
            box_pool=box_pool,
            options=dict(base_options or {}),
        )
        branch = None
        if refine:
            branch = RefinementBranch(
                nn.Sequential(deepcopy(detector.later_stages())).requires_grad_(),
                num_classes,
                stride=detector.stride,
                channels=detector.channels,
                pool_size=pool_size,
                decoupled=decoupled,
            )
        RefinedDetector.__init__(
            self,
            detector,
            branch,
            top=top,
            fusion=fusion,
            sampling=SamplingRule(**sampling),
            threshold=threshold,
            overlap=overlap,
            most=most,
            max_mib=max_mib,
        )
