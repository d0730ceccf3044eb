"""Write the report, its page and figures, and the merged model's card, from the run's own files."""

from reprotune import params_file, process
from reprotune.pipeline.guard import stage
from reprotune.report import report


def main() -> None:
    paths = process.arguments(__doc__, "metrics", "evals", "plots", "page", "lock", "out")
    report.run(params_file.load(), **vars(paths))


if __name__ == "__main__":
    stage(main)
