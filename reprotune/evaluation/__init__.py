"""Scoring: one model on one benchmark (`cell`), by lm-eval (`harness`) on the benchmark's `rows` and `tasks`.

`backends` gives lm-eval its model: `lm_eval_model` and `generation`, on `batching` and `forward` passes.
`samples` and `protocol` are recorded, `sandbox` runs generated code, `terminal_chat` talks to a model.
"""
