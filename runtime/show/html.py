"""HTML elements: children are escaped unless they are elements themselves."""

from __future__ import annotations

import html
from collections.abc import Iterable

_VOID = ("img", "meta", "br")


class Html(str):
    """A str of HTML, not to be escaped again. Only `element` and `style` make it."""

    __slots__ = ()


def element(name: str, *children: object, **attributes: object) -> Html:
    """`<name attributes>children</name>`.

    Args:
        children: `Html` as it is, None omitted, iterables flattened, everything else as escaped text.
        attributes: a trailing underscore is dropped, others become dashes; attributes of None are omitted.
    """
    words = [name, *(f'{_spelt(key)}="{html.escape(str(v))}"' for key, v in attributes.items() if v is not None)]
    opened = f"<{' '.join(words)}>"
    return Html(opened if name in _VOID else f"{opened}{''.join(map(_inner, children))}</{name}>")


def style(css: str) -> Html:
    """A style element. Raises ValueError for CSS with "</", which would end it."""
    if "</" in css:
        raise ValueError("a style cannot hold an end of an element")
    return Html(f"<style>{css}</style>")


def page(title: str, css: str, *children: object) -> str:
    """A self-contained document, whose content security policy forbids loading anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("title", title),
        style(css),
    )
    return f"<!doctype html>\n{element('html', head, element('body', *children), lang='en')}\n"


def _spelt(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _inner(child: object) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, Iterable) and not isinstance(child, str):
        return "".join(map(_inner, child))
    return html.escape(str(child))
