"""What a page holds, read back from its HTML."""

import json
import re
from html.parser import HTMLParser


class Structure(HTMLParser):
    """Tags, attributes, and text outside scripts, styles and the contents."""

    def __init__(self):
        super().__init__()
        self.quiet = ""
        self.tags, self.ids, self.text = [], [], []
        self.attributes = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.quiet = tag if tag in ("script", "style", "nav") else self.quiet
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        self.quiet = "" if tag == self.quiet else self.quiet

    def handle_data(self, data):
        if not self.quiet:
            self.text.append(data)


def parsed(html):
    structure = Structure()
    structure.feed(html)
    return structure


def figure(page, name):
    """Data and layout of one figure."""
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    (found,) = [f for f in json.loads(text) if f["id"] == f"fig-{name}"]
    return found


def section_text(page, name):
    """Text of one section of the page."""
    start = page.index(f'<section id="{name}"')
    return " ".join(" ".join(parsed(page[start : page.index("</section>", start)]).text).split())


def traces(page, name):
    """Traces of one figure by name."""
    return {trace.get("name"): trace for trace in figure(page, name)["data"]}
