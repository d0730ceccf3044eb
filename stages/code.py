"""Take the fingerprint of the code that each stage runs, by its meaning: `code.yaml`.

Every other stage has its own entry there among its params, so that a changed comment reruns none of them.
"""

from pathlib import Path

from reprotune import fingerprints, process
from reprotune.pipeline.guard import stage
from reprotune.records import write_text


def main() -> None:
    out = process.arguments(__doc__, "out").out
    found = fingerprints.of_stages(Path.cwd())
    write_text(out, "".join(f"{name}: {digest}\n" for name, digest in found.items()))
    print(f"{len(found)} stages have a fingerprint in {out}")


if __name__ == "__main__":
    stage(main)
