"""Pages that hold all they show, and escape what goes into them."""

import base64
from pathlib import Path
from typing import Any

import jinja2


def render(template: Path, **values: Any) -> str:
    """The page that a Jinja template makes of the values; each is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{share:.1%}"
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment.from_string(template.read_text("utf-8")).render(**values)


def embedded(media_type: str, data: bytes) -> str:
    """The URL of a file that the page itself holds."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
