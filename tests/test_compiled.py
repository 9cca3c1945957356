"""plan.json says what it depends on, and a compiled folder is used again only while none of that has changed."""

import functools
import importlib.util
import json
import operator
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from families import small_config

from longctx import seal, sources
from longctx.command_line import naming_options
from longctx.compiled import (
    CODE,
    PLAN,
    REPORT,
    Decisions,
    GeneratedModule,
    PlanFile,
    Predicted,
    check_generated,
    fingerprint,
    read_decisions,
    read_fingerprint,
    read_plan_file,
    why_damaged,
    write_plan_file,
)
from longctx.compiler.ops import REGISTERED_OPS, register_op
from longctx.engines.builtin import cache
from longctx.errors import CompiledError, DecisionsError, GeneratedCodeError, UserError
from longctx.options import causes, parse_job

ROOT = Path(__file__).parent.parent


def plan_file(**inputs) -> PlanFile:
    decisions = Decisions("S1", {"Llama": [("aten.add.Tensor", "l"), ("aten.view.default", None)]}, ("none", "layer"))
    module = GeneratedModule("Llama", "model.layers", 1, {"w": 1}, {"w": [2, 4]}, 3.0, 2.0, [[[1, 2, 8, 4]] * 3])
    predicted = Predicted({"compute": 0.5}, {"saved": 1e9, "moment": "loss"}, {"loss": 0.5})
    return PlanFile(inputs, decisions, module, predicted)


def test_a_plan_file_is_read_as_it_was_written(tmp_path):
    write_plan_file(tmp_path, plan_file(sequence_length=8))
    assert read_plan_file(tmp_path) == plan_file(sequence_length=8)
    assert read_decisions(tmp_path / PLAN)["boundary"] == "S1"


def test_a_compiled_folder_has_a_fingerprint_only_with_its_code(tmp_path):
    write_plan_file(tmp_path, plan_file(sequence_length=8))
    assert read_fingerprint(tmp_path) is None
    (tmp_path / CODE).write_text("")
    assert read_fingerprint(tmp_path) == fingerprint({"sequence_length": 8})
    assert read_fingerprint(tmp_path) != fingerprint({"sequence_length": 9})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"[" * 100_000, "it is nested too deep"),
        (b"{", "Expecting property name"),
        (b"3", "it is no object of JSON"),
        (b"{}", "its digest is missing"),
        (seal.sealed_json({"fingerprint": "1"}), "inputs is missing"),
        (seal.sealed_json({"fingerprint": "1", "inputs": {}, "decisions": {}}), "decisions.boundary is missing"),
        (seal.sealed_json({"fingerprint": "1"})[1:], "its bytes are not those that were written"),
    ],
)
def test_a_damaged_plan_file_is_named_as_such_with_the_reason(tmp_path, content, reason):
    (tmp_path / PLAN).write_bytes(content)
    sentence = f"^{tmp_path}/plan.json is missing or damaged \\({reason}.*; remove the folder"
    with pytest.raises(CompiledError, match=sentence):
        read_plan_file(tmp_path)


def test_a_flipped_byte_in_a_compiled_folder_is_named(tmp_path):
    for name in (CODE, REPORT):
        (tmp_path / name).write_text("# what compile wrote\n")
    write_plan_file(tmp_path, plan_file(sequence_length=8))
    check_generated(tmp_path)
    for name in (CODE, REPORT, PLAN):
        content = (tmp_path / name).read_bytes()
        for place in range(0, len(content), 7):
            (tmp_path / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(GeneratedCodeError, match=f"^{tmp_path} is not as compile wrote it: .*; remove the fol"):
                check_generated(tmp_path)
            assert (read_fingerprint(tmp_path) is None) == (name == PLAN)
            assert (why_damaged(tmp_path) is not None) == (name == PLAN)
        (tmp_path / name).write_bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting"),
        ("3", "3, where an object belongs"),
        ("{}", "decisions is missing"),
        ('{"decisions": {}}', "decisions.boundary is missing"),
    ],
)
def test_decisions_of_something_else_are_refused_with_the_reason(tmp_path, content, reason):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(DecisionsError, match=f"^it is no plan.json that compile wrote \\({reason}"):
        read_decisions(tmp_path / "plan.json")


# --- what a compiled folder depends on -------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path):
    small_config("llama").save_pretrained(tmp_path / "model")
    words = ["--model_id", str(tmp_path / "model"), "--compiled_dir", str(tmp_path / "compiled"), "--engine", "torch"]
    return parse_job([*words, "--run_mode", "compile", "--sequence_length", "32"])


@pytest.fixture
def load_op(tmp_path, monkeypatch):
    """Registers `op` of a module of the user's with this source, as the import in their train.py would."""
    before = dict(REGISTERED_OPS)

    def load(source: str, **rules) -> None:
        (tmp_path / "their_op.py").write_text(source)
        spec = importlib.util.spec_from_file_location("their_op", tmp_path / "their_op.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "their_op", module)
        spec.loader.exec_module(module)
        register_op("b l^ -> b l^", **rules)(module.op)

    yield load
    REGISTERED_OPS.clear()
    REGISTERED_OPS.update(before)


def is_compiled_again(job, capsys) -> bool:
    cache.ensure_compiled(job)
    return "up to date" not in capsys.readouterr().out


def test_a_changed_default_of_a_users_op_makes_a_compiled_folder_out_of_date(job, load_op, capsys):
    load_op("def op(x, slope=0.1):\n    return x * slope\n")
    assert is_compiled_again(job, capsys)
    assert not is_compiled_again(job, capsys)
    load_op("def op(x, slope=0.2):\n    return x * slope\n")
    assert is_compiled_again(job, capsys)


def test_code_that_compile_did_not_write_runs_only_if_it_is_trusted(job, capsys):
    assert is_compiled_again(job, capsys)
    code = job.compiled_folder / CODE
    code.write_text(code.read_text() + "# mine\n")
    sentence = f"--compiled_dir .*: {job.compiled_folder} is not as compile wrote it: its file gencode.py has .* bytes"
    hint = "; remove the folder to compile it anew; or pass --trust_gencode to run it as it is$"
    with pytest.raises(UserError, match=f"{sentence}.*{hint}"), naming_options(job, causes(job)):
        cache.ensure_compiled(job)
    assert not is_compiled_again(replace(job, trust_gencode=True), capsys)
    assert code.read_text().endswith("# mine\n")
    (job.compiled_folder / PLAN).write_text("{}")
    cache.ensure_compiled(job)
    assert f"{job.compiled_folder} is compiled anew, since it is damaged (plan.json: " in capsys.readouterr().out
    assert "# mine" not in code.read_text()


OP = "def op(x):\n    return x\n"


def test_a_changed_rule_of_a_users_op_makes_a_compiled_folder_out_of_date(job, load_op):
    load_op(OP, efficiency=0.5)
    before = fingerprint(cache.plan_inputs(job))
    load_op(OP, efficiency=0.5)
    assert fingerprint(cache.plan_inputs(job)) == before
    load_op(OP, efficiency=0.9)
    assert fingerprint(cache.plan_inputs(job)) != before


def rule_in(file: Path, source: str):
    """The function `rule` of a file with this source."""
    file.write_text(source)
    names = {}
    exec(compile(source, str(file), "exec"), names)
    return names["rule"]


@pytest.mark.parametrize(
    "wrap", [lambda rule: rule, functools.partial, functools.cache], ids=["as_is", "partial", "cached"]
)
def test_a_changed_file_of_a_users_rule_makes_a_compiled_folder_out_of_date(job, load_op, tmp_path, wrap):
    fingerprints = []
    for share in ("1.0", "2.0"):
        load_op(OP, workspace=wrap(rule_in(tmp_path / "rules.py", f"def rule(op, phase):\n    return {share}\n")))
        fingerprints.append(fingerprint(cache.plan_inputs(job)))
    assert fingerprints[0] != fingerprints[1]


@pytest.mark.parametrize("rule", [bool, len, str.lower, operator.itemgetter(0)])
def test_a_rule_that_is_built_into_python_has_a_fingerprint_though_it_has_no_file(job, load_op, rule):
    load_op(OP, draws_random=rule)
    assert fingerprint(cache.plan_inputs(job)) == fingerprint(cache.plan_inputs(job))


def test_a_changed_default_of_the_loss_makes_a_compiled_folder_out_of_date(job, load_op):
    loss = (ROOT / "chunk_linear_cross_entropy.py").read_text()
    assert "CHUNK_SIZE = 2048" in loss
    load_op(loss + "\n\nop = chunk_linear_cross_entropy\n")
    before = cache.plan_inputs(job)
    load_op(loss.replace("CHUNK_SIZE = 2048", "CHUNK_SIZE = 4096") + "\n\nop = chunk_linear_cross_entropy\n")
    assert fingerprint(cache.plan_inputs(job)) != fingerprint(before)


def test_a_fingerprint_covers_the_file_of_the_loss_that_train_registers():
    [(_, function, _)] = [facts for name, facts in sources.hash_registered_ops().items() if "chunk_linear" in name]
    assert function[-1] == sources.hash_files([ROOT / "chunk_linear_cross_entropy.py"])


def test_a_fingerprint_covers_what_makes_the_code_and_what_the_code_calls_and_not_what_trains_it():
    covered = {str(file.relative_to(ROOT / "longctx")) for file in cache.compiler_sources()}
    assert {"compiler/codegen.py", "kernels/attention.py", "huggingface/build.py", "runtime/collectives.py"} <= covered
    assert "compiled.py" in covered  # which says what plan.json holds
    assert not {"runtime/trainer.py", "runtime/metrics.py", "options.py", "errors.py"} & covered


def test_an_option_that_only_training_heeds_leaves_a_compiled_folder_up_to_date(job):
    later = replace(job, learning_rate=1.0, max_epochs=9, checkpoint_dir=Path("elsewhere"))
    assert cache.plan_inputs(later) == cache.plan_inputs(job)
    assert cache.plan_inputs(replace(job, gpu_mem_constraint=65.0)) != cache.plan_inputs(job)


def test_inputs_are_the_same_read_back_from_plan_json(job, capsys):
    cache.ensure_compiled(job)
    stored = read_plan_file(job.compiled_folder).inputs
    assert stored == json.loads(json.dumps(cache.plan_inputs(job)))
