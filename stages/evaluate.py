"""Score one model on one benchmark, through lm-eval's own task, on the pinned rows."""

import argparse
from pathlib import Path

from reprotune import params_file
from reprotune.compat import lazy_imports
from reprotune.pipeline.guard import stage

with lazy_imports.for_scoring():
    from reprotune.evaluation import cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--adapter", type=Path, required=True)
    for name in ("base", "data", "templates", "checkpoints", "samples", "metrics"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    cell.run(params_file.load(), arguments.name, arguments)


if __name__ == "__main__":
    stage(main)
