"""SPGNet: encoder-decoder stages in a row, each guided by the semantic prediction of the one before it.

Paper: Cheng et al., SPGNet: Semantic Prediction Guidance for Scene Parsing, https://arxiv.org/abs/1908.09798.
No code of the authors is public, and what could be read of the paper gives the parts and not their sizes:
README.md here says which choices are ours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from gingham.errors import CheckpointError
from gingham.nn.backbone import Backbone, BackboneError
from gingham.nn.convolution import convolution
from gingham.nn.pretrained import PretrainedModel

Psi = Literal["identity", "softmax"]
GateActivation = Literal["sigmoid", "tanh", "softmax"]


class SPGNetOutput(NamedTuple):
    """What SPGNet gives for a batch of images, all at the resolution of its finest features."""

    logits: Tensor  # [B, K, h, w], of the last stage
    stages: list[Tensor]  # [B, K, h, w] of every stage in order, the last one included


class StageOutput(NamedTuple):
    """What one stage gives; levels from fine to coarse."""

    encoded: list[Tensor]  # four of [B, C_l, h / 2^l, w / 2^l]
    decoded: list[Tensor]  # four of [B, C, h / 2^l, w / 2^l]
    logits: Tensor  # [B, K, h, w]


class SPGNet(PretrainedModel, paper_url="https://arxiv.org/abs/1908.09798", pipeline_tag="image-segmentation"):
    """Semantic segmentation by several encoder-decoder stages with semantic prediction guidance between them.

    Args:
        backbone: the encoder of every stage: a timm ResNet, or "small", a narrow one for small images.
        num_classes: K.
        stages: S, encoder-decoders in a row. One is the plain encoder-decoder, without gate, transition, aggregation.
        decoder_channels: C, a multiple of 4; the residual blocks of the decoder narrow it to a quarter.
        guidance: whether the prediction of a stage gates the features that the next one gets; False passes them as
            they are.
        psi: of the gates, see `SemanticPredictionGuidance`, as the next five are.
        gate_channels: None or 1.
        residual: whether the features are added to what the gate lets through.
        detach_guidance: whether the gates leave the predictions to their own loss.
        gate_act: "sigmoid", "tanh" or "softmax".
        gate_zero_init: whether the gates begin as constants.
        aggregation: whether the encoder of a stage adds, level by level, what the stage before encoded and decoded.
        image_pooling: whether the mean of the coarsest features over the image is added to every pixel.
        pooling_norm: whether that mean is batch-normalised, which takes two images or more (all processes counted with
            synchronised batch norm).
        dropout: probability of dropping a channel before a stage classifies.
        classifier_std: standard deviation of the classifiers' first weights, 0 or more; None: that of all other new
            convolutions, under which first logits are large.
        deep_stem: three 3x3 convolutions in place of the 7x7; False to use timm's pretrained weights.
        align_corners: of every resizing of maps, or "auto": where it makes grids meet, that is for images whose rows
            and columns are 1 more than a multiple of the encoder's stride.
        backbone_weights: None, "timm", a timm tag, or a safetensors or torch file; for the encoder of every stage.
        backbone_options: further arguments of the backbone's constructor; of "small": ``widths``, four numbers of
            channels, the first that of the stem too, and ``depth``, 3x3 convolutions per level.

    Attributes:
        output_stride: pixels of the image per pixel of the coarsest level.

    Shape:
        images [B, 3, H, W] -> `SPGNetOutput`, logits at a quarter of the image's size ("small": at half of it), rounded
        up. Every H and W.

    Raises:
        BackboneError: a backbone that does not exist, does not have an option, or is no ResNet.
        CheckpointError: backbone weights that cannot be found or do not fit.
        ValueError: another argument outside its range; in training, a batch of one image with `pooling_norm`.

    Source: the paper's figures 1 and 2. Sizes, the gate's formula and what is aggregated are not confirmed.

    Example:
        >>> model = SPGNet("small", num_classes=5, decoder_channels=16)
        >>> output = model.eval()(torch.randn(1, 3, 64, 96))
        >>> output.logits.shape, len(output.stages)
        (torch.Size([1, 5, 32, 48]), 2)
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 19,
        stages: int = 2,
        decoder_channels: int = 256,
        guidance: bool = True,
        psi: Psi = "identity",
        gate_channels: int | None = None,
        residual: bool = True,
        detach_guidance: bool = False,
        gate_act: GateActivation = "sigmoid",
        gate_zero_init: bool = False,
        aggregation: bool = True,
        image_pooling: bool = True,
        pooling_norm: bool = True,
        dropout: float = 0.0,
        classifier_std: float | None = None,
        deep_stem: bool = False,
        align_corners: bool | Literal["auto"] = "auto",
        backbone_weights: str | None = None,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if stages < 1:
            raise ValueError(f"stages must be at least 1, got {stages}")
        if decoder_channels < 4 or decoder_channels % 4:
            raise ValueError(f"decoder_channels must be a multiple of 4, got {decoder_channels}")
        if classifier_std is not None and classifier_std < 0:
            raise ValueError(f"classifier_std must be 0 or more, got {classifier_std}")
        if align_corners not in (True, False, "auto"):
            raise ValueError(f"align_corners must be True, False or 'auto', got {align_corners!r}")
        self.align_corners = align_corners
        encoders = [
            _encoder(backbone, deep_stem, backbone_weights, dict(backbone_options or {})) for _ in range(stages)
        ]
        self.stem = encoders[0].stem  # the later ones begin with a transition instead
        channels, self.output_stride = encoders[0].channels, encoders[0].output_stride
        self.stages = nn.ModuleList(
            EncoderDecoder(
                encoder.levels,
                channels,
                num_classes,
                decoder_channels=decoder_channels,
                aggregation=aggregation and index > 0,
                image_pooling=image_pooling,
                pooling_norm=pooling_norm,
                dropout=dropout,
                classifier_std=classifier_std,
            )
            for index, encoder in enumerate(encoders)
        )
        self.transitions = nn.ModuleList(
            convolution(decoder_channels, encoders[0].stem_channels) for _ in range(stages - 1)
        )
        _initialize(self.transitions)
        # Last, so that with one seed all other weights begin alike, with gates and without.
        self.gates = nn.ModuleList(
            SemanticPredictionGuidance(
                decoder_channels,
                num_classes,
                psi=psi,
                gate_channels=gate_channels,
                residual=residual,
                detach_guidance=detach_guidance,
                gate_act=gate_act,
                gate_zero_init=gate_zero_init,
            )
            for _ in range(stages - 1 if guidance else 0)
        )

    def corners_align(self, size: torch.Size | tuple[int, int]) -> bool:
        """Whether maps of images of this size (H, W) are resized with aligned corners.

        Example:
            >>> model = SPGNet("small", decoder_channels=16)
            >>> model.corners_align((769, 769)), model.corners_align((1024, 2048))
            (True, False)
        """
        if self.align_corners == "auto":
            return all((extent - 1) % self.output_stride == 0 for extent in size)
        return bool(self.align_corners)

    def forward(self, images: Tensor) -> SPGNetOutput:
        align_corners = self.corners_align(images.shape[-2:])
        output: StageOutput = self.stages[0](self.stem(images), align_corners=align_corners)
        predictions = [output.logits]
        for index, transition in enumerate(self.transitions):
            features = output.decoded[0]
            if self.gates:
                features = self.gates[index](features, output.logits)
            output = self.stages[index + 1](transition(features), output, align_corners=align_corners)
            predictions.append(output.logits)
        return SPGNetOutput(output.logits, predictions)


class SemanticPredictionGuidance(nn.Module):
    """Weight features, pixel by pixel, by a gate that is computed from the semantic prediction for that pixel.

    M = act(W psi(P) + b) with a 1x1 convolution W; the result is F * M + F, or F * M without `residual`. Nothing is
    pooled. Squeeze-and-excitation with the global mean of F in the place of P, and without a loss on it, would be the
    nearest relative.

    Args:
        channels: C, of the features.
        num_classes: K, of the prediction.
        psi: what of the logits P the gate sees: "identity", or "softmax" over the classes.
        gate_channels: None for a weight per channel and pixel, 1 for one per pixel.
        residual: whether the features are added to what the gate lets through.
        detach_guidance: whether no gradient flows from the gate into the prediction.
        gate_act: "sigmoid", "tanh", or "softmax" over the channels.
        gate_zero_init: whether W and b begin at 0, so that a sigmoid gate begins at 1/2 everywhere.

    Shape:
        features [B, C, h, w], logits [B, K, h, w] -> [B, C, h, w].

    Raises:
        ValueError: an argument outside its range, or a softmax over one channel, which is constant.

    Source: SPGNet, figure 1 (c), "supervise-and-excite". The formula is not confirmed.

    Example:
        >>> guide = SemanticPredictionGuidance(64, 19)
        >>> guide(torch.randn(2, 64, 9, 17), torch.randn(2, 19, 9, 17)).shape
        torch.Size([2, 64, 9, 17])
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        psi: Psi = "identity",
        gate_channels: int | None = None,
        residual: bool = True,
        detach_guidance: bool = False,
        gate_act: GateActivation = "sigmoid",
        gate_zero_init: bool = False,
    ) -> None:
        super().__init__()
        if psi not in ("identity", "softmax"):
            raise ValueError(f"psi must be 'identity' or 'softmax', got {psi!r}")
        if gate_channels not in (None, 1):
            raise ValueError(f"gate_channels must be None or 1, got {gate_channels}")
        if gate_act not in ("sigmoid", "tanh", "softmax"):
            raise ValueError(f"gate_act must be 'sigmoid', 'tanh' or 'softmax', got {gate_act!r}")
        if gate_act == "softmax" and gate_channels == 1:
            raise ValueError("gate_act 'softmax' needs more than one channel: gate_channels 1 would make it constant")
        self.psi, self.gate_act = psi, gate_act
        self.residual, self.detach_guidance = residual, detach_guidance
        self.gate = nn.Conv2d(num_classes, channels if gate_channels is None else gate_channels, 1)
        if gate_zero_init:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        prediction = logits.detach() if self.detach_guidance else logits
        if self.psi == "softmax":
            prediction = prediction.softmax(dim=1)
        score = self.gate(prediction)
        if self.gate_act == "sigmoid":
            weight = score.sigmoid()
        elif self.gate_act == "tanh":
            weight = score.tanh()
        else:
            weight = score.softmax(dim=1)
        weighted = features * weight
        return weighted + features if self.residual else weighted


class EncoderDecoder(nn.Module):
    """One stage: an encoder of four levels, a decoder that upsamples step by step, and a classifier on its finest map.

    Args:
        encoder: four modules, each giving the next coarser level; its own from here on.
        channels: of the four levels.
        num_classes: K.
        decoder_channels: C, a multiple of 4.
        aggregation: whether each level adds what the stage before encoded and decoded there.
        image_pooling: whether the mean of the coarsest level over the image is added to every pixel.
        pooling_norm: whether that mean is batch-normalised.
        dropout: probability of dropping a channel before the classifier.
        classifier_std: standard deviation of the classifier's first weights, or None.

    Shape:
        features [B, C_0, h, w], the `StageOutput` of the stage before or None -> `StageOutput`.

    Source: SPGNet, figure 2: the upsampling module is a bottleneck residual block and bilinear upsampling by 2 (here to
    the size of the next finer level). Order, widths and the place of the classifier are not confirmed.

    Example:
        >>> levels = [nn.MaxPool2d(1), *(nn.MaxPool2d(2) for _ in range(3))]
        >>> stage = EncoderDecoder(nn.ModuleList(levels), (8, 8, 8, 8), 5, decoder_channels=16)
        >>> stage(torch.randn(2, 8, 16, 24)).logits.shape
        torch.Size([2, 5, 16, 24])
    """

    def __init__(
        self,
        encoder: nn.ModuleList,
        channels: Sequence[int],
        num_classes: int,
        *,
        decoder_channels: int = 256,
        aggregation: bool = False,
        image_pooling: bool = True,
        pooling_norm: bool = True,
        dropout: float = 0.0,
        classifier_std: float | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.aggregation = nn.ModuleList(
            CrossStageAggregation(width, decoder_channels) for width in (channels if aggregation else ())
        )
        self.laterals = nn.ModuleList(convolution(width, decoder_channels) for width in channels)
        self.pooling = ImagePooling(channels[-1], decoder_channels, norm=pooling_norm) if image_pooling else None
        self.blocks = nn.ModuleList(Bottleneck(decoder_channels, decoder_channels // 4) for _ in channels)
        classify = nn.Conv2d(decoder_channels, num_classes, 1)
        self.classifier = nn.Sequential(nn.Dropout2d(dropout), classify)
        _initialize(module for name, module in self.named_children() if name != "encoder")
        if classifier_std is not None:
            nn.init.normal_(classify.weight, std=classifier_std)

    def forward(
        self, features: Tensor, previous: StageOutput | None = None, *, align_corners: bool = False
    ) -> StageOutput:
        encoded = []
        for level, encode in enumerate(self.encoder):
            features = encode(features)
            if self.aggregation and previous is not None:
                features = self.aggregation[level](features, previous.encoded[level], previous.decoded[level])
            encoded.append(features)
        decoded: list[Tensor] = []  # from coarse to fine
        for lateral, block, features in reversed(list(zip(self.laterals, self.blocks, encoded, strict=True))):
            finer = lateral(features)
            if decoded:
                # The exact size: 25 rows double to 50, where the level has 49.
                finer = finer + F.interpolate(
                    decoded[-1], size=finer.shape[-2:], mode="bilinear", align_corners=align_corners
                )
            elif self.pooling is not None:
                finer = finer + self.pooling(features)
            decoded.append(block(finer))
        return StageOutput(encoded, decoded[::-1], self.classifier(decoded[-1]))


class CrossStageAggregation(nn.Module):
    """Add to the features of a level what the stage before encoded and decoded there, each through a 1x1 convolution.

    Args:
        channels: of the level in the encoders.
        decoder_channels: of the decoder.

    Shape:
        features and encoded [B, channels, h, w], decoded [B, decoder_channels, h, w] -> [B, channels, h, w].

    Source: Li et al., Rethinking on Multi-Stage Networks for Human Pose Estimation, https://arxiv.org/abs/1901.00148.

    Example:
        >>> add = CrossStageAggregation(8, 16)
        >>> add(torch.randn(2, 8, 5, 9), torch.randn(2, 8, 5, 9), torch.randn(2, 16, 5, 9)).shape
        torch.Size([2, 8, 5, 9])
    """

    def __init__(self, channels: int, decoder_channels: int) -> None:
        super().__init__()
        self.of_encoded = convolution(channels, channels)
        self.of_decoded = convolution(decoder_channels, channels)

    def forward(self, features: Tensor, encoded: Tensor, decoded: Tensor) -> Tensor:
        added: Tensor = features + self.of_encoded(encoded) + self.of_decoded(decoded)
        return added


class ImagePooling(nn.Module):
    """The mean of the features over the image, through a 1x1 convolution.

    Args:
        in_channels: of the features.
        out_channels: of the result.
        norm: whether the result is batch-normalised; the convolution has a bias where it is not.

    Shape:
        features [B, in_channels, h, w] -> [B, out_channels, 1, 1].

    Raises:
        ValueError: in training, a batch of one image whose mean is to be normalised: one value has no variance.

    Source: Liu et al., ParseNet, https://arxiv.org/abs/1506.04579.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm: bool = True) -> None:
        super().__init__()
        self.project = nn.Conv2d(in_channels, out_channels, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        # The class that --trainer.sync_batchnorm puts in its place sees the images of all processes.
        if isinstance(self.norm, nn.BatchNorm2d) and self.norm.training and len(features) == 1:
            raise ValueError(
                "images must be two or more in a training batch, got one: batch norm of their pooled features needs "
                "two; train with pooling_norm=False or with synchronised batch norm"
            )
        pooled: Tensor = self.norm(self.project(features.mean(dim=(2, 3), keepdim=True))).relu()
        return pooled


class _Encoder(NamedTuple):
    stem: nn.Module
    levels: nn.ModuleList
    stem_channels: int
    channels: list[int]  # of the levels
    output_stride: int


def _encoder(name: str, deep_stem: bool, weights: str | None, options: dict[str, Any]) -> _Encoder:
    """A backbone, taken apart."""
    if name == "small":
        if deep_stem:
            raise BackboneError("backbone 'small' is no ResNet and has no deep stem; leave deep_stem out")
        if weights is not None:
            raise CheckpointError(f"backbone small has no pretrained weights, neither {weights!r} nor others")
        if unknown := sorted(options.keys() - {"widths", "depth"}):
            raise BackboneError(f"backbone small takes the options widths, depth, got {unknown[0]}")
        return _small_encoder(**options)
    network: Any = Backbone(name, stages=4, deep_stem=deep_stem, ceil_mode=False, weights=weights, options=options)
    parts = dict(network.body.named_children())
    names = [f"layer{number}" for number in (1, 2, 3, 4)]
    if not {"conv1", "maxpool", *names} <= parts.keys():
        raise BackboneError(f"backbone {name!r} is no ResNet: SPGNet takes timm's ResNets and 'small'")
    if weights is None:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # timm's residual blocks would begin as the identity
    stem = nn.Sequential(OrderedDict((part, module) for part, module in parts.items() if part not in names))
    stem_channels = next(module.in_channels for module in parts["layer1"].modules() if isinstance(module, nn.Conv2d))
    return _Encoder(stem, nn.ModuleList(parts[part] for part in names), stem_channels, network.channels, 32)


def _small_encoder(widths: Sequence[int] = (16, 32, 64, 64), depth: int = 1) -> _Encoder:
    if len(widths) != 4 or min(widths) < 1 or depth < 1:
        raise BackboneError(f"backbone small takes four widths and a depth, 1 or more each, got {widths} and {depth}")
    stem = convolution(3, widths[0], 3, stride=2)
    levels = nn.ModuleList()
    channels = widths[0]
    for number, width in enumerate(widths):
        layers = list(convolution(channels, width, 3, stride=2 if number else 1))
        for _ in range(depth - 1):
            layers += convolution(width, width, 3)
        levels.append(nn.Sequential(*layers))
        channels = width
    _initialize([stem, levels])
    return _Encoder(stem, levels, widths[0], list(widths), 16)


def _initialize(parts: Iterable[nn.Module]) -> None:
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
