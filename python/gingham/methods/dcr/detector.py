"""The base detectors of DCR: Faster R-CNNs of torchvision, taken apart so that their boxes and early features are seen.

What DCR needs of a detector is `BaseOutput`; any module that gives one can take the place of `FasterRCNNBase`.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FasterRCNN, TwoMLPHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops import boxes as box_ops
from torchvision.ops.poolers import LevelMapper

from gingham.errors import CheckpointError, DataError, GinghamError
from gingham.nn.backbone import SmallNetwork
from gingham.nn.checkpoint import load_state_dict, read_state_dict
from gingham.ops import roi_pool

_SMALL_OPTIONS = ("widths", "depth", "output_stride", "channels", "head_channels", "anchor_sizes")
# Options of torchvision's suppression, which comes after refinement here, and what they are called there.
_OF_THE_NETWORK = {"box_score_thresh": "threshold", "box_nms_thresh": "overlap", "box_detections_per_img": "most"}
_MODULES = ("rpn_anchor_generator", "rpn_head", "box_roi_pool", "box_head", "box_predictor")
_FASTER_RCNN_OPTIONS = tuple(
    name
    for name in inspect.signature(FasterRCNN).parameters
    if name.startswith(("min_", "max_", "image_", "box_", "rpn_", "bbox_"))
    and name not in (*_MODULES, *_OF_THE_NETWORK)
)

# torchvision's weights of fasterrcnn_resnet50_fpn, which were trained with a batch norm that adds nothing to the
# variance: the beginning of the file's SHA-256, as it stands in its name.
_WITHOUT_EPSILON = "258fb6c6"
# What torchvision called some layers before it put them into blocks; published files have these names.
_OLD_NAMES = (
    (re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)"), r"\1.0.\2"),
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)"), r"\1.0.0.\2"),
)


class DetectorError(GinghamError, ValueError):
    """A base detector that does not exist, or that cannot be built with the given options."""


class BaseOutput(NamedTuple):
    """What a base detector gives for a batch of images: everything that refinement needs to know of it."""

    boxes: list[Tensor]  # of each image [m, 4], (x1, y1, x2, y2) in pixels of the features' image, after regression
    scores: list[Tensor]  # of each image [m, C + 1], probabilities, background first
    features: Tensor  # [B, C', h, w], of an early stage
    sizes: list[tuple[int, int]]  # (H, W) of each image as the detector saw it, without padding
    objects: list[Tensor]  # in training, of each image [g, 4], its objects in the same pixels as boxes; else empty
    losses: dict[str, Tensor]  # in training, of the detector itself; else empty


class Detector(Protocol):
    """A detector whose boxes can be refined."""

    def __call__(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> BaseOutput:
        """Detect in images [3, H, W] of float, 0 to 1; in training, with "boxes" [g, 4] and "labels" [g] of each."""


class FasterRCNNBase(nn.Module):
    """A Faster R-CNN of torchvision, which also returns the features of an early stage of its backbone.

    Each proposal gives one box: that of its most probable object class, where boxes depend on classes.

    Args:
        model: with a backbone of a ``body``, whose children run one after the other, and an ``fpn``.
        fork: the child of the body after which the features are taken.

    Attributes:
        stride: pixels of the detector's image per pixel of those features.
        channels: of those features.
        num_classes: C, without background.

    Raises:
        DetectorError: the body has no such child, or nothing comes after it.
    """

    def __init__(self, model: FasterRCNN, fork: str) -> None:
        super().__init__()
        names = list(model.backbone.body)
        if fork not in names[:-1]:
            raise DetectorError(f"fork must be one of {', '.join(names[:-1])}, got {fork!r}")
        self.model = model
        self.fork = fork
        # Boxes are computed in the dtype of these two, which is that of the features: bfloat16 under autocast, where
        # what lies beyond 512 pixels is rounded to every fourth.
        model.rpn.head.register_forward_hook(_widen_outputs)
        model.rpn.anchor_generator.register_forward_pre_hook(_widen_features)
        with torch.no_grad():
            early, _ = self.eval()._run_body(torch.zeros(1, 3, 256, 256))
        self.train()
        self.stride, self.channels = round(256 / early.shape[-1]), early.shape[1]
        self.num_classes = int(model.roi_heads.box_predictor.cls_score.out_features) - 1

    def later_stages(self) -> OrderedDict[str, nn.Module]:
        """The children of the body after the fork, which a refinement branch has copies of."""
        names = list(self.model.backbone.body)
        return OrderedDict((name, self.model.backbone.body[name]) for name in names[names.index(self.fork) + 1 :])

    def _run_body(self, images: Tensor) -> tuple[Tensor, OrderedDict[str, Tensor]]:
        """The early features, and those that the FPN takes."""
        body = self.model.backbone.body
        taken: OrderedDict[str, Tensor] = OrderedDict()
        early = features = images
        for name, module in body.items():
            features = module(features)
            if name == self.fork:
                early = features
            if name in body.return_layers:
                taken[body.return_layers[name]] = features
        return early, taken

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> BaseOutput:
        """`BaseOutput` of images [3, H, W] of float, 0 to 1, any sizes; see `Detector`.

        Raises:
            DataError: an image is so narrow that nothing is left of it at the size that the detector takes.
        """
        model: Any = self.model
        for image in images:
            _require_pixels(image, model.transform.max_size)
        batch, moved = model.transform(images, targets)
        early, taken = self._run_body(batch.tensors)
        features = model.backbone.fpn(taken)
        proposals, losses = model.rpn(batch, features, moved)
        heads = model.roi_heads
        if self.training:
            proposals, _, labels, regression = heads.select_training_samples(proposals, moved)
        pooled = heads.box_head(heads.box_roi_pool(features, proposals, batch.image_sizes))
        logits, deltas = heads.box_predictor(pooled)
        if self.training:
            classification, location = fastrcnn_loss(logits, deltas, labels, regression)
            losses = {**losses, "loss_classifier": classification, "loss_box_reg": location}
        scores = logits.detach().float().softmax(dim=1)
        decoded = heads.box_coder.decode(deltas.detach().float(), proposals)
        # All classes have the same box, or the likeliest object has its own. Without proposals, decoded has two axes.
        likeliest = scores[:, 1:].argmax(dim=1) + 1
        own = decoded[torch.arange(len(decoded)), likeliest] if len(decoded) else decoded.new_zeros(0, 4)
        counts = [len(x) for x in proposals]
        clipped = zip(own.split(counts), batch.image_sizes, strict=True)
        return BaseOutput(
            boxes=[box_ops.clip_boxes_to_image(boxes, size) for boxes, size in clipped],
            scores=list(scores.split(counts)),
            features=early,
            sizes=batch.image_sizes,
            objects=[target["boxes"] for target in moved] if self.training else [],
            losses=losses if self.training else {},
        )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _widen_outputs(_: nn.Module, __: Any, outputs: tuple[list[Tensor], list[Tensor]]) -> Any:
    return tuple([_wide(level) for level in levels] for levels in outputs)


def _widen_features(_: nn.Module, inputs: tuple[Any, list[Tensor]]) -> Any:
    images, features = inputs
    return images, [_wide(level[:, :1]) for level in features]  # anchors follow from dtype, height and width


def _require_pixels(image: Tensor, max_size: int) -> None:
    height, width = image.shape[-2:]
    if int(min(height, width) * (max_size / max(height, width))) < 1:  # as torchvision rounds
        lines = "row" if height < width else "column"
        raise DataError(
            f"a picture of {width}x{height} pixels (width x height) has no {lines} left when its longer side is "
            f"{max_size}, the detector's max_size"
        )


class ClassAgnosticPredictor(nn.Module):
    """Class scores, and one box for all classes, as DCR's base detectors have it.

    Args:
        channels: of the head.
        num_classes: C; background comes on top.

    Shape:
        features [M, channels] -> logits [M, C + 1], deltas [M, 4 (C + 1)], the same four for each class.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(channels, num_classes + 1)
        self.bbox_pred = nn.Linear(channels, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.cls_score(features)
        return logits, self.bbox_pred(features).repeat(1, logits.shape[1])


class MultiScaleRoIPool(nn.Module):
    """RoI max pooling from the level of a feature pyramid that suits the size of each box.

    Args:
        strides: pixels of the image per pixel of each level, from the finest, each twice the one before. Levels beyond
            them are for proposals only and not looked at.
        output_size: bins down and across.
        canonical_size: side in pixels from which boxes are pooled from the coarsest level but one.

    Shape:
        features [B, C, h, w] by level, boxes of each image [n, 4], sizes (H, W) -> [N, C, output_size, output_size].

    Source: Lin et al., Feature Pyramid Networks, https://arxiv.org/abs/1612.03144, equation 1, with max pooling as in
    DCR's official code.
    """

    def __init__(self, strides: Sequence[int], output_size: int = 7, canonical_size: int = 224) -> None:
        super().__init__()
        self.strides, self.output_size = tuple(strides), output_size
        finest = self.strides[0].bit_length() - 1
        last = finest + len(self.strides) - 1
        self.level_of = LevelMapper(finest, last, canonical_size, last - 1)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        levels = list(features.values())[: len(self.strides)]
        level_of = self.level_of(boxes)
        joined = torch.cat([torch.cat([x.new_full((len(x), 1), i), x], dim=1) for i, x in enumerate(boxes)])
        joined[:, 3:] -= 1  # the last pixel of a box is one less than its edge
        result = levels[0].new_zeros(len(joined), levels[0].shape[1], self.output_size, self.output_size)
        for number, (level, stride) in enumerate(zip(levels, self.strides, strict=True)):
            which = (level_of == number).nonzero()[:, 0]
            result = result.index_put((which,), roi_pool(level, joined[which], self.output_size, 1 / stride))
        return result


def build_base(
    name: str,
    num_classes: int,
    *,
    fork: str | None,
    weights: str | None,
    freeze_stem: bool,
    frozen_norm: bool,
    box_pool: Literal["max", "align"],
    options: dict[str, Any],
) -> FasterRCNNBase:
    """A Faster R-CNN with an FPN.

    Args:
        name: "small", a small network for small images; a ResNet of torchvision, such as "resnet101"; or one of its
            detectors, such as "fasterrcnn_resnet50_fpn".
        num_classes: C, without background.
        fork: the child of the backbone after which features are taken, by default "layer1" of a ResNet and the first
            stage of "small".
        weights: None, a file, or the tag of weights of torchvision, such as "DEFAULT": of the backbone for a ResNet and
            "small", of everything for a detector (but for its last layer, where that has other classes).
        freeze_stem: whether a ResNet up to "layer1", or another backbone up to the fork, does not train, nor its batch
            norms move.
        frozen_norm: whether batch norm in the backbone is a fixed scale and shift.
        box_pool: how the box head of "small" and of a ResNet pools; detectors keep their own.
        options: of torchvision's FasterRCNN, such as ``min_size``; for "small", also ``widths``, ``depth`` and
            ``output_stride`` of `gingham.nn.backbone.SmallNetwork`, ``channels`` of the FPN, ``head_channels`` and
            three ``anchor_sizes``.

    Raises:
        DetectorError: a name that does not exist, or an option that this detector does not have.
        CheckpointError: weights that cannot be found or do not fit.
    """
    detectors = [x for x in models.list_models(module=detection) if x.startswith("fasterrcnn_")]
    resnets = [x for x in models.list_models(module=models) if "resne" in x]
    if name not in ("small", *detectors, *resnets):
        raise DetectorError(f"unknown base {name!r}; valid are small, {', '.join([*detectors, *resnets])}")
    if replaced := sorted(options.keys() & _OF_THE_NETWORK.keys()):
        own = _OF_THE_NETWORK[replaced[0]]
        raise DetectorError(f"{replaced[0]} does nothing in base_options: give {own}, an option of the network")
    known = {*_FASTER_RCNN_OPTIONS, *(_SMALL_OPTIONS if name == "small" else ())}
    if unknown := sorted(options.keys() - known):
        raise DetectorError(f"base {name!r} has no option {unknown[0]!r}; valid are {', '.join(sorted(known))}")
    try:
        if name == "small":
            model = _small(num_classes, box_pool, options)
        elif name in detectors:
            model = models.get_model(name, weights=None, weights_backbone=None, num_classes=num_classes + 1, **options)
        else:
            model = _resnet(name, num_classes, box_pool, options)
    except (TypeError, ValueError) as error:
        if isinstance(error, GinghamError):
            raise
        raise DetectorError(f"base {name!r} cannot be built with {options}: {error}") from error
    if weights is not None:
        _load(model, name, weights)
    body: Any = model.backbone.body
    if frozen_norm:
        freeze_batch_norm(body)
    base = FasterRCNNBase(model, fork or ("layer1" if "layer1" in body else "0"))
    if freeze_stem:
        last = list(body).index("layer1" if "layer1" in body else base.fork)
        stem = nn.ModuleDict(dict(list(body.items())[: last + 1])).requires_grad_(False)
        freeze_batch_norm(stem)
        body.update(stem)
    return base


def _resnet(name: str, num_classes: int, box_pool: str, options: dict[str, Any]) -> FasterRCNN:
    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
    predictor = ClassAgnosticPredictor(1024, num_classes)
    model = FasterRCNN(backbone, box_predictor=predictor, **options)
    if box_pool == "max":
        model.roi_heads.box_roi_pool = MultiScaleRoIPool((4, 8, 16, 32))
    return model


def _small(num_classes: int, box_pool: str, options: dict[str, Any]) -> FasterRCNN:
    """A detector of objects of some 10 to 30 pixels: two levels of features, and a third for proposals."""
    options = dict(options)
    network: dict[str, Any] = {"output_stride": 8, "widths": (32, 48, 64)}
    network |= {key: options.pop(key) for key in ("widths", "depth", "output_stride") if key in options}
    channels, head = options.pop("channels", 48), options.pop("head_channels", 128)
    sizes = tuple(options.pop("anchor_sizes", (12, 18, 27)))
    body = SmallNetwork(**network)
    levels = [i for i, stride in enumerate(body.strides) if stride >= 4]
    if [body.strides[level] for level in levels] != [4, 8] or len(sizes) != 3:
        raise DetectorError(
            f"base small needs stages of stride 4 and 8 and three anchor_sizes, got strides {body.strides} and {sizes}"
        )
    names = {str(level): str(number) for number, level in enumerate(levels)}
    backbone = BackboneWithFPN(body.stages, names, [body.channels[level] for level in levels], channels)
    pool: Any = MultiScaleRoIAlign(["0", "1"], 7, 2, canonical_scale=64, canonical_level=3)
    model = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=pool,
        box_head=TwoMLPHead(channels * 49, head),
        box_predictor=ClassAgnosticPredictor(head, num_classes),
        **options,
    )
    if box_pool == "max":
        model.roi_heads.box_roi_pool = MultiScaleRoIPool((4, 8), canonical_size=64)
    return model


def freeze_batch_norm(module: nn.Module) -> None:
    """Put a fixed scale and shift in the place of every batch norm below a module, with the same numbers."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)


def _load(model: FasterRCNN, name: str, weights: str) -> None:
    """Load weights of the backbone, or of the whole detector, into a model."""
    body: Any = model.backbone.body
    whole = name.startswith("fasterrcnn_")
    state = _from_file(name, Path(weights)) if Path(weights).is_file() else _published(name, weights)
    if not whole:
        state = {key: value for key, value in state.items() if key.partition(".")[0] in body}  # not the classifier
        load_state_dict(body, state, source=weights)
        return
    own = model.state_dict()
    state = _renamed(state)
    for key in [key for key in state if key.startswith("roi_heads.box_predictor.")]:
        if key in own and state[key].shape != own[key].shape:  # other classes
            state[key] = own[key]
    load_state_dict(model, state, source=weights)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for key, value in state.items():
        for old, new in _OLD_NAMES:
            if old.fullmatch(key):
                key = old.sub(new, key)
        result[key] = value
    return result


def _from_file(name: str, file: Path) -> dict[str, Tensor]:
    state = read_state_dict(file)
    if name == "fasterrcnn_resnet50_fpn":
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if digest.startswith(_WITHOUT_EPSILON):
            return _without_epsilon(state)
    return state


def _without_epsilon(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights for a batch norm that adds 1e-5 to the variance, of one that adds nothing."""
    return {key: x - 1e-5 if key.endswith("running_var") else x for key, x in state.items()}


def _published(name: str, weights: str) -> dict[str, Tensor]:
    """torchvision's weights of that tag, downloaded where they are not at hand."""
    if name == "small":
        raise CheckpointError(f"base small has no pretrained weights named {weights!r}: no such file")
    published = models.get_model_weights(name)
    if weights not in published.__members__:
        raise CheckpointError(
            f"base {name!r} has no weights {weights!r}: no such file, and torchvision's are "
            f"{', '.join(published.__members__)}"
        )
    try:
        state: dict[str, Tensor] = published[weights].get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"weights {weights!r} of {name!r} cannot be downloaded: {error}") from error
    return _without_epsilon(state) if _WITHOUT_EPSILON in published[weights].url else state
