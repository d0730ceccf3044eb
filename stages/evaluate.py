"""Score one model on one benchmark, through lm-eval's own task, on the pinned rows."""

from reprotune import params_file, process
from reprotune.compat import lazy_imports
from reprotune.pipeline.guard import stage

with lazy_imports.for_scoring():
    from reprotune.evaluation import cell


def main() -> None:
    paths = process.arguments(
        __doc__, "base", "adapter", "data", "templates", "checkpoints", "samples", "metrics", of="benchmark"
    )
    cell.run(params_file.load(), paths.benchmark, paths)


if __name__ == "__main__":
    stage(main)
