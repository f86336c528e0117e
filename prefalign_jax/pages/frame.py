"""The frame of pages that load nothing from elsewhere."""

from __future__ import annotations

import html


def self_contained(title: str, style: str, body: str, *, pictures: bool = False) -> str:
    """A whole page, whose browser is told to load nothing and to run nothing.

    Args:
      title: plain text.
      style: CSS.
      body: HTML; whatever in it comes from data must be escaped already.
      pictures: let it show pictures that it holds as data: addresses.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'" + ("; img-src data:" if pictures else "")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )
