"""What a run will need, before it starts: `preflight` prints it, `needs` and `evaluate_need` derive it.

They rest on `devices`, `workload` (tokens, from rows or `published` sizes), `tracing` (the cost of a
micro-batch, by its `operations`) and `costs` (what a stage needs, and FLOPs as seconds).
"""
