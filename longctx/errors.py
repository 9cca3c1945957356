"""What a person did wrong, said in one sentence, with exit status 2.

Code below the scripts raises the errors of the domain: it speaks of models, rows, plans and checkpoints, and never of
options. A script knows which of its options named the thing at fault, and puts that option before the sentence
(`naming_options` of longctx/command_line.py; train.py's table is in longctx/options.py).
"""

import gc
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from longctx import torchrun

QUOTED = 300  # characters of somebody else's message at most
OTHER_RANKS_WAIT_S = 10  # for rank 0 to say it first; torchrun then ends them


class UserError(Exception):
    """The job can't be done as asked. The message is one sentence: what is wrong, and what to do."""


class ModelError(UserError):
    """A model's configuration, architecture or weights can't be used."""


class ProofError(ModelError):
    """Generated code could not be shown to compute what the model computes."""


class NoWeights(ModelError):
    """A model has no weights to start from."""


class KernelError(UserError):
    """An attention implementation that was asked for can't be had here."""


class AnnotationError(UserError):
    """An operator's annotation breaks the grammar, or doesn't fit the operator's tensors."""


class HardwareError(UserError):
    """What a plan is to be made for is neither in the table nor a profile."""


class PlanSizeError(UserError):
    """The ranks of a plan could share no work."""


class ConfigurationError(ModelError):
    """A model's configuration can't be changed as asked. `field`: by which value of the job."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class DoesNotFit(UserError):
    """No plan needs as little memory as there may be. `missing_gb`: by how much."""

    def __init__(self, message: str, missing_gb: float):
        super().__init__(message)
        self.missing_gb = missing_gb


class MemoryLimitError(UserError):
    """A plan may need more memory than the GPU that it is for has."""


class DecisionsError(UserError):
    """The decisions of another plan can't be taken for this one."""


class RehearsalError(UserError):
    """Layers can't be left out of a rehearsal of this model."""


class LayerNameError(UserError):
    """A layer class that the model doesn't have."""


class SolverError(UserError):
    """The solver of the integer program ended with no answer."""


class RowsError(UserError):
    """A dataset of rows can't be trained on."""


class CompiledError(UserError):
    """A compiled folder can't be made or used."""


class GeneratedCodeError(CompiledError):
    """The code in a compiled folder is not what compile wrote."""


class CompiledFolderError(CompiledError):
    """A folder can't be compiled to without harm to what is there."""


class CheckpointError(UserError):
    """A checkpoint or merged file is missing, damaged, or of another model."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint is of a run that differs from this one. `field`: in which value of the job."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class OtherEngine(CheckpointError):
    """A checkpoint is of another engine, whose shards this one can't read. `engine`: which."""

    def __init__(self, message: str, engine: str):
        super().__init__(message)
        self.engine = engine


class CheckpointFolderError(CheckpointError):
    """Checkpoints can't be written to a folder without harm to what is there."""


class SaveError(CheckpointError):
    """A checkpoint could not be saved."""


class LogError(UserError):
    """A run can't add its metrics to a file that is there."""


class NoRoom(UserError):
    """The disk has no room for what is to be written."""


class TrainingError(UserError):
    """Training can't go on."""


class NotFinite(TrainingError):
    """The loss or the gradient of a step is not finite, or its loss is above what is allowed."""


class DeviceError(UserError):
    """A device that was asked for is not here."""


class OutOfMemory(UserError):
    """A GPU has no memory left for what a plan needs."""


class EngineError(UserError):
    """An engine can't work here."""


class DocumentsError(UserError):
    """No text can be read where a corpus is said to be."""


class ColumnError(DocumentsError):
    """The column that should hold a corpus's text is missing, or holds something else."""


class ChatTemplateError(UserError):
    """A tokenizer's chat template is missing, or can't write conversations."""


class GroupError(DocumentsError):
    """A column by which documents are to be joined is missing, or holds something else."""


class BadDocument(DocumentsError):
    """One document of a corpus can't be read."""


class SplitError(DocumentsError):
    """A corpus doesn't have the split that is asked for."""


class ConfigNameError(DocumentsError):
    """Which configuration of a corpus is meant is open, or it doesn't have the one that is asked for."""


def some_of(names: list[str]) -> str:
    """The first three names, to quote within a sentence."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def one_line(error: BaseException) -> str:
    """A library's error on one line, cut where it rambles, to quote within a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= QUOTED else f"{text[:QUOTED]} ...").rstrip(".")


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a UserError is printed as one line and becomes exit status 2, and so does an OSError: no
    permission, no space left. A signal that raises KeyboardInterrupt, with its number, becomes 128 more than that.

    Under torchrun most errors meet every rank, so rank 0 speaks for all. A rank that torchrun has not ended after
    OTHER_RANKS_WAIT_S is alone with its error (a file missing on its node, say) and speaks for itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may have what the terminal can't show
    try:
        main()
        gc.freeze()  # Python's last collection would go through all that was imported and traced, which takes a second
    except (UserError, OSError) as error:
        if torchrun.rank() != 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which torchrun sends
            time.sleep(OTHER_RANKS_WAIT_S)
        sentence = error if isinstance(error, UserError) else one_line(error)
        print(f"{os.path.basename(sys.argv[0])}: error: {sentence}", file=sys.stderr, flush=True)
        leave(2)
    except KeyboardInterrupt as interrupt:
        leave(128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))
    except Exception:
        if not torchrun.started_this():
            raise
        traceback.print_exc()
        leave(1)


def leave(status: int) -> NoReturn:
    """Ends this process. A rank ends at once, and torchrun ends the others when it sees that.

    Python's own way out would destroy the process group, and that waits for collectives under way, in which the other
    ranks may never take part.
    """
    if not torchrun.started_this():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
