"""The generated code computes what the Hugging Face model computes."""

import ast
import copy
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from families import (
    FAMILIES,
    ROTARY,
    random_rows,
    reference_loss,
    reference_model,
    rotary_config,
    small_config,
    worst_gradient_error,
)
from ranks import run_ranks

import train
from longctx.compiled import read_plan_file
from longctx.compiler import codegen, hardware, memory, planner
from longctx.compiler.ir import Statement, Tensor
from longctx.compiler.localize import Assignment, localize
from longctx.compiler.ops import legal_partitions, register_op, spec_of
from longctx.compiler.placement import Shard
from longctx.compiler.plan import Fixed, Plan, Setting
from longctx.compiler.recompute import Recompute
from longctx.compiler.statements import statement_of
from longctx.compiler.trace import sample_row, trace
from longctx.errors import UserError
from longctx.huggingface import build
from longctx.huggingface.attention import make_no_masks
from longctx.huggingface.weights import find_weights
from longctx.kernels.rms_norm import rms_norm
from longctx.proof import gradients_of
from longctx.runtime import parallel
from longctx.runtime.rendezvous import fresh_store

LENGTH = 48
SIX_FAMILIES = ["llama", "qwen3", "phi3", "gemma2", "gpt_neox", "opt"]


def compile_small(folder: Path, family: str, **changes) -> tuple[Path, object]:
    """Saves a reference model in `folder` and compiles it in float32; returns the compiled folder and the model."""
    reference = reference_model(small_config(family, **changes))
    reference.save_pretrained(folder / family)
    return compile_folder(folder / family, folder / "compiled", "--precision", "fp32"), reference


def compile_folder(model_id: Path, compiled_dir: Path, *more: str) -> Path:
    """What `train.py --run_mode compile` makes of a model's folder."""
    paths = ["--model_id", str(model_id), "--compiled_dir", str(compiled_dir), "--name", model_id.name]
    train.main(["--run_mode", "compile", "--engine", "torch", *paths, "--sequence_length", str(LENGTH), *more])
    return compiled_dir / model_id.name


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model, its parameters rounded to a dtype in place; its buffers keep theirs, as rotary tables have to."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def load_module(compiled: Path, reference) -> torch.nn.Module:
    """The generated module with the reference's weights, of its dtype and on its device."""
    module = parallel.load_generated(compiled, read_plan_file(compiled).module.class_name)
    cast(module, reference.dtype)
    parallel.give_memory(module, reference.device)
    module.load_state_dict(dict(reference.named_parameters()))
    return module


def assert_equal_to(reference, compiled: Path, length: int = LENGTH) -> None:
    """The generated module has the reference's loss and gradients on one row."""
    module = load_module(compiled, reference)
    tokens, labels = (x.to(reference.device) for x in random_rows(1, length, 256))

    loss, expected = module(tokens, labels), reference_loss(reference, tokens, labels)
    loss.backward()
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    error, name = worst_gradient_error(gradients_of(module), gradients_of(reference))
    assert error < 1e-4, name


def on_each_device(on_cpu: Iterable[str], on_gpu: Iterable[str]) -> pytest.MarkDecorator:
    """Runs a test with some families on the CPU, and with some on a GPU where there is one."""
    gpu = [pytest.param(family, "cuda", marks=pytest.mark.gpu) for family in on_gpu]
    return pytest.mark.parametrize(("family", "device"), [*((f, "cpu") for f in on_cpu), *gpu], indirect=["device"])


@on_each_device(FAMILIES, SIX_FAMILIES)
def test_loss_and_every_gradient_equal_hugging_faces(family, device, tmp_path):
    tied = list(FAMILIES).index(family) % 2 == 1
    compiled, reference = compile_small(tmp_path, family, tie_word_embeddings=tied)
    assert_equal_to(reference.to(device), compiled)


def gradients_of_loss(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """All gradients of a loss as one vector in float64, in the order of the parameters' names."""
    parameters = [parameter for _, parameter in sorted(model.named_parameters())]
    return torch.cat([gradient.flatten().double() for gradient in torch.autograd.grad(loss, parameters)])


@on_each_device(["llama", "gemma2"], SIX_FAMILIES)
def test_in_bfloat16_loss_and_gradients_are_about_as_far_from_float32_as_hugging_faces(family, device, tmp_path):
    exact = cast(cast(reference_model(small_config(family)), torch.bfloat16), torch.float32)
    exact.save_pretrained(tmp_path / family)
    compiled = compile_folder(tmp_path / family, tmp_path / "compiled", "--precision", "bf16")
    exact.to(device)
    rounded = cast(copy.deepcopy(exact), torch.bfloat16)
    module = load_module(compiled, rounded)
    tokens, labels = (x.to(device) for x in random_rows(1, LENGTH, 256))

    losses = [module(tokens, labels), *(reference_loss(model, tokens, labels) for model in (rounded, exact))]
    ours, theirs, expected = (gradients_of_loss(x, m) for x, m in zip(losses, (module, rounded, exact), strict=True))

    assert abs(losses[0] - losses[2]) < 0.01 * losses[2]
    # Hugging Face's own ways to compute attention differ by chance from each other by a factor of up to 1.6.
    assert (ours - expected).norm() < 2 * (theirs - expected).norm()


def test_statements_of_the_model_are_found_in_a_folder_that_is_named_torch(tmp_path):
    source = tmp_path / "torch" / "site-packages" / "transformers" / "model.py"
    source.parent.mkdir(parents=True)
    source.write_text("def forward(x):\n    doubled = torch.relu(\n        x + x)\n")
    pytorch = Path(torch.__file__).parent / "nn" / "functional.py"
    frames = [(Path(train.__file__).parent / "longctx" / "huggingface" / "build.py", 36), (source, 3), (pytorch, 1)]
    found = statement_of("".join(f'  File "{file}", line {line}, in forward\n' for file, line in frames))
    assert found == Statement((str(source), 2), ("doubled",))


def test_without_ruff_the_code_is_valid_and_compile_says_that_its_lines_are_long(tmp_path, monkeypatch, capsys):
    formatted, reference = compile_small(tmp_path / "formatted", "gemma2")
    assert ("ruff is not installed" in capsys.readouterr().out) == (not codegen.has_formatter())
    monkeypatch.setattr(codegen, "has_formatter", lambda: False)
    compiled, _ = compile_small(tmp_path / "as_written", "gemma2")
    assert "compile: ruff is not installed, so gencode.py has long lines\n" in capsys.readouterr().out
    assert_equal_to(reference, compiled)
    code = [ast.dump(ast.parse((folder / "gencode.py").read_text())) for folder in (compiled, formatted)]
    assert code[0] == code[1]


@pytest.mark.parametrize("length", [24, 48])  # within the 32 positions of pretraining, and beyond
@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_tables_of_every_kind_are_hugging_faces(kind, length, tmp_path):
    reference = reference_model(rotary_config(kind))
    reference.save_pretrained(tmp_path / kind)
    options = ["--precision", "fp32", "--sequence_length", str(length)]
    assert_equal_to(reference, compile_folder(tmp_path / kind, tmp_path / "compiled", *options), length)


def test_learned_positions_that_are_fewer_than_the_rows_tokens_are_refused(tmp_path):
    reference = reference_model(small_config("opt", max_position_embeddings=LENGTH))
    reference.save_pretrained(tmp_path / "opt")
    options = ["--precision", "fp32", "--sequence_length"]
    with pytest.raises(UserError, match=f"for {LENGTH} tokens and the rows have {LENGTH + 1}; take rows of at most"):
        compile_folder(tmp_path / "opt", tmp_path / "longer", *options, str(LENGTH + 1))
    assert_equal_to(reference, compile_folder(tmp_path / "opt", tmp_path / "compiled", *options, str(LENGTH)))


def test_a_model_that_torch_export_can_not_trace_is_refused_in_one_sentence(monkeypatch, capfd):
    config = small_config("llama")
    wrapped = build.build_model(config, torch.float32)
    norm = wrapped.model.model.norm
    monkeypatch.setattr(norm, "forward", lambda x: x if x.sum() > 0 else -x)
    sample = sample_row(8)
    with pytest.raises(UserError, match="torch.export can't trace LlamaForCausalLM") as error:
        trace(wrapped, sample)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_numbers_that_a_forward_makes_a_tensor_of_stay_in_the_graph(monkeypatch):
    wrapped = build.build_model(small_config("llama"), torch.float32)
    norm = wrapped.model.model.norm
    monkeypatch.setattr(norm, "forward", lambda x: x * torch.tensor([0.5, 2.0] * 32, device=x.device))
    graph = trace(wrapped, sample_row(8))
    numbers = [op.args[1] for op in graph.all_ops() if op.module == "model.norm" and not op.inputs]
    assert numbers == [0.5, 2.0] * 32


def _compare_on_ranks(folder: Path, families: list[str]) -> None:
    """Each rank computes one row; the summed gradients are those of the reference on all rows."""
    with parallel.process_group() as device:
        n_ranks = dist.get_world_size()
        for family in families:
            (compiled,) = (folder / family / "compiled").iterdir()
            plan = read_plan_file(compiled).module
            module = parallel.load_generated(compiled, plan.class_name)
            sharded = parallel.parallelize(module, plan.layers_path, device, torch.float32)
            model_id = str(folder / family / family)
            weights = find_weights(model_id).by_parameter
            parallel.load_stored(sharded, {name: stored.read for name, stored in weights.items()})
            tokens, labels = random_rows(n_ranks, LENGTH, 256)
            mine = slice(dist.get_rank(), dist.get_rank() + 1)
            loss = module(tokens[mine].to(device), labels[mine].to(device))
            loss.backward()
            loss = loss.detach()
            dist.all_reduce(loss)

            reference = reference_model(small_config(family))
            expected = reference_loss(reference, tokens, labels)
            expected.backward()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-6), family
            gradients = {name: p.grad.full_tensor().cpu() for name, p in module.named_parameters()}
            error, name = worst_gradient_error(gradients, gradients_of(reference))
            assert error < 1e-4, (family, name)


def test_two_ranks_under_fsdp_sum_to_hugging_faces_gradients(device, tmp_path):
    families = ["llama", "gemma2", "phi3", "gpt_neox"]  # the last has its head by another name in files
    for family in families:
        compile_small(tmp_path / family, family)
    run_ranks(2, _compare_on_ranks, tmp_path, families, device=device.type)


def test_equal_layers_share_one_class_however_many_there_are(tmp_path):
    texts = []
    for layers in (2, 6):
        compiled, _ = compile_small(tmp_path / str(layers), "llama", num_hidden_layers=layers)
        texts.append((compiled / "gencode.py").read_text())
    few, many = ([line for line in text.splitlines() if "ayers" not in line] for text in texts)
    assert few == many
    assert texts[1].count("class LlamaDecoderLayer") == 1


def test_layers_that_alternate_have_a_class_each(tmp_path):
    compiled, _ = compile_small(tmp_path, "gemma2")
    text = (compiled / "gencode.py").read_text()
    assert "window=16" in text.split("class Gemma2DecoderLayer0")[1].split("class ")[0]
    assert "window=16" not in text.split("class Gemma2DecoderLayer1")[1].split("class ")[0]


def test_constants_are_buffers_that_move_with_the_module_and_that_checkpoints_do_not_have(tmp_path):
    compiled, _ = compile_small(tmp_path, "llama")
    text = (compiled / "gencode.py").read_text()
    assert "self.inv_freq = nn.Buffer(INV_FREQ, persistent=False)" in text and "INV_FREQ.to" not in text
    module = parallel.load_generated(compiled, read_plan_file(compiled).module.class_name)
    before = module.inv_freq.clone()
    parallel.give_memory(module, torch.device("cpu"))
    assert torch.equal(module.inv_freq, before) and before.device.type == "cpu"
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}


def test_a_buffer_takes_no_name_that_a_part_of_the_model_has():
    constant = Tensor("inv_freq", (2,), torch.float32, False)
    parts = {"inv_freq.weight": Tensor("weight", (2,), torch.float32, True)}
    graph = SimpleNamespace(constants={constant: torch.ones(2)}, parameters=parts, kinds=[], layers_path="")
    assert codegen._name_constants(graph)[constant][0] == "INV_FREQ_1"


def gradients_after(compiled: Path, reference, seed: int) -> dict[str, torch.Tensor]:
    """Every gradient of the generated module on one row, whatever it draws at random drawn from `seed`."""
    module = load_module(compiled, reference)
    torch.manual_seed(seed)
    module(*random_rows(1, LENGTH, 256)).backward()
    return gradients_of(module)


@pytest.mark.parametrize("family", ["llama", "opt"])  # dropout within attention's operator, and of its own
def test_a_layer_with_dropout_has_the_same_gradients_when_it_is_recomputed(family, tmp_path):
    changes = {"dropout": 0.1} if family == "opt" else {}
    reference = reference_model(small_config(family, attention_dropout=0.1, **changes))
    reference.save_pretrained(tmp_path / family)
    gradients = []
    for modules in ("", f"{type(reference).__name__.removesuffix('ForCausalLM')}DecoderLayer"):
        options = ["--precision", "fp32", "--recompute_modules", modules]
        compiled = compile_folder(tmp_path / family, tmp_path / f"compiled-{modules}", *options)
        assert ("checkpoint(layer" in (compiled / "gencode.py").read_text()) == bool(modules)
        gradients.append(gradients_after(compiled, reference, seed=0))
    kept, recomputed = gradients
    error, name = worst_gradient_error(recomputed, kept)
    assert error < 1e-6, name
    error, _ = worst_gradient_error(gradients_after(compiled, reference, seed=1), kept)
    assert error > 1e-2  # another seed drops others


def check_dropout_on_ranks(folders: list[Path], class_name: str, layers_path: str, weights: Path) -> None:
    """Each rank has the same gradients whether its layers keep what they dropped or compute it again."""
    gradients = []
    with parallel.process_group() as device:
        for folder in folders:
            module = parallel.load_generated(folder, class_name)
            model = parallel.parallelize(module, layers_path, device, torch.float32, 2, {})
            parallel.load_tensors(model, torch.load(weights).items())
            torch.manual_seed(0)
            module(*random_rows(1, LENGTH, 256)).backward()
            found = {name: model.globally(name, p.grad).full_tensor() for name, p in module.named_parameters()}
            gradients.append(found)
    error, name = worst_gradient_error(*gradients)
    assert error < 1e-6, name


def test_ranks_that_share_out_dropout_draw_for_their_own_parts_and_draw_the_same_again(tmp_path):
    config = small_config("opt", attention_dropout=0.1, dropout=0.1)
    weights = {name: p.detach() for name, p in reference_model(config).named_parameters()}
    torch.save(weights, tmp_path / "weights.pt")
    sample = sample_row(LENGTH)
    graph = trace(build.build_model(config, torch.float32), sample)
    split = {op: next(p for p in reversed(legal_partitions(op, 2))) for op in graph.all_ops()}
    assignment = Assignment(2, split)
    folders = []
    for policy in (Recompute.NOTHING, Recompute.EVERYTHING):
        plan = Plan(assignment, (policy,) * 2, seconds=0.0, memory=0.0)
        text = codegen.generate(localize(graph, assignment), plan, "Dropout is split.")
        written = "".join(text.split())  # whichever lines it is broken into
        assert "draw_own(lambda:F.dropout(" in written and "draw_own(lambda:attention(" in written
        folders.append(tmp_path / str(policy))
        folders[-1].mkdir()
        (folders[-1] / "gencode.py").write_text(text)
    run_ranks(2, check_dropout_on_ranks, folders, graph.class_name, graph.layers_path, tmp_path / "weights.pt")


def test_values_are_called_as_the_source_calls_them_or_by_the_module_that_made_them():
    sample = sample_row(LENGTH)
    graph = trace(build.build_model(small_config("llama"), torch.float32), sample)
    of = {
        name: [op for op in graph.kinds[0].ops if spec_of(op).name == name] for name in ("linear", "view", "transpose")
    }
    setting = Setting(2, 2, hardware.load("h100"), 64e9)

    # v_proj's result is resharded between its view and its transpose, within a statement of the source: along
    # dimension 1 of the view.
    wanted = {
        of["linear"][2]: Shard(1),
        of["view"][2]: Shard(1),
        of["transpose"][2]: Shard(1),
    }
    fixed = {op: next(p.dim for p in legal_partitions(op, 2) if p.outputs == (s,)) for op, s in wanted.items()}
    plan = planner.make_plan(graph, setting, Fixed(fixed))
    text = codegen.generate(localize(graph, plan.assignment), plan, "Moves v early.")
    assert "v_proj = all_to_all(v_proj, split=2, gather=1)" in text
    assert "value_states = v_proj.transpose(1, 2)" in text


def test_large_values_are_freed_behind_their_last_reader_though_no_gradient_is_made_for_them(tmp_path, monkeypatch):
    compiled, _ = compile_small(tmp_path / "small", "gemma2")
    assert "del emb" not in (compiled / "gencode.py").read_text()
    monkeypatch.setattr(codegen, "LARGE", 1)
    compiled, reference = compile_small(tmp_path / "large", "gemma2")
    before_layers, _, _ = (compiled / "gencode.py").read_text().partition("for layer in")
    assert "del emb\n" in before_layers
    assert_equal_to(reference, compiled)


def test_the_bytes_of_a_reshard_are_told_in_a_unit_that_shows_them():
    assert [memory.say_bytes(size) for size in (4, 8192, 134_217_728)] == ["4 bytes", "8.2 KB", "134.2 MB"]


def test_parameters_keep_their_hugging_face_names(tmp_path):
    compiled, reference = compile_small(tmp_path, "qwen3")
    module = parallel.load_generated(compiled, read_plan_file(compiled).module.class_name)
    expected = {name: p.shape for name, p in reference.named_parameters()}
    assert {name: p.shape for name, p in module.named_parameters()} == expected


def test_compiling_reads_no_weights(tmp_path):
    reference = reference_model(small_config("llama"))
    reference.config.save_pretrained(tmp_path / "config_only")
    compiled = compile_folder(tmp_path / "config_only", tmp_path / "out")
    assert {file.name for file in compiled.iterdir()} == {"gencode.py", "plan.json", "report.md"}


def test_a_compiled_folder_is_reused_for_an_equal_job_and_for_no_other(tmp_path, capsys):
    compile_small(tmp_path, "llama")
    compile_small(tmp_path, "llama")
    assert "up to date" in capsys.readouterr().out.splitlines()[-1]
    compile_small(tmp_path, "llama", rope_theta=20_000.0)
    assert "wrote" in capsys.readouterr().out.splitlines()[-1]


def like_a_norm(hidden_states, weight, eps, offset=0.0) -> str:
    return "* d^, d^ -> * d^"


def _compile_on_ranks(folder: Path, options: list[list[str]]) -> None:
    """Each rank compiles with its own options, and writes down how that ended."""
    register_op(like_a_norm)(rms_norm)  # a function, at another address in each process
    rank = int(os.environ["RANK"])
    try:
        said = str(compile_folder(folder / "llama", folder / "compiled", "--precision", "fp32", *options[rank]))
    except UserError as error:
        said = f"error: {error}"
    (folder / str(rank)).write_text(said)
    store = fresh_store()
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(len(options))])  # rank 0 holds the store of all


def compile_on_ranks(folder: Path, *options: list[str]) -> list[str]:
    """How compiling one small model ended on each rank: the compiled folder, or 'error: ...'."""
    reference_model(small_config("llama")).save_pretrained(folder / "llama")
    run_ranks(len(options), _compile_on_ranks, folder, list(options))
    return [(folder / str(rank)).read_text() for rank in range(len(options))]


def test_the_first_rank_compiles_for_the_others(tmp_path):
    assert compile_on_ranks(tmp_path, [], []) == [str(tmp_path / "compiled" / "llama")] * 2


def test_a_rank_that_would_compile_another_plan_stops(tmp_path):
    first, second = compile_on_ranks(tmp_path, [], ["--gpu_mem_constraint", "63"])
    assert first == str(tmp_path / "compiled" / "llama")
    assert second.startswith("error: --compiled_dir") and "start all ranks alike" in second


def test_where_compiling_fails_on_the_first_rank_the_others_stop(tmp_path):
    first, second = compile_on_ranks(tmp_path, *[["--gpu_mem_constraint", "0.0001"]] * 2)
    assert first.startswith("error: --gpu_mem_constraint")
    assert second.startswith("error: --compiled_dir") and "failed on this node's first rank" in second


def test_a_head_that_the_loss_can_not_compute_is_refused(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def squared(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.square()
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", squared)
    with pytest.raises(UserError, match="LlamaForCausalLM computes linear -> pow"):
        build.build_model(small_config("llama"), torch.float32)


def test_an_attention_argument_that_this_programs_attention_lacks_is_refused():
    config = small_config("llama")
    wrapped = build.build_model(config, torch.float32)
    make_no_masks()  # transformers can make none on meta, but while tracing
    tokens = torch.zeros(1, 4, dtype=torch.long, device="meta")
    with pytest.raises(UserError, match="takes lookahead"):
        wrapped.to("meta").model.model(input_ids=tokens, use_cache=False, lookahead=1.0)
