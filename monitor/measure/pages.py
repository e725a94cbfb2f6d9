"""Pages of HTML in one file: what comes from data is escaped, the plots are inline SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render(template: str, **values: Any) -> str:
    """Fill in a template of this folder; a value that it lacks is an error.

    Raises
    ------
    ImportError
        Without jinja2, naming the extra.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("reports need jinja2: pip install 'midstream[learn]'") from error
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
