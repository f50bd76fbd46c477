import gradio
import torch

from stages import export_folders


def test_requirements_are_pinned_to_what_is_installed():
    text = export_folders.pinned("# a comment\n--extra-index-url https://example.org\n\ngradio\ntorch\n")
    assert text.splitlines()[:4] == [
        "# a comment",
        "--extra-index-url https://example.org",
        "",
        f"gradio=={gradio.__version__}",
    ]
    assert text.splitlines()[4] == f"torch=={torch.__version__.partition('+')[0]}"


def test_the_card_names_a_fallback_corpus():
    facts = {
        "title": 'A "title"',
        "fallback_reason": "cannot download x",
        "parameters": 1_234_567,
        "dtype_losses": {"fp32": 2.0, "int8": 2.001},
        "target": "cpu",
        "tasks": {},
    }
    card = export_folders.fill_card("t: {{title}}\n{{heading}} {{parameters}}.{{fallback}}", facts)
    assert card == 't: "A \\"title\\""\nA "title" 1,234,567.\n\nThe corpus is a fallback: cannot download x.'
