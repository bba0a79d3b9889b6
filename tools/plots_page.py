"""Write the page template for `dvc plots`, with Vega in it, so that plots open without a network.

DVC's own template loads Vega from a CDN. `make setup` runs this: it writes .dvc/plots.html, and
points to it in .dvc/config.local. Git ignores both, so in a fresh clone DVC uses its own template.
(Setting the option in .dvc/config would break that: if the file is missing, DVC uses the option's
text itself as the template.)
"""

import argparse
import subprocess
import sys
from pathlib import Path

import vl_convert

ROOT = Path(__file__).parent.parent
TEMPLATE = Path(__file__).with_suffix(".html")
PAGE = Path(".dvc/plots.html")


def main() -> None:
    argparse.ArgumentParser(prog="python -m tools.plots_page", description=__doc__).parse_args()
    install(ROOT)


def install(repository: Path) -> None:
    """Write the template into a DVC repository, and configure `dvc plots` there to use it."""
    (repository / PAGE).write_text(plots_page(), "utf-8")
    # The path is relative to .dvc.
    command = ["config", "--local", "plots.html_template", PAGE.name]
    subprocess.run([sys.executable, "-m", "dvc", *command], cwd=repository, check=True)


def plots_page() -> str:
    """The template, with the placeholders that DVC fills."""
    vega = vl_convert.javascript_bundle("window.embed = vegaEmbed;")
    return TEMPLATE.read_text("utf-8").replace("{vega}", vega)


if __name__ == "__main__":
    main()
