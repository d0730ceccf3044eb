"""The pipeline's stages: each module is one `dvc.yaml` entry, run as `python -m stages.<name>`.

Stages are functions of their declared deps and params, so nothing here may reach the network: the Hub client is
put offline before any library can read its settings. Only `stages.sources`, which fetches, puts it online again.
"""

import errno
import os
import sys
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


class InputError(ValueError):
    """Bad input: the message names the file, the row or key, what was found, what was expected and what to do."""


def command(main: Callable[[], None]) -> None:
    """Run a stage. Bad input and a full disk end in one clear message and exit code 1; a bug keeps its traceback."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or os.getcwd()
            sys.exit(f"error: {where}: the disk is full; free space and run `dvc repro` again (`dvc checkout` restores outs)")
        if isinstance(error, FileNotFoundError):
            sys.exit(f"error: {error.filename}: no such file; `dvc checkout` restores it, `dvc repro` makes it anew")
        raise
