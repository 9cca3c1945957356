"""What a rank does with generated code. Nothing here imports the compiler: what a run has to know is in compiled.py.

collectives.py      the reshards between placements, which generated code calls
rendezvous.py       the store by which ranks find each other, new at every start
parallel.py         ranks, their mesh, FSDP2 over the generated module, weights read by slices
determinism.py      the same bits in every run
schedule.py         the learning rate of every step
trainer.py          the training loop: gradients, clipping, a loss that is not finite and going back from it
watch.py            signals, ranks that hang, a torchrun that has died; lock.py: one run at a time on a folder
metrics.py          progress bar, TensorBoard, metrics.jsonl; throughput and MFU
storage.py          a checkpoint's files as PyTorch writes and reads them: sealed, and running no code
saving.py           checkpoints that are written while training goes on
checkpoint.py       sharded checkpoints, whole or not at all; resume.py: what a run goes on from; merge.py: one file
"""
