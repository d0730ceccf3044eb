"""The report and the merged model's card. `report` is the stage's run, on what `metrics` and `samples` read.

`sections` and `model_card` say it in parts, which `document` writes as Markdown and HTML.
`figures` draws with `drawing`; `names` and `translation` have the words.
`plots_page` is the page of `dvc plots`.
"""
