"""Check params.yaml as a whole, before any stage that a wrong value would cost its outs.

The out is a constant: a wrong file keeps the other stages from running, a changed one makes none of them
stale. What stages made for params that are no longer there is removed.
"""

from reprotune import outs, params_file, process
from reprotune.data import hub
from reprotune.evaluation import tasks
from reprotune.pipeline.guard import stage
from reprotune.records import write_text


def main() -> None:
    out = process.arguments(__doc__, "out").out
    settings = params_file.load(resolve=hub.commit_of)
    params_file.check_template(settings)
    outs.check_sources(settings)
    tasks.check_benchmarks(settings)
    outs.remove_leftovers()
    write_text(out, "params.yaml is valid\n")
    print("params.yaml is valid")


if __name__ == "__main__":
    stage(main)
