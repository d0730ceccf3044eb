"""Training with TRL: the stages `sft`, `reference` and `dpo`, with their arithmetic in `pairs` and `rewards`.

They share `row_checks` and `ordering` (checks, batches), `trainers` and `callbacks` (around TRL's trainers),
`curves` and `speed` (records), `checkpoints` and `stopping` (resuming), `launching` and `distributed`.
"""
