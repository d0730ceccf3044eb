"""The pipeline's stages: each module is one `dvc.yaml` entry, run as `python -m stages.<name>`.

Stages are functions of their declared deps and params, so nothing here may reach the network: the Hub client is
put offline before any library can read its settings. Only `stages.sources`, which fetches, puts it online again.
"""

import os
import sys
import warnings
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class InputError(ValueError):
    """Bad input: the message names the file, the row or key, what was found, what was expected and what to do."""


def command(main: Callable[[], None]) -> None:
    """Run a stage. Bad input and a full disk end in one clear message and exit code 1; a bug keeps its traceback."""
    warnings.simplefilter("ignore", FutureWarning)
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename}: no such file; `dvc checkout` restores it, `dvc repro` makes it anew")
    except Exception as error:
        # each library says it in an exception of its own, but all with the system's words
        if "No space left on device" not in str(error):
            raise
        sys.exit(f"error: {os.getcwd()}: the disk is full ({error}); free space, then `dvc checkout` and `dvc repro`")
