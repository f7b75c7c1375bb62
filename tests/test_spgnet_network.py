"""SPGNet's network: guidance by the prediction, stages, aggregation, sizes, parameter counts."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gingham.errors import CheckpointError
from gingham.methods.spgnet.network import (
    CrossStageAggregation,
    EncoderDecoder,
    ImagePooling,
    SemanticPredictionGuidance,
    SPGNet,
    SPGNetOutput,
)
from gingham.nn.backbone import BackboneError
from gingham.nn.inference import whole_image

SMALL = {"backbone": "small", "num_classes": 5, "decoder_channels": 8, "backbone_options": {"widths": [4, 6, 8, 10]}}
# A ResNet of one narrow block a level
RESNET = {"backbone": "resnet18", "num_classes": 5, "decoder_channels": 8}
RESNET |= {"backbone_options": {"layers": [1, 1, 1, 1], "channels": [4, 6, 8, 10]}}


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 48)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(**options) -> SPGNet:
    torch.manual_seed(0)
    return SPGNet(**{**SMALL, **options})


def guidance(channels: int = 6, num_classes: int = 4, **options) -> SemanticPredictionGuidance:
    torch.manual_seed(0)
    return SemanticPredictionGuidance(channels, num_classes, **options)


class Guided(nn.Module):
    """Features guided by a prediction from themselves, as between two stages."""

    def __init__(self, channels: int = 6, num_classes: int = 4, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.guide = SemanticPredictionGuidance(channels, num_classes, **options)

    def forward(self, features: Tensor) -> Tensor:
        return self.guide(features, self.classifier(features))


GATES = [
    {},
    {"psi": "softmax"},
    {"gate_channels": 1},
    {"residual": False},
    {"detach_guidance": True},
    {"gate_act": "tanh"},
    {"gate_act": "softmax"},
]


# --- semantic prediction guidance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", GATES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3)])
def test_guided_features_keep_their_shape(options: dict, shape: tuple[int, int]) -> None:
    for batch, channels, classes in ((1, 6, 2), (3, 4, 19)):
        features = torch.randn(batch, channels, *shape)
        assert Guided(channels, classes, **options)(features).shape == features.shape


def test_gate_stays_within_its_range() -> None:
    features, logits = torch.rand(2, 6, 5, 7), torch.randn(2, 4, 5, 7) * 3
    guided = guidance()(features, logits)
    assert (features <= guided).all() and (guided <= 2 * features).all()
    assert guided.ne(features).any() and guided.ne(2 * features).any()
    guided = guidance(residual=False)(features, logits)
    assert (guided >= 0).all() and (guided <= features).all() and guided.any()


@pytest.mark.parametrize("options", GATES, ids=str)
def test_guidance_looks_at_one_position_only(options: dict) -> None:
    features = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(Guided(3, **options).double(), features)
    over_space = jacobian.squeeze().permute(0, 3, 1, 2, 4, 5).reshape(9, 8, 8)
    assert over_space[:, ~torch.eye(8, dtype=torch.bool)].eq(0).all()
    assert over_space.diagonal(dim1=1, dim2=2).ne(0).any(dim=0).all()


@pytest.mark.parametrize("options", GATES, ids=str)
def test_guidance_commutes_with_a_permutation_of_the_pixels(options: dict) -> None:
    guided = Guided(**options)
    features = torch.randn(2, 6, 1, 15)
    order = torch.randperm(15)
    torch.testing.assert_close(guided(features[..., order]), guided(features)[..., order])
    standing = features.reshape(2, 6, 3, 5)
    torch.testing.assert_close(guided(standing.mT), guided(standing).mT)


@pytest.mark.parametrize(("residual", "factor"), [(True, 1.5), (False, 0.5)])
def test_zero_gate_is_one_half(residual: bool, factor: float) -> None:
    features, logits = torch.randn(2, 6, 5, 7), torch.randn(2, 4, 5, 7)
    guided = guidance(residual=residual, gate_zero_init=True)(features, logits)
    torch.testing.assert_close(guided, factor * features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bias", "factor"), [(50.0, 2), (-50.0, 1)])
def test_saturated_gate_passes_all_or_nothing(dtype: torch.dtype, bias: float, factor: int) -> None:
    module = guidance().to(dtype)
    nn.init.constant_(module.gate.bias, bias)
    features = torch.randn(2, 6, 5, 7).to(dtype).requires_grad_()
    guided = module(features, torch.randn(2, 4, 5, 7).to(dtype))
    torch.testing.assert_close(guided, factor * features)
    (gradient,) = torch.autograd.grad(guided.sum(), features)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (1.7310586, 3.7615942)),
        ({"residual": False}, (0.7310586, 1.7615942)),
        ({"psi": "softmax"}, (1.5668330, 3.3500751)),
    ],
    ids=str,
)
def test_one_pixel_goldens(options: dict, expected: tuple[float, float]) -> None:
    module = SemanticPredictionGuidance(2, 2, **options).double()
    with torch.no_grad():
        module.gate.weight.copy_(torch.eye(2)[..., None, None])
        module.gate.bias.zero_()
    features = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    assert module(features, features).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_softmax_gates_share_one_among_the_channels() -> None:
    module = guidance(gate_act="softmax", residual=False)
    weights = module(torch.ones(2, 6, 3, 4), torch.randn(2, 4, 3, 4))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 3, 4))


def test_one_gate_channel_weights_all_channels_alike() -> None:
    module = guidance(gate_channels=1, residual=False)
    weights = module(torch.ones(2, 6, 3, 4), torch.randn(2, 4, 3, 4))
    torch.testing.assert_close(weights, weights[:, :1].expand_as(weights))
    assert count(module) == 5


@pytest.mark.parametrize("psi", ["identity", "softmax"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("detach_guidance", [True, False])
def test_gradients_are_those_of_the_closed_form(psi: str, residual: bool, detach_guidance: bool) -> None:
    guided = Guided(3, 4, psi=psi, residual=residual, detach_guidance=detach_guidance).double()
    features = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    if not detach_guidance:  # what is detached has no gradient in autograd, and one in the differences
        assert torch.autograd.gradcheck(guided, features)
    upstream = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    prediction_gradient = torch.randn(2, 4, 2, 3, dtype=torch.float64)  # of the loss on P
    ((guided(features) * upstream).sum() + (guided.classifier(features) * prediction_gradient).sum()).backward()

    weight_p, weight_g = guided.classifier.weight[..., 0, 0], guided.guide.gate.weight[..., 0, 0]
    with torch.no_grad():
        logits = guided.classifier(features)
        seen = logits.softmax(1) if psi == "softmax" else logits
        gate = torch.sigmoid(torch.einsum("ck,bkhw->bchw", weight_g, seen) + guided.guide.gate.bias[:, None, None])
        score = upstream * features * gate * (1 - gate)
        of_seen = torch.einsum("ck,bchw->bkhw", weight_g, score)
        if psi == "softmax":
            of_seen = seen * (of_seen - (seen * of_seen).sum(1, keepdim=True))
        of_logits = prediction_gradient + (0 if detach_guidance else of_seen)
        of_features = upstream * (gate + residual) + torch.einsum("kc,bkhw->bchw", weight_p, of_logits)
    torch.testing.assert_close(features.grad, of_features)
    torch.testing.assert_close(guided.guide.gate.bias.grad, score.sum((0, 2, 3)))
    of_gate = torch.einsum("bchw,bkhw->ck", score, seen)
    torch.testing.assert_close(guided.guide.gate.weight.grad[..., 0, 0], of_gate)
    of_classifier = torch.einsum("bkhw,bchw->kc", of_logits, features.detach())
    torch.testing.assert_close(guided.classifier.weight.grad[..., 0, 0], of_classifier)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"psi": "logits"}, "psi must be 'identity' or 'softmax', got 'logits'"),
        ({"gate_channels": 3}, "gate_channels must be None or 1, got 3"),
        ({"gate_act": "relu"}, "gate_act must be 'sigmoid', 'tanh' or 'softmax', got 'relu'"),
        ({"gate_act": "softmax", "gate_channels": 1}, "gate_act 'softmax' needs more than one channel"),
    ],
    ids=str,
)
def test_gate_options_out_of_range_are_named(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SemanticPredictionGuidance(6, 4, **options)


# --- size and cost ---------------------------------------------------------------------------------------------------

ONE_STAGE = {"stages": 1}
COUNTERPART = {"stages": 1, "backbone": "resnet101"}
TWO_STAGES = {"aggregation": False}


def on_meta(**options) -> SPGNet:
    with torch.device("meta"):
        return SPGNet(**options).eval()


@pytest.mark.parametrize(
    ("options", "parameters", "gigaflops"),
    [
        (ONE_STAGE, 25_304_403, 399),
        (COUNTERPART, 44_296_531, 710),
        (TWO_STAGES, 50_620_902, 795),
        ({}, 57_189_862, 895),
    ],
    ids=str,
)
def test_parameters_and_operations_are_those_of_the_specification(
    options: dict, parameters: int, gigaflops: int
) -> None:
    model = on_meta(**options)
    assert count(model) == parameters
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 256, 512, device="meta"))
    assert 16 * counter.get_total_flops() / 1e9 == pytest.approx(gigaflops, rel=1e-3)  # 16 times the pixels


def test_gate_and_transition_have_the_parameters_of_the_specification() -> None:
    model = on_meta()
    assert [count(gate) for gate in model.gates] == [5_120]
    assert [count(transition) for transition in model.transitions] == [16_512]


def test_two_stages_cost_about_what_a_deeper_single_one_does() -> None:
    costs = []
    for options in (TWO_STAGES, COUNTERPART):
        model = on_meta(**options)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 256, 512, device="meta"))
        costs.append((count(model), counter.get_total_flops()))
    for ours, theirs in zip(*costs, strict=True):
        assert 0.8 <= ours / theirs <= 1.2


@pytest.mark.parametrize(
    ("size", "logits"), [((512, 1024), (128, 256)), ((769, 769), (193, 193)), ((129, 97), (33, 25)), ((33, 33), (9, 9))]
)
@pytest.mark.parametrize("deep_stem", [False, True])
def test_every_size_comes_back(size: tuple[int, int], logits: tuple[int, int], deep_stem: bool) -> None:
    model = on_meta(deep_stem=deep_stem)
    images = torch.empty(1, 3, *size, device="meta")
    output = model(images)
    assert [stage.shape for stage in output.stages] == [(1, 19, *logits)] * 2
    assert whole_image(model, images, align_corners=model.corners_align(size)).shape == (1, 19, *size)


@pytest.mark.parametrize("size", [(1, 1), (5, 33), (31, 64), (65, 17)])
@pytest.mark.parametrize("options", [SMALL, RESNET], ids=["small", "resnet"])
def test_odd_sizes_give_numbers(size: tuple[int, int], options: dict) -> None:
    torch.manual_seed(0)
    model = SPGNet(**options).eval()
    stride = 2 if options is SMALL else 4
    logits = model(torch.randn(1, 3, *size)).logits
    assert logits.shape == (1, 5, -(-size[0] // stride), -(-size[1] // stride))
    assert logits.isfinite().all()


def test_corners_align_where_grids_meet() -> None:
    auto = on_meta()
    for size, aligned in (((769, 769), True), ((129, 97), True), ((512, 1024), False), ((769, 512), False)):
        assert auto.corners_align(size) is aligned
    assert on_meta(align_corners=True).corners_align((512, 1024)) is True
    assert on_meta(align_corners=False).corners_align((769, 769)) is False


def test_corner_rule_reaches_the_decoder(images: Tensor) -> None:
    results = {rule: small(align_corners=rule).eval()(images).logits for rule in (True, False, "auto")}
    assert torch.equal(results["auto"], results[False])
    assert not torch.allclose(results["auto"], results[True])
    images = torch.randn(1, 3, 33, 49)
    results = {rule: small(align_corners=rule).eval()(images).logits for rule in (True, False, "auto")}
    assert torch.equal(results["auto"], results[True])
    assert not torch.allclose(results["auto"], results[False])


# --- stages ----------------------------------------------------------------------------------------------------------


def test_one_stage_is_the_plain_encoder_decoder(images: Tensor) -> None:
    model = small(stages=1).eval()
    assert len(model.stages) == 1 and not model.gates and not model.transitions
    assert not any(isinstance(module, CrossStageAggregation) for module in model.modules())
    (stage,) = model.stages
    encoded, features = [], model.stem(images)
    for level in stage.encoder:
        features = level(features)
        encoded.append(features)
    decoded = stage.blocks[3](stage.laterals[3](encoded[3]) + stage.pooling(encoded[3]))
    for level in (2, 1, 0):
        lateral = stage.laterals[level](encoded[level])
        decoded = stage.blocks[level](lateral + F.interpolate(decoded, lateral.shape[-2:], mode="bilinear"))
    output = model(images)
    assert torch.equal(output.logits, stage.classifier(decoded))
    assert [torch.equal(output.logits, logits) for logits in output.stages] == [True]


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_outputs_are_one_map_per_stage_and_the_last_one(stages: int, images: Tensor) -> None:
    output = small(stages=stages)(images)
    assert isinstance(output, SPGNetOutput)
    assert [logits.shape for logits in output.stages] == [(2, 5, 16, 24)] * stages
    assert output.logits is output.stages[-1]
    for first in range(stages):
        for second in range(first):
            assert not torch.allclose(output.stages[first], output.stages[second])


@pytest.mark.parametrize("options", [SMALL, RESNET], ids=["small", "resnet"])
@pytest.mark.parametrize("stages", [2, 3])
def test_every_weight_gets_a_gradient(options: dict, stages: int, images: Tensor) -> None:
    torch.manual_seed(0)
    model = SPGNet(**options, stages=stages)
    model(images).logits.square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    # Through batch norm of two values a mean has a gradient of almost nothing.
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if ".pooling." not in name)


def test_next_stage_gets_the_guided_features(images: Tensor) -> None:
    model = small(aggregation=False).eval()
    first = model.stages[0](model.stem(images))
    guided = model.gates[0](first.decoded[0], first.logits)
    second = model.stages[1](model.transitions[0](guided))
    torch.testing.assert_close(model(images).logits, second.logits)
    plain = small(aggregation=False, guidance=False).eval()
    assert not plain.gates
    second = model.stages[1](model.transitions[0](first.decoded[0]))
    torch.testing.assert_close(plain(images).logits, second.logits)


def test_weights_begin_alike_with_guidance_and_without() -> None:
    guided, plain = small().state_dict(), small(guidance=False).state_dict()
    assert guided.keys() - plain.keys() == {"gates.0.gate.weight", "gates.0.gate.bias"}
    assert all(torch.equal(guided[name], value) for name, value in plain.items())


def test_gate_options_reach_the_gates() -> None:
    options = {"psi": "softmax", "residual": False, "detach_guidance": True, "gate_act": "tanh"}
    (gate,) = small(**options).gates
    assert {name: getattr(gate, name) for name in options} == options
    assert small(gate_channels=1).gates[0].gate.out_channels == 1
    assert not small(gate_zero_init=True).gates[0].gate.weight.any()


def test_each_stage_has_weights_of_its_own() -> None:
    first, second = small(aggregation=False).stages
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one is not other
        if one.dim() > 1:
            assert not torch.equal(one, other)


def test_aggregation_with_zeroed_weights_is_none(images: Tensor) -> None:
    model, plain = small().eval(), small(aggregation=False).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".aggregation." not in name})
    assert not torch.allclose(model(images).logits, plain(images).logits)
    for module in model.modules():
        if isinstance(module, CrossStageAggregation):
            for norm in (module.of_encoded[1], module.of_decoded[1]):
                nn.init.zeros_(norm.weight)
                nn.init.zeros_(norm.bias)
    torch.testing.assert_close(model(images).logits, plain(images).logits)


def test_aggregation_feeds_the_next_level(images: Tensor) -> None:
    model = small().eval()
    first = model.stages[0](model.stem(images))
    stage = model.stages[1]
    features = model.transitions[0](model.gates[0](first.decoded[0], first.logits))
    for level in range(4):
        features = stage.aggregation[level](stage.encoder[level](features), first.encoded[level], first.decoded[level])
        torch.testing.assert_close(
            stage(model.transitions[0](model.gates[0](first.decoded[0], first.logits)), first).encoded[level], features
        )


# --- the image's mean ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
def test_zeroed_pooling_is_none_and_its_part_is_constant_over_the_image(norm: bool, images: Tensor) -> None:
    model, plain = small(pooling_norm=norm).eval(), small(image_pooling=False).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".pooling." not in name})
    assert not torch.allclose(model(images).logits, plain(images).logits)
    pooling = model.stages[0].pooling
    assert pooling(torch.randn(2, 10, 5, 7)).shape == (2, 8, 1, 1)
    for stage in model.stages:
        nn.init.zeros_(stage.pooling.project.weight)
        nn.init.zeros_(stage.pooling.norm.bias if norm else stage.pooling.project.bias)
    torch.testing.assert_close(model(images).logits, plain(images).logits)


def test_pooling_takes_the_mean_over_rows_and_columns() -> None:
    pooling = ImagePooling(3, 4, norm=False)
    features = torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(pooling(features), pooling(features.mean((2, 3), keepdim=True)))


def test_batch_of_one_is_refused_where_it_cannot_be_normalised(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^images must be two or more in a training batch, got one: .*pooling_norm=F"):
        small()(images[:1])
    frozen = small()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for model in (small(pooling_norm=False), small(image_pooling=False), small().eval(), frozen):
        assert model(images[:1]).logits.isfinite().all()


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50d", "seresnet50"])
def test_resnets_of_either_kind_will_do(name: str) -> None:
    model = on_meta(backbone=name, decoder_channels=32)
    assert model(torch.empty(2, 3, 64, 96, device="meta")).logits.shape == (2, 19, 16, 24)
    widths = [64, 128, 256, 512] if name == "resnet18" else [256, 512, 1024, 2048]
    assert [lateral[0].in_channels for lateral in model.stages[1].laterals] == widths


def test_encoders_are_not_dilated_and_begin_as_functions_of_their_input() -> None:
    torch.manual_seed(0)
    model = SPGNet(**RESNET)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert {convolution.dilation for convolution in convolutions} == {(1, 1)}
    assert all(module.weight.eq(1).all() for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_new_convolutions_begin_as_the_specification_has_it() -> None:
    torch.manual_seed(0)
    stage = EncoderDecoder(nn.ModuleList(nn.Identity() for _ in range(4)), [64] * 4, 16, decoder_channels=256)
    for layer in (stage.laterals[0][0], stage.blocks[0].conv2, stage.classifier[1]):
        fan_out = layer.out_channels * layer.kernel_size[0] * layer.kernel_size[1]
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert not stage.classifier[1].bias.any()


def test_classifiers_may_begin_small() -> None:
    torch.manual_seed(0)
    model = SPGNet(**SMALL | {"num_classes": 50, "decoder_channels": 64}, classifier_std=0.01)
    for stage in model.stages:
        assert stage.classifier[1].weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert stage.laterals[0][0].weight.std().item() > 0.1


def test_dropout_is_before_every_classifier() -> None:
    assert [stage.classifier[0].p for stage in small(dropout=0.1).stages] == [0.1, 0.1]
    assert [stage.classifier[0].p for stage in small().stages] == [0.0, 0.0]


def test_backbone_weights_are_those_of_every_stage(tmp_path: Path) -> None:
    torch.manual_seed(3)
    source = SPGNet(**RESNET, stages=1)
    state = {
        f"layer{level + 1}.{name}": value
        for level in range(4)
        for name, value in source.stages[0].encoder[level].state_dict().items()
    }
    state |= source.stem.state_dict()
    torch.save(state, tmp_path / "backbone.pth")
    model = SPGNet(**RESNET, backbone_weights=str(tmp_path / "backbone.pth"))
    for stage in model.stages:
        for name, value in stage.encoder.state_dict().items():
            assert torch.equal(value, source.stages[0].encoder.state_dict()[name])
    assert torch.equal(model.stem.conv1.weight, source.stem.conv1.weight)
    assert not torch.equal(model.stages[0].laterals[0][0].weight, model.stages[1].laterals[0][0].weight)


def test_image_does_not_depend_on_its_batch(images: Tensor) -> None:
    model = small().eval()
    alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(model(images).logits, alone, rtol=1e-5, atol=1e-5)


def test_channels_last_changes_no_result(images: Tensor) -> None:
    model = small().eval()
    expected = model(images).logits
    result = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_save_and_load_give_the_same_model(tmp_path: Path, images: Tensor) -> None:
    model = small(stages=3, psi="softmax", residual=False).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["psi"] == "softmax" and config["stages"] == 3
    loaded = SPGNet.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_compiled_network_gives_the_same(images: Tensor) -> None:
    model = small().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).stages, model(images).stages)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"stages": 0}, "stages must be at least 1, got 0"),
        ({"decoder_channels": 6}, "decoder_channels must be a multiple of 4, got 6"),
        ({"classifier_std": -0.1}, "classifier_std must be 0 or more, got -0.1"),
        ({"align_corners": "always"}, "align_corners must be True, False or 'auto', got 'always'"),
        ({"psi": "logits"}, "psi must be"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        small(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backbone": "mobilenetv2_100"}, "backbone 'mobilenetv2_100' is no ResNet"),
        ({"backbone": "resnet5"}, "unknown backbone 'resnet5'"),
        ({"backbone": "small", "deep_stem": True}, "'small' is no ResNet and has no deep stem"),
        ({"backbone": "small", "backbone_options": {"widths": [8, 8]}}, r"four widths and a depth.*\[8, 8\] and 1"),
        ({"backbone": "small", "backbone_options": {"width": 8}}, "small takes the options widths, depth, got width"),
    ],
    ids=str,
)
def test_backbones_that_will_not_do_are_named(options: dict, text: str) -> None:
    with pytest.raises(BackboneError, match=text):
        SPGNet(**options)


def test_small_backbone_has_no_pretrained_weights() -> None:
    with pytest.raises(CheckpointError, match="backbone small has no pretrained weights, neither 'timm'"):
        small(backbone_weights="timm")
