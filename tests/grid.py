"""The grid of awkward workloads that every strategy meets on every ISA: small, and ugly on purpose.

Each table maps a case's name to its workload. `SHAPES` and `MATMULS` keep the plain int32 epilogue
and u8 x s8 operands, `DTYPES` varies operand types and zero points, `EPILOGUES` what is stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from topi_int8.workload import Conv2dWorkload, Epilogue, MatmulWorkload

SAME = (1, 1, 1, 1)


def conv(ic: int, size: tuple[int, int], oc: int, kernel: tuple[int, int] = (1, 1), **more: Any):
    """Return a u8 x s8 workload, batch 1 and data zero point 3 unless `more` says otherwise."""
    more = {"data_zero_point": 3, "n": 1} | more
    n = more.pop("n")
    return Conv2dWorkload(n, ic, *size, oc, *kernel, **more)


SHAPES: dict[str, Conv2dWorkload] = {
    # channels
    "one_of_everything": conv(1, (1, 1), 1),
    "ic1": conv(1, (9, 9), 17, (3, 3), padding=SAME),
    "ic3_oc65": conv(3, (6, 5), 65, (3, 3), padding=SAME),
    "ic17_oc33": conv(17, (7, 13), 33, (3, 3), padding=SAME),
    "ic65_oc3": conv(65, (4, 5), 3, (3, 3), padding=SAME),
    "ic65_oc129_1x1": conv(65, (3, 7), 129),
    "aligned": conv(64, (8, 14), 128, (3, 3), padding=SAME),
    "large_k": conv(300, (4, 4), 20, (3, 3), padding=SAME),
    "large_k_1x1": conv(520, (2, 3), 17),
    # images
    "one_pixel_3x3": conv(20, (1, 1), 20, (3, 3), padding=SAME),
    "one_row": conv(20, (1, 19), 20, (1, 3), padding=(0, 1, 0, 1)),
    "one_column": conv(20, (19, 1), 20, (3, 1), padding=(1, 0, 1, 0)),
    "prime_31": conv(16, (2, 31), 16),
    "prime_37": conv(16, (2, 37), 33, (3, 3), padding=SAME),
    "prime_17_s2": conv(16, (3, 35), 16, (3, 3), strides=(2, 2), padding=(0, 0, 1, 0)),
    "image_7x7": conv(64, (7, 7), 64, (3, 3), padding=SAME),
    "image_10x10_unpadded": conv(32, (10, 10), 16, (3, 3)),
    "batch_3": conv(20, (5, 6), 20, (3, 3), n=3, padding=SAME),
    "batch_3_1x1": conv(20, (7, 7), 40, n=3),
    # kernels
    "stem_7x7": conv(3, (37, 29), 64, (7, 7), strides=(2, 2), padding=(3, 3, 3, 3)),
    "stem_3x3": conv(3, (19, 17), 32, (3, 3), strides=(2, 2), padding=(0, 0, 1, 1)),
    "gray_5x5": conv(1, (12, 12), 6, (5, 5), padding=(2, 2, 2, 2)),
    "row_kernel": conv(20, (5, 12), 20, (1, 7), padding=(0, 3, 0, 3)),
    "column_kernel": conv(20, (12, 5), 20, (7, 1), padding=(3, 0, 3, 0)),
    "kernel_larger_than_image": conv(20, (3, 2), 20, (5, 5), padding=(2, 2, 2, 2)),
    "even_kernel": conv(20, (7, 6), 20, (2, 4), padding=(1, 1, 0, 2)),
    # strides, padding, dilation
    "stride_3": conv(20, (11, 14), 20, (3, 3), strides=(3, 3), padding=SAME),
    "stride_2_1": conv(20, (9, 9), 20, (3, 3), strides=(2, 1), padding=SAME),
    "stride_1_2": conv(20, (5, 13), 20, (3, 3), strides=(1, 2), padding=SAME),
    "stride_beyond_kernel": conv(20, (11, 11), 20, (1, 1), strides=(2, 3)),
    "padding_asymmetric": conv(20, (6, 7), 20, (3, 3), padding=(0, 1, 2, 0)),
    "padding_beyond_kernel": conv(20, (3, 4), 20, (2, 2), padding=(3, 2, 0, 4)),
    "padding_1x1": conv(20, (4, 5), 20, padding=(1, 0, 0, 2)),
    "dilation_2_1": conv(20, (9, 9), 20, (3, 3), dilation=(2, 1), padding=(2, 1, 2, 1)),
    "dilation_3_strided": conv(
        20, (13, 12), 20, (3, 2), strides=(2, 2), dilation=(1, 3), padding=(0, 2, 1, 1)
    ),
    "everything": conv(
        100, (13, 11), 70, (3, 3), n=2, strides=(2, 1), padding=(0, 1, 2, 0), dilation=(2, 1)
    ),
    # groups
    "groups_aligned": conv(128, (5, 5), 128, (3, 3), groups=2, padding=SAME),
    "groups_16": conv(32, (5, 6), 64, (3, 3), groups=2, padding=SAME),
    "groups_misaligned": conv(24, (5, 6), 36, (3, 3), groups=3, padding=SAME),
    "groups_of_3": conv(6, (5, 6), 130, (1, 1), groups=2),
    "groups_of_2": conv(8, (5, 6), 8, (3, 3), groups=4, strides=(2, 2), padding=SAME),
    "channel_multiplier": conv(8, (5, 6), 16, (3, 3), groups=8, padding=SAME),
    "channel_multiplier_7": conv(5, (5, 6), 35, (3, 3), groups=5, padding=SAME, n=2),
    "groups_32x4": conv(128, (4, 6), 128, (3, 3), groups=32, padding=SAME),
}

_BASE = conv(17, (5, 7), 33, (3, 3), padding=SAME)
_U8 = {"data_dtype": "uint8"}
_S8 = {"data_dtype": "int8"}
_NARROW = {"weight_dtype": "uint8", "weight_zero_point": 100, "weight_range": (40, 200)}

DTYPES: dict[str, Conv2dWorkload] = {
    "u8s8": replace(_BASE, **_U8, data_zero_point=0),
    "u8s8_zero_point_255": replace(_BASE, **_U8, data_zero_point=255),
    "s8s8": replace(_BASE, **_S8, data_zero_point=0),
    "s8s8_zero_point": replace(_BASE, **_S8, data_zero_point=-128),
    "s8s8_1x1": conv(65, (7, 7), 40, **_S8, data_zero_point=9),
    "u8u8": replace(_BASE, **_U8, weight_dtype="uint8"),
    "s8u8": replace(_BASE, **_S8, weight_dtype="uint8"),
    "u8u8_weight_zero_point": replace(_BASE, **_U8, weight_dtype="uint8", weight_zero_point=128),
    "s8u8_weight_zero_point": replace(_BASE, **_S8, weight_dtype="uint8", weight_zero_point=1),
    "u8s8_weight_zero_point": replace(_BASE, **_U8, weight_zero_point=-128),
    "s8s8_weight_zero_point": replace(_BASE, **_S8, weight_zero_point=100),
    "u8u8_proven_int8": replace(_BASE, **_U8, **_NARROW),
    "s8u8_proven_int8": replace(_BASE, **_S8, **_NARROW, strides=(1, 2)),
    "s8s8_grouped": conv(24, (5, 6), 36, (3, 3), groups=3, padding=SAME, **_S8),
    "s8s8_stem": conv(3, (13, 14), 16, (5, 5), strides=(2, 2), padding=(2, 2, 2, 2), **_S8),
    "u8u8_grouped": conv(
        24, (5, 6), 36, (3, 3), groups=3, padding=SAME, weight_dtype="uint8", weight_zero_point=77
    ),
    "weight_zero_point_stem": conv(
        3, (13, 14), 16, (5, 5), padding=(2, 2, 2, 2), weight_dtype="uint8", weight_zero_point=99
    ),
}


def _requantized(out_dtype: str, zero_point: int, **more: Any) -> Epilogue:
    return Epilogue(out_dtype, bias=True, scale=True, out_zero_point=zero_point, **more)


def _residual(dtype: str, zero_point: int, scale: float) -> dict[str, Any]:
    return {
        "residual_dtype": dtype, "residual_zero_point": zero_point, "residual_scale": scale,
    }  # fmt: skip


EPILOGUES: dict[str, Epilogue] = {
    "int32": Epilogue("int32"),
    "int32_bias": Epilogue("int32", bias=True),
    "int32_relu": Epilogue("int32", bias=True, clip_min=0),
    "int32_clip": Epilogue("int32", clip_min=-1000, clip_max=2000),
    "float32_bare": Epilogue("float32"),
    "float32": Epilogue("float32", bias=True, scale=True),
    "float32_relu6": Epilogue("float32", bias=True, scale=True, clip_min=0.0, clip_max=6.0),
    "float32_residual_u8": Epilogue("float32", scale=True, **_residual("uint8", 200, 0.01)),
    "float32_residual_f32": Epilogue(
        "float32", scale=True, clip_min=0.0, **_residual("float32", 0, 1.0)
    ),
    "u8": _requantized("uint8", 7),
    "u8_no_bias": Epilogue("uint8", scale=True),
    "u8_zero_point_255": _requantized("uint8", 255),
    "u8_relu": _requantized("uint8", 100, clip_min=100),
    "u8_relu6": _requantized("uint8", 3, clip_min=3, clip_max=150),
    "u8_bounded": _requantized("uint8", 7, clip_min=9, clip_max=200, bounded=True),
    "s8": _requantized("int8", -3),
    "s8_bounded": _requantized("int8", 0, bounded=True, **_residual("int8", 5, 0.8)),
    "u8_small_sums": _requantized(
        "uint8", 4, clip_min=4, bounded=True, small_sums=True, **_residual("uint8", 0, 0.6)
    ),
    "u8_small_sums_alone": _requantized("uint8", 0, small_sums=True),
    "s8_small_sums": _requantized("int8", 2, small_sums=True, **_residual("int8", -7, 1.1)),
    "s8_zero_point_min": _requantized("int8", -128),
    "s8_clip": _requantized("int8", 10, clip_min=10, clip_max=77),
    "u8_residual_u8": _requantized("uint8", 9, **_residual("uint8", 12, 0.37)),
    "u8_residual_s8": _requantized("uint8", 9, clip_min=9, **_residual("int8", -12, 1.7)),
    "u8_residual_f32": _requantized("uint8", 9, **_residual("float32", 0, 20.0)),
    "s8_residual_u8": _requantized("int8", -3, clip_min=-3, **_residual("uint8", 12, 0.37)),
    "s8_residual_s8": _requantized("int8", -3, **_residual("int8", 0, 0.9)),
}

# What epilogues are tried on: tails in channels and columns, and the AMX schedule's two forms.
EPILOGUE_BASES: dict[str, Conv2dWorkload] = {
    "conv": conv(20, (4, 13), 36, (3, 3), padding=SAME),
    "flat": conv(20, (5, 6), 36, (3, 3), padding=SAME),
    "1x1": conv(20, (3, 14), 48, n=2),
}

MATMULS: dict[str, MatmulWorkload] = {
    "one_of_everything": MatmulWorkload(1, 1, 1),
    "vector_classifier": MatmulWorkload(1, 1000, 256, data_zero_point=3),
    "vector_odd": MatmulWorkload(1, 37, 70, data_zero_point=3),
    "rows_13": MatmulWorkload(13, 48, 100, data_zero_point=3),
    "rows_17_odd_n": MatmulWorkload(17, 17, 64, data_zero_point=3),
    "square": MatmulWorkload(64, 64, 64),
    "k_7": MatmulWorkload(13, 17, 7, data_zero_point=3),
    "k_768": MatmulWorkload(31, 33, 768, data_zero_point=3),
    "s8s8": MatmulWorkload(13, 17, 66, data_zero_point=-3, data_dtype="int8"),
    "u8u8": MatmulWorkload(13, 17, 66, weight_dtype="uint8", weight_zero_point=128),
    "s8u8": MatmulWorkload(13, 17, 66, data_dtype="int8", weight_dtype="uint8"),
    "transposed": MatmulWorkload(9, 20, 32, transpose_b=False, data_zero_point=3),
    "batch": MatmulWorkload(10, 24, 64, batch=3, data_zero_point=3),
    "batch_s8s8": MatmulWorkload(10, 24, 64, batch=3, data_zero_point=3, data_dtype="int8"),
    "batch_odd_n": MatmulWorkload(7, 13, 20, batch=4, data_zero_point=3, transpose_b=False),
    "batch_k_6": MatmulWorkload(7, 24, 6, batch=3, data_zero_point=3),
    "batch_k_5": MatmulWorkload(7, 24, 5, batch=3, data_zero_point=3),
    "u8": MatmulWorkload(13, 49, 96, data_zero_point=3, epilogue=_requantized("uint8", 9)),
    "float32_out": MatmulWorkload(
        1, 50, 128, data_zero_point=3, epilogue=Epilogue("float32", scale=True, bias=True)
    ),
    "residual": MatmulWorkload(
        13, 49, 96, epilogue=_requantized("int8", -3, **_residual("int8", 4, 0.6))
    ),
    "batch_u8": MatmulWorkload(5, 40, 64, batch=2, epilogue=Epilogue("uint8", scale=True)),
}

_RELU = Epilogue("float32", bias=True, clip_min=0.0)
_FLOAT: dict[str, Any] = {"data_dtype": "float32", "weight_dtype": "float32", "data_zero_point": 0}

FLOATS: dict[str, Conv2dWorkload | MatmulWorkload] = {
    "conv": conv(20, (6, 13), 36, (3, 3), padding=SAME, epilogue=_RELU, **_FLOAT),
    "stem": conv(3, (19, 17), 20, (5, 5), strides=(2, 2), padding=(2, 2, 2, 2), epilogue=_RELU,
                 **_FLOAT),
    "grouped": conv(24, (5, 6), 36, (3, 3), groups=3, epilogue=Epilogue("float32"), **_FLOAT),
    "residual": conv(
        17, (5, 7), 33, epilogue=replace(_RELU, residual_dtype="float32"), **_FLOAT
    ),
    "depthwise": conv(20, (6, 9), 20, (3, 3), groups=20, padding=SAME, epilogue=_RELU, **_FLOAT),
    "matmul": MatmulWorkload(5, 37, 66, epilogue=_RELU, **_FLOAT),
    "batch": MatmulWorkload(5, 24, 33, batch=3, epilogue=Epilogue("float32"), **_FLOAT),
}  # fmt: skip


def depthwise(channels: int, size: tuple[int, int], kernel: tuple[int, int], **more: Any):
    """Return a u8 x s8 depthwise workload with data zero point 3, unless `more` says otherwise."""
    return conv(channels, size, channels, kernel, groups=channels, **more)


DEPTHWISE: dict[str, Conv2dWorkload] = {
    "c2": depthwise(2, (5, 5), (3, 3), padding=SAME),
    "c17": depthwise(17, (6, 7), (3, 3), padding=SAME),
    "c65": depthwise(65, (4, 5), (3, 3), padding=SAME),
    "c128": depthwise(128, (4, 7), (3, 3), padding=SAME),
    "stride_2": depthwise(32, (9, 11), (3, 3), strides=(2, 2), padding=(0, 0, 1, 1)),
    "stride_2_1": depthwise(32, (9, 11), (3, 3), strides=(2, 1), padding=SAME),
    "kernel_5": depthwise(24, (7, 13), (5, 5), padding=(2, 2, 2, 2)),
    "kernel_1": depthwise(24, (3, 5), (1, 1)),
    "kernel_1x7": depthwise(24, (3, 9), (1, 7), padding=(0, 3, 0, 3)),
    "unpadded": depthwise(24, (5, 33), (3, 3)),
    "asymmetric": depthwise(24, (5, 6), (3, 3), padding=(2, 0, 0, 1)),
    "dilation": depthwise(24, (7, 9), (3, 3), dilation=(2, 3), padding=(2, 3, 2, 3)),
    "one_pixel": depthwise(24, (1, 1), (3, 3), padding=SAME),
    "prime_31": depthwise(16, (2, 31), (3, 3), padding=SAME),
    "batch_3": depthwise(24, (4, 5), (3, 3), n=3, padding=SAME),
    "s8s8": depthwise(24, (4, 5), (3, 3), padding=SAME, data_dtype="int8", data_zero_point=-9),
    "u8u8": depthwise(24, (4, 5), (3, 3), padding=SAME, weight_dtype="uint8"),
    "weight_zero_point": depthwise(
        24, (4, 5), (3, 3), padding=SAME, weight_dtype="uint8", weight_zero_point=130
    ),
    "s8_weight_zero_point": depthwise(
        24, (4, 5), (3, 3), padding=SAME, data_dtype="int8", weight_zero_point=-128
    ),
}
