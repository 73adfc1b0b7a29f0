"""Every layer against PyTorch: forward, gradients, state and text, in float32 and float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def shapes_case(name: str, build: Any, *shapes: tuple[int, ...], **options: Any) -> Any:
    return pytest.param(build, shapes, options, id=name)


ELEMENTWISE = [
    shapes_case("relu", lambda nn: nn.ReLU(), (3, 5)),
    shapes_case("relu6", lambda nn: nn.ReLU6(), (3, 5)),
    shapes_case("silu", lambda nn: nn.SiLU(), (3, 5)),
    shapes_case("mish", lambda nn: nn.Mish(), (3, 5)),
    shapes_case("elu", lambda nn: nn.ELU(0.7), (3, 5)),
    shapes_case("leaky_relu", lambda nn: nn.LeakyReLU(0.2), (3, 5)),
    shapes_case("hardtanh", lambda nn: nn.Hardtanh(-0.5, 0.7), (3, 5)),
    shapes_case("gelu", lambda nn: nn.GELU(), (3, 5)),
    shapes_case("gelu tanh", lambda nn: nn.GELU("tanh"), (3, 5)),
    shapes_case("softplus", lambda nn: nn.Softplus(2.0, 1.5), (3, 5)),
    shapes_case("logsigmoid", lambda nn: nn.LogSigmoid(), (3, 5)),
    shapes_case("sigmoid", lambda nn: nn.Sigmoid(), (3, 5)),
    shapes_case("tanh", lambda nn: nn.Tanh(), (3, 5)),
    shapes_case("glu", lambda nn: nn.GLU(1), (3, 6)),
    shapes_case("softmax", lambda nn: nn.Softmax(dim=1), (3, 5, 2)),
    shapes_case("log_softmax", lambda nn: nn.LogSoftmax(dim=-1), (3, 5, 2)),
    shapes_case("selu", lambda nn: nn.SELU(), (3, 5)),
    shapes_case("celu", lambda nn: nn.CELU(0.5), (3, 5)),
    shapes_case("hardswish", lambda nn: nn.Hardswish(), (3, 5)),
    shapes_case("hardshrink", lambda nn: nn.Hardshrink(0.7), (3, 5)),
    shapes_case("softshrink", lambda nn: nn.Softshrink(0.7), (3, 5)),
    shapes_case("softsign", lambda nn: nn.Softsign(), (3, 5)),
    shapes_case("tanhshrink", lambda nn: nn.Tanhshrink(), (3, 5)),
    shapes_case("prelu", lambda nn: nn.PReLU(), (3, 5)),
    shapes_case("prelu channels", lambda nn: nn.PReLU(5, init=0.1), (3, 5, 2)),
]

LINEAR = [
    shapes_case("identity", lambda nn: nn.Identity(1, a=2), (3, 4)),
    shapes_case("flatten", lambda nn: nn.Flatten(), (3, 4, 5)),
    shapes_case("flatten some", lambda nn: nn.Flatten(1, 2), (3, 4, 5, 2)),
    shapes_case("unflatten", lambda nn: nn.Unflatten(1, (2, 3)), (4, 6, 2), text=False),
    shapes_case("linear", lambda nn: nn.Linear(4, 3), (5, 4)),
    shapes_case("linear no bias", lambda nn: nn.Linear(4, 3, bias=False), (2, 5, 4)),
    shapes_case("linear vector", lambda nn: nn.Linear(4, 3), (4,)),
    shapes_case("linear empty batch", lambda nn: nn.Linear(4, 3), (0, 4)),
    shapes_case("bilinear", lambda nn: nn.Bilinear(3, 4, 5), (2, 3), (2, 4)),
    shapes_case("sequential", lambda nn: nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (5, 4)),
]

CONVOLUTION = [
    shapes_case("conv1d", lambda nn: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    shapes_case("conv1d same", lambda nn: nn.Conv1d(3, 4, 4, padding="same"), (2, 3, 9)),
    shapes_case("conv2d", lambda nn: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 5)),
    shapes_case("conv2d unbatched", lambda nn: nn.Conv2d(3, 4, 3), (3, 6, 5)),
    shapes_case(
        "conv2d all", lambda nn: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), 2), (2, 4, 7, 8)
    ),
    shapes_case("conv2d depthwise", lambda nn: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    shapes_case(
        "conv2d same", lambda nn: nn.Conv2d(3, 4, (3, 4), padding="same", dilation=2), (2, 3, 8, 9)
    ),
    shapes_case("conv2d valid", lambda nn: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 6, 6)),
    shapes_case(
        "conv2d reflect",
        lambda nn: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect", bias=False),
        (2, 3, 6, 5),
    ),
    shapes_case(
        "conv2d replicate",
        lambda nn: nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"),
        (2, 3, 6, 5),
    ),
    shapes_case(
        "conv2d circular",
        lambda nn: nn.Conv2d(3, 4, (3, 4), padding="same", padding_mode="circular"),
        (2, 3, 6, 5),
    ),
    shapes_case("conv3d", lambda nn: nn.Conv3d(2, 3, 3, 2, 1), (2, 2, 5, 6, 4)),
    shapes_case("conv_transpose1d", lambda nn: nn.ConvTranspose1d(3, 4, 3, 2), (2, 3, 5)),
    shapes_case(
        "conv_transpose2d",
        lambda nn: nn.ConvTranspose2d(4, 6, 3, (2, 3), 1, 1, 2, False, 2),
        (2, 4, 5, 4),
    ),
    shapes_case(
        "conv_transpose2d size",
        lambda nn: nn.ConvTranspose2d(3, 2, 3, 2, 1),
        (2, 3, 4, 5),
        output_size=(8, 9),
    ),
    shapes_case("conv_transpose3d", lambda nn: nn.ConvTranspose3d(2, 3, 2, 2), (1, 2, 3, 2, 3)),
]

NORMALIZATION = [
    shapes_case("batch_norm1d", lambda nn: nn.BatchNorm1d(4), (5, 4)),
    shapes_case("batch_norm1d sequence", lambda nn: nn.BatchNorm1d(4), (5, 4, 3)),
    shapes_case("batch_norm2d", lambda nn: nn.BatchNorm2d(3, momentum=0.3), (4, 3, 5, 2)),
    shapes_case("batch_norm2d mean", lambda nn: nn.BatchNorm2d(3, momentum=None), (4, 3, 5, 2)),
    shapes_case("batch_norm2d plain", lambda nn: nn.BatchNorm2d(3, affine=False), (4, 3, 5, 2)),
    shapes_case(
        "batch_norm2d untracked",
        lambda nn: nn.BatchNorm2d(3, track_running_stats=False),
        (4, 3, 5, 2),
    ),
    shapes_case("batch_norm2d no bias", lambda nn: nn.BatchNorm2d(3, bias=False), (4, 3, 5, 2)),
    shapes_case("batch_norm3d", lambda nn: nn.BatchNorm3d(2), (3, 2, 3, 2, 4)),
    shapes_case("instance_norm1d", lambda nn: nn.InstanceNorm1d(3), (2, 3, 7)),
    shapes_case("instance_norm2d", lambda nn: nn.InstanceNorm2d(3, affine=True), (2, 3, 5, 4)),
    shapes_case(
        "instance_norm2d tracked",
        lambda nn: nn.InstanceNorm2d(3, track_running_stats=True),
        (2, 3, 5, 4),
    ),
    shapes_case("instance_norm2d unbatched", lambda nn: nn.InstanceNorm2d(3), (3, 5, 4)),
    shapes_case("layer_norm", lambda nn: nn.LayerNorm(6), (2, 3, 6)),
    shapes_case("layer_norm two", lambda nn: nn.LayerNorm((3, 6), 1e-3), (2, 3, 6)),
    shapes_case("layer_norm no bias", lambda nn: nn.LayerNorm(6, bias=False), (2, 3, 6)),
    shapes_case(
        "layer_norm plain", lambda nn: nn.LayerNorm(6, elementwise_affine=False), (2, 3, 6)
    ),
    shapes_case("rms_norm", lambda nn: nn.RMSNorm(6), (2, 3, 6)),
    shapes_case("rms_norm eps", lambda nn: nn.RMSNorm((3, 6), eps=1e-3), (2, 3, 6)),
    shapes_case("group_norm", lambda nn: nn.GroupNorm(2, 6), (2, 6, 3, 4)),
    shapes_case("group_norm plain", lambda nn: nn.GroupNorm(3, 6, affine=False), (2, 6)),
]

SPATIAL = [
    shapes_case("max_pool1d", lambda nn: nn.MaxPool1d(3, 2, 1), (2, 3, 9)),
    shapes_case("max_pool2d", lambda nn: nn.MaxPool2d(2), (2, 3, 6, 7)),
    shapes_case(
        "max_pool2d all", lambda nn: nn.MaxPool2d((3, 2), (2, 1), 1, 2, False, True), (2, 3, 8, 7)
    ),
    shapes_case(
        "max_pool2d indices", lambda nn: nn.MaxPool2d(2, return_indices=True), (2, 3, 6, 6)
    ),
    shapes_case("avg_pool1d", lambda nn: nn.AvgPool1d(3, 2, 1), (2, 3, 9)),
    shapes_case("avg_pool2d", lambda nn: nn.AvgPool2d(3, 2, 1, True, False), (2, 3, 6, 7)),
    shapes_case("avg_pool2d sum", lambda nn: nn.AvgPool2d(2, divisor_override=1), (2, 3, 6, 6)),
    shapes_case("adaptive_avg_pool1d", lambda nn: nn.AdaptiveAvgPool1d(4), (2, 3, 9)),
    shapes_case("adaptive_avg_pool2d", lambda nn: nn.AdaptiveAvgPool2d((3, None)), (2, 3, 7, 5)),
    shapes_case("adaptive_max_pool1d", lambda nn: nn.AdaptiveMaxPool1d(4), (2, 3, 9)),
    shapes_case("adaptive_max_pool2d", lambda nn: nn.AdaptiveMaxPool2d((3, 2)), (2, 3, 7, 5)),
    shapes_case("max_pool3d", lambda nn: nn.MaxPool3d(2, 1), (2, 2, 4, 3, 5)),
    shapes_case("avg_pool3d", lambda nn: nn.AvgPool3d(2, padding=1), (2, 2, 4, 3, 5)),
    shapes_case("adaptive_avg_pool3d", lambda nn: nn.AdaptiveAvgPool3d(2), (2, 2, 4, 3, 5)),
    shapes_case("adaptive_max_pool3d", lambda nn: nn.AdaptiveMaxPool3d(2), (2, 2, 4, 3, 5)),
    shapes_case("upsample nearest", lambda nn: nn.Upsample(scale_factor=2), (2, 3, 4, 5)),
    shapes_case("upsample size", lambda nn: nn.Upsample(size=(7, 6)), (2, 3, 4, 5)),
    shapes_case(
        "upsample bilinear", lambda nn: nn.Upsample(scale_factor=2, mode="bilinear"), (2, 3, 4, 5)
    ),
    shapes_case(
        "upsample corners",
        lambda nn: nn.Upsample(size=(7, 6), mode="bilinear", align_corners=True),
        (2, 3, 4, 5),
    ),
    shapes_case("pixel_shuffle", lambda nn: nn.PixelShuffle(2), (2, 8, 3, 4)),
    shapes_case("pixel_unshuffle", lambda nn: nn.PixelUnshuffle(2), (2, 3, 4, 6)),
    shapes_case("zero_pad2d", lambda nn: nn.ZeroPad2d((1, 2, 3, 0)), (2, 3, 4, 5)),
    shapes_case("constant_pad1d", lambda nn: nn.ConstantPad1d(2, 1.5), (2, 3, 4)),
    shapes_case("reflection_pad2d", lambda nn: nn.ReflectionPad2d((1, 2, 3, 0)), (2, 3, 4, 5)),
    shapes_case("replication_pad2d", lambda nn: nn.ReplicationPad2d((1, 2, 3, 0)), (2, 3, 4, 5)),
    shapes_case("circular_pad2d", lambda nn: nn.CircularPad2d((1, 2, 3, 0)), (2, 3, 4, 5)),
    shapes_case("dropout evaluation", lambda nn: nn.Dropout(0.3), (3, 4), training=False),
    shapes_case("dropout2d evaluation", lambda nn: nn.Dropout2d(0.3), (3, 4, 2, 2), training=False),
]


@DTYPES
@pytest.mark.parametrize(
    ("build", "shapes", "options"),
    [*ELEMENTWISE, *LINEAR, *CONVOLUTION, *NORMALIZATION, *SPATIAL],
)
def test_same_as_torch(
    build: Any, shapes: Any, options: Any, dtype: str, same_as_torch: Any, random: Any
) -> None:
    # Values that no two of are close, so that maxima and kinks are the same in both.
    inputs = [
        (random.permutation(int(np.prod(shape))).reshape(shape) - np.prod(shape) / 2.0 + 0.25)
        / np.prod(shape).clip(1)
        * 3
        for shape in shapes
    ]
    same_as_torch(build, inputs, dtype, **options)


def test_hardsigmoid(same_as_torch: Any, random: Any) -> None:
    # In float32 alone, as PyTorch's float64 has a sixth rounded to float32 in its gradient.
    same_as_torch(lambda nn: nn.Hardsigmoid(), [3 * random.standard_normal((3, 5))], "float32")


@pytest.mark.parametrize(("build", "shapes", "options"), NORMALIZATION)
def test_normalization_in_evaluation(
    build: Any, shapes: Any, options: Any, same_as_torch: Any, random: Any
) -> None:
    inputs = [random.standard_normal(shape) for shape in shapes]
    same_as_torch(build, inputs, "float64", training=False, **options)


@DTYPES
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding(padding_idx: Any, dtype: str, same_as_torch: Any) -> None:
    indices = np.array([[0, 2, 4], [2, 3, 4]])
    same_as_torch(lambda nn: nn.Embedding(5, 3, padding_idx), [indices], dtype)


LOSSES = [
    pytest.param(lambda nn: nn.MSELoss(), id="mse"),
    pytest.param(lambda nn: nn.MSELoss(reduction="sum"), id="mse sum"),
    pytest.param(lambda nn: nn.L1Loss(reduction="none"), id="l1"),
    pytest.param(lambda nn: nn.SmoothL1Loss(beta=0.5), id="smooth l1"),
    pytest.param(lambda nn: nn.HuberLoss(delta=0.5), id="huber"),
    pytest.param(lambda nn: nn.BCEWithLogitsLoss(), id="bce logits"),
]


@DTYPES
@pytest.mark.parametrize("build", LOSSES)
def test_loss(build: Any, dtype: str, same_as_torch: Any, random: Any) -> None:
    same_as_torch(build, [random.standard_normal((4, 3)), random.random((4, 3))], dtype)


@DTYPES
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_classification_losses(reduction: str, dtype: str, same_as_torch: Any, random: Any) -> None:
    logits = random.standard_normal((4, 3, 2))
    labels = np.array([[0, 1], [2, 1], [-7, 2], [1, 0]])
    options = {"ignore_index": -7, "reduction": reduction}
    same_as_torch(lambda nn: nn.NLLLoss(**options), [logits, labels], dtype)
    same_as_torch(lambda nn: nn.CrossEntropyLoss(**options), [logits, labels], dtype)
    same_as_torch(
        lambda nn: nn.CrossEntropyLoss(label_smoothing=0.2, **options), [logits, labels], dtype
    )


@DTYPES
def test_probability_losses(dtype: str, same_as_torch: Any, random: Any) -> None:
    chances = random.uniform(0.1, 0.9, (4, 3))
    targets = random.uniform(0.1, 0.9, (4, 3))
    same_as_torch(lambda nn: nn.BCELoss(), [chances, targets], dtype)
    same_as_torch(lambda nn: nn.KLDivLoss(reduction="batchmean"), [np.log(chances), targets], dtype)
    same_as_torch(
        lambda nn: nn.KLDivLoss(reduction="sum", log_target=True),
        [np.log(chances), np.log(targets)],
        dtype,
    )


def test_losses_with_weights(random: Any) -> None:
    torch = pytest.importorskip("torch")
    import flame

    logits, weight = random.standard_normal((4, 3)), np.array([0.2, 1.0, 2.0])
    labels, chances = np.array([0, 2, 1, 2]), random.random((4, 3))
    for name, option, target in (
        ("CrossEntropyLoss", "weight", labels),
        ("CrossEntropyLoss", "weight", chances),
        ("NLLLoss", "weight", labels),
        ("BCEWithLogitsLoss", "weight", chances),
        ("BCEWithLogitsLoss", "pos_weight", chances),
    ):
        found = [
            getattr(lib.nn, name)(**{option: lib.from_numpy(weight)})(
                lib.from_numpy(logits), lib.from_numpy(target)
            ).item()
            for lib in (flame, torch)
        ]
        assert found[0] == pytest.approx(found[1], rel=1e-10), name
