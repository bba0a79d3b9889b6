"""Write a page template for `dvc plots` that includes Vega, so that plots open without a network.

DVC's own template loads Vega from a CDN. `make setup` runs this tool, which writes .dvc/plots.html
and its path in .dvc/config.local. Git tracks neither, and without them DVC uses its own template.
The option is not in .dvc/config, because DVC would use the path of a missing file as the template.
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
    """Write the template into a DVC repository, and configure `dvc plots` to use it."""
    (repository / PAGE).write_text(plots_page(), "utf-8")
    # The path is relative to .dvc.
    command = ["config", "--local", "plots.html_template", PAGE.name]
    subprocess.run([sys.executable, "-m", "dvc", *command], cwd=repository, check=True)


def plots_page() -> str:
    """The template, with the placeholders that DVC replaces."""
    vega = vl_convert.javascript_bundle("window.embed = vegaEmbed;")
    return TEMPLATE.read_text("utf-8").replace("{vega}", vega)


if __name__ == "__main__":
    main()
