"""The method, usable without a Trainer. Read `schedule`, `feature_reuse`, `skipping` and `freezing`, in this order.

Two kinds of optimizer step alternate over random sets D of a network's residual blocks:

1. *stochastic depth*: the blocks in D are not computed; the rest trains, with the increments of the kept blocks
   divided by their survival probability.
2. *masked freeze*: the whole network runs, and of its blocks only those in D train; the others are frozen exactly.

    blocks = find_residual_blocks(model)                      # blocks: by structure, from one forward
    schedule = FeatureReuseSchedule(len(blocks), seed=0)      # schedule: (seed, step) -> plan, a pure function
    reuse = FeatureReuse(model, blocks, schedule)             # feature_reuse: opens and closes each step
    for step, batch in enumerate(loader):
        with reuse.step(step):                                # skipping or freezing, undone at the exit
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

What they build on: `dummy_forward`, `residual_graph` and `graph_walk` find blocks, `targets` chooses among them,
`draws` holds the random sets, `class_swap` changes what a module does for a while; `per_sample`, `batch_arguments` and
`samples_apart` give each sample its own set; `batch_norm`, `frozen_buffers`, `compiling` and `fsdp` keep a step exact
with running statistics, compiled blocks and sharded weights; `late_backward` reports a backward that comes too late,
and `cost` counts the arithmetic of each kind of step.
"""
