"""Check params.yaml as a whole, before any stage that a wrong value would cost its outs.

The out is a constant: only a wrong file keeps the other stages from running, a changed one invalidates what reads it.
"""

import argparse
from pathlib import Path

from stages import command, hub, params, tasks
from stages.records import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    settings = params.load(resolve=hub.commit_of)
    named = {name: settings.benchmarks[name].task or name for name in settings.evaluate.benchmarks}
    # which tasks a column's values name is known once the rows are there
    definitions = tasks.definitions({task: name for name, task in named.items() if "{" not in task})
    for name, task in named.items():
        if task in definitions:
            tasks.check(name, settings.benchmarks[name], task, tasks.read(definitions[task]))
    tasks.check_backend(settings.evaluate.backend)
    write_text(out, "params.yaml is valid\n")
    print("params.yaml is valid")


if __name__ == "__main__":
    command(main)
