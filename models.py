"""Tokenizer and encoder from a folder, the hub or the packaged default; LoRA; saving."""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as transformers_logging
from transformers.utils.hub import cached_file, extract_commit_hash

import hub
import packaged
from config import DEFAULT_MODEL, UserError, first_line, say
from metrics import METRICS

HUB_IDS = {DEFAULT_MODEL: f"distilbert/{DEFAULT_MODEL}"}
LONGEST = 512  # tokens, where the user sets no --max_length


@dataclass(frozen=True)
class ModelSource:
    """Where an encoder comes from: `location` is what from_pretrained gets, the rest is for the records."""

    name: str
    kind: str  # "local", "hub" or "packaged"
    source: str
    location: str
    config: Any  # transformers' config of the encoder
    license: str | None  # as its model card states it


def find_model(name: str | None) -> ModelSource:
    """A local folder as it is; else the hub or its cache; else, for the default alone, the packaged encoder.

    Raises UserError where a model that was named cannot be had: it is never replaced by another.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    wanted = name or DEFAULT_MODEL
    if name and (os.path.exists(name) or name.startswith((".", "/", "~"))):  # noqa: PTH110 - never raises
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"--model {name}: expected a folder with config.json and model.safetensors")
        return ModelSource(Path(name).resolve().name, "local", name, name, _read_config(name, name), _license(name))
    location = HUB_IDS.get(wanted, wanted)
    try:
        config = _read_config(location, wanted)
        if name is None:
            _fetch_whole(location)
    except UserError:
        if name is not None:
            raise
        packaged.announce(packaged.ENCODER_NAME, packaged.ENCODER_WHEEL)
        return packaged_model()
    revision = extract_commit_hash(cached_file(location, "config.json"), None)
    return ModelSource(wanted, "hub", f"{hub.endpoint()}/{location}@{revision}", location, config, _license(location))


def packaged_model() -> ModelSource:
    """The packaged encoder, whatever the hub says: what a run that began on it goes on with."""
    folder = str(packaged.encoder_folder())
    source, config = packaged.ENCODER_WHEEL.requirement, _read_config(folder, folder)
    return ModelSource(packaged.ENCODER_NAME, "packaged", source, folder, config, packaged.ENCODER_LICENSE)


def _fetch_whole(location: str) -> None:
    """UserError where the cache has a part of the model and the hub does not give the rest."""
    try:
        for file in ("tokenizer.json", "model.safetensors"):
            cached_file(location, file)
    except Exception as error:  # the hub's clients' many kinds
        raise UserError(f"--model {location}: {first_line(error)}") from error


def _license(location: str) -> str | None:
    """What the front matter of the model's card says, if it has one."""
    try:
        card = Path(cached_file(location, "README.md")).read_text(encoding="utf-8")
    except Exception:  # no card, or the hub's clients' many errors: nothing depends on it
        return None
    found = re.search(r"\A---\n(?:(?!---).*\n)*?license: *([\w.-]+)", card)
    return found[1] if found else None


def _read_config(location: str, name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # the hub's clients raise errors of many libraries, some of them no OSError
        reason = first_line(error) if os.path.exists(location) else hub.reason(error)  # noqa: PTH110 - never raises
        advice = "give a local folder, or leave --model out for the default"
        raise UserError(f"--model {name}: {reason}; {advice}") from error


def load_tokenizer(source: ModelSource, max_length: int | None) -> tuple[Any, int]:
    """(tokenizer, most tokens a text may have). Raises UserError for more than the model's positions."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
    except Exception as error:  # of many kinds: JSON, tokenizers' own, the hub's
        raise UserError(f"--model {source.name}: its tokenizer cannot be read: {first_line(error)}") from error
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"--model {source.name}: expected a fast tokenizer with a padding token")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one where files are missing
        raise UserError(f"--model {source.name}: expected its tokenizer files (tokenizer.json) beside the weights")
    words = getattr(source.config, "vocab_size", None) or len(tokenizer)
    if len(tokenizer) > words:
        raise UserError(f"--model {source.name}: its tokenizer has {len(tokenizer)} words, its config.json {words}")
    limit = min(tokenizer.model_max_length, _positions(source.config))
    if max_length is not None and max_length > limit:
        raise UserError(f"--max_length: expected at most {limit}, the model's limit, got {max_length}")
    return tokenizer, max_length or min(limit, LONGEST)


def _positions(config: Any) -> int:
    """How many tokens the position embeddings allow. RoBERTa and its kin number them from behind the padding's id."""
    positions = getattr(config, "max_position_embeddings", None) or 10**9
    from_padding = re.search("roberta|camembert|mpnet|longformer|data2vec-text|xmod", config.model_type)
    return positions - config.pad_token_id - 1 if from_padding else positions


def load_classifier(source: ModelSource, label_names: tuple[str, ...]) -> nn.Module:
    """The encoder in fp32 under a head of `len(label_names)` outputs.

    The head is drawn from torch's generator, but where the checkpoint has one for the same classes: then training goes
    on from it. One for other classes gets a new last layer. UserError where the checkpoint cannot be read.
    """
    if (Path(source.location) / "adapter_config.json").exists():
        raise _adapter(source)
    names = dict(enumerate(label_names))
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            source.location,
            output_loading_info=True,
            num_labels=len(names),
            id2label=names,
            label2id={name: number for number, name in names.items()},
            problem_type="single_label_classification",  # whatever the checkpoint was for
            dtype=torch.float32,  # else a bf16 checkpoint would be trained in bf16
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # of a head for another number of classes; looked at below
        )
    except Exception as error:  # of many kinds: safetensors', the hub's, shapes that differ
        reason = first_line(error)
        if isinstance(error, SafetensorError):  # it names no file
            reason = f"its model.safetensors is damaged: {reason}"
        elif "use_safetensors" in reason:
            reason = "expected model.safetensors among its files; a .bin, which can hold code, is not read"
        raise UserError(f"--model {source.name}: {reason}") from error
    if hasattr(model, "peft_config"):  # of the hub: transformers has put it on and frozen the rest
        raise _adapter(source)
    _check_encoder(model, source, found)
    _refresh_head(model, source, label_names, found)
    return model


def _adapter(source: ModelSource) -> UserError:
    plain = "python main.py --merge RUN writes plain weights to RUN/merged"
    return UserError(f"--model {source.name}: it is a LoRA run's adapter; {plain}")


def _check_encoder(model: nn.Module, source: ModelSource, found: dict[str, Any]) -> None:
    """UserError where the checkpoint lacks weights of the encoder or has some of another shape. found: as below."""
    inner = f"{model.base_model_prefix}."
    if mismatched := sorted(name for name, *_ in found["mismatched_keys"] if name.startswith(inner)):
        raise UserError(
            f"--model {source.name}: {len(mismatched)} of its weights, such as {mismatched[0]}, have other shapes than "
            "its config.json asks for"
        )
    missing = sorted(name for name in found["missing_keys"] if name.startswith(inner))
    missing = [name for name in missing if ".pooler." not in name]  # BERT's, which masked-LM checkpoints lack
    if missing:
        raise UserError(
            f"--model {source.name}: its weights lack {len(missing)} of the encoder's, such as {missing[0]}"
        )


def _refresh_head(model: nn.Module, source: ModelSource, label_names: tuple[str, ...], found: dict[str, Any]) -> None:
    """Draw the head's last layer anew where the checkpoint has one for other classes, and say so. found: what
    transformers tells of the loading."""
    inner = f"{model.base_model_prefix}."
    linear = [
        name for name, part in model.named_modules() if isinstance(part, nn.Linear) and not name.startswith(inner)
    ]
    if not linear or f"{linear[-1]}.weight" in found["missing_keys"]:
        return  # the checkpoint has no head
    theirs = list(dict(sorted((getattr(source.config, "id2label", None) or {}).items())).values())
    unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in theirs)
    same = [name.lower() for name in theirs] == [name.lower() for name in label_names]
    if not found["mismatched_keys"] and (same or unnamed):
        if not same:
            say(f"note: the classes of the model's head have no names: taken for {', '.join(label_names)}")
        return
    say(f"note: the model's head is for other classes ({', '.join(theirs)}): its last layer is drawn anew")
    last = model.get_submodule(linear[-1])
    nn.init.normal_(last.weight, std=getattr(model.config, "initializer_range", 0.02))
    if last.bias is not None:
        nn.init.zeros_(last.bias)


def load_saved(source: ModelSource, label_names: tuple[str, ...]) -> nn.Module:
    """The classifier that `save_model` wrote, in fp32, as a plain module: a LoRA run's adapters are merged in.

    Of a baseline's folder, which has no head, the encoder under a fresh one. Raises UserError where it is damaged.
    """
    folder = Path(source.location)
    if not (folder / "adapter_config.json").exists():
        return load_classifier(source, label_names)
    from peft import PeftModel
    from safetensors.torch import load_file

    try:
        reading = "adapter_model.safetensors"
        load_file(folder / reading)  # PEFT would look for another file, or at the hub
        reading = "model.safetensors"
        base = AutoModelForSequenceClassification.from_config(source.config, dtype=torch.float32)
        base.load_state_dict(load_file(folder / reading))
        with warnings.catch_warnings():  # PEFT reads names that transformers is about to drop
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(base, folder).merge_and_unload()
    except Exception as error:  # of many kinds: safetensors', PEFT's, shapes that differ
        damaged = f"its {reading} is damaged: " if isinstance(error, SafetensorError) else ""
        raise UserError(f"--model {source.name}: {damaged}{first_line(error)}") from error


def encoder_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the encoder's weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.base_model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, layers: int | None = None) -> nn.Module:
    """`model` with a LoRA adapter on every linear layer of its encoder, or of the last `layers` of its blocks.

    Only the adapters and the head are trained. (Hu et al. 2021, through PEFT: the output gains alpha / rank * B A x,
    and B starts at zero.) Raises UserError for more layers than there are.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    prefix = model.base_model_prefix
    heads = [name for name, part in model.named_children() if name != prefix and any(True for _ in part.parameters())]
    heads += ["pooler"] * (getattr(model.base_model, "pooler", None) is not None)  # BERT's, often as new as the head
    linear = [name for name, part in model.base_model.named_modules() if isinstance(part, nn.Linear)]
    linear = [name for name in linear if not name.startswith("pooler.")]
    if layers is not None:
        name, blocks = encoder_blocks(model)
        if layers > len(blocks):
            raise UserError(f"--lora_layers: expected at most {len(blocks)}, the encoder's layers, got {layers}")
        chosen = tuple(f"{name}.{number}." for number in range(len(blocks) - layers, len(blocks)))
        linear = [name for name in linear if name.startswith(chosen)]
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # A pattern of whole names, since heads have layers called `dense` too.
        target_modules=rf"{prefix}\.({'|'.join(map(re.escape, linear))})",
        modules_to_save=heads,
    )
    with warnings.catch_warnings():  # PEFT reads names that transformers is about to drop
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, settings)


def encoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name within the encoder, blocks): its longest list of modules."""
    lists = [(name, part) for name, part in model.base_model.named_modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise UserError("--lora_layers: this encoder has no list of layers")
    return max(lists, key=lambda found: len(found[1]))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total). PEFT's frozen second copy of the head is no part of the model and is not counted."""
    named = [(name, p) for name, p in model.named_parameters() if ".original_module." not in name]
    return sum(p.numel() for _, p in named if p.requires_grad), sum(p.numel() for _, p in named)


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights that training changes, on the CPU: what must be kept of the best epoch."""
    return {n: full_tensor(p.detach()).to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}


def load_trained_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put back what `trained_state` took."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.copy_(shard_like(parameter, state[name]))


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself; where it is spread over the processes (FSDP), which all take part, all of it, on the CPU: what
    needs them all does not fit on one's device."""
    return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor


def shard_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, whole in every process, spread as `parameter` is."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor  # here, since it takes a while to import

    value = value.to(parameter.device_mesh.device_type)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _without_adapters(model: nn.Module) -> nn.Module:
    """A plain model of the frozen encoder under the trained head."""
    base = model.get_base_model()
    plain = type(base)(base.config)
    weights = {
        name.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."): weight
        for name, weight in base.state_dict().items()
        if ".lora_" not in name and ".original_module." not in name
    }
    plain.load_state_dict(weights)
    return plain


def save_model(model: nn.Module, tokenizer: Any, folder: Path, card: str) -> None:
    """Weights, tokenizer and model card as transformers reads them.

    Of a LoRA model the adapter with its head, for PEFT, and beside it the base under that head: transformers reads
    the base and puts the adapter on it; the adapter alone would not tell it the number and names of the classes.
    """
    if hasattr(model, "peft_config"):
        # PEFT would ask the hub whether the base model's vocabulary was resized; it was not.
        model.save_pretrained(folder, save_embedding_layers=False)
        model = _without_adapters(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """UserError where the block cannot write to `folder`, such as on a full disk: safetensors' error is no OSError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"model and results cannot be written to {folder}: {error}") from error


def positive_class(data: dict[str, Any]) -> str | None:
    """The class that precision, recall and F1 are about: the second of two. Of more, they are means over all."""
    return data["labels"][1] if len(data["labels"]) == 2 else None


def model_card(record: dict[str, Any], scores: dict[str, Any]) -> str:
    """README.md of the saved model: base and its source, data, metrics with intervals, limits."""
    model, data, test = record["model"], record["data"], scores["test"]
    rows = [
        f"| {name} | {test[name]:.4f} | {test[f'{name}_interval'][0]:.4f} to {test[f'{name}_interval'][1]:.4f} |"
        for name in METRICS
    ]
    title = f"fine-tuned ({record['method']})"
    chosen = f"Best epoch by validation accuracy, then loss: {record['best_epoch']} of {record['config']['epochs']}."
    once = "One run with one seed: another seed gives another number. "
    if record["method"] == "baseline":
        once = ""
        title = "frozen, with a LinearSVC (linear.safetensors),"
        chosen = f"C by validation accuracy: {record['C']:g}."
    return "\n".join(
        [
            "---",
            "library_name: " + ("peft" if record["method"] == "lora" else "transformers"),
            *(["pipeline_tag: text-classification"] if record["method"] != "baseline" else []),
            *([f"license: {model['license']}"] if model["license"] else []),
            "---",
            f"# {model['name']}, {title} on {data['name']}",
            "",
            f"- Base: {model['name']} ({model['source']}). Its license holds for these weights too: "
            f"{model['license'] or 'its card names none, so ask where it comes from'}.",
            f"- Data: {data['name']} ({data['source']}), rows {data['rows']}; classes: {', '.join(data['labels'])}.",
            f"- {chosen}",
            *(f"- {note[0].upper()}{note[1:]}." for note in data["notes"]),
            *([f"- Precision, recall and F1 are those of {positive!r}."] if (positive := positive_class(data)) else []),
            "",
            f"| test ({test['rows']} rows) | value | 95% interval over rows |",
            "|---|---|---|",
            *rows,
            "",
            once + "For texts like those of its data; not checked for bias, and not for decisions about people.",
            "",
        ]
    )
