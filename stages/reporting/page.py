"""HTML pages that need no other files and escape their values."""

import base64
import math
from pathlib import Path
from typing import Any

import jinja2

REPORT = Path(__file__).with_name("report.html")
PUBLISHED = Path(__file__).with_name("published.csv")
PUBLISHED_CURVES = Path(__file__).with_name("published_curves.csv")


def render(template: Path, **values: Any) -> str:
    """Render a Jinja template; every value is escaped. A missing share is a dash."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: "-" if math.isnan(share) else f"{share:.1%}"
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment.from_string(template.read_text("utf-8")).render(**values)


def embedded(media_type: str, data: bytes) -> str:
    """A data URL, which contains the file itself."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
