"""The model: its weights, how it attends, and what becomes of it.

fetching (the base model), loading and saving (base and adapter), merging (one whole model); policies (what is
trained), determinism (same seed, same bytes); attention (several sequences in one row), shared_prefixes (a
tree of prompts), kv_slots (a KV cache for generation), layout_attention
(attends to both), probing (is such a row exact?).
"""
