"""Scores of base, SFT and DPO compared on the same rows.

`scores` reads and checks cells, `intervals` and `significance` hold the statistics, `wording` their text.
`table` compares models on all benchmarks, `compare` is the stage's run, `revisions` compares with a revision.
"""
