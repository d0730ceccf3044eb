"""The full recipe, prepared by preflight."""

from reprotune import cli
from reprotune.planning import preflight


def prepared(*options: str):
    """The arguments of `needs`, with these options of `reprotune preflight`."""
    arguments = cli.parser().parse_args(["preflight", "--params", "recipes/qwen3-4b.yaml", *options])
    return preflight.prepared(arguments)
