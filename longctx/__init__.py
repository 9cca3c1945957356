"""The machinery behind the scripts, in rooms.

    data/           documents, tokens, rows, and the order in which training takes them
    huggingface/    a model as it is trained: built, wrapped, its weights; small models to prove it by
    compiler/       model -> plan -> Python; knows nothing of processes, real devices or data
    kernels/        functions that generated code calls (attention, recurrences), and what the compiler knows of them
    runtime/        what a rank does: collectives, FSDP2, training, metrics, checkpoints; knows nothing of planning
    engines/        builtin/ joins these; nnscaler/ does the job with upstream nnScaler

Between the rooms: job.py (train.py's options, and the typed `Job` that they amount to), options.py (reads and checks
them), command_line.py, schema.py (JSON checked as it is read), errors.py (errors of the domain), atomic.py (files and
folders that appear whole or not at all), seal.py (digests of files, which tell damage), proof.py (a model's code
compared with the model), compiled.py (the compiled folder, all that passes from compiler/ to runtime/), flops.py,
sources.py, torchrun.py, devices.py, and measure.py (a command that measures a machine's speeds).
"""
