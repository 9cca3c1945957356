"""What this program needs of Hugging Face: models built to be traced, their weights, and the FLOPs they take.

configuration.py  load_config: a model's configuration, read and checked
build.py        build_model: a causal language model as it is trained, wrapped to return its loss
attention.py    what build_model puts in place of the model's attention, if that is to be had from a registry
norms.py        ... of its RMSNorms
recurrences.py  ... of its recurrences and the short convolutions before them
rotary.py       ... of rotary tables that depend on the sequence length
head.py         what the model's head does to its logits, so that the chunked loss does the same
weights.py      weights as from_pretrained takes them from files, or drawn at random
shrink.py       small configurations of an architecture, to prove a model by

Hugging Face's model stays the source of truth: what is put in place of a part of it is known to compute the same, and
where that can't be known the model is refused with a ModelError.
"""
