"""The one frame of all pages: templates that escape what they are given, in a browser that is told to load nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from prefalign_jax.pages.palette import PALETTE
from prefalign_jax.tables import written

_POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'"
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("prefalign_jax", "."),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["written"] = written


def render(template: str, *, title: str, scripts: Sequence[str] = (), **values: Any) -> str:
    """A whole page: it loads nothing, adapts to dark displays and to phones, and runs no script but its own.

    Args:
      template: a file of the package that extends pages/frame.html, such as 'pages/token_page.html'.
      title: of the page.
      scripts: .js files of the package, in order; the browser is told their digest, and runs nothing else.
      **values: what the template shows. Text is escaped, unless it is `markupsafe.Markup`.
    """
    policy, script = _POLICY, "\n".join(_TEMPLATES.loader.get_source(_TEMPLATES, name)[0] for name in scripts)
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    page = _TEMPLATES.get_template(template)
    return page.render(title=title, policy=Markup(policy), script=Markup(script), palette=PALETTE, **values)
