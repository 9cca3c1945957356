"""A Hugging Face model -> Python that trains it over the ranks of a plan. The stages, in their order:

    trace.py            torch.export -> ir.py's graph; statements.py: the model's source; layers.py: kinds of layers
    ops/                one spec an operator: annotation, Python, FLOPs, what it saves, workspace, randomness
    annotation.py       the grammar of annotations
    placement.py        Shard, Replicate, Partial; legal partitions; the reshard between two placements
    hardware.py         speeds of devices and links; cost.py: seconds of an operator and of a reshard
    planner.py          the fastest plan that fits (plan.py: what a plan is): program.py states it as an integer
                        program, which linear_program.py solves; memory.py adds up what lifetimes.py finds live
    localize.py         the graph that one rank computes, reshards among its operators
    codegen.py          that graph as Python
    prediction.py       seconds and bytes of a plan; report.py, resize.py: what a person reads of it

engines/builtin/compile.py calls them. Nothing here imports runtime/, engines/ or data/.
"""
