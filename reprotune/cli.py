"""`reprotune COMMAND`: what DVC does not know about a run. Arguments stand here, the work in the rooms."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from reprotune import process

Command = Callable[[argparse.Namespace], None]


def plan(arguments: argparse.Namespace) -> None:
    from reprotune.pipeline import plan

    plan.run(arguments.change)


def preflight(arguments: argparse.Namespace) -> None:
    from reprotune.planning import preflight

    preflight.run(arguments)


def cells(arguments: argparse.Namespace) -> None:
    from reprotune.pipeline import cells

    cells.run(arguments.processes)


def compare(arguments: argparse.Namespace) -> None:
    from reprotune import params_file
    from reprotune.comparison import revisions

    print(revisions.against(params_file.load(), arguments.against, Path("metrics"), Path("evals")))


def lineage(arguments: argparse.Namespace) -> None:
    from reprotune.pipeline import lineage

    lineage.run(arguments.result, arguments.json)


def fsck(arguments: argparse.Namespace) -> None:
    from reprotune.pipeline import fsck

    if not fsck.run(arguments.remote, arguments.remove):
        sys.exit(1)


def chat(arguments: argparse.Namespace) -> None:
    from reprotune.evaluation import terminal_chat

    terminal_chat.run(arguments.model, arguments.models, arguments.max_new_tokens, arguments.temperature)


def parser() -> argparse.ArgumentParser:
    """The arguments of every command; importing none of the rooms keeps `--help` quick."""
    top = argparse.ArgumentParser(
        prog="reprotune",
        description="What DVC does not know about a run. `dvc repro` runs it, `dvc metrics diff` compares.",
        epilog="Run it where dvc.yaml is. `reprotune --print-completion bash` prints a completion script.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(command: Command, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            command.__name__, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        added.set_defaults(run=command)
        return added

    sub = add(plan, "which stages a change makes stale, or what is stale now")
    sub.add_argument("change", nargs="*", help="a key of params.yaml (dpo.beta), a file, or a library (trl)")

    sub = add(preflight, "memory, hours and disk that a run needs, before it starts")
    sub.add_argument(
        "--gpu", help="name and memory of the devices, such as h100-80gb; default: those found here"
    )
    sub.add_argument("--gpus", type=int, help="how many of them")
    sub.add_argument(
        "--utilization", type=float, help="share of their peak FLOP/s that is reached; default: 0.4 on GPUs"
    )
    for name, path in (
        ("params", "params.yaml"),
        ("base", "models/base"),
        ("tokenized", "data/tokenized"),
        ("models", "configs/models"),
        ("lock", "dvc.lock"),
    ):
        sub.add_argument(f"--{name}", type=Path, default=Path(path), help=f"default: {path}")

    sub = add(cells, "run the stale cells of evaluate side by side, one a GPU")
    sub.add_argument(
        "--processes", type=int, help="cells at once; default: one a GPU, or REPROTUNE_PROCESSES"
    )

    sub = add(compare, "whether scores changed since another revision, by paired tests")
    sub.add_argument(
        "--against", metavar="REV", required=True, help="a git revision, or an experiment of `dvc exp list`"
    )

    sub = add(lineage, "the chain behind a file or a number, down to pinned sources")
    sub.add_argument("result", help="an out (metrics/dpo/gsm8k.json), or a number (all.mean.dpo.score)")
    sub.add_argument("--json", action="store_true", help="print the chain as JSON")

    sub = add(fsck, "check DVC's cache, a remote, the workspace and local sources against dvc.lock")
    sub.add_argument("--remote", metavar="NAME", help="also check the objects of this DVC remote")
    sub.add_argument(
        "--remove", action="store_true", help="remove damaged objects from the cache, and from --remote"
    )

    sub = add(chat, "talk to a model of the run in the terminal")
    sub.add_argument("model", choices=("base", "sft", "dpo", "final"))
    sub.add_argument("--models", type=Path, default=Path("models"), help="default: models")
    sub.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="default: 512")
    sub.add_argument("--temperature", type=float, default=0.0, help="default: 0, the likeliest tokens")
    return top


def main() -> None:
    top = parser()
    if "--print-completion" in sys.argv:
        import shtab

        shtab.add_argument_to(top, "--print-completion")
    arguments = top.parse_args()
    process.command(lambda: arguments.run(arguments))
