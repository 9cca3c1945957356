"""The kinds of work that a device does at rates of their own: an operator says which its are, hardware.py how fast."""

from enum import Enum


class Work(str, Enum):
    """The kinds of work that have a rate of their own: products in FLOP/s, all else in bytes/s, read and written."""

    PRODUCTS = "matrix products"  # bfloat16 and float16
    FLOAT32_PRODUCTS = "float32 matrix products"  # without TF32
    ATTENTION_FORWARD = "attention, forward"  # causal, by a fused kernel, bfloat16 and float16
    ATTENTION_BACKWARD = "attention, backward"
    COPIES = "contiguous copies and elementwise work"
    STRIDED = "strided copies and elementwise work"  # values whose elements lie in another order than their dimensions
    FSDP_COPIES = "FSDP's copies"  # between weights or gradients and the buffers of collectives
    OPTIMIZER = "the optimizer"

    __str__ = str.__str__  # its value, as that of StrEnum, which Python 3.10 lacks; nnScaler takes no newer Python


PRODUCT_KINDS = (Work.PRODUCTS, Work.FLOAT32_PRODUCTS, Work.ATTENTION_FORWARD, Work.ATTENTION_BACKWARD)
