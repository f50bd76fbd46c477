import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools import architecture, screenshots
from tools.architecture import Box, imports, reduced, route


@pytest.fixture
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A small tree of packages: file -> what is in it."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return architecture.modules()

    monkeypatch.chdir(tmp_path)
    return write


def test_the_picture_is_what_the_code_gives_now(root):
    assert architecture.PICTURE.read_text() == architecture.draw(), "the code changed: python -m tools.architecture"


def test_the_picture_is_valid_and_loads_nothing(root):
    picture = architecture.PICTURE.read_text()
    assert ET.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    assert set(re.findall(r"https?://[^\"]+", picture)) == {"http://www.w3.org/2000/svg"}


def test_every_module_is_drawn(root):
    picture = architecture.draw()
    for path in Path("gpt2").rglob("*.py"):
        assert path.stem == "__init__" or path.stem in picture, path


def test_what_follows_from_other_arrows_is_left_out(code):
    found = code(
        {
            "stages/train.py": "from gpt2.training.trainer import train\nfrom gpt2 import config",
            "gpt2/training/trainer.py": "def train():\n    from gpt2.config import x",
            "gpt2/config.py": "import torch",
            "gpt2/__init__.py": "from gpt2.training.trainer import train",
        }
    )
    assert reduced(imports(found)) == {"stages/": {"gpt2/training/"}, "gpt2/training/": {"gpt2/"}, "gpt2/": set()}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("gpt2/new/module.py", "", "give these a place in tools/architecture.py: ['gpt2/new/']"),
        ("gpt2/config.py", "from gpt2.hub import export", "gpt2/ imports gpt2/hub/, which is not below it"),
    ],
)
def test_what_does_not_fit_the_picture_is_reported(code, file, content, message):
    packages = [name for row in architecture.PROGRAMS + architecture.LIBRARY for name in row if name.endswith("/")]
    stages = "".join(f"  {stage}:\n    outs: [{place}]\n" for stage, _, _, place, *_ in architecture.PIPELINE if stage)
    files = {f"{package}module.py": "" for package in packages}
    code(
        {
            **files,
            "gpt2/__main__.py": "",
            "gpt2/hub/export.py": "from gpt2 import config",
            "dvc.yaml": f"stages:\n{stages}",
        }
    )
    architecture.draw()
    code({file: content})
    with pytest.raises(SystemExit, match=re.escape(message)):
        architecture.draw()


def test_an_arrow_goes_straight_down_or_around_what_is_in_its_way():
    source, target = Box(0, 0, 100, 0, 50), Box(2, 0, 200, 200, 250)
    assert route(source, target, []) == "M50 50V200"
    assert route(source, target, [Box(1, 40, 90, 100, 150)]) == "M20 50V200"
    beside = route(source, Box(2, 120, 200, 200, 250), [])
    assert beside.startswith("M86 50")
    assert beside.endswith("134 200")
    with pytest.raises(SystemExit, match="an arrow has no room"):
        route(source, target, [Box(1, 0, 100, 100, 150)])


def test_screenshots_draw_the_picture_without_a_browser(monkeypatch):
    drawn = []
    monkeypatch.setattr(architecture, "main", lambda: drawn.append(True))
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit, match="no Chromium found"):
        screenshots.main()
    assert drawn
