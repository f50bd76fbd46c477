"""The page itself: facts, curves and scripts in one file."""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from experiments.report import numbers
from experiments.report.curves import curves, history, losses_at_equal_budget, measurements
from experiments.report.facts import NO_EVALUATION, Facts, changed_params, collect, params_table, samples_by_prompt
from experiments.report.vega import vega_script
from experiments.runs import Run
from gpt2.files import write_text

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("charts.js", "page.js")
NUM_HUES, NUM_DASHES = 10, 3


def write_report(runs: Sequence[Run], path: Path) -> int:
    """Writes one HTML file about runs, best first. It needs no other file and no network. Returns its bytes."""
    html = render(runs, datetime.now().astimezone())
    write_text(path, html)
    return len(html.encode())


def render(runs: Sequence[Run], now: datetime) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    facts = collect(runs)
    params = params_table(facts)
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    for name in ("fixed", "short", "power", "duration", "plain"):
        environment.filters[name] = getattr(numbers, name)
    environment.globals["style_of"] = style_of
    scripts = [vega_script(), "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)]
    return environment.get_template("page.html").render(
        facts=facts,
        groups=groups(facts),
        params=params,
        changed=[changed_params(params, each) for each in facts],
        measurements=[measurements(history(each.run)) for each in facts],
        prompts=samples_by_prompt(facts),
        are_sampled_alike=not any(name.startswith("evaluate.") for name, _ in params),
        passages=[each for each in facts if each.passage],
        now=now,
        css=(ASSETS / "page.css").read_text(encoding="utf-8"),
        policy=content_security_policy(scripts),
        scripts=scripts,
        data=json_for_html(page_data(facts)),
    )


def groups(facts: Sequence[Facts]) -> list[dict[str, Any]]:
    """The runs by held-out text: those of a group can be compared."""
    found = []
    for text, members in groupby(facts, key=lambda each: each.text):
        rows = list(members)
        bounds = [
            each.evaluated[key]
            for each in rows
            for key in ("bits_per_byte_low", "bits_per_byte_high", "bits_per_byte")
            if key in each.evaluated
        ]
        found.append(
            {
                "rows": rows,
                "is_evaluated": text != NO_EVALUATION,
                "tokens": rows[0].evaluated.get("tokens"),
                "bytes": rows[0].evaluated.get("bytes"),
                "low": min(bounds, default=0.0),
                "high": max(bounds, default=1.0),
                "budgets": losses_at_equal_budget([history(each.run) for each in rows]) if len(rows) > 1 else {},
            }
        )
    return found


def page_data(facts: Sequence[Facts]) -> dict[str, Any]:
    """What the scripts draw. A passage that runs share is there once."""
    passages: list[list[str]] = []
    first_text = facts[0].text if facts else NO_EVALUATION
    runs = []
    for each in facts:
        passage = None
        if each.passage:
            texts, losses = each.passage
            if texts not in passages:
                passages.append(texts)
            passage = {"number": passages.index(texts), "losses": losses}
        hue, dash = style_of(each)
        shown = each.text == first_text or each.text == NO_EVALUATION
        row = {"name": each.name, "hue": hue, "dash": dash, "shown": shown, "curves": curves(each.run)}
        runs.append({**row, "passage": passage})
    return {"runs": runs, "passages": passages}


def style_of(each: Facts) -> tuple[int, int]:
    """The number of a run's hue and of its dashes."""
    return each.number % NUM_HUES, each.number // NUM_HUES % NUM_DASHES


def json_for_html(content: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def content_security_policy(scripts: Sequence[str]) -> str:
    """A policy that lets the browser run these scripts only, and load nothing: https://www.w3.org/TR/CSP3/."""
    sums = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in sums)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
