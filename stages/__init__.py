"""The pipeline's stages: each module is one `dvc.yaml` entry, run as `python -m stages.<name>`.

Stages are functions of their declared deps and params, so nothing here may reach the network: the Hub client is
put offline before any library can read its settings. Only `stages.hub` puts it online again, for as long as it fetches.
"""

import ctypes
import gc
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable

STARTED = time.time()
"""Before any other module of a stage is read."""
# read before a stage imports what is slow: its parent may be gone by then
STARTED_BY = {os.getpid(): os.getppid()}

if sys.argv[0] == "-m":
    # until `command`: of the thousands of modules that a stage loads nothing is garbage, and looking for it takes a fifth of that time
    gc.disable()

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# without it cuBLAS may sum in another order from run to run
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# torch.use_deterministic_algorithms would set it as well, but loads the compiler for that
os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"


class InputError(ValueError):
    """Bad input: the message names the file, the row or key, what was found, what was expected and what to do."""


def first_line(error: Exception) -> str:
    """A library's error, as part of a message of ours."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def command(main: Callable[[], None]) -> None:
    """Run a stage. Bad input and a full disk end in one clear message and exit code 1; a bug keeps its traceback."""
    gc.freeze()
    gc.enable()
    warnings.simplefilter("ignore", FutureWarning)
    for stream in (sys.stdout, sys.stderr):
        # a terminal that cannot show ± costs no stage its work
        stream.reconfigure(errors="replace")
    end_with_parent()
    from stages import provenance

    try:
        provenance.begin()
        main()
        provenance.end()
    except InputError as error:
        sys.exit(f"error: {error}")
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename or error}: no such file; `dvc checkout` restores it, `dvc repro` makes it anew")
    except Exception as error:
        if full := disk_full(error):
            sys.exit(f"error: the disk is full, or a quota is used up ({first_line(full)}); free space, then `dvc repro` (`dvc checkout` restores what was there)")
        if isinstance(error, OSError) and error.filename:
            sys.exit(f"error: {error.filename}: {error.strerror}; correct the path or its permissions, then `dvc repro`")
        raise


def end_with_parent(parent: int | None = None) -> None:
    """Have Linux end this process when the one that started it is gone (PR_SET_PDEATHSIG of prctl(2)): a stage whose `dvc` was killed
    would go on alone, beside the next one. SIGTERM, so that training saves a checkpoint first. A fork passes its `parent`."""
    die_with_parent(signal.SIGTERM)
    if os.getppid() != (parent or STARTED_BY.get(os.getpid(), os.getppid())):
        os._exit(1)


def die_with_parent(signal_number: int) -> None:
    """Which signal this process gets when its parent ends; 0 for none."""
    ctypes.CDLL(None).prctl(1, signal_number)


NO_SPACE = ("No space left on device", "Not enough disk space", "Disk quota exceeded", "File too large", "database or disk is full", "iostream error")
"""The system's words, and those of C++, by which torch.save says that it could not write, never why."""


def disk_full(error: BaseException | None) -> BaseException | None:
    """The one that says it, of an error and those behind it: each library has an exception of its own."""
    while error is not None and not any(words in str(error) for words in NO_SPACE):
        error = error.__cause__ or error.__context__
    return error
