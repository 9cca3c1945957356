"""The fused kernels of causal attention: what each one needs, and how PyTorch is told to take it.

A kernel is fused if it never holds all scores. A new one is an entry of KERNELS. Where its backward needs other memory
than is said in attention.py, the rules there need a branch for it too.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from longctx.errors import KernelError

HALF = (torch.float16, torch.bfloat16)  # what all these kernels compute in, but for the memory-efficient one of sdpa
NVIDIA = (8, 9, 10, 11, 12)  # major numbers of compute capabilities: A100, H100, B200 and what came with it


@dataclass(frozen=True)
class Kernel:
    """A fused kernel that can be asked for by name.

    Attributes:
        backend: the backend of PyTorch's scaled_dot_product_attention that runs it. The package flash-attn has a
            function of its own, which attention.py calls.
        activates: the FlashAttention that takes the place of PyTorch's own behind that backend.
        capabilities: the major numbers of the CUDA compute capabilities that it runs on.
        module: the Python module that it comes in; None if PyTorch has it.
        package: what that module belongs to, and how to install it.
        masks_more: whether it knows windows, soft-caps and linear biases.
        documents: whether it takes parts of a row that do not see each other, by their cumulative lengths.
        deterministic: whether its backward can give the same bits each time.
    """

    backend: SDPBackend = SDPBackend.FLASH_ATTENTION
    activates: str | None = None
    capabilities: tuple[int, ...] = NVIDIA
    module: str | None = None
    package: tuple[str, str] = ("", "")
    masks_more: bool = False
    documents: bool = True
    deterministic: bool = True


KERNELS = {
    "cudnn": Kernel(SDPBackend.CUDNN_ATTENTION, documents=False, deterministic=False),
    "flash": Kernel(),  # FlashAttention-2
    "fa3": Kernel(
        activates="FA3",
        capabilities=(9,),
        module="flash_attn_interface",
        package=("flash-attn-3", "from the folder hopper of github.com/Dao-AILab/flash-attention"),
    ),
    "fa4": Kernel(
        activates="FA4",
        capabilities=(9, 10),
        module="flash_attn.cute",
        package=("flash-attn-4", "pip install flash-attn-4==4.0.0b12, whose functions return what PyTorch expects"),
    ),
    "flash_attention_2": Kernel(
        module="flash_attn.flash_attn_interface",  # with flash-attn-4 alone there is a flash_attn without it
        package=("flash-attn", "pip install flash-attn --no-build-isolation"),
        masks_more=True,
    ),
}
# PyTorch can put another FlashAttention in the place of its own; 2.6, the newest that nnScaler takes, could not yet.
_TAKES_OTHER_FLASH_ATTENTIONS = hasattr(torch_attention, "activate_flash_attention_impl")
# In this order 'auto' tries PyTorch's own where none was chosen. The last takes what the others refuse.
_IN_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

# A module variable, since generated code has no kernel to pass around: compile may have run on another machine.
_chosen = "auto"


def set_auto(implementation: str) -> None:
    """Makes this the kernel that 'auto' stands for in this process."""
    global _chosen
    _chosen = implementation


def resolve(implementation: str) -> str:
    """The kernel to take: of 'auto' the one that was chosen for this process; it stays 'auto' if none was."""
    return _chosen if implementation == "auto" else implementation


def why_not(implementation: str, dtype: torch.dtype, device: str | None) -> str | None:
    """Why an implementation can't be used, and what to do, without its subject; None if it can.

    Args:
        dtype: what the model computes in.
        device: 'cuda' or 'cpu', which it is to run on; None if it is only to be compiled, for another machine perhaps.
    """
    kernel = KERNELS.get(implementation)
    if kernel is None:
        return None
    if kernel.module and not _is_installed(kernel.module):
        name, how = kernel.package
        return f"the package {name} is not installed; install it ({how}) or choose sdpa"
    if kernel.activates and not _TAKES_OTHER_FLASH_ATTENTIONS:
        return f"PyTorch {torch.__version__} can't put it behind scaled_dot_product_attention; choose flash"
    if dtype not in HALF:
        return "it computes in 16 bits only; choose sdpa, or compute in bf16"
    if device == "cpu":
        return "it runs on a GPU; choose auto, sdpa or eager"
    return _why_not_this_gpu(kernel) if device == "cuda" else None


def check_masks(implementation: str, module: str, masks_more: bool) -> None:
    """Raises a KernelError if attention masks more than what comes after a query, and the kernel doesn't know that.

    Args:
        module: whose attention it is, for the error.
        masks_more: whether there is a window, a soft-cap or a bias.
    """
    kernel = KERNELS.get(implementation)
    if kernel and masks_more and not kernel.masks_more:
        raise KernelError(
            f"the attention of {module} has a window, a soft-cap or a bias, which this kernel does not have; "
            "choose auto or flash_attention_2"
        )


def check_documents(implementation: str) -> None:
    """Raises a KernelError if documents that do not see each other are not what the kernel takes."""
    kernel = KERNELS.get(implementation)
    if kernel and not kernel.documents:
        others = ", ".join(name for name, other in KERNELS.items() if other.documents)
        raise KernelError(f"it can't keep the documents of a row apart; choose auto or one of {others}")


def check_sinks(implementation: str, module: str) -> None:
    """Raises a KernelError if a fused kernel was asked for, for the attention of `module`, which has sinks."""
    if implementation in KERNELS:
        raise KernelError(f"the attention of {module} has sinks, which no fused kernel has here; choose auto")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def _why_not_this_gpu(kernel: Kernel) -> str | None:
    major, minor = torch.cuda.get_device_capability()
    if major not in kernel.capabilities:
        needed = ", ".join(f"{major}.x" for major in kernel.capabilities)
        return f"it runs on compute capability {needed}, and this GPU has {major}.{minor}; choose auto"
    return None


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    dropout: float,
    implementation: str = "sdpa",
    **mask,
) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention; on GPUs only with kernels that never hold all scores.

    [b, heads, l, d], [b, kv_heads, l, d], [b, kv_heads, l, e] -> [b, heads, l, e].

    Args:
        implementation: 'auto' tries PyTorch's kernels in the order of _IN_ORDER, 'sdpa' in PyTorch's own, and the name
            of one of KERNELS takes that one alone.
        mask: is_causal or attn_mask.

    Raises:
        RuntimeError: the kernel that was asked for does not take these tensors.
    """
    if not query.is_cuda:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scale, enable_gqa=query.shape[1] != key.shape[1], **mask
        )
    grouped = query.dtype in HALF and "attn_mask" not in mask
    if not grouped:  # only the memory-efficient kernel is left, which knows no grouped queries
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    kernel = KERNELS.get(implementation)
    if grouped:  # no FlashAttention takes a mask, and none may be changed between a forward and its backward
        activate(kernel.activates if kernel else None)
    with sdpa_kernel([kernel.backend] if kernel else _IN_ORDER, set_priority=implementation == "auto"):
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scale, enable_gqa=grouped, **mask
        )


def activate(flash_attention: str | None) -> None:
    """Puts this FlashAttention behind PyTorch's flash backend, for all calls that follow, or PyTorch's own for None.

    The backward pass calls what is there when it runs, so between a forward and its backward it must not be changed.
    """
    if not _TAKES_OTHER_FLASH_ATTENTIONS or torch_attention.current_flash_attention_impl() == flash_attention:
        return
    if flash_attention is None:
        torch_attention.restore_flash_attention_impl()
    else:
        torch_attention.activate_flash_attention_impl(flash_attention)


def fused_operators() -> list[Callable]:
    """The operators of the fused kernels that exist in this process: PyTorch's, flash-attn's, and that of pieces.py.

    PyTorch and flash-attn have one more each for documents. FlashAttention-3 and 4 run under the operators of the flash
    backend, whose kernel they replace.
    """
    kinds = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    packets = [getattr(torch.ops.aten, f"_scaled_dot_product_{kind}", None) for kind in kinds]
    packets += [getattr(torch.ops.flash_attn, f"_flash_attn_{kind}forward", None) for kind in ("", "varlen_")]
    packets.append(getattr(torch.ops.torch_attn, "_varlen_attn", None))
    packets.append(getattr(torch.ops.longctx, "attention_in_pieces", None))
    return [packet.default for packet in packets if packet is not None]
