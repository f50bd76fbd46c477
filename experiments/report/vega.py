"""Vega, Vega-Lite and Vega-Embed as one script, so that pages draw without a network: the report, and DVC's plots."""

import contextlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from gpt2.errors import FileError, UserError, one_line
from gpt2.files import cache_folder, write_text

SNIPPET = "window.vegaEmbed = vegaEmbed;"
TEMPLATE = Path(".dvc/plots.html")
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width">
    {refresh_tag}
    <title>DVC plots</title>
    <script>SCRIPT</script>
    <style>
        body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }
        table { border-spacing: 15px }
        img { max-width: 100% }
    </style>
</head>
<body>
    {plot_divs}
</body>
</html>
"""
"""DVC's own page without its links to a CDN. `{scripts}`, which would be these links, is left out."""


def vega_script() -> str:
    """JavaScript that defines `vegaEmbed`, with all that it needs, from vl-convert, which carries it.

    vl-convert takes a second or two to put it together; it is kept in the user's cache folder.
    """
    path = cache_folder() / f"vega-of-vl-convert-{version('vl-convert-python')}.js"
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        import vl_convert

        script = vl_convert.javascript_bundle(SNIPPET)
        assert "</script" not in script.lower()
        with contextlib.suppress(OSError, FileError):  # a cache that cannot be written is no reason to fail
            write_text(path, script)
        return script


def write_template(root: Path) -> Path:
    """Writes a page for DVC's plots with Vega in it, and makes it the template of this clone. Returns its path.

    Raises UserError outside of a DVC repository.
    """
    path = root / TEMPLATE
    if not path.parent.is_dir():
        raise UserError(f"{root} has no {TEMPLATE.parent}; run this in the project's repository")
    script = vega_script()
    assert "{plot_divs}" not in script  # DVC replaces it anywhere
    write_text(path, PAGE.replace("SCRIPT", script))
    command = [sys.executable, "-m", "dvc", "config", "--local", "plots.html_template", TEMPLATE.name]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise FileError(f"cannot set DVC's template: {one_line(RuntimeError(done.stderr))}")
    return path
