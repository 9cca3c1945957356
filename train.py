"""Trains a causal language model at long context: compiles a plan for it, then runs the generated code.

    python train.py --run_mode compile --model_id MODEL --dataset_path ROWS --plan_ngpus 1 --runtime_ngpus 8
    torchrun --nproc_per_node=8 train.py --model_id MODEL --dataset_path ROWS --plan_ngpus 1 --runtime_ngpus 8

An engine does the job: the built-in one, on stock PyTorch, compiles with no GPU and no weights. Run compiles too,
unless what is compiled is up to date.

Where to look, in longctx/:

    the options                                job.py: Options, Job
    their checks, and errors that name them    options.py: CHECKS, CAUSES
    the engines                                engines/table.py: ENGINES
    the compiler, from model to code           engines/builtin/compile.py: compile_plan
    positions for longer rows                  huggingface/overrides.py: change_rope
    the proof that the code is the model       proof.py: prove
    what makes compiled code out of date       engines/builtin/cache.py: plan_inputs
    where an all-to-all is decided             compiler/placement.py: find_reshard
    where it is put between operators          compiler/localize.py: localize; it is run by runtime/collectives.py
    a new operator                             compiler/ops/aten.py: ATEN; compiler/ops/registered.py: register_op
    attention's kernels, and their choice      kernels/fused.py: KERNELS; kernels/choice.py: choose
    new hardware                               compiler/hardware.py: HARDWARE
    where fp8 products would go                compiler/ops/, with Hardware.rates; job.py: DTYPES
    which device a rank computes on            devices.py: choose, take
    a run, from weights to training            engines/builtin/run.py: run
    how weights are read                       runtime/parallel.py: load_stored
    compute dtypes and float32 masters         job.py: DTYPES; runtime/parallel.py: parallelize
    the training loop                          runtime/trainer.py: train
    the learning rate                          runtime/schedule.py: learning_rate
    a loss that is not finite (NaN)            runtime/trainer.py: check_finite, roll_back
    signals, hangs, two runs on one folder     runtime/watch.py; runtime/lock.py: sole_run
    the order of the rows                      data/order.py: epoch_order
    checkpoints, and what a run resumes        runtime/saving.py: Saver; runtime/resume.py: find_resume
    throughput and MFU                         runtime/metrics.py: step_metrics
"""

import transformers

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from longctx import torchrun
from longctx.command_line import naming_options
from longctx.compiler.ops import register_op
from longctx.engines.table import ENGINES
from longctx.errors import run_script
from longctx.huggingface.overrides import remark
from longctx.job import Job
from longctx.kernels import cross_entropy
from longctx.options import causes, parse_job
from longctx.runtime import watch
from longctx.runtime.lock import sole_run


def register_loss() -> None:
    """Makes the loss one operator of the graph, which may be split along the batch b or the tokens l."""
    register_op("b l d^, n^ d^, b l -> b l", **cross_entropy.RULES)(chunk_linear_cross_entropy)


def main(argv: list[str] | None = None) -> None:
    transformers.logging.set_verbosity_error()
    register_loss()
    job = parse_job(argv)
    torchrun.say(f"engine: {job.engine}, {job.engine_reason}")
    engine = ENGINES[job.engine]
    with naming_options(job, causes(job)):
        say_positions(job)
        if job.run_mode == "compile":
            engine.ensure_compiled(job)
        elif job.run_mode == "rehearse":
            assert engine.rehearse is not None, "parse_job refuses a rehearsal by an engine that has none"
            engine.rehearse(job)
        else:
            with sole_run(job.checkpoint_dir):
                say_if_complete(*engine.run(job))


def say_positions(job: Job) -> None:
    """Rank 0 prints how the model's positions differ from what it was made for."""
    if line := remark(job.model_id, job.changes):
        torchrun.say(line)


def say_if_complete(steps_before: int, steps: int) -> None:
    """Rank 0 prints that there was no step left to take."""
    if steps_before == steps:
        torchrun.say(f"run: training is complete after step {steps}; raise --max_epochs or --max_train_steps to go on")


if __name__ == "__main__":
    watch.start()
    run_script(main)
