"""The ceilings of this machine: versions, card and clocks, a copy, large products. Nothing later can be faster."""

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.cuda.nccl as nccl

from benchmarks.gpu_parts.measuring import DEVICE, ON_GPU, Sizes, normal, sizes, timed_row
from benchmarks.gpu_parts.products import fp8_product
from benchmarks.gpu_parts.results import LeftOut, Measurement, Row

PACKAGES = ("torch", "triton", "transformers", "flash-attn", "liger-kernel", "cut-cross-entropy", "datasets", "ruff")
CARD = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"
UNDER_LOAD = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
LOADED_S = 1.0


def measurements(small: bool, folder: Path) -> Iterator[Measurement]:
    size = sizes(small)
    yield Measurement("versions", lambda: [Row("versions", note=versions())])
    yield Measurement("card", lambda: [Row("card", note=nvidia_smi(CARD))])
    yield Measurement("a copy", lambda: [copy(size.copied)])
    for dtype in (torch.bfloat16, torch.float32):
        yield Measurement(
            f"a product in {str(dtype).removeprefix('torch.')}", partial(square_product, size.square, dtype)
        )
    yield Measurement("a product in FP8", partial(square_fp8_product, size.square))
    yield Measurement("clocks under load", lambda: [Row("clocks under load", note=under_load(size))])


def versions() -> str:
    """The packages that are installed, and of those that are not, that they are not."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    if ON_GPU:
        of_nccl = ".".join(map(str, nccl.version()))
        found.append(torch.cuda.get_device_name())
        found.append(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {of_nccl}")
    return ", ".join(found)


def nvidia_smi(fields: str) -> str:
    """What nvidia-smi says of the GPU that is measured; it is asked, and changes nothing."""
    if not ON_GPU:
        raise LeftOut("there is no GPU")
    if not shutil.which("nvidia-smi"):
        raise LeftOut("nvidia-smi is not installed")
    card = f"GPU-{torch.cuda.get_device_properties(0).uuid}"  # nvidia-smi knows nothing of CUDA_VISIBLE_DEVICES
    command = ["nvidia-smi", f"--id={card}", f"--query-gpu={fields}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    values = zip(fields.split(","), answer.strip().split(","), strict=True)
    return ", ".join(f"{name} {value.strip()}" for name, value in values)


def copy(nbytes: int) -> Row:
    source = torch.ones(nbytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return timed_row(f"copy of {nbytes / 1e9:.2g} GB", partial(target.copy_, source), nbytes=2 * nbytes)


def square_product(n: int, dtype: torch.dtype) -> list[Row]:
    a, b = normal(n, n, dtype=dtype), normal(n, n, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    return [timed_row(f"{name} product, {n:,} cubed", partial(torch.mm, a, b), flops=2 * n**3)]


def square_fp8_product(n: int) -> list[Row]:
    call = fp8_product(normal(n, n), normal(n, n))
    return [timed_row(f"FP8 product, {n:,} cubed", call, flops=2 * n**3)]


def under_load(size: Sizes) -> str:
    """Clocks and power while products keep the GPU busy: idle clocks say nothing of the figures of the other parts."""
    if not ON_GPU:
        raise LeftOut("there is no GPU")
    a, b = (normal(size.square, size.square) for _ in range(2))
    product = partial(torch.mm, a, b)
    ms = timed_row("", product).ms or 1.0
    for _ in range(round(1e3 * LOADED_S / ms)):
        product()
    answer = nvidia_smi(UNDER_LOAD)
    torch.cuda.synchronize()
    return answer
