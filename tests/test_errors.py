"""What a person or a machine did wrong is one line on stderr and exit status 2."""

import errno
from pathlib import Path

import pytest

from longctx import errors
from longctx.command_line import naming_options
from longctx.engines.nnscaler.options import NnscalerOptions, PivotNameError
from longctx.errors import UserError, run_script
from longctx.job import Options
from longctx.options import causes


def said(capsys, error: Exception) -> str:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.split(": error: ", 1)[1].rstrip("\n")


def test_what_the_system_refuses_is_one_sentence(capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "some/file")
    assert said(capsys, full) == "[Errno 28] No space left on device: 'some/file'"
    assert said(capsys, PermissionError("two\nlines")) == "two lines"


def test_the_sentence_of_a_user_error_is_printed_however_long_it_is(capsys):
    sentence = "--option: " + "word " * 100 + "end."
    assert said(capsys, UserError(sentence)) == sentence


def test_an_exception_that_is_no_user_error_keeps_its_traceback():
    def main() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_script(main)


# --- errors that name their option -----------------------------------------------------------------------------------


def sentence_of(error: UserError, **options) -> str:
    """What a person reads of an error that is raised below train.py."""
    given = Options(**{"model_id": "./llama", **options})
    with pytest.raises(UserError) as raised, naming_options(given, causes(given)):
        raise error
    return str(raised.value)


@pytest.mark.parametrize(
    ("error", "options", "sentence"),
    [
        (errors.ModelError("no config.json there"), {}, "--model_id ./llama: no config.json there"),
        (
            errors.NoWeights("it has no model.safetensors or pytorch_model.bin"),
            {},
            "--model_id ./llama: it has no model.safetensors or pytorch_model.bin; pass --random_init to start without",
        ),
        (
            errors.DoesNotFit("the leanest plan needs 76.9 GB a GPU", 12.9),
            {"gpu_mem_constraint": 64.0},
            "--gpu_mem_constraint 64: the leanest plan needs 76.9 GB a GPU; raise it by 12.9, take more GPUs "
            "(--plan_ngpus, --runtime_ngpus), or shorter rows",
        ),
        (
            errors.LayerNameError("C is no layer of Llama"),
            {"recompute_modules": ("A", "C")},
            "--recompute_modules A,C: C is no layer of Llama",
        ),
        (errors.CheckpointError("it is cut short"), {}, "--checkpoint_dir checkpoints: it is cut short"),
        (
            errors.CheckpointError("it is cut short"),
            {"resume_path": Path("merged.ckpt")},
            "--resume_path merged.ckpt: it is cut short",
        ),
        (errors.CheckpointMismatch("seed", "take 3"), {"seed": 4}, "--seed 4: take 3"),
        (
            errors.OtherEngine("its checkpoint is the other engine's", "torch"),
            {},
            "--checkpoint_dir checkpoints: its checkpoint is the other engine's; choose --engine torch, or merge it "
            "with ckpt_merger.py and name the merged file with --resume_path, and another --checkpoint_dir",
        ),
        (
            errors.TrainingError("step 3: the loss (nan) is not finite"),
            {},
            "step 3: the loss (nan) is not finite; look at these rows, or resume from it with a lower --learning_rate",
        ),
        (
            PivotNameError("C is no module of Llama"),
            {"nnscaler": NnscalerOptions(pipeline_pivots=("B", "C"))},
            "--pipeline_pivots B,C: C is no module of Llama",
        ),
        (errors.AnnotationError("annotation 'b l': no arrow"), {}, "annotation 'b l': no arrow"),
    ],
)
def test_an_error_of_the_domain_becomes_a_sentence_that_names_its_option(error, options, sentence):
    assert sentence_of(error, **options) == sentence


OF_OTHER_SCRIPTS = {"DocumentsError", "BadDocument", "SplitError", "ConfigNameError", "ColumnError"}
OF_OTHER_SCRIPTS |= {"GroupError", "ChatTemplateError"}
# The annotation is quoted; a solver's failure is nobody's option.
OF_NO_OPTION = {"UserError", "AnnotationError", "SolverError", *OF_OTHER_SCRIPTS}


def test_train_knows_the_option_of_every_error_of_the_domain():
    known = causes(Options(model_id="./llama"))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, UserError)]
    unknown = {kind.__name__ for kind in kinds if not any(base in known for base in kind.__mro__)}
    assert unknown == OF_NO_OPTION
