import json

import pytest

from space import server
from space.model_files import load_model
from space.service import DEFAULTS
from tests.space.conftest import FACTS, write_manifest


@pytest.mark.parametrize(
    ("losses", "among"),
    [
        ({"fp32": 5.0, "bf16": 5.0, "int8": 5.02}, ("fp32", "bf16", "int8")),
        ({"fp32": 5.0, "bf16": 5.0, "int8": 5.03}, ("fp32", "bf16")),
        ({"fp32": 5.0}, ("fp32",)),
        ({}, ("fp32",)),
    ],
)
def test_int8_is_used_only_if_the_loss_increases_little(folder, monkeypatch, losses, among):
    monkeypatch.setattr(server, "fastest_dtype", lambda model, among: among)
    assert server.choose_dtype(load_model(folder), {**FACTS, "dtype_losses": losses}) == among


def test_the_page_describes_the_model(folder):
    text = json.dumps(server.build(folder)[0].get_config_file(), default=str)
    for fact in ("A tiny model", f"{FACTS['parameters']:,}", "12,345", "5.5 nats", "abc123", "0123456789ab"):
        assert fact in text


def test_a_title_is_no_markup(folder):
    write_manifest(folder, {**FACTS, "title": "<script>alert(1)</script>"})
    parts = server.build(folder)[0].get_config_file()["components"]
    assert all("<script>alert" not in str(part["props"].get("value")) for part in parts)


def test_a_click_before_the_page_has_loaded_uses_the_defaults(folder):
    parts = server.build(folder)[0].get_config_file()["components"]
    values = [part["props"]["value"] for part in parts if part["type"] == "slider"]
    names = ("max_new_tokens", "temperature", "samples", "top_k", "top_p", "repetition_penalty")
    assert values == [DEFAULTS[name] for name in names]
