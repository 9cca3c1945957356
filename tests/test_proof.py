"""No plan is made of a model before its generated code has been shown to compute what the model does."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, small_config

import train
from longctx import proof
from longctx.compiler import trace as tracing
from longctx.compiler.ir import FlatGraph, Graph, Op
from longctx.compiler.ops import arguments_of, target_of
from longctx.compiler.trace import sample_row, trace
from longctx.errors import ModelError, ProofError, UserError
from longctx.huggingface import norms
from longctx.huggingface.build import build_model
from longctx.huggingface.shrink import small_configs
from longctx.kernels.attention import attention

LENGTH = 96


def graph_of(config, length: int = LENGTH) -> Graph:
    """What compile traces of a model, in bfloat16."""
    return trace(build_model(config, torch.bfloat16, "auto", length), sample_row(length))


def prove(family: str, **changes) -> proof.Proof:
    return proof.prove(graph_of(small_config(family, **changes)), small_config(family, **changes), LENGTH)


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# --- what is broken is refused ---------------------------------------------------------------------------------------


def lose_writes(monkeypatch) -> None:
    monkeypatch.setattr(tracing, "overwrite", lambda *_: None)


def change_attention(monkeypatch, change: Callable[[dict], dict]) -> None:
    """Tracing takes attention for one with other arguments."""
    rewritten = tracing._rewritten

    def changed(op: Op) -> Op:
        return replace(op, args=(), kwargs=change(arguments_of(op))) if op.target == target_of(attention) else op

    def rewrite(*args) -> FlatGraph:
        flat = rewritten(*args)
        return replace(flat, ops=list(map(changed, flat.ops)))

    monkeypatch.setattr(tracing, "_rewritten", rewrite)


def change_scale(monkeypatch) -> None:
    change_attention(monkeypatch, lambda arguments: {**arguments, "scale": 1.05 * arguments["scale"]})


def ignore_windows(monkeypatch) -> None:
    change_attention(monkeypatch, lambda arguments: {**arguments, "window": 0})


def mask_nothing(monkeypatch) -> None:
    unmasked = torch.nn.functional.scaled_dot_product_attention

    def attend(*args, is_causal=False, **kwargs):
        return unmasked(*args, is_causal=False, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)


def take_every_norm_for_another(monkeypatch) -> None:
    monkeypatch.setattr(norms, "_rms_norm_arguments", lambda module: (1e-6, 1.0))


BROKEN = {
    lose_writes: ("olmo", "the gradient of model"),
    change_scale: ("llama", "the gradient of model"),
    ignore_windows: ("mistral", "the gradient of model"),
    mask_nothing: ("llama", "the gradient of model"),
    take_every_norm_for_another: ("llama", "the gradient of model"),
}


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda function: function.__name__)
def test_code_that_computes_something_else_than_the_model_is_refused_in_a_sentence(break_it, monkeypatch):
    family, named = BROKEN[break_it]
    break_it(monkeypatch)
    with pytest.raises(ProofError, match=f"does not compute what transformers computes.*{named}") as error:
        prove(family)
    assert "\n" not in str(error.value)


def test_a_model_that_holds_a_square_of_the_sequence_length_is_refused(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: (x @ x.transpose(1, 2)).relu() @ self.gate_proj(x))
    with pytest.raises(ModelError, match=r"mlp makes a tensor that grows with the square .*\[1, l, l\]"):
        prove("llama", intermediate_size=64)


# --- what is right is proved, and remembered -------------------------------------------------------------------------


# Families that have trained on wrong numbers: their writes were lost, or no mask was built for them.
WERE_WRONG = {
    "olmo": {},
    "youtu": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "xglm": {"ffn_dim": 128, "num_layers": 2, "attention_heads": 4, "d_model": 64},
}


@pytest.mark.parametrize("family", WERE_WRONG)
def test_a_family_that_was_silently_wrong_is_proved(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, {**FAMILIES.get(family, {}), **WERE_WRONG[family]})
    found = prove(family)
    assert found.loss_error < 1e-6 and found.gradient_error < 1e-4, found.parameter


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_model_is_proved_whatever_kernel_it_is_to_be_trained_with(kernel):
    config = small_config("llama")
    graph = trace(build_model(config, torch.bfloat16, kernel, LENGTH), sample_row(LENGTH))
    assert proof.prove(graph, config, LENGTH).holds


def test_rows_of_a_few_tokens_are_no_squares():
    config = small_config(
        "llama", hidden_size=200, num_attention_heads=20
    )  # 8 times the square of 5, the row of a proof
    assert proof.prove(graph_of(config, 6), config, 6).holds


def test_a_gradient_that_generated_code_lacks_is_zero():
    expected = {"weight": torch.ones(3), "bias": torch.ones(1)}
    assert proof.gradient_errors({"weight": torch.ones(3)}, expected) == {"weight": 0.0, "bias": 1.0}


def test_a_proof_is_remembered_for_its_configuration_and_no_other(monkeypatch):
    first = prove("llama")
    with monkeypatch.context() as context:
        context.setattr(proof, "compare", lambda *_: pytest.fail("it is compared again"))
        assert prove("llama") == first
    monkeypatch.setattr(proof, "compare", lambda *_: proof.Proof(1.0, 0.0, "nothing"))
    with pytest.raises(ProofError):
        prove("llama", rms_norm_eps=1e-3)


def test_what_was_refused_is_not_remembered(monkeypatch):
    with monkeypatch.context() as context:
        change_scale(context)
        with pytest.raises(ProofError):
            prove("llama")
    assert prove("llama").holds


def test_compile_writes_nothing_of_a_model_that_is_refused_unless_it_is_to_be_trusted(monkeypatch, tmp_path, capsys):
    change_scale(monkeypatch)
    small_config("llama").save_pretrained(tmp_path / "model")
    options = ["--run_mode", "compile", "--engine", "torch", "--model_id", str(tmp_path / "model"), "--name", "plan"]
    options += ["--sequence_length", str(LENGTH), "--compiled_dir", str(tmp_path / "compiled")]
    with pytest.raises(UserError, match=r"^--model_id .*pass --trust_model to compile it all the same"):
        train.main(options)
    assert not (tmp_path / "compiled" / "plan").exists()
    train.main([*options, "--trust_model"])
    assert "LlamaForCausalLM is trusted" in capsys.readouterr().out
    with pytest.raises(UserError, match="does not compute"):  # what was trusted isn't reused once it is to be proved
        train.main(options)


# --- the small model -------------------------------------------------------------------------------------------------


def llama3_8b():
    from transformers import AutoConfig

    return AutoConfig.from_pretrained("examples/llama3_8b_128k")


def test_the_small_model_of_a_large_one_is_narrow_and_has_its_heads_and_their_ratio():
    small, *_ = small_configs(llama3_8b(), 131072, 67, 2)
    assert (small.num_hidden_layers, small.num_attention_heads, small.num_key_value_heads) == (2, 4, 2)
    assert (small.hidden_size, small.intermediate_size, small.vocab_size) == (512, 1792, 256)
    kept = {"rms_norm_eps", "rope_parameters", "hidden_act", "head_dim", "tie_word_embeddings"}
    before, after = (json.loads(config.to_json_string()) for config in (llama3_8b(), small))
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}


def test_a_window_that_no_row_is_longer_than_is_none_in_the_small_model_either():
    config = small_config("mistral", sliding_window=4096)
    assert LENGTH < 4096
    assert proof.prove(graph_of(config), small_config("mistral", sliding_window=4096), LENGTH).holds


@pytest.mark.parametrize("family", ["gemma3_text", "smollm3", "exaone4"])
def test_the_small_model_has_every_kind_of_layer_and_windows_that_matter(family):
    config = small_config(family, num_hidden_layers=8, layer_types=None, no_rope_layers=None, sliding_window=32)
    graph = graph_of(config)
    assert len(graph.kinds) > 1
    small, *_ = small_configs(config, LENGTH, 67, proof._layers_with_all_kinds(graph))
    assert small.num_hidden_layers < 8 and (getattr(small, "sliding_window", None) or 0) < 67
    assert proof._difference(proof._signature(graph_of(small)), proof._signature(graph)) is None
