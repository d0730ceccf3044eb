"""The page of `dvc plots` with its scripts inside, so that it opens offline; DVC's own loads them from a CDN.

python -m reprotune.report.plots_page FILE      `plots.html_template` of DVC's config names the file
"""

import sys
from pathlib import Path

import vl_convert

from reprotune.records import write_text

VEGA_LITE = "5.20"
"""The newest minor version of the major one that DVC's plots are written for."""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>reprotune: plots</title>
<script>(() => {%s})();</script>
<style>
body { font-family: sans-serif; margin: 1em; }
body > div { display: inline-block; margin: 1em; }
table { border-spacing: 15px; }
</style>
</head>
<body>
{plot_divs}
</body>
</html>
"""


if __name__ == "__main__":
    write_text(
        Path(sys.argv[1]),
        PAGE.replace("%s", vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)),
    )
