"""What knows DVC.

`reads`: what each stage reads. `guard`: a stage against what DVC will record of it.
`plan`: what a change makes stale. `cells`: stale cells side by side. `lineage`: the chain behind a number.
`fsck` and `objects`: DVC's cache.
"""
