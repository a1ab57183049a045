"""Pictures and tables from saved records."""

import pytest
from PIL import Image


def test_report_draws_both_pictures_and_a_table(cli, tmp_path):
    cli("--finetune", "--epochs", "2")
    cli("--finetune", "--peft", "--epochs", "3")
    cli("--baseline")
    code, out, err = cli("--report", dataset=None)
    assert code == 0, err
    for name in ("loss", "precision"):
        with Image.open(tmp_path / "plots" / f"{name}.png") as picture:
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # something is drawn
    rows = [line for line in out.splitlines() if line.startswith("| rotten_tomatoes-")]
    assert [row.split("-")[1] for row in rows] == ["baseline", "full", "lora"]


@pytest.mark.parametrize("what", ["nothing", "folder"])
def test_without_a_finished_run_it_says_so(cli, tmp_path, what):
    code, _, err = cli("--report", *([str(tmp_path)] if what == "folder" else []), dataset=None)
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1
