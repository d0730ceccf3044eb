"""Compare base, SFT and DPO on the same rows: scores, and whether their differences are more than chance."""

from reprotune import params_file, process
from reprotune.comparison import compare
from reprotune.pipeline.guard import stage


def main() -> None:
    paths = process.arguments(
        __doc__, "metrics", "evals", "contamination", "summary", "markdown", "means", "plot"
    )
    compare.run(params_file.load(), **vars(paths))


if __name__ == "__main__":
    stage(main)
