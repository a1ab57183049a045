"""Encoders beside DistilBERT: tiny random ones of every kind, from their configs, through the real command line."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import read_json, read_lines
from safetensors.torch import load_file
from standin_hub import FILLER, TELLING
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
V3 = {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
V3 |= {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}
ROBERTA = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 66}
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
KINDS = {  # the class whose checkpoint is saved, what its config gets beside SMALL
    "BERT": ("BertForMaskedLM", {"max_position_embeddings": 64, "pad_token_id": 1}),  # without a pooler
    "MiniLM": ("BertModel", {"max_position_embeddings": 64, "pad_token_id": 1}),
    "RoBERTa": ("RobertaForMaskedLM", ROBERTA),
    "XLM-R": ("XLMRobertaForMaskedLM", ROBERTA),
    "ELECTRA": ("ElectraForPreTraining", {"embedding_size": 8, "max_position_embeddings": 64, "pad_token_id": 1}),
    "DeBERTa-v3": ("DebertaV2ForMaskedLM", {**V3, "max_position_embeddings": 64, "pad_token_id": 1}),
    "ModernBERT": ("ModernBertForMaskedLM", {**IDS, "max_position_embeddings": 64, "global_attn_every_n_layers": 2}),
}
METHODS = {
    "full": ("--finetune", "--lr", "5e-3"),
    "lora": ("--finetune", "--peft", "--lora_r", "4", "--lr", "5e-3"),
    "last layer": ("--finetune", "--peft", "--lora_r", "4", "--lora_layers", "1", "--lr", "5e-3"),
    "baseline": ("--baseline",),
}


def write_tokenizer(folder: Path, cls: bool = True) -> int:
    """Whole words, as most of these have them: <s> in front and </s> behind, or (not cls) nothing at all."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", ".", ",", *FILLER, *sum(TELLING, [])]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>"}
    if cls:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        special |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return len(vocabulary)


def write_encoder(folder: Path, kind: str, cls: bool = True) -> Path:
    name, settings = KINDS[kind]
    architecture = getattr(transformers, name)
    torch.manual_seed(0)
    config = architecture.config_class(vocab_size=write_tokenizer(folder, cls), **SMALL, **settings)
    architecture(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def encoder(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, write_encoder(tmp_path_factory.mktemp("encoder") / request.param, request.param)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_saves_and_predicts(cli, encoder, method, capsys):
    from main import main

    _, folder = encoder
    words = (*METHODS[method], "--model", str(folder), "--precision", "fp32")
    words += ("--epochs", "2", "--batch_size", "8") * (method != "baseline")
    code, _, err = cli(*words)
    assert code == 0, err
    (run,) = cli.runs.iterdir()
    rows, result = read_lines(run / "predictions.jsonl"), read_json(run / "result.json")
    if method == "baseline":
        assert result["pooling"] == "cls"
    else:
        assert result["engine"].startswith("plain")
        losses = [line["train/loss"] for line in read_lines(run / "metrics.jsonl") if "train/loss" in line]
        assert losses[-1] < losses[0]
        classify = transformers.pipeline("text-classification", model=str(run / "model"), top_k=None)
        for row, scores in zip(rows, classify([row["text"] for row in rows]), strict=True):
            assert {s["label"]: s["score"] for s in scores} == pytest.approx(row["probabilities"], abs=1e-5)
    texts = [row["text"] for row in rows]
    capsys.readouterr()
    assert main(["--precision", "fp32", "--predict", str(run), *texts]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for mine, row in zip(said, rows, strict=True):
        assert mine["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)


def test_lora_is_on_every_linear_layer_and_the_head_is_trained(encoder):
    from models import add_lora, find_model, load_classifier

    kind, folder = encoder
    model = load_classifier(find_model(str(folder)), ("a", "b"))
    prefix = f"{model.base_model_prefix}."
    linear = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    inside = {name for name in linear if name.startswith(prefix) and not name.startswith(f"{prefix}pooler.")}
    assert len(inside) >= 2 * 4
    assert (f"{prefix}embeddings_project" in inside) == (kind == "ELECTRA")
    heads = {name for name, _ in model.named_parameters() if not name.startswith(prefix) or ".pooler." in name}
    adapted = add_lora(model, 2, 4, 0.1)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    lora = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in trained if ".lora_" in name}
    assert lora == inside
    rest = {name.removeprefix("base_model.model.") for name in trained if ".lora_" not in name}
    assert {name.replace(".modules_to_save.default", "") for name in rest} == heads


@pytest.mark.usefixtures("no_curves")
def test_a_lora_run_keeps_the_encoder_and_loads_in_peft_with_its_head(cli, encoder):
    from peft import AutoPeftModelForSequenceClassification

    _, folder = encoder
    assert cli(*METHODS["lora"], "--model", str(folder), "--epochs", "1", "--precision", "fp32")[0] == 0
    (run,) = cli.runs.iterdir()
    model = AutoPeftModelForSequenceClassification.from_pretrained(run / "model", num_labels=2).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    for row in read_lines(run / "predictions.jsonl")[:5]:
        with torch.no_grad():
            inputs = tokenizer(row["text"], return_tensors="pt")
            shares = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.softmax(-1)
        assert shares[0].tolist() == pytest.approx(list(row["probabilities"].values()), abs=1e-5)
    prefix = model.get_base_model().base_model_prefix + "."
    base = {name.removeprefix(prefix): weight for name, weight in load_file(folder / "model.safetensors").items()}
    saved = load_file(run / "model" / "model.safetensors")
    kept = {name.removeprefix(prefix): weight for name, weight in saved.items() if name.startswith(prefix)}
    same = [name for name in kept if name in base and not name.startswith("pooler.")]
    assert same and all(torch.equal(kept[name], base[name]) for name in same)


def test_roberta_has_fewer_positions_than_its_config_says(tmp_path, cli):
    folder = write_encoder(tmp_path / "roberta", "RoBERTa")
    code, _, err = cli("--baseline", "--model", str(folder), "--max_length", "65")
    assert code == 2 and "expected at most 64" in err
    assert cli("--baseline", "--model", str(folder), "--max_length", "64")[0] == 0


def test_without_a_cls_token_the_baseline_takes_the_mean_and_says_so(tmp_path, cli, capsys):
    from main import main

    folder = write_encoder(tmp_path / "bert", "BERT", cls=False)
    code, _, err = cli("--baseline", "--model", str(folder), "--precision", "fp32")
    assert code == 0 and "no CLS token" in err and "mean" in err
    (run,) = cli.runs.iterdir()
    assert read_json(run / "config.json")["pooling"] == "mean"
    row = read_lines(run / "predictions.jsonl")[0]
    layer = load_file(run / "model" / "linear.safetensors")
    encoder = transformers.AutoModel.from_pretrained(run / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    with torch.no_grad():
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        mean = encoder(input_ids=ids).last_hidden_state[0].mean(dim=0).double()
    shares = (layer["weight"] @ mean + layer["bias"]).softmax(dim=0).tolist()
    assert shares == pytest.approx(list(row["probabilities"].values()), abs=1e-4)
    capsys.readouterr()
    assert main(["--precision", "fp32", "--predict", str(run), row["text"]]) == 0
    assert f'"label": "{row["prediction"]}"' in capsys.readouterr().out
