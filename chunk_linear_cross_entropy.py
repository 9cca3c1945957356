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

On a CPU, tokens that don't count are left out. On a GPU they take part in the products with a gradient of zero: the
host launches the products, so to leave tokens out it would have to wait for the device to count them.

Needs PyTorch 2.6 or newer. On a GPU with Triton, one kernel turns logits into losses and dx, and half precision is
multiplied as it is, with float32 sums. Elsewhere PyTorch's operators do it, and half precision is converted to float32
first: on a CPU, PyTorch rounds the sums of half-precision products, and many CPUs take longer for those products.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language
except ImportError:  # PyTorch for CPUs comes without it.
    triton: Any = None

# At most this many tokens' logits are held at a time, unless the caller gives another number. At 16,384 x 4,096 x
# 128,256 in bfloat16 on an H200, 1,024 take 92 ms, 2,048 and 4,096 both 86, and each doubling from 2,048 on takes 1 GB.
CHUNK_SIZE = 2048
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
        padding_idx: a token with this label has loss and gradient 0. On a CPU it costs no matrix product; on a GPU it
            takes part in them, so that its hidden state must be finite.
        chunk_size: at most this many tokens' logits are held at a time, in chunk_size * n * 4 bytes. Every chunk reads
            and writes the whole gradient of the weight, so smaller chunks take less memory and more time. On a CPU, a
            float32 copy of a half-precision weight is held besides.
        logit_softcap: c > 0 caps the logits first, to c * tanh(logits / c), as Gemma 2 does.

    Returns:
        [b, l] losses in nats, in float32, or in float64 for float64 inputs.

    Raises:
        ValueError: shapes, dtypes or devices don't go together, or, on a CPU, a label is neither in [0, n) nor
            padding_idx. On a GPU such a label fails an assertion on the device, which CUDA reports later.

    Under autocast the inputs are cast as torch.nn.functional.linear casts them. The host doesn't wait for a GPU, with
    one exception: backward compares incoming gradients whose strides don't tell that they are one number expanded to
    all tokens, as that of .sum() is. torch.compile breaks its graph around the call.
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
    labels, counts = _checked(labels, padding_idx, len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return _ChunkLinearCrossEntropy.apply(hidden, weight, labels, counts, chunk_size, logit_softcap)
        return _losses(hidden, weight, labels, counts.to(_sum_dtype(weight)), chunk_size, logit_softcap)


def _checked(labels: Tensor, padding_idx: int, n: int) -> tuple[Tensor, Tensor]:
    """The labels [b, l], each in [0, n), and whether each token counts [b, l]. A token that doesn't has the label 0.

    Raises a ValueError if a label is neither padding_idx nor in [0, n). On a GPU, where the host would have to wait to
    learn that, an assertion fails on the device.
    """
    counts = labels != padding_idx
    good = (labels >= 0) & (labels < n)
    fits = good | ~counts
    if not _host_can_look_at(labels):
        torch._assert_async(fits.all(), f"labels must be in [0, {n}) or equal padding_idx ({padding_idx})")
    elif not fits.all():
        bad = labels[~fits]
        raise ValueError(
            f"labels must be in [0, {n}) or equal padding_idx ({padding_idx}), but {len(bad)} of {labels.numel()} are "
            f"not, the first being {bad[0].item()}."
        )
    return labels.where(counts & good, 0), counts


def _host_can_look_at(tensor: Tensor) -> bool:
    """Whether the host can read a tensor's values without waiting for another device to compute them."""
    return tensor.device.type == "cpu"


class _ChunkLinearCrossEntropy(torch.autograd.Function):
    """_losses, and the gradients made along with them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, counts: Tensor, chunk_size: int, logit_softcap: float
    ) -> Tensor:
        """The losses [b, l], as by _losses, of the tokens that count [b, l]."""
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        # float16 could not hold a gradient before it is scaled.
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if to_hidden else None
        grad_weight = weight.new_empty(weight.shape, dtype=_sum_dtype(weight)) if to_weight else None
        row_grads = counts.to(_sum_dtype(weight))
        losses = _losses(hidden, weight, labels, row_grads, chunk_size, logit_softcap, grad_hidden, grad_weight)
        # The inputs serve only to make the weight's gradient again. Whatever is kept goes through save_for_backward,
        # where activation checkpointing and offloading can reach it.
        inputs = (hidden, weight, labels) if to_weight else (None, None, None)
        ctx.save_for_backward(*inputs, counts, grad_hidden, grad_weight)
        ctx.dtype, ctx.chunk_size, ctx.logit_softcap = hidden.dtype, chunk_size, logit_softcap
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of hidden and weight for those of the losses [b, l]."""
        if torch.is_grad_enabled():  # That is so under create_graph=True.
            raise RuntimeError("chunk_linear_cross_entropy has no second derivative: create_graph must be False.")
        hidden, weight, labels, counts, grad_hidden, grad_weight = ctx.saved_tensors
        row_grads = grad_losses.where(counts, 0)  # Whatever comes in for tokens that don't count.
        if grad_hidden is not None:
            grad_hidden = _scaled(grad_hidden, row_grads.reshape(-1), ctx.dtype)
        if grad_weight is not None:
            scale = _only_value(row_grads)
            if not any(grad_losses.stride()) or bool(((row_grads == scale) | ~counts).all()):
                grad_weight = _scaled(grad_weight, scale.expand(len(grad_weight)), ctx.dtype)
            else:
                grad_weight = grad_weight if _saved_tensors_are_spent() else torch.empty_like(grad_weight)
                _losses(hidden, weight, labels, row_grads, ctx.chunk_size, ctx.logit_softcap, None, grad_weight)
                grad_weight = grad_weight.to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _only_value(row_grads: Tensor) -> Tensor:
    """The value [] of the elements of row_grads [b, l] that are not 0, if they have only one; 0 if there are none."""
    least, greatest = F.pad(row_grads.reshape(-1), (0, 1)).aminmax()
    return least + greatest  # One of them is the 0 that is put at the end.


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
    row_grads: Tensor,
    chunk_size: int,
    logit_softcap: float,
    grad_hidden: Tensor | None = None,
    grad_weight: Tensor | None = None,
) -> Tensor:
    """The losses [b, l] of hidden [b * l, d], and zero for tokens whose incoming gradient in row_grads [b, l] is zero.

    Fills the gradients that are given. grad_hidden [b * l, d] must be zero; grad_weight [n, d] is overwritten.
    """
    sums, n, takes_triton = _sum_dtype(weight), len(weight), _takes_triton(weight)
    result = hidden.new_zeros(labels.shape, dtype=sums)
    losses, labels, row_grads = result.view(-1), labels.reshape(-1), row_grads.reshape(-1)
    chunks = _chunks(row_grads, chunk_size)
    if not chunks:
        if grad_weight is not None:
            grad_weight.zero_()
        return result
    operands = weight.dtype if takes_triton else sums
    hidden, weight = hidden.detach(), weight.detach().to(operands)
    # float16 holds nothing below 6e-8, where most of a softmax over a large vocabulary lies.
    gain = 2.0**15 / row_grads.abs().amax().clamp(min=1e-30) if operands == torch.float16 else 1

    # The kernel's rows begin at multiples of 64 bytes.
    memory = hidden.new_empty(len(losses[chunks[0]]), -(-n // 16) * 16 if takes_triton else n, dtype=sums)
    softmax_pass = _triton_softmax_pass if takes_triton else _softmax_pass
    wants_gradient = grad_hidden is not None or grad_weight is not None
    for number, chunk in enumerate(chunks):
        h, grads = hidden[chunk].to(operands), row_grads[chunk] * gain
        logits = memory[: len(h)]
        x, dx = _multiply(h, weight.t(), out=logits[:, :n]), logits.view(operands)[:, :n]
        chunk_losses = softmax_pass(x, dx if wants_gradient else None, labels[chunk], grads, logit_softcap)
        losses[chunk] = chunk_losses.where(grads != 0, 0)
        if grad_hidden is not None:
            product = torch.empty_like(h, dtype=grad_hidden.dtype if takes_triton else sums)
            grad_hidden[chunk] = _multiply(dx, weight, out=product).to(grad_hidden.dtype)
        if grad_weight is not None:
            _multiply(dx.t(), h, out=grad_weight, add=number > 0)
    for gradient in (grad_hidden, grad_weight):
        if gradient is not None and operands == torch.float16:
            gradient /= gain
    return result


def _chunks(row_grads: Tensor, chunk_size: int) -> Sequence[Tensor | slice]:
    """Indices into row_grads [t] of chunks of tokens: on a CPU, of those whose gradient is not zero.

    To know those of a GPU the host would have to wait for it, so there the chunks have all tokens. Chunks are of one
    size, to within a few tokens, so that the last is no sliver; none is longer than the first.
    """
    if _host_can_look_at(row_grads):
        rows = row_grads.nonzero()[:, 0]
        return rows.tensor_split(-(-len(rows) // chunk_size)) if len(rows) else ()
    t = len(row_grads)
    size = -(-t // max(1, -(-t // chunk_size)))
    return [slice(start, start + size) for start in range(0, t, max(1, size))]


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
