"""What DVC needs of the environment that it runs in: `python -m reprotune.compat.dvc`, as `make setup` does.

DVC is a program of its own, so this stands in a .pth file, which Python runs whenever it starts.

- configobj writes ASCII, and DVC asks for nothing else: in a folder such as /home/josé, `dvc config`,
  `dvc remote modify` and `dvc exp run --temp` end in a UnicodeEncodeError. It also takes %(x)s for a name.
- DVC's state holds pickles, by default in a folder that everybody may write to. A relative path in
  .dvc/config would be another folder for each one that DVC is called in.

Seen with DVC 3.67.1 and configobj 5.0.9.
"""

import re
import sys
import sysconfig
from pathlib import Path

START = """\
import configobj, functools; configobj.ConfigObj.__init__ = functools.partialmethod(configobj.ConfigObj.__init__, default_encoding="utf-8", interpolation=False)
import os, sys; os.environ.setdefault("DVC_SITE_CACHE_DIR", os.path.join(sys.prefix, "dvc"))
"""  # noqa: E501
NO_URL = re.compile(r"[#?]|%[0-9A-Fa-f]{2}")
"""What means something else in a URL: DVC hands git the folder of an experiment as `file://` and its path."""


def main() -> None:
    """Write the .pth file and make the folder of DVC's state.

    Raises:
        SystemExit: DVC would lose experiments of this folder.
    """
    if found := NO_URL.search(str(Path.cwd())):
        sys.exit(
            f"error: {Path.cwd()}: found {found[0]!r} in the path of this folder, expected no #, ? or %XX, "
            "which `dvc exp run --temp` and `--queue` would read as parts of a URL; rename the folder"
        )
    state = Path(sys.prefix) / "dvc"
    state.mkdir(mode=0o700, exist_ok=True)
    state.chmod(0o700)
    (Path(sysconfig.get_path("purelib")) / "reprotune_dvc.pth").write_text(START)


if __name__ == "__main__":
    main()
