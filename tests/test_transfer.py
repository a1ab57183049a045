"""The scripts of experiments/: what two data sets share, a run scored on the other's rows, and runs averaged."""

import shutil
import subprocess
import sys

import pyarrow.parquet as pq
from conftest import ROOT
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(ROOT / "experiments"))
import average
import transfer

import predict


def test_shared_rows_are_found_whatever_their_spelling():
    trained = ["It 's a Charming , caf\u00e9-lit journey .", "of the year", "one two three four five six", "the end"]
    tested = [
        "it's a charming, cafe-lit journey",  # the same sentence
        "we say: it's a charming cafe-lit journey, twice",  # holds it
        "two three four five",  # is part of one
        "it's the best film of the year",  # three words in common prove nothing
        "the end",  # short, but the whole row
        "something else",
    ]
    found = transfer.shared_rows(tested, trained)
    assert found["whole"].tolist() == [True, False, False, False, True, False]
    assert found["part"].tolist() == [True, True, False, False, False, False]
    assert found["within"].tolist() == [True, False, True, False, False, False]
    found = transfer.shared_rows([*tested, "journey"], trained, fewest_within=1)
    assert found["within"].tolist() == [True, False, True, False, True, False, True]


def test_written_data_trains_on_one_and_tests_on_the_other(tiny_data, tiny_model, tmp_path):
    script = [sys.executable, str(ROOT / "experiments" / "transfer.py"), "--dataset_dir", str(tiny_data)]
    done = subprocess.run([*script, "--write", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5 and "rows dropped" in done.stdout
    tested = set(pq.read_table(tmp_path / "sst2_to_rotten_tomatoes" / "test.parquet")["text"].to_pylist())
    assert tested == set(pq.read_table(tiny_data / "rotten_tomatoes" / "test.parquet")["text"].to_pylist())
    trained = pq.read_table(tmp_path / "sst2_to_rotten_tomatoes" / "train.parquet")["text"].to_pylist()
    assert trained and not any(some.any() for some in transfer.shared_rows(trained, sorted(tested), 1).values())
    both = tmp_path / "rotten_tomatoes_and_sst2"
    held_out = []
    for split in ("train", "validation", "test"):
        texts = pq.read_table(tiny_data / "rotten_tomatoes" / f"{split}.parquet")["text"].to_pylist()
        pooled = pq.read_table(both / f"{split}.parquet")["text"].to_pylist()
        if split == "train":
            assert pooled[: len(texts)] == texts
            added = pooled[len(texts) :]
        else:
            assert pooled == texts
            held_out += texts
    assert added and not any(some.any() for some in transfer.shared_rows(added, held_out, 1).values())


def test_saved_models_are_scored_on_the_other_set(cli, tiny_data, monkeypatch, capsys):
    where = ("--dataset_dir", str(tiny_data))
    for more in ((), ("--peft",)):
        code, _, err = cli("--finetune", *where, "--dataset", "rotten_tomatoes", "--epochs", "1", *more)
        assert code == 0, err
    monkeypatch.setattr(sys, "argv", ["transfer.py", *where, str(cli.runs)])
    assert transfer.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| rotten_tomatoes-")]
    assert len(rows) == 2 and all("| sst2 |" in row for row in rows)


def test_runs_are_averaged(cli, tiny_data, monkeypatch, capsys, tmp_path):
    where = ("--dataset_dir", str(tiny_data))
    for seed in "12":
        words = ("--dataset", "rotten_tomatoes", "--lr", "1e-3", "--precision", "bf16", "--seed", seed)
        assert cli("--finetune", *where, *words)[0] == 0
    one, two = map(str, sorted(cli.runs.iterdir()))
    monkeypatch.setattr(predict, "CLOSE", 0.0)  # no row is computed again in fp32: that pass reads weights of its own
    capsys.readouterr()

    def rows(*runs: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", ["average.py", *where, *runs])
        assert average.main() == 0
        return [line.strip("| ").split(" | ")[1:] for line in capsys.readouterr().out.splitlines()[2:]]

    first, second, *means = rows(one, two)
    assert first != second and len(means) == 2
    assert rows(one, one) == [first] * 4  # the mean of a run and itself is the run
    shutil.copytree(one, tmp_path / "turned")  # the head times -3: averaged with the first one's it is that times -1
    file = tmp_path / "turned" / "model" / "model.safetensors"
    weights = {name: tensor * (-3 if name.startswith("classifier") else 1) for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    _, turned, _, mean = rows(one, str(tmp_path / "turned"))
    assert mean == turned != first
    assert cli("--finetune", *where, "--dataset", "sst2", "--epochs", "1")[0] == 0
    other = next(str(run) for run in cli.runs.iterdir() if run.name.startswith("sst2"))
    monkeypatch.setattr(sys, "argv", ["average.py", *where, one, other])
    assert average.main() == 2 and f"{other}: its rows are not those of" in capsys.readouterr().err
    assert cli("--baseline", *where, "--dataset", "sst2")[0] == 0
    linear = next(str(run) for run in cli.runs.iterdir() if run.name.startswith("sst2-baseline"))
    monkeypatch.setattr(sys, "argv", ["average.py", *where, linear, linear])
    assert average.main() == 2 and "got baseline" in capsys.readouterr().err
