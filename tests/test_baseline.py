"""The linear baseline: its embeddings, its cache, its choice of C and its probabilities."""

import json

import numpy as np
import pytest
import torch
from conftest import read_json, read_lines
from safetensors.numpy import load_file

import packaged


def test_it_leaves_the_records_of_a_run_and_the_second_is_the_same(cli, monkeypatch):
    import baseline

    assert cli("--baseline", "--precision", "fp32")[0] == 0

    def embed_again(*_):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(baseline, "embeddings", embed_again)
    assert cli("--baseline", "--precision", "fp32")[0] == 0
    first, second = (read_json(run / "result.json") for run in sorted(cli.runs.iterdir()))
    assert first["test"] == second["test"] and first["val"] == second["val"]
    assert first["val"].keys() == first["test"].keys() >= {"loss", "accuracy", "precision", "recall", "f1"}
    assert first["test"]["accuracy"] > 0.55


def test_other_weights_and_other_code_have_embeddings_of_their_own(cli, nudged_model, monkeypatch):
    import runs

    folder, seen = packaged.cache_dir() / "embeddings", []
    for words in ((), ("--model", str(nudged_model)), ()):
        assert cli("--baseline", *words)[0] == 0
        seen.append({path.name for path in folder.iterdir()})
        if words:
            monkeypatch.setattr(runs, "code_hash", lambda: "that of another version")
    assert len(seen[1] - seen[0]) == len(seen[2] - seen[1]) == 3


def test_a_damaged_file_of_embeddings_is_made_again(cli):
    assert cli("--baseline")[0] == 0
    for damaged in (b"", b"\x93NUMPY"):
        for file in (packaged.cache_dir() / "embeddings").glob("*.npy"):
            file.write_bytes(damaged or file.read_bytes()[:-100])
        assert cli("--baseline")[0] == 0
    assert len({json.dumps(read_json(run / "result.json")["test"]) for run in cli.runs.iterdir()}) == 1


def test_a_validation_set_without_a_mistake_wants_no_certainty():
    """Without Platt's targets the factor would run to its bound, and one wrong test row would cost 100 nats."""
    import baseline

    margins = np.array([[-1.0, 1.0], [1.0, -1.0]] * 6)
    scale = baseline.fit_scale(margins, np.array([1, 0] * 6))
    assert 1 / (1 + np.exp(-2 * scale)) == pytest.approx(7 / 8, abs=0.01)  # six of its class: 7 of 8


def test_a_class_that_limit_leaves_without_a_training_row_spoils_no_probabilities(cli, tmp_path):
    """Its score is -1e6: to fit the factor to rows of it would make all other probabilities alike."""
    rows = [f"a {word} film {n},{label}" for n in range(40) for word, label in (("great", "good"), ("awful", "bad"))]
    (tmp_path / "rows").mkdir()
    for split in ("train", "validation", "test"):
        odd = ["so so,odd"] * (split == "validation") + ["so so so,odd"] * (split == "train")
        (tmp_path / "rows" / f"{split}.csv").write_text("\n".join(["text,label", *rows, *odd, ""]))
    code, _, err = cli("--baseline", "--dataset", str(tmp_path / "rows"), "--limit", "20")
    assert code == 0 and "1 validation rows are of classes that --limit left" in err
    (run,) = cli.runs.iterdir()
    assert np.mean([line["probability"] for line in read_lines(run / "predictions.jsonl")]) > 0.8


def test_multi_class(cli):
    code, _, err = cli("--baseline", dataset="ag_news")
    assert code == 0, err
    (run,) = cli.runs.iterdir()
    rows, result = read_lines(run / "predictions.jsonl"), read_json(run / "result.json")
    assert len(rows[0]["probabilities"]) == 4
    assert result["trainable_parameters"] == 4 * 16 + 4


def test_embeddings_are_the_last_hidden_state_at_cls(tiny_model, tiny_data):
    from baseline import embeddings
    from data import load_data
    from models import find_model, load_classifier, load_tokenizer
    from tokens import Cutter, tokenize

    source = find_model(str(tiny_model))
    tokenizer, _ = load_tokenizer(source, None)
    data = load_data(str(tiny_data / "rotten_tomatoes"), None, None, 0)
    split = tokenize(data, Cutter(tokenizer, 512))[0]["test"]
    model = load_classifier(source, data.label_names)
    for reader in (model, model.base_model):  # on the fast path, and on transformers' own modules
        got = embeddings(reader, split, torch.device("cpu"), "fp32")
        with torch.no_grad():
            for row, text in enumerate(data.splits["test"]["text"]):
                alone = model.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0]
                np.testing.assert_allclose(got[row], alone, atol=1e-5)


def test_the_saved_linear_map_gives_the_recorded_probabilities(cli, tiny_model):
    """model/ holds the encoder and one linear layer: softmax(weight @ CLS + bias)."""
    from transformers import AutoModel, AutoTokenizer

    cli("--baseline", "--precision", "fp32")
    (run,) = cli.runs.iterdir()
    layer = load_file(run / "model" / "linear.safetensors")
    encoder = AutoModel.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    for row in read_lines(run / "predictions.jsonl")[:5]:
        with torch.no_grad():
            cls = encoder(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state[0, 0].double().numpy()
        logits = layer["weight"] @ cls + layer["bias"]
        probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        np.testing.assert_allclose(probabilities, list(row["probabilities"].values()), atol=1e-4)


def test_c_is_chosen_on_validation_and_ties_go_to_the_smallest():
    from baseline import C_GRID, fit

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    separable = labels[:, None] * 4 + rng.normal(size=(200, 3)) * 0.1
    features, labels = {"train": separable, "validation": separable}, {"train": labels, "validation": labels}
    assert fit(features, labels)[1] == C_GRID[0]


def test_c_is_not_chosen_on_train():
    """60 columns of noise beside one that tells: the larger C, the better on train, and the worse on validation."""
    from baseline import C_GRID, fit

    rng = np.random.default_rng(1)
    labels = {name: rng.integers(0, 2, n) for name, n in (("train", 100), ("validation", 2000))}
    features = {name: rng.normal(size=(len(some), 61)) for name, some in labels.items()}
    for name, some in labels.items():
        features[name][:, 0] += 3 * some
    found = {}
    for chosen_on in labels:
        found[chosen_on] = fit(
            {"train": features["train"], "validation": features[chosen_on]},
            {"train": labels["train"], "validation": labels[chosen_on]},
        )[1]
    assert found["validation"] < found["train"] and found["validation"] in C_GRID


@pytest.mark.parametrize("classes", [2, 4])
def test_the_linear_map_decides_as_the_svc_does(classes):
    """Neither the standardised columns nor the scale of the probabilities change a decision."""
    from baseline import fit, fit_map

    rng = np.random.default_rng(0)
    labels = {name: rng.integers(0, classes, 200) for name in ("train", "validation")}
    features = {name: rng.normal(3, 2, (200, 5)) + some[:, None] for name, some in labels.items()}
    weight, bias, _ = fit_map(features, labels, classes, "none")
    expected = fit(features, labels)[0].predict(features["validation"])
    assert len(set(expected)) == classes
    assert ((features["validation"] @ weight.T + bias).argmax(axis=1) == expected).all()
