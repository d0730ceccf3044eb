"""Data, from pinned sources to token shards and contamination records.

`sources` and `hub` fetch; `tables`, `json_rows`, `file_forms` and `benchmarks` store raw rows. `raw_rows`,
`fields`, `turns` and `formats` turn them into `conversations`. `templates` gives the tokenizer, whose
template `template_checks`, `template_places` and `published_template` try; `rendering` and `chat_tokens` make
text and tokens of conversations. `contamination` compares `ngrams`. `tokenizing` runs both stages:
`limiting`, `row_kinds`, `chunks` and `workers` make tokens, `spool` keeps them, `duplicates`, `selection` and
`accounting` decide on each row, `packing` and `shards` write rows.
"""
