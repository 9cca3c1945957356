"""Cross entropy of a linear layer's logits, holding no more than one chunk of them.

The logits x = h W^T of t tokens over n words are the largest tensor of a language model's training step. Here they are
computed a chunk of tokens at a time, and each chunk is turned, in its own memory, into its gradient, so that three
matrix products make the loss and both gradients:

    loss   = -log softmax(x)[label] = log(1 + sum over j != label of exp(x_j - x_label))
    dx     = softmax(x) - onehot(label)
    dh, dW = dx W, dx^T h

The gradients are made during the forward pass, for an incoming gradient of one. Backward scales them: dh by each
token's incoming gradient, dW by the one that all tokens share. Only where tokens differ in theirs is dW made again.

Needs PyTorch 2.6 or newer. On a GPU the pass over a chunk's logits is one Triton kernel, if Triton is there. On a CPU
threads take blocks of words that stay in a core's cache, and multiply bfloat16 in its units for that, if it has them.
"""

import concurrent.futures
import ctypes
import functools
import math
import os
import threading
from pathlib import Path

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # as on every CPU build of PyTorch
    triton = None

CHUNK_SIZE = 1024  # tokens whose logits are held at a time, unless asked otherwise
# cuBLAS sums products of half precision in float32; since PyTorch 2.8 it can be asked to return the sum as it is.
_CUBLAS_RETURNS_FLOAT32 = "dtype_out" in torch.ops.aten.addmm.overloads()


def chunk_linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    padding_idx: int = -100,
    chunk_size: int = CHUNK_SIZE,
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
            in bfloat16 on 2 CPU cores took 6.7 s with chunks of 1,024 (525 MB of logits) and 7.6 s with 256 (131 MB).
            A CPU with AVX-512 fills every chunk up to a multiple of 32 tokens.
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
    if weight.numel() == 0:
        raise ValueError(f"weight must have words and features, but is {tuple(weight.shape)}.")
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
    size = max(1, (8 << 20) // grads.shape[1])  # where dtypes differ, a CPU makes float32 copies: of one block, then
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
    sums, operands = _sum_dtype(weight), _operand_dtype(weight)
    losses = hidden.new_zeros(labels.shape, dtype=sums)
    if len(rows) == 0:
        if grad_weight is not None:
            grad_weight.zero_()
        return losses
    hidden, weight = hidden.detach(), weight.detach()
    row_grads = torch.ones_like(rows, dtype=sums) if row_grads is None else row_grads
    # float16 holds nothing below 6e-8, where most of a softmax over a large vocabulary lies.
    if operands == torch.float16:
        gain = 2.0**15 / row_grads.abs().amax()
        row_grads = row_grads * gain

    # Chunks of one size, so that the last is no sliver.
    flat_labels, flat_losses = labels.reshape(-1), losses.view(-1)
    run_chunk, multiple = (_chunk_by_triton, 1) if _takes_triton(weight) else (_chunk_by_blocks, _tokens_step(weight))
    chunks = -(-len(rows) // max(multiple, chunk_size // multiple * multiple))
    tokens = -(-len(rows) // chunks // multiple) * multiple
    memory = hidden.new_empty(tokens * (-(-len(weight) // 16) * 16), dtype=sums)
    parts = zip(rows.tensor_split(chunks), row_grads.tensor_split(chunks), strict=True)
    for chunk, (index, index_grads) in enumerate(parts):
        h = _filled_up(hidden[index].to(operands), multiple)
        y, g = _filled_up(flat_labels[index], multiple), _filled_up(index_grads, multiple)
        wants_dh = grad_hidden is not None
        chunk_losses, dh = run_chunk(h, weight, y, g, logit_softcap, memory, wants_dh, grad_weight, add=chunk > 0)
        flat_losses[index] = chunk_losses[: len(index)]
        if wants_dh:
            grad_hidden[index] = dh[: len(index)].to(grad_hidden.dtype)
    if operands == torch.float16:
        for grads in (grad_hidden, grad_weight):
            if grads is not None:
                grads /= gain
    return losses


def _sum_dtype(tensor):
    """The dtype of sums over products of such tensors."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _operand_dtype(weight):
    """The dtype of what is multiplied: half precision where that is faster and its sums can be had in float32."""
    has_units = _brgemm(weight.device.type, weight.dtype) is not None and weight.shape[1] % 2 == 0
    return weight.dtype if _takes_triton(weight) or has_units else _sum_dtype(weight)


def _filled_up(tensor, multiple):
    """tensor with rows of zeros appended, up to a multiple of rows. With row_grads of 0, they add to no gradient."""
    rows = -len(tensor) % multiple
    return torch.cat((tensor, tensor.new_zeros(rows, *tensor.shape[1:]))) if rows else tensor


# On a CPU, or without Triton: logits [n, c], in blocks of words, which threads work on side by side.


def _chunk_by_blocks(h, weight, labels, row_grads, logit_softcap, memory, wants_dh, grad_weight, add):
    """The losses [c] of hidden states h [c, d] and, if wanted, their gradient [c, d], for incoming gradients row_grads.

    Fills or, with add, adds to grad_weight [n, d], if it isn't None. Column t of the logits x [n, c], which lie in
    memory, is token t's: so weight in x = W h^T and dx in dW = dx h, the larger operands, need no transposed copies.
    """
    x = memory[: len(weight) * len(h)].view(len(weight), len(h))
    blocks = _blocks(x, h.shape[1], labels)
    label_h, label_weight = h.to(x.dtype), weight[labels].to(x.dtype)
    at_label = (label_h * label_weight).sum(1)
    slope = 1
    if logit_softcap:
        tanh = (at_label / logit_softcap).tanh_()
        at_label, slope = logit_softcap * tanh, 1 - tanh.square()

    tops, sums = _make_probabilities(x, h, weight, blocks, logit_softcap)
    top = torch.maximum(tops.amax(0), at_label)
    factors, of_label = sums * (tops - top).exp_(), at_label - top  # sums of exp(logit - top), a block; a logarithm
    others = factors.sum(0)
    total = others + of_label.exp()
    losses = _log1p_exp(others.log() - of_label)
    if not wants_dh and grad_weight is None:
        return losses, None

    factors.mul_(row_grads / total)
    dh = _make_gradients(x, h, weight, blocks, logit_softcap, tops, sums, factors, wants_dh, grad_weight, add)
    # The label's part, the largest, is added by itself: no operand of it is rounded, nor many small ones added to it.
    # As a sum over the other words, 1 - p keeps its digits where the label's probability p is near 1.
    dx_at_label = (-(others / total) * slope * row_grads)[:, None]
    if wants_dh:
        dh.addcmul_(dx_at_label, label_weight)
    if grad_weight is not None:
        grad_weight.index_add_(0, labels, label_h * dx_at_label)
    return losses, dh


def _blocks(x, d, labels):
    """Blocks of the words of logits x [n, c]: slices, each with the indices into x[slice] of the labels among them."""
    n, c = x.shape
    threads = _number_of_threads(x)
    # On a GPU what is worth a launch; on a CPU what its caches hold of x, the fastest of those tried.
    words = (64 << 20) // c if x.is_cuda else min(max((1 << 20) // c, 512), 1024)
    # Four blocks a thread or more, for balance; and what _make_gradients copies of weight is a quarter of x at most.
    words = max(32, min(words, n // (4 * threads), n * c // (8 * d * threads)))
    starts = range(0, n, words)
    tokens = labels.argsort()
    bounds = torch.searchsorted(labels[tokens], torch.tensor(starts[1:], device=labels.device, dtype=labels.dtype))
    parts = zip(starts, tokens.tensor_split(bounds.cpu()), strict=True)
    return [(slice(start, min(start + words, n)), (labels[part] - start, part)) for start, part in parts]


def _make_probabilities(x, h, weight, blocks, logit_softcap):
    """Makes x [n, c] of the softmax over each block's words, labels left out.

    Returns the blocks' largest logits and their sums of exp(logit - largest), [len(blocks), c] each.
    """
    tops, sums = x.new_empty(2, len(blocks), x.shape[1])
    h_tiles = _tiles(h.t())
    least = torch.finfo(x.dtype).min  # a logit whose probability is 0, without the NaN that -inf gives if it is alone

    def make(i):
        words, label_places = blocks[i]
        block = x[words]
        _multiply_by_tiles(weight[words].to(h.dtype).contiguous(), h_tiles, out=block)
        if logit_softcap:
            block.div_(logit_softcap).tanh_().mul_(logit_softcap)
        block[label_places] = least
        tops[i] = block.amax(0)
        torch.softmax(block, 0, out=block)
        sums[i] = block.amax(0).reciprocal_()  # the largest probability is exp(0) / sum

    _for_each(range(len(blocks)), make, _number_of_threads(x))
    return tops, sums


def _make_gradients(x, h, weight, blocks, logit_softcap, tops, sums, factors, wants_dh, grad_weight, add):
    """Makes of the probabilities in x [n, c] the logits' gradient, and of that grad_weight [n, d] and dh [c, d], which
    it returns.

    A block's probabilities are multiplied by its row of factors [len(blocks), c]. The labels' part is left out.
    """
    threads = _number_of_threads(x)
    h_tiles = _tiles(h)
    dh_t = x.new_zeros(h.t().shape) if wants_dh else None
    weight_t = {}  # of the blocks that dh_t lacks

    def make(i):
        words = blocks[i][0]
        block = x[words]
        if logit_softcap:
            logits = block.log().add_(tops[i] + sums[i].log()).clamp_(min=-logit_softcap)
            block.mul_(1 - logits.div_(logit_softcap).square_())
        block.mul_(factors[i])
        if grad_weight is not None:
            _multiply_by_tiles(block.to(h.dtype), h_tiles, out=grad_weight[words], add=add)
        if wants_dh:
            weight_t[i] = weight[words].t().contiguous().to(x.dtype)

    def add_to_dh(tile):
        # In float32: in bfloat16 dx's few large elements, rounded, would be most of dh's error.
        features, tokens = tile
        for i, w_t in sorted(weight_t.items()):
            _multiply_by_tiles(w_t[features], [x[blocks[i][0], tokens]], out=dh_t[tile], add=True)

    for first in range(0, len(blocks), 2 * threads):
        _for_each(range(first, min(first + 2 * threads, len(blocks))), make, threads)
        if wants_dh:
            _for_each(_tiles_of_dh(dh_t, threads), add_to_dh, threads)
            weight_t.clear()
    return dh_t.t() if wants_dh else None


def _tiles_of_dh(dh_t, threads):
    """Slices of features and of tokens of dh_t [d, c]: a tile for each thread, if that leaves them some size."""
    d, c = dh_t.shape
    by_tokens = math.ceil(c / 256)
    by_features = min(math.ceil(threads / math.gcd(threads, by_tokens)), math.ceil(d / 128))
    features = math.ceil(d / by_features)
    return [(slice(f, f + features), slice(t, t + 256)) for f in range(0, d, features) for t in range(0, c, 256)]


def _number_of_threads(tensor):
    return torch.get_num_threads() if tensor.device.type == "cpu" else 1


def _for_each(items, function, threads):
    """Calls function with each item, in that many threads. Where it raises, none of them is left at work."""
    function = torch.inference_mode()(function)  # the caller's mode is its own thread's
    if threads == 1:
        for item in items:
            function(item)
        return
    pool = _pool(threads)
    futures = [pool.submit(function, item) for item in items]
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        concurrent.futures.wait(futures)


@functools.cache
def _pool(threads):
    """Threads in each of which PyTorch's operators run on one core, so that a block stays in that core's cache.

    As it is with OpenMP's, a forked process has none of them.
    """

    def begin():
        torch.get_num_threads()  # a thread's first look at the number takes what was set last, for any thread
        torch.set_num_threads(1)

    pool = concurrent.futures.ThreadPoolExecutor(threads, initializer=begin)
    all_there = threading.Barrier(threads, timeout=60)
    for _ in pool.map(lambda _: all_there.wait(), range(threads)):
        pass
    torch.set_num_threads(threads)
    return pool


# A CPU's bfloat16 units multiply twice as fast. PyTorch's products of bfloat16 matrices round their sums to bfloat16,
# but it also has, for attention of its own, one of small matrices that returns them in float32: oneDNN's brgemm. It
# has no name in Python; this is its name in C++, argument types included, the same from PyTorch 2.6 to 2.13.
_BRGEMM = {
    torch.float32: "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb",
    torch.bfloat16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
}


def _brgemm(device_type, dtype):
    """brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, in_pairs) of operands of dtype; None where it can't be used."""
    if device_type != "cpu" or dtype not in _BRGEMM:
        return None
    if not torch.backends.mkldnn.is_available() or not torch._C._get_mkldnn_enabled():
        return None
    # Where oneDNN lacks the instructions, or is kept from them, brgemm would end the process.
    has_units = torch.cpu._is_avx512_bf16_supported if dtype == torch.bfloat16 else torch.cpu._is_avx512_supported
    if not has_units() or os.environ.keys() & {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}:
        return None
    return _load(_BRGEMM[dtype], *6 * [ctypes.c_int64], ctypes.c_bool, *3 * [ctypes.c_void_p], ctypes.c_bool)


@functools.cache
def _load(name, *argument_types):
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))[name]
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = argument_types, None
    return function


def _tokens_step(weight):
    """What number of tokens a chunk is filled up to a multiple of: brgemm compiles a kernel for every shape."""
    return 32 if _brgemm(weight.device.type, _operand_dtype(weight)) else 1


def _tiles(b):
    """b [k, n] as _multiply_by_tiles takes it: tiles of 256 columns; of bfloat16, in pairs of rows."""
    if _brgemm(b.device.type, b.dtype) is None:
        return [b]
    tiles = b.split(256, 1)
    if b.dtype == torch.bfloat16:
        tiles = [tile.unflatten(0, (-1, 2)).transpose(1, 2) for tile in tiles]
    return [tile.contiguous() for tile in tiles]


def _multiply_by_tiles(a, tiles, out, add=False):
    """out [m, n] = a [m, k] b, or out += a b, where b [k, n] is in tiles and a's rows and out's are contiguous."""
    brgemm = _brgemm(a.device.type, a.dtype)
    for tile, part in zip(tiles, out.split(tiles[0].shape[1], 1), strict=True):
        if brgemm is None:
            torch.addmm(part, a, tile, beta=int(add), out=part)
            continue
        (m, n), paired = part.shape, a.dtype == torch.bfloat16
        # The stride of a dimension of 1 may be anything.
        b_stride = tile.stride(0) // (2 if paired else 1)
        strides = max(a.stride(0), a.shape[1]), max(b_stride, n), max(out.stride(0), n)
        for k in range(0, a.shape[1], 512):  # as much of a tile as a cache holds
            a_k, b_k = a[:, k : k + 512], tile[k // 2 if paired else k :]
            pointers = (x.data_ptr() for x in (a_k, b_k, part))
            brgemm(m, n, a_k.shape[1], *strides, add or k > 0, *pointers, paired)
    if brgemm is not None:
        _load("_ZN2at6native7cpublas14brgemm_releaseEb", ctypes.c_bool)(True)  # the tile registers, where it took them


def _log1p_exp(z):
    return torch.logaddexp(z, torch.zeros_like(z))


# On a GPU: logits [c, n], one kernel from them to their gradient, cuBLAS for the rest.


def _takes_triton(weight):
    is_taken = weight.dtype in (torch.bfloat16, torch.float32)
    is_taken |= weight.dtype == torch.float16 and _CUBLAS_RETURNS_FLOAT32
    return triton is not None and weight.is_cuda and is_taken


def _chunk_by_triton(h, weight, labels, row_grads, logit_softcap, memory, wants_dh, grad_weight, add):
    """What _chunk_by_blocks does, with the logits as [c, n], n being rounded up to 16 in memory."""
    c, n = len(h), len(weight)
    # Rows of logits begin at multiples of 64 bytes.
    rows = memory[: c * (-(-n // 16) * 16)].view(c, -1)
    x = rows[:, :n]
    _multiply(h, weight.t(), out=x)
    if not wants_dh and grad_weight is None:
        return _triton_softmax_pass(x, None, labels, row_grads, logit_softcap), None
    dx = rows.view(h.dtype)[:, :n]
    losses = _triton_softmax_pass(x, dx, labels, row_grads, logit_softcap)
    dh = torch.empty_like(h, dtype=x.dtype) if wants_dh else None
    if wants_dh:
        _multiply(dx, weight, out=dh)
    if grad_weight is not None:
        _multiply(dx.t(), h, out=grad_weight, add=add)
    return losses, dh


def _multiply(a, b, out, add=False):
    """out = a b, or out += a b, in out's dtype."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif _CUBLAS_RETURNS_FLOAT32:
        torch.addmm(out, a, b, out.dtype, beta=int(add), out=out)
    else:
        product = torch.mm(a, b)
        out.add_(product) if add else out.copy_(product)


def _triton_softmax_pass(x, dx, labels, row_grads, logit_softcap):
    """The losses [c] of float32 logits x [c, n], in one kernel, a program a row.

    Leaves row_grads [c] times the logits' gradient in dx, which lies in x's memory, unless it is None; x is lost.
    """
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
