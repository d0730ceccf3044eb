"""`python -m reprotune`: the same as `reprotune`, with the code of the current folder."""

from reprotune.cli import main

main()
