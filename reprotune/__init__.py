"""The library behind the pipeline's stages. Each folder is a room, whose `__init__.py` says what lives there.

Importing it sets the environment that libraries read as they are imported: offline, repeatable, no threads of
their own.
"""

import gc
import os
import sys

if sys.argv[0] == "-m":
    # Until `process.command` runs: imports leave no garbage, and looking for it takes a fifth of the
    # start-up.
    gc.disable()

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Without it cuBLAS may sum in another order from run to run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# torch.use_deterministic_algorithms would set it too, but imports the compiler to do so.
os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
