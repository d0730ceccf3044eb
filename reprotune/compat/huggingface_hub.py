"""huggingface_hub: offline, except while something is fetched."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def online() -> Iterator[str | bool]:
    """Let the Hub's client reach the network inside a `with` block; yields the token to use, or False.

    The client reads HF_HUB_OFFLINE once, as it is imported, so its constant has to change too. There is a
    public `is_offline_mode` (https://github.com/huggingface/huggingface_hub/pull/3593) and nothing to set it.
    Seen with huggingface_hub 2.4.0.
    """
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE = "0", False
    try:
        yield os.environ.get("HF_TOKEN") or False
    finally:
        os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE = "1", True
