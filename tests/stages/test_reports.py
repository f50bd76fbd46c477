import matplotlib as mpl
import pytest

from stages import reports

HISTORY = [
    {
        "step": step,
        "train_loss": 5 - step / 10,
        "val_loss": 4.0 if step == 20 else None,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_s": 1000.0,
        "mfu": 0.25,
        "peak_memory_bytes": 10**9,
        "tokens": step * 100,
        "elapsed_s": step * 0.1,
    }
    for step in (10, 20, 30)
]


def draw(table, path, epoch_steps=15.0, warning=None):
    reports.draw_loss(table, path, {"train_sample_loss": 1.9}, epoch_steps=epoch_steps, warning=warning)


def test_history_is_a_table_with_a_row_for_each_point(tmp_path):
    table = reports.write_history(HISTORY, tmp_path)
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert (
        lines[0]
        == "step,train_loss,val_loss,learning_rate,grad_norm,tokens_per_s,mfu,peak_memory_bytes,tokens,elapsed_s"
    )
    assert lines[1].startswith("10,4,,0.001,")
    assert lines[2].startswith("20,3,4,0.001,")
    assert len(table) == 3
    assert (tmp_path / "validation.csv").read_text() == "step,val_loss\n20,4\n"


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1]], ids=["evaluated", "never evaluated"])
def test_curves_are_written_as_png(tmp_path, history):
    table = reports.write_history(history, tmp_path)
    for epoch_steps, warning in ((15.0, "the model overfits"), (1000.0, None)):
        draw(table, tmp_path / "loss.png", epoch_steps, warning)
    reports.draw_schedule(table, tmp_path / "schedule.png")
    for name in ("loss.png", "schedule.png"):
        picture = mpl.image.imread(tmp_path / name)
        assert picture.shape[0] > 300
        assert picture.std() > 0.05  # something is drawn


def test_the_same_numbers_give_the_same_file(tmp_path):
    table = reports.write_history(HISTORY, tmp_path)
    for name in ("a.png", "b.png"):
        draw(table, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
