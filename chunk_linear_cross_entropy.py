"""Cross entropy of a linear layer's logits, which are held for one chunk of tokens at a time.

The logits x = h W^T of t tokens over n words are the largest tensor of a language model's training step. Here one
buffer takes the logits of a chunk of tokens, then, written over them, their gradient dx. A chunk takes three products:

    x  = h W^T
    dx = softmax(x) - onehot(label)
    dh = dx W,  dW += dx^T h

The usual way, to checkpoint each chunk, makes the logits again in the backward pass: a fourth product. Here the forward
pass makes the gradients, as if every loss had an incoming gradient of one, and the backward pass scales them: dh by the
incoming gradient of each token, dW by the one that all tokens share, as they do after a sum or a mean. Only where they
differ is dW made again, by two products.

The softmax leaves the label out. With m, the logarithm of the odds against the label,

    m = log(sum of exp(x_j) over all words j but the label) - x_label
    loss = log(1 + exp(m)),  dx = sigmoid(m) * (softmax over all words but the label - onehot(label))

Where the model is nearly certain of the label, these keep all their digits, and 1 - softmax(x)[label] loses them.

Needs PyTorch 2.6 or newer. On a GPU with Triton, one kernel turns logits into losses and dx, and half precision is
multiplied as it is, with float32 sums. Elsewhere PyTorch's operators do it, and half precision is converted to float32
first: on a CPU, PyTorch rounds the sums of half-precision products, and many CPUs take longer for those products.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language
except ImportError:  # PyTorch for CPUs comes without it.
    triton: Any = None

CHUNK_SIZE = 1024  # At most this many tokens' logits are held at a time, unless the caller gives another number.
_STRIP_NUMEL = 1 << 20  # This many logits stay in a CPU's cache while several operators pass over them.

# cuBLAS sums products of half precision in float32. Since PyTorch 2.8 it can be asked to return the sums unrounded.
_CUBLAS_RETURNS_FLOAT32 = "dtype_out" in torch.ops.aten.addmm.overloads()


def chunk_linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    padding_idx: int = -100,
    chunk_size: int = CHUNK_SIZE,
    logit_softcap: float = 0.0,
) -> Tensor:
    """Cross entropy of the logits hidden_states @ weight.T, per token.

    Args:
        hidden_states: [b, l, d], floating point.
        weight: [n, d], of the same dtype.
        labels: [b, l], integers in [0, n), or padding_idx where a token doesn't count.
        padding_idx: a token with this label has loss and gradient 0, and costs no matrix product.
        chunk_size: at most this many tokens' logits are held at a time, in chunk_size * n * 4 bytes. Every chunk reads
            and writes the whole gradient of the weight, so smaller chunks take less memory and more time. On a CPU, a
            float32 copy of a half-precision weight is held besides.
        logit_softcap: c > 0 caps the logits first, to c * tanh(logits / c), as Gemma 2 does.

    Returns:
        [b, l] losses in nats, in float32, or in float64 for float64 inputs.

    Raises:
        ValueError: shapes, dtypes or devices don't go together, or a label is neither in [0, n) nor padding_idx.

    Under autocast the inputs are cast as torch.nn.functional.linear casts them. On a GPU the host waits for the device
    once, to learn how many tokens count and whether a label is wrong. Backward waits only where the incoming gradient
    is not one number expanded to all tokens, which that of .sum() is. torch.compile breaks its graph around the call.
    """
    device = hidden_states.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    _check_inputs(hidden_states, weight, labels, chunk_size, logit_softcap)
    if device == "meta" or isinstance(hidden_states, torch._subclasses.FakeTensor):
        return hidden_states.new_empty(labels.shape, dtype=_sum_dtype(weight))
    hidden = hidden_states.reshape(labels.numel(), weight.shape[1])
    return _outside_compiled_graphs(hidden, weight, labels.long(), padding_idx, chunk_size, logit_softcap)


def _check_inputs(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, logit_softcap: float) -> None:
    """Raises a ValueError of one sentence for shapes, dtypes, devices or options that make no sense."""
    shapes = [tuple(tensor.shape) for tensor in (hidden, weight, labels)]
    if [len(shape) for shape in shapes] != [3, 2, 2] or shapes[0] != (*shapes[2], shapes[1][1]):
        are = "hidden_states, weight and labels must be [b, l, d], [n, d] and [b, l], but are"
        raise ValueError(f"{are} {', '.join(map(str, shapes))}.")
    if hidden.dtype != weight.dtype or not weight.is_floating_point():
        have = "hidden_states and weight must have the same floating point dtype, but have"
        raise ValueError(f"{have} {hidden.dtype} and {weight.dtype}.")
    if weight.numel() == 0:
        raise ValueError(f"weight must have words and features, but is {shapes[1]}.")
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"labels must be integers, but are {labels.dtype}.")
    if not hidden.device == weight.device == labels.device:
        are = "hidden_states, weight and labels must be on the same device, but are on"
        raise ValueError(f"{are} {hidden.device}, {weight.device} and {labels.device}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}.")
    if logit_softcap < 0:
        raise ValueError(f"logit_softcap must be positive, or 0 for no cap, but is {logit_softcap}.")


@torch.compiler.disable()
def _outside_compiled_graphs(
    hidden: Tensor, weight: Tensor, labels: Tensor, padding_idx: int, chunk_size: int, logit_softcap: float
) -> Tensor:
    """The losses [b, l] of hidden [b * l, d], weight [n, d] and labels [b, l]. torch.compile doesn't look inside."""
    rows = _rows_that_count(labels.reshape(-1), padding_idx, len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return _ChunkLinearCrossEntropy.apply(hidden, weight, labels, rows, chunk_size, logit_softcap)
        return _losses(hidden, weight, labels, rows, chunk_size, logit_softcap)


def _rows_that_count(labels: Tensor, padding_idx: int, n: int) -> Tensor:
    """The indices into labels [t] of the tokens that count, in order.

    The host launches the products, so it must know for how many rows. It waits for one copy, of two totals. Raises a
    ValueError if a label is neither padding_idx nor in [0, n).
    """
    counts = labels != padding_idx
    bad = counts & ((labels < 0) | (labels >= n))
    order = counts.to(torch.uint8).argsort(descending=True, stable=True)
    number, number_bad = torch.stack((counts.sum(), bad.sum())).tolist()
    if number_bad:
        raise ValueError(
            f"labels must be in [0, {n}) or equal padding_idx ({padding_idx}), but {number_bad} of {len(labels)} are "
            f"not, the first being {labels[bad][0].item()}."
        )
    return order[:number]


class _ChunkLinearCrossEntropy(torch.autograd.Function):
    """_losses, and the gradients made along with them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor, chunk_size: int, logit_softcap: float
    ) -> Tensor:
        """The losses [b, l], as by _losses."""
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        # float16 could not hold a gradient before it is scaled.
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if to_hidden else None
        grad_weight = weight.new_empty(weight.shape, dtype=_sum_dtype(weight)) if to_weight else None
        losses = _losses(hidden, weight, labels, rows, chunk_size, logit_softcap, None, grad_hidden, grad_weight)
        # The inputs serve only to make the weight's gradient again. Whatever is kept goes through save_for_backward,
        # where activation checkpointing and offloading can reach it.
        inputs = (hidden, weight, labels) if to_weight else (None, None, None)
        ctx.save_for_backward(*inputs, rows, grad_hidden, grad_weight)
        ctx.dtype, ctx.chunk_size, ctx.logit_softcap = hidden.dtype, chunk_size, logit_softcap
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of hidden and weight for those of the losses [b, l]."""
        if torch.is_grad_enabled():  # That is so under create_graph=True.
            raise RuntimeError("chunk_linear_cross_entropy has no second derivative: create_graph must be False.")
        hidden, weight, labels, rows, grad_hidden, grad_weight = ctx.saved_tensors
        row_grads = grad_losses.reshape(-1)[rows]
        if grad_hidden is not None:
            # Tokens that don't count get zero, whatever comes in for them.
            scales = row_grads.new_zeros(len(grad_hidden)).index_copy_(0, rows, row_grads)
            grad_hidden = _scaled(grad_hidden, scales, ctx.dtype)
        if grad_weight is not None and _is_uniform(grad_losses, row_grads):
            scale = row_grads[:1].sum()  # This is 0 if no token counts.
            grad_weight = _scaled(grad_weight, scale.expand(len(grad_weight)), ctx.dtype)
        elif grad_weight is not None:
            matter = row_grads != 0
            grad_weight = grad_weight if _saved_tensors_are_spent() else torch.empty_like(grad_weight)
            options = ctx.chunk_size, ctx.logit_softcap
            _losses(hidden, weight, labels, rows[matter], *options, row_grads[matter], None, grad_weight)
            grad_weight = grad_weight.to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _is_uniform(grad_losses: Tensor, row_grads: Tensor) -> bool:
    """Whether the tokens that count all have the same incoming gradient.

    The strides of an expanded gradient tell. The elements of any other are compared, for which the host has to wait on
    a GPU, though for less time than two matrix products take.
    """
    return len(row_grads) == 0 or not any(grad_losses.stride()) or bool((row_grads == row_grads[0]).all())


def _saved_tensors_are_spent() -> bool:
    """Whether autograd frees saved tensors after the present backward pass, which then may overwrite them."""
    functions = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]  (PyTorch's stub lacks the module.)
    keeps = getattr(functions, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def _scaled(grads: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """grads [r, d] times scales [r], in dtype, and in the memory of grads if that can be overwritten."""
    out = grads if grads.dtype == dtype and _saved_tensors_are_spent() else torch.empty_like(grads, dtype=dtype)
    return torch.mul(grads, scales[:, None], out=out)


def _losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor,
    chunk_size: int,
    logit_softcap: float,
    row_grads: Tensor | None = None,
    grad_hidden: Tensor | None = None,
    grad_weight: Tensor | None = None,
) -> Tensor:
    """The losses [b, l] of the tokens in rows, indices into hidden [b * l, d], and zero for the others.

    Fills the gradients that are given. row_grads [len(rows)] are the incoming ones, None standing for ones. grad_hidden
    [b * l, d] must be zero outside rows; grad_weight [n, d] is overwritten.
    """
    sums, n, takes_triton = _sum_dtype(weight), len(weight), _takes_triton(weight)
    losses = hidden.new_zeros(labels.shape, dtype=sums)
    if len(rows) == 0:
        if grad_weight is not None:
            grad_weight.zero_()
        return losses
    operands = weight.dtype if takes_triton else sums
    hidden, weight = hidden.detach(), weight.detach().to(operands)
    row_grads = torch.ones_like(rows, dtype=sums) if row_grads is None else row_grads
    # float16 holds nothing below 6e-8, where most of a softmax over a large vocabulary lies.
    gain = 2.0**15 / row_grads.abs().amax() if operands == torch.float16 else 1

    # Chunks are of one size, so that the last is no sliver. The kernel's rows begin at multiples of 64 bytes.
    chunks = -(-len(rows) // chunk_size)
    buffer = hidden.new_empty(-(-len(rows) // chunks), -(-n // 16) * 16 if takes_triton else n, dtype=sums)
    softmax_pass = _triton_softmax_pass if takes_triton else _softmax_pass
    wants_gradient = grad_hidden is not None or grad_weight is not None
    flat_labels, flat_losses = labels.reshape(-1), losses.view(-1)
    parts = zip(rows.tensor_split(chunks), (row_grads * gain).tensor_split(chunks), strict=True)
    for chunk, (index, grads) in enumerate(parts):
        h, memory = hidden[index].to(operands), buffer[: len(index)]
        x = _multiply(h, weight.t(), out=memory[:, :n])
        dx = memory.view(operands)[:, :n]
        flat_losses[index] = softmax_pass(x, dx if wants_gradient else None, flat_labels[index], grads, logit_softcap)
        if grad_hidden is not None:
            grad_hidden[index] = _multiply(dx, weight, out=torch.empty_like(h, dtype=sums)).to(grad_hidden.dtype)
        if grad_weight is not None:
            _multiply(dx.t(), h, out=grad_weight, add=chunk > 0)
    for gradient in (grad_hidden, grad_weight):
        if gradient is not None and operands == torch.float16:
            gradient /= gain
    return losses


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a b, or out += a b, in out's dtype. Returns out."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, beta=int(add), out=out)
    if _CUBLAS_RETURNS_FLOAT32:
        return torch.addmm(out, a, b, out.dtype, beta=int(add), out=out)
    product = torch.mm(a, b)
    return out.add_(product) if add else out.copy_(product)


def _softmax_pass(x: Tensor, dx: Tensor | None, labels: Tensor, row_grads: Tensor, logit_softcap: float) -> Tensor:
    """The losses [c] of logits x [c, n], in whose place it leaves row_grads [c] times their gradient.

    dx is where the gradient goes, so it must be x, or None where none is wanted; x is overwritten in either case. Each
    strip of rows goes through all steps before the next strip does, so that it stays in a CPU's cache.
    """
    log_odds = torch.empty_like(row_grads)
    rows = max(1, _STRIP_NUMEL // x.shape[1])
    columns = (tensor[:, None].split(rows) for tensor in (labels, row_grads, log_odds))
    for strip, label, row_grad, m in zip(x.split(rows), *columns, strict=True):
        if logit_softcap:
            slope = 1 - strip.div_(logit_softcap).tanh_().square()
            strip.mul_(logit_softcap)
        at_label = strip.gather(1, label)
        # This leaves the label out. In a row where all else is -inf, another -inf would make NaN.
        strip.scatter_(1, label, torch.finfo(x.dtype).min)
        top = strip.amax(1, keepdim=True)
        others = strip.sub_(top).exp_().sum(1, keepdim=True)
        m.copy_(top - at_label + others.log())
        if dx is not None:
            scale = m.sigmoid() * row_grad
            strip.mul_(scale / others).scatter_(1, label, -scale)
            if logit_softcap:
                strip.mul_(slope)
    return F.softplus(log_odds, threshold=40)  # Above 40, log(1 + exp(m)) is m to the last digit.


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums over products of such tensors."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _takes_triton(weight: Tensor) -> bool:
    """Whether a chunk's softmax is the kernel's and its products are cuBLAS's, of the weight's own dtype."""
    is_taken = weight.dtype in (torch.bfloat16, torch.float32)
    is_taken |= weight.dtype == torch.float16 and _CUBLAS_RETURNS_FLOAT32
    return triton is not None and weight.is_cuda and is_taken


def _triton_softmax_pass(
    x: Tensor, dx: Tensor | None, labels: Tensor, row_grads: Tensor, logit_softcap: float
) -> Tensor:
    """What _softmax_pass does, for float32 logits, in one kernel that runs a program for each row.

    dx may be of half precision. It begins where x does, and its rows begin where those of x do.
    """
    log_odds = torch.empty_like(row_grads)
    out = x if dx is None else dx
    tensors, strides = (x, out, labels, row_grads, log_odds), (x.stride(0), out.stride(0))
    with torch.cuda.device_of(x):
        _softmax_kernel[(len(x),)](*tensors, *strides, x.shape[1], float(logit_softcap), dx is not None, num_warps=8)
    return F.softplus(log_odds, threshold=40)


if triton is not None:
    tl = triton.language
    _BLOCK = tl.constexpr(4096)

    @triton.jit
    def _softmax_kernel(
        x, dx, labels, row_grads, log_odds, x_stride, dx_stride, n, SOFTCAP: tl.constexpr, WITH_GRADIENT: tl.constexpr
    ):
        """One row of what _softmax_pass does. The log_odds [c] are the m of this file's docstring."""
        row = tl.program_id(0).to(tl.int64)
        x += row * x_stride
        label = tl.load(labels + row)
        at_label = _capped(tl.load(x + label), SOFTCAP)

        # others = sum over j != label of exp(x_j - top), where top is the largest logit met so far.
        top, others = at_label, 0.0
        for start in range(0, n, _BLOCK):
            words = start + tl.arange(0, _BLOCK)
            z = _capped(tl.load(x + words, mask=words < n, other=0.0), SOFTCAP)
            z = tl.where((words < n) & (words != label), z, float("-inf"))
            new_top = tl.maximum(top, tl.max(z, 0))
            others = others * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
            top = new_top
        tl.store(log_odds + row, tl.log(others) + top - at_label)

        if WITH_GRADIENT:
            dx += row * dx_stride
            row_grad, total = tl.load(row_grads + row), others + tl.exp(at_label - top)
            scale, label_gradient = row_grad / total, -(others / total) * row_grad
            for start in range(0, n, _BLOCK):
                words = start + tl.arange(0, _BLOCK)
                z = _capped(tl.load(x + words, mask=words < n, other=0.0), SOFTCAP)
                gradient = tl.where(words == label, label_gradient, tl.exp(z - top) * scale)
                if SOFTCAP > 0:
                    gradient *= 1 - (z / SOFTCAP) * (z / SOFTCAP)
                # In half precision, block k lies over float32 blocks up to k, which all threads must have read.
                tl.debug_barrier()
                tl.store(dx + words, gradient.to(dx.dtype.element_ty), mask=words < n)

    @triton.jit
    def _capped(z, SOFTCAP: tl.constexpr):
        """SOFTCAP * tanh(z / SOFTCAP), or z if SOFTCAP is 0."""
        if SOFTCAP > 0:
            z = SOFTCAP * (2 * tl.sigmoid(2 * z / SOFTCAP) - 1)
        return z
