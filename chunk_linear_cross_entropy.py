"""Cross entropy of a linear layer's logits, holding no more than one chunk of them.

The logits x = h W^T of t tokens over n words are the largest tensor of a language model's training step. Here they are
computed a chunk of tokens at a time, and each chunk is turned, in its own memory, into its gradient, so that three
matrix products make the loss and both gradients:

    loss   = -log softmax(x)[label] = log(1 + sum over j != label of exp(x_j - x_label))
    dx     = softmax(x) - onehot(label)
    dh, dW = dx W, dx^T h

The gradients are made during the forward pass, for an incoming gradient of one. Backward scales them: dh by each
token's incoming gradient, dW by the one that all tokens share. Only where tokens differ in theirs is dW made again.

Needs PyTorch 2.6 or newer. On a GPU the pass over a chunk's logits is one Triton kernel, if Triton is there.
"""

import contextlib

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # as on every CPU build of PyTorch
    triton = None

# cuBLAS sums products of half precision in float32; since PyTorch 2.8 it can be asked to return the sum as it is.
_CUBLAS_RETURNS_FLOAT32 = "dtype_out" in torch.ops.aten.addmm.overloads()


def chunk_linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    padding_idx: int = -100,
    chunk_size: int = 1024,
    logit_softcap: float = 0.0,
) -> torch.Tensor:
    """Cross entropy of the logits hidden_states @ weight.T, per token.

    Args:
        hidden_states: [b, l, d], floating point.
        weight: [n, d], of the same dtype.
        labels: [b, l], integers in [0, n), or padding_idx where a token doesn't count.
        padding_idx: a token with this label has loss and gradient 0, and costs no matrix product.
        chunk_size: logits of at most this many tokens are held at a time, in float32. Every chunk reads and writes the
            whole weight gradient, so fewer tokens take less memory and more time: 4,096 tokens x 512 x 128,256 words
            on 2 CPU cores took 10.4 s with chunks of 1,024 (525 MB of logits) and 11.1 s with 256 (131 MB), run once.
        logit_softcap: c > 0 caps the logits first, to c * tanh(logits / c), as Gemma 2 does.

    Returns:
        [b, l] losses, in float32, or in float64 for float64 inputs.

    Raises:
        ValueError: shapes, dtypes or devices don't go together, or a label is neither in [0, n) nor padding_idx.

    Under autocast the inputs are cast as torch.nn.functional.linear casts them. On a GPU the host waits for the device
    once, to learn how many tokens count; bad labels come to light in that same wait. Backward waits only where the
    incoming gradient is not one number expanded to all tokens, which that of .sum() is. torch.compile calls it as it
    is, with a graph break.
    """
    device = hidden_states.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and hidden_states.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    _check_inputs(hidden_states, weight, labels, chunk_size, logit_softcap)
    if device == "meta" or isinstance(hidden_states, torch._subclasses.FakeTensor):
        return hidden_states.new_empty(labels.shape, dtype=_sum_dtype(hidden_states))
    hidden = hidden_states.reshape(labels.numel(), weight.shape[1])
    return _opaque(hidden, weight, labels.long(), padding_idx, chunk_size, logit_softcap)


def _check_inputs(hidden_states, weight, labels, chunk_size, logit_softcap):
    """Raises a ValueError of one sentence for shapes, dtypes, devices or options that make no sense."""
    shapes = [tuple(tensor.shape) for tensor in (hidden_states, weight, labels)]
    if [len(shape) for shape in shapes] != [3, 2, 2] or shapes[0] != (*shapes[2], shapes[1][1]):
        shapes = ", ".join(map(str, shapes))
        raise ValueError(f"hidden_states, weight and labels must be [b, l, d], [n, d] and [b, l], but are {shapes}.")
    if hidden_states.dtype != weight.dtype or not weight.is_floating_point():
        dtypes = f"{hidden_states.dtype} and {weight.dtype}"
        raise ValueError(f"hidden_states and weight must have the same floating point dtype, but have {dtypes}.")
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"labels must be integers, but are {labels.dtype}.")
    if not hidden_states.device == weight.device == labels.device:
        devices = f"{hidden_states.device}, {weight.device} and {labels.device}"
        raise ValueError(f"hidden_states, weight and labels must be on the same device, but are on {devices}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}.")
    if logit_softcap < 0:
        raise ValueError(f"logit_softcap must be positive, or 0 for no cap, but is {logit_softcap}.")


@torch.compiler.disable
def _opaque(hidden, weight, labels, padding_idx, chunk_size, logit_softcap):
    """The losses [b, l] of hidden [b * l, d], weight [n, d] and labels [b, l]; torch.compile doesn't look inside."""
    rows = _rows_that_count(labels.reshape(-1), padding_idx, len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return _ChunkLinearCrossEntropy.apply(hidden, weight, labels, rows, chunk_size, logit_softcap)
        return _losses(hidden, weight, labels, rows, chunk_size, logit_softcap)


def _rows_that_count(labels, padding_idx, n):
    """The indices of the tokens that count, in order.

    The host launches the products, so it must know for how many rows. It waits for one copy, of two totals.
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
    def forward(ctx, hidden, weight, labels, rows, chunk_size, logit_softcap):
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        # float16 could not hold a gradient before it is scaled.
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if to_hidden else None
        grad_weight = weight.new_empty(weight.shape, dtype=_sum_dtype(weight)) if to_weight else None
        losses = _losses(hidden, weight, labels, rows, chunk_size, logit_softcap, None, grad_hidden, grad_weight)
        # The inputs serve only to make the weight's gradient again. Whatever is kept goes through save_for_backward,
        # for activation checkpointing or offloading to take.
        inputs = (hidden, weight, labels) if to_weight else (None, None, None)
        ctx.save_for_backward(*inputs, rows, grad_hidden, grad_weight)
        ctx.dtype, ctx.options = hidden.dtype, (chunk_size, logit_softcap)
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        if torch.is_grad_enabled():  # as it is under create_graph=True
            raise RuntimeError("chunk_linear_cross_entropy has no second derivative: create_graph must be False.")
        hidden, weight, labels, rows, grad_hidden, grad_weight = ctx.saved_tensors
        row_grads = grad_losses.reshape(-1)[rows]
        if grad_hidden is not None:
            # Tokens that don't count get zero, whatever comes in for them.
            scales = row_grads.new_zeros(len(grad_hidden)).index_copy_(0, rows, row_grads)
            grad_hidden = _scaled(grad_hidden, scales, ctx.dtype)
        if grad_weight is not None and _is_uniform(grad_losses, row_grads):
            scale = row_grads[:1].sum()  # 0 if no token counts
            grad_weight = _scaled(grad_weight, scale.expand(len(grad_weight)), ctx.dtype)
        elif grad_weight is not None:
            matter = row_grads != 0
            grad_weight = grad_weight if _saved_tensors_are_spent() else torch.empty_like(grad_weight)
            _losses(hidden, weight, labels, rows[matter], *ctx.options, row_grads[matter], None, grad_weight)
            grad_weight = grad_weight.to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _is_uniform(grad_losses, row_grads):
    """Whether the tokens that count all have the same incoming gradient.

    The strides of an expanded gradient tell. Any other is looked at, which on a GPU the host has to wait for: less long
    than two matrix products take.
    """
    return len(row_grads) == 0 or not any(grad_losses.stride()) or bool((row_grads == row_grads[0]).all())


def _saved_tensors_are_spent():
    """Whether autograd frees saved tensors after the present backward pass, which then may overwrite them."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def _scaled(grads, scales, dtype):
    """grads [r, d] times scales [r], in dtype."""
    if grads.dtype == dtype and grads.device.type == "cpu" and bool((scales == 1).all()):
        return grads
    out = grads if grads.dtype == dtype and _saved_tensors_are_spent() else torch.empty_like(grads, dtype=dtype)
    size = _block_size(grads)  # where dtypes differ, a CPU makes copies of what it multiplies: of one block, then
    for block, block_scales, block_out in zip(grads.split(size), scales.split(size), out.split(size), strict=True):
        torch.mul(block, block_scales[:, None], out=block_out)
    return out


def _losses(
    hidden, weight, labels, rows, chunk_size, logit_softcap, row_grads=None, grad_hidden=None, grad_weight=None
):
    """The losses [b, l] of the tokens in rows, indices into hidden [b * l, d], and zero for the others.

    Fills the gradients that are given. row_grads [len(rows)] are the incoming ones, None standing for ones. grad_hidden
    [b * l, d] must be zero outside rows; grad_weight [n, d] is overwritten.
    """
    n, sums, operands = len(weight), _sum_dtype(weight), _operand_dtype(weight)
    losses = hidden.new_zeros(labels.shape, dtype=sums)
    if len(rows) == 0:
        if grad_weight is not None:
            grad_weight.zero_()
        return losses
    row_grads = torch.ones_like(rows, dtype=sums) if row_grads is None else row_grads
    # float16 holds nothing below 6e-8, where most of a softmax over a large vocabulary lies.
    if operands == torch.float16:
        gain = 2.0**15 / row_grads.abs().amax()
        row_grads = row_grads * gain

    # Chunks of one size, so that the last is no sliver; rows of logits begin at multiples of 64 bytes.
    flat_labels, flat_losses = labels.reshape(-1), losses.view(-1)
    chunks = -(-len(rows) // chunk_size)
    logits = hidden.new_empty(-(-len(rows) // chunks), -(-n // 16) * 16, dtype=sums)
    with _bfloat16_units(weight):
        parts = zip(rows.tensor_split(chunks), row_grads.tensor_split(chunks), strict=True)
        for chunk, (index, index_grads) in enumerate(parts):
            h, x = hidden[index].to(operands), logits[: len(index), :n]
            dx = None if grad_hidden is None and grad_weight is None else logits.view(operands)[: len(index), :n]
            for words, block in _word_blocks(weight, operands):
                _multiply(h, block.t(), out=x[:, words])
            flat_losses[index] = _softmax_pass(x, dx, flat_labels[index], index_grads, logit_softcap)
            if dx is None:
                continue
            dh = torch.empty_like(h, dtype=sums)
            for words, block in _word_blocks(weight, operands):
                if grad_hidden is not None:
                    _multiply(dx[:, words], block, out=dh, add=words.start > 0)
                if grad_weight is not None:
                    _multiply(dx[:, words].t(), h, out=grad_weight[words], add=chunk > 0)
            if grad_hidden is not None:
                grad_hidden[index] = dh.to(grad_hidden.dtype)
    if operands == torch.float16:
        for grads in (grad_hidden, grad_weight):
            if grads is not None:
                grads /= gain
    return losses


def _sum_dtype(tensor):
    """The dtype of sums over products of such tensors."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _operand_dtype(weight):
    """The dtype of what is multiplied: a GPU has units for half precision; a CPU is many times faster in float32."""
    takes_half = weight.dtype == torch.bfloat16 or _CUBLAS_RETURNS_FLOAT32
    return weight.dtype if weight.is_cuda and takes_half else _sum_dtype(weight)


def _block_size(tensor):
    """How many rows of a matrix make a block: one that a CPU's caches hold; on a GPU, one that is worth a launch."""
    size = 64 << 20 if tensor.is_cuda else torch.get_num_threads() * (4 << 20)
    return max(1, size // max(1, tensor.shape[1] * _sum_dtype(tensor).itemsize))


def _word_blocks(weight, dtype):
    """Yields weight in dtype, block by block, with the words that are in it: on a GPU whole, if no copy is needed.

    On a CPU both gradients' products then find a block of dx in its caches.
    """
    size = len(weight) if weight.is_cuda and weight.dtype == dtype else _block_size(weight)
    for start in range(0, len(weight), size):
        yield slice(start, start + size), weight[start : start + size].to(dtype)


def _multiply(a, b, out, add=False):
    """out = a b, or out += a b, in out's dtype."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif _CUBLAS_RETURNS_FLOAT32:
        torch.addmm(out, a, b, out.dtype, beta=int(add), out=out)
    else:
        product = torch.mm(a, b)
        out.add_(product) if add else out.copy_(product)


@contextlib.contextmanager
def _bfloat16_units(weight):
    """Lets a CPU that has bfloat16 units multiply bfloat16 values in them, though float32 holds them.

    Sums stay in float32. The setting is PyTorch's, of 2.9 and newer, and for all threads.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if not on_cpu or matmul is None or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _softmax_pass(x, dx, labels, row_grads, logit_softcap):
    """The losses [c] of logits x [c, n].

    Leaves row_grads [c] times the logits' gradient in dx, which lies in x's memory, unless it is None; x is lost.
    """
    if triton is not None and x.is_cuda and x.dtype == torch.float32:
        return _triton_softmax_pass(x, dx, labels, row_grads, logit_softcap)
    losses = torch.empty_like(row_grads)
    size = _block_size(x)
    for start in range(0, len(x), size):
        block = slice(start, start + size)
        z, label = x[block], labels[block, None]
        if logit_softcap:
            tanh = z.div_(logit_softcap).tanh_()
            slope = 1 - tanh.square() if dx is not None else None
            z.mul_(logit_softcap)
        z.sub_(z.amax(1, keepdim=True))
        at_label = z.gather(1, label)
        others = z.exp_().scatter_(1, label, 0).sum(1, keepdim=True)
        losses[block] = _log1p_exp(others.log() - at_label).squeeze(1)
        if dx is None:
            continue
        # As a sum over the other words, 1 - p keeps its digits where the label's probability p is near 1.
        total, grads = others + at_label.exp(), row_grads[block, None]
        z.mul_(grads / total).scatter_(1, label, -(others / total) * grads)
        if logit_softcap:
            z.mul_(slope)
        if dx.dtype != x.dtype:
            dx[block] = z.to(dx.dtype)
    return losses


def _log1p_exp(z):
    return torch.logaddexp(z, torch.zeros_like(z))


def _triton_softmax_pass(x, dx, labels, row_grads, logit_softcap):
    """_softmax_pass of float32 logits in one kernel, a program a row."""
    c, n = x.shape
    log_ratios = torch.empty_like(row_grads)
    out = x if dx is None else dx
    strides = x.stride(0), out.stride(0)
    flags = {"CAPPED": logit_softcap > 0, "WITH_GRADIENT": dx is not None}
    with torch.cuda.device_of(x):
        _softmax_kernel[(c,)](
            x, out, labels, row_grads, log_ratios, *strides, n, float(logit_softcap), **flags, BLOCK=4096, num_warps=8
        )
    return _log1p_exp(log_ratios)


if triton is not None:

    @triton.jit
    def _softmax_kernel(
        x,
        dx,
        labels,
        row_grads,
        log_ratios,
        x_stride,
        dx_stride,
        n,
        softcap,
        CAPPED: tl.constexpr,
        WITH_GRADIENT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        x += row * x_stride
        label = tl.load(labels + row)
        at_label = _capped(tl.load(x + label), softcap, CAPPED)

        # others = sum over j != label of exp(x_j - top), where top is the largest logit met so far.
        top, others = at_label, 0.0
        for start in range(0, n, BLOCK):
            words = start + tl.arange(0, BLOCK)
            z = _capped(tl.load(x + words, mask=words < n, other=0.0), softcap, CAPPED)
            z = tl.where((words < n) & (words != label), z, float("-inf"))
            new_top = tl.maximum(top, tl.max(z, 0))
            others = others * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
            top = new_top
        tl.store(log_ratios + row, tl.log(others) + top - at_label)

        if WITH_GRADIENT:
            dx += row * dx_stride
            row_grad, total = tl.load(row_grads + row), others + tl.exp(at_label - top)
            scale, label_gradient = row_grad / total, -(others / total) * row_grad
            for start in range(0, n, BLOCK):
                words = start + tl.arange(0, BLOCK)
                z = _capped(tl.load(x + words, mask=words < n, other=0.0), softcap, CAPPED)
                gradient = tl.where(words == label, label_gradient, tl.exp(z - top) * scale)
                if CAPPED:
                    gradient *= 1 - (z / softcap) * (z / softcap)
                # A half-precision block k is stored over float32 words of blocks up to k: all threads must have read.
                tl.debug_barrier()
                tl.store(dx + words, gradient.to(dx.dtype.element_ty), mask=words < n)

    @triton.jit
    def _capped(z, softcap, CAPPED: tl.constexpr):
        """softcap * tanh(z / softcap) if CAPPED."""
        if CAPPED:
            z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
        return z
