"""The fused kernels of attention: which one is taken, what is refused, and, on a GPU, what each computes and holds."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from families import small_config
from test_kernels import formula

import train
from longctx.compiled import read_plan_file
from longctx.compiler.ir import Op, Tensor, nbytes
from longctx.compiler.ops.registered import target_of
from longctx.engines.builtin.run import agree_on_attention, choose_attention, take_attention
from longctx.errors import KernelError, UserError
from longctx.huggingface.attention import attention_function, attention_options
from longctx.kernels import attention as attention_module
from longctx.kernels import choice, fused
from longctx.kernels.attention import (
    QUERY_BLOCK,
    attention,
    flops,
    flops_of_queries,
    fused_shapes,
    is_one_kernel,
    saves,
    workspace,
)
from longctx.kernels.choice import Choice, Milliseconds, candidates, choose
from longctx.options import parse_job
from longctx.runtime import parallel
from longctx.runtime.determinism import be_deterministic

SHAPES = [[[1, 4, 131072, 128], [1, 1, 131072, 128], [1, 1, 131072, 128]]]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def attention_op(shapes, dtype=torch.bfloat16, **options) -> Op:
    """A call of attention on one rank."""
    inputs = tuple(Tensor(name, tuple(s), dtype, True) for name, s in zip("qkv", shapes, strict=True))
    return Op(target_of(attention), inputs, {"scale": 1.0, **options}, (), "", None)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.fixture(autouse=True)
def unchosen():
    """'auto' stands for no kernel after a test, as before it."""
    yield
    fused.set_auto("auto")


# --- which kernel ----------------------------------------------------------------------------------------------------


def timed(monkeypatch, **outcomes: Milliseconds | Exception) -> None:
    """Kernels take these times, or raise these errors."""

    def time_kernel(name, shapes, dtype):
        if isinstance(outcomes[name], Exception):
            raise outcomes[name]
        return outcomes[name]

    monkeypatch.setattr(choice, "time_kernel", time_kernel)


def test_the_kernel_whose_forward_and_backward_together_are_fastest_is_taken_and_said(no_gpu, monkeypatch):
    timed(monkeypatch, flash=Milliseconds(53.56, 135.66), cudnn=Milliseconds(29.63, 80.32), fa3=Milliseconds(20, 190))
    assert choose(("flash", "cudnn", "fa3"), SHAPES, torch.bfloat16) == Choice(
        "cudnn", "cudnn, 29.6 + 80.3 ms at [1, 4, 131072, 128] (flash 53.6 + 135.7; fa3 20.0 + 190.0)"
    )


def test_a_kernel_that_refuses_a_shape_is_said_and_the_next_one_is_taken(no_gpu, monkeypatch):
    timed(monkeypatch, cudnn=RuntimeError("No available kernel.\nAborting."), flash=Milliseconds(2.0, 5.0))
    found = choose(("cudnn", "flash"), SHAPES, torch.bfloat16)
    assert found.kernel == "flash"
    assert found.findings.endswith("(cudnn can't: No available kernel. Aborting)")
    assert choose(("cudnn",), SHAPES, torch.bfloat16) == Choice(None, "cudnn can't: No available kernel. Aborting")


def test_rows_of_any_length_take_no_longer_to_try_than_those_of_131072_tokens(no_gpu, monkeypatch):
    tried = []
    monkeypatch.setattr(choice, "time_kernel", lambda name, shapes, dtype: tried.append(shapes) or Milliseconds(1, 1))
    longer = [[[1, 2, 2**20, 64]] * 3, [[2, 2, 1024, 64]] * 3]
    found = choose(("flash",), longer, torch.bfloat16)
    assert tried == [[[(1, 2, 131072, 64)] * 3, [(2, 2, 1024, 64)] * 3]]
    assert found.findings == "flash, 1.0 + 1.0 ms at [1, 2, 131072, 64] and [2, 2, 1024, 64]"


def test_auto_tries_every_kernel_that_is_there_and_one_that_was_asked_for_alone(monkeypatch):
    monkeypatch.setattr(choice, "why_not", lambda name, dtype, device: None if name in ("cudnn", "flash") else "absent")
    assert candidates("auto", deterministic=False) == ("cudnn", "flash")
    assert candidates("auto", deterministic=False, documents_apart=True) == ("flash",)  # cuDNN's takes none apart
    assert candidates("fa4", deterministic=True) == ("fa4",)
    assert candidates("sdpa", deterministic=False) == candidates("eager", deterministic=True) == ()


def test_auto_is_not_left_to_a_clock_where_runs_are_to_have_the_same_bits():
    assert candidates("auto", deterministic=True) == ("flash",)


class Job(SimpleNamespace):
    attn_implementation, deterministic, document_mask, dtype = "auto", False, False, torch.bfloat16


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_is_chosen_before_the_first_step_is_what_auto_runs(one_rank, no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(choice, "choose", lambda names, shapes, dtype: Choice("cudnn", f"cudnn at {shapes}"))
    monkeypatch.setattr(choice, "candidates", lambda *asked: ("cudnn", "flash"))
    take_attention(Job(), agree_on_attention(Job(), SHAPES, torch.device("cuda")))
    assert capsys.readouterr().out == f"attention: cudnn at {SHAPES}\n"

    called = []
    monkeypatch.setattr(attention_module, "sdpa", lambda q, k, v, s, p, kernel, **mask: called.append(kernel) or q)
    for asked in ("auto", "flash", "sdpa"):
        attention(*torch.randn(3, 1, 2, 8, 4), 1.0, implementation=asked)
    assert called == ["cudnn", "flash", "sdpa"]


def test_a_kernel_that_was_asked_for_and_refuses_the_shape_ends_the_run_in_one_sentence(one_rank, no_gpu, monkeypatch):
    monkeypatch.setattr(choice, "choose", lambda *asked: Choice(None, "fa4 can't: no heads of 80"))
    job = Job(attn_implementation="fa4")
    with pytest.raises(KernelError, match="^fa4 can't: no heads of 80; choose auto$"):
        take_attention(job, choose_attention(job, SHAPES, torch.device("cuda")))


def test_on_a_cpu_and_in_float32_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(choice, "choose", lambda *asked: pytest.fail("it was"))
    assert choose_attention(Job(), SHAPES, torch.device("cpu")) is None
    assert choose_attention(Job(dtype=torch.float32), SHAPES, torch.device("cuda")) is None


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        (r"--attn_implementation fa3: the package flash-attn-3 is not installed; install it \(from", "fa3"),
        (r"--attn_implementation fa4: the package flash-attn-4 is not installed; install it \(pip", "fa4"),
        ("--attn_implementation flash: it runs on a GPU; choose auto, sdpa or eager", "flash"),
        ("--attn_implementation cudnn: it computes in 16 bits only; choose sdpa", "cudnn --precision fp32"),
        ("--deterministic: the backward of --attn_implementation cudnn gives other bits", "cudnn --deterministic"),
    ],
)
def test_a_kernel_that_is_not_there_is_refused_before_anything_is_compiled(tmp_path, no_gpu, sentence, words):
    small_config("llama").save_pretrained(tmp_path / "model")
    mode = "run" if "GPU" in sentence else "compile"
    argv = f"--run_mode {mode} --model_id {tmp_path / 'model'} --sequence_length 32 --attn_implementation {words}"
    rows = ["--dataset_path", "rows"] if mode == "run" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longctx.options.choose_sequence_length", lambda options: 32)
        with pytest.raises(UserError, match=f"^{sentence}"):
            parse_job([*argv.split(), *rows, "--compiled_dir", str(tmp_path / "compiled")])


def test_a_kernel_for_another_kind_of_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(fused, "_is_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    reason = "it runs on compute capability 9.x, and this GPU has 8.0; choose auto"
    assert fused.why_not("fa3", torch.bfloat16, "cuda") == reason
    assert fused.why_not("fa3", torch.bfloat16, None) is None
    assert fused.why_not("flash", torch.bfloat16, "cuda") is None


@pytest.mark.parametrize("options", [{"sliding_window": 8}, {"softcap": 50.0}])
def test_a_kernel_without_a_window_or_a_softcap_is_refused_for_a_model_that_has_one(options):
    tensors = torch.randn(3, 1, 2, 16, 4)
    flash = attention_options("flash")
    with pytest.raises(KernelError, match="the attention of Linear has a window, a soft-cap or a bias, which this"):
        attention_function(flash, torch.nn.Linear(1, 1), *tensors, None, **options)
    attention_function(flash, torch.nn.Linear(1, 1), *tensors, None, sliding_window=16)  # all is seen


# --- what the compiler knows -----------------------------------------------------------------------------------------


def test_every_fused_kernels_output_can_be_kept_where_the_rest_is_recomputed():
    for name in (*fused.KERNELS, "auto", "sdpa"):
        assert is_one_kernel(attention_op(SHAPES[0], implementation=name)), name
        assert fused_shapes(attention_op(SHAPES[0], implementation=name)) == tuple(map(tuple, SHAPES[0]))
    for options in ({"implementation": "eager"}, {"softcap": 1.0}, {"dropout": 0.1}):
        assert not is_one_kernel(attention_op(SHAPES[0], **options))
    assert fused_shapes(attention_op(SHAPES[0], window=1024)) == ()


@pytest.mark.parametrize(("d", "e", "options"), [(192, 128, {}), (128, 128, {"dropout": 0.1}), (100, 100, {})])
def test_queries_whose_pieces_no_gpu_kernel_takes_are_priced_and_weighed_as_the_blocks_that_run(d, e, options):
    def op(n_queries: int, d: int = d, e: int = e, **options) -> Op:
        return attention_op([(1, 4, n_queries, d), (1, 4, 8192, d), (1, 4, 8192, e)], **options)

    some, fused_op = flops_of_queries(op(8192, **options), (6144,), 2048), op(8192, 128, 128)
    assert some.backward == 3.5 * some.forward  # a block's forward again, and the five products of its backward
    assert flops_of_queries(op(8192, **options), (0,), 8192).backward == 2.5 * flops(op(8192, **options)).forward
    assert flops_of_queries(fused_op, (6144,), 2048).backward == 2.5 * flops_of_queries(fused_op, (6144,), 2048).forward
    part = op(2048, **options)
    distances = 8 * QUERY_BLOCK * 8192  # int64, of which a block's mask is made
    assert sum(share * nbytes(t) for t, share in workspace(part, "forward").items()) > distances
    assert saves(part) == part.inputs
    assert is_one_kernel(part) == is_one_kernel(op(8192, **options))  # a rank's ops have the names of the model's


def predicted_backward(op: Op) -> float:
    """Bytes that the backward makes: its workspace, and the gradients of the inputs."""
    return sum(share * nbytes(tensor) for tensor, share in workspace(op, "backward").items()) + sum(
        nbytes(tensor) for tensor in op.inputs
    )


def test_cudnns_backward_takes_what_it_was_measured_to_take_on_an_h200():
    assert predicted_backward(attention_op(SHAPES[0], implementation="cudnn")) == pytest.approx(0.740e9, rel=0.002)


def test_a_deterministic_backward_of_flashattention_2_holds_a_gradient_for_every_split_of_the_keys():
    query = 4 * 131072 * 128 * 4  # bytes in float32
    for heads, splits in ((4, 33), (32, 5), (256, 1)):  # 132 multiprocessors, shared by as many thread blocks
        shapes = [[1, heads, 131072 * 4 // heads, 128]] * 3
        once, each_time = (attention_op(shapes, implementation="flash", deterministic=d) for d in (False, True))
        assert predicted_backward(each_time) - predicted_backward(once) == (splits - 1) * query
    once, each_time = (attention_op(SHAPES[0], implementation="fa4", deterministic=d) for d in (False, True))
    assert predicted_backward(each_time) == predicted_backward(once)


def test_a_compiled_folder_knows_the_option_and_the_shapes_of_its_attention(tmp_path):
    compiled = compile_llama(tmp_path, "--plan_ngpus", "2", "--hardware", "cpu", "--deterministic")
    assert compiled.inputs["deterministic"]
    assert compiled.module.fused_attention == [[[1, 4, 256, 64], [1, 1, 256, 64], [1, 1, 256, 64]]]
    assert "deterministic=True" in (tmp_path / "compiled" / "small" / "gencode.py").read_text()


def compile_llama(folder, *options: str, length: int = 256):
    """8 query heads and 2 key-value heads of 64 features, in bfloat16."""
    small_config(
        "llama",
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=length,
    ).save_pretrained(folder / "model")
    paths = ["--model_id", str(folder / "model"), "--compiled_dir", str(folder / "compiled"), "--name", "small"]
    train.main(["--run_mode", "compile", "--engine", "torch", "--sequence_length", str(length), *paths, *options])
    return read_plan_file(folder / "compiled" / "small")


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic():
    be_deterministic()
    yield
    torch.use_deterministic_algorithms(False)


def tensors(shapes, dtype=torch.bfloat16) -> list[torch.Tensor]:
    """Query, key, value, and the gradient of the output, [b, l, heads, e]."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(*s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes)
    b, heads, length, _ = shapes[0]
    return [query, key, value, torch.randn(b, length, heads, shapes[2][-1], device="cuda", dtype=dtype)]


def skip_unless_there(name: str) -> None:
    if reason := fused.why_not(name, torch.bfloat16, "cuda"):
        pytest.skip(reason)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", [*fused.KERNELS, "auto", "sdpa", "eager"])
@pytest.mark.parametrize("shape", [(2, 8, 2, 300, 64), (1, 4, 1, 1024, 128), (1, 4, 4, 257, 96)])
def test_a_kernel_computes_attentions_formula(name, shape):
    skip_unless_there(name)
    b, heads, kv_heads, length, d = shape
    *inputs, gradient = tensors([(b, heads, length, d), (b, kv_heads, length, d), (b, kv_heads, length, d)])
    result = attention(*inputs, d**-0.5, implementation=name)
    found = [result, *torch.autograd.grad(result, inputs, gradient)]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    expected = formula(*exact, d**-0.5)
    expected = [expected, *torch.autograd.grad(expected, exact, gradient.double().cpu())]
    for tensor, reference in zip(found, expected, strict=True):
        error = (tensor.double().cpu() - reference).norm() / reference.norm()
        assert error < 0.01  # bfloat16 rounds to 2 ** -9


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", [*fused.KERNELS, "auto", "sdpa"])
def test_a_kernel_computes_the_formula_for_two_blocks_of_the_queries_too(name):
    skip_unless_there(name)
    starts, places = (128, 768), [*range(128, 256), *range(768, 896)]
    *inputs, gradient = tensors([(1, 4, 1024, 128), (1, 1, 1024, 128), (1, 1, 1024, 128)])
    query = inputs[0].detach()[:, :, places].requires_grad_()
    result = attention(query, *inputs[1:], 128**-0.5, implementation=name, starts=starts)
    found = [result, *torch.autograd.grad(result, (query, *inputs[1:]), gradient[:, places])]
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    whole = formula(*exact, 128**-0.5)[:, places]
    of_query, *others = torch.autograd.grad(whole, exact, gradient[:, places].double().cpu())
    for tensor, reference in zip(found, [whole, of_query[:, :, places], *others], strict=True):
        error = (tensor.double().cpu() - reference).norm() / reference.norm()
        assert error < 0.01  # bfloat16 rounds to 2 ** -9


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("name", "same_bits"), [("cudnn", False), ("flash", False), ("flash", True)])
def test_a_backward_takes_the_memory_that_is_predicted(name, same_bits, request):
    if same_bits:
        request.getfixturevalue("deterministic")
    skip_unless_there(name)
    shapes = [(1, 4, 16384, 128), (1, 1, 16384, 128), (1, 1, 16384, 128)]
    *inputs, gradient = tensors(shapes)
    for _ in range(2):  # the first loads the kernel
        result = attention(*inputs, 128**-0.5, implementation=name)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients = torch.autograd.grad(result, inputs, gradient)
        taken = torch.cuda.max_memory_allocated() - before
        del gradients
    op = attention_op(shapes, implementation=name, deterministic=same_bits)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    if same_bits and multiprocessors != attention_module.MULTIPROCESSORS:
        pytest.skip(f"the rule is for another GPU than one of {multiprocessors} multiprocessors")
    assert predicted_backward(op) == pytest.approx(taken, rel=0.05)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", [n for n, kernel in fused.KERNELS.items() if kernel.deterministic])
def test_a_deterministic_kernel_has_the_same_bits_in_every_backward(name, deterministic):
    skip_unless_there(name)
    shapes = [(1, 4, 16384, 128), (1, 1, 16384, 128), (1, 1, 16384, 128)]
    *inputs, gradient = tensors(shapes)
    result = attention(*inputs, 128**-0.5, implementation=name, deterministic=True)
    once, again = (torch.autograd.grad(result, inputs, gradient, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.gpu
@needs_gpu
def test_two_steps_of_a_model_have_the_same_bits_with_the_option(tmp_path, deterministic):
    length = 8192
    module = compile_llama(tmp_path, "--deterministic", "--hardware", "h100", length=length).module
    (shapes,) = module.fused_attention
    fused.set_auto(choose(candidates("auto", deterministic=True), [shapes], torch.bfloat16).kernel or "auto")
    model = parallel.load_generated(tmp_path / "compiled" / "small", module.class_name)
    parallel.give_memory(model, torch.device("cuda"))
    torch.manual_seed(0)
    for parameter in model.parameters():  # the rotary table, a buffer, stays in float32
        parameter.data = torch.nn.init.normal_(parameter.data, std=0.05).to(torch.bfloat16)
    tokens, labels = torch.randint(0, 256, (2, 1, length), device="cuda")
    labels[:, ::7] = -100

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(tokens, labels)
        loss.backward()
        return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

    once, again = step(), step()
    assert len(once) > 10 and all(map(torch.equal, once, again))


@pytest.mark.gpu
@needs_gpu
def test_auto_times_the_kernels_of_this_gpu_and_takes_the_fastest(monkeypatch):
    shapes = [[[1, 4, 8192, 128], [1, 1, 8192, 128], [1, 1, 8192, 128]]]
    names = candidates("auto", deterministic=False)
    found = choose(names, shapes, torch.bfloat16)
    assert found.kernel in names and "flash" in names
    assert " ms at [1, 4, 8192, 128] (" in found.findings
