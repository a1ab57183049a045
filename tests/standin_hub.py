"""A stand-in for the Hugging Face hub on loopback, for tests: the real clients, no network.

ROOT/models/<owner>/<name>/* and ROOT/datasets/<owner>/<name>/* are served; an id without its owner redirects (307),
as on the real hub. `HF_ENDPOINT` must be set before the client is imported, so the client runs in its own process:

    with StandInHub(root) as hub:
        subprocess.run(command, env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(empty_folder)})
        assert any("distilbert-base-uncased" in path for _, path in hub.requests)

By hand: `python tests/standin_hub.py --root DIR --port 0` (with `--fill N` it writes tiny contents first).
"""

import argparse
import base64
import hashlib
import json
import random
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "5ca1ab1e" * 5  # the one revision of every repository; an upload doesn't change it
_FIXED = {"/api/whoami-v2": {"name": "tester", "orgs": []}, "/api/validate-yaml": {"errors": [], "warnings": []}}
_ID = r"(?P<id>[\w.-]+(?:/[\w.-]+)?)"
_FILE_URL = re.compile(rf"/(?P<kind>datasets/)?{_ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
_REPO_URL = re.compile(
    rf"/api/(?P<kind>models|datasets)/{_ID}"
    r"(?:/(?P<verb>revision|tree|paths-info|preupload|commit)/(?P<rev>[^/]+)(?:/(?P<path>.+))?)?"
)


class StandInHub:
    """Serves `root` from a thread while the `with` block lasts; afterwards its address refuses connections.

    `requests` lists (method, path without query) of everything asked, refused requests included. `fail_with` can be
    set at any time: a status code answers every request with it, "hang" accepts requests and never answers.
    """

    def __init__(self, root: Path | str, port: int = 0) -> None:
        self.root = Path(root).resolve()
        self.requests: list[tuple[str, str]] = []
        self.created: list[dict[str, Any]] = []  # what was asked of new repositories
        self.fail_with: int | Literal["hang"] | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "StandInHub":
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.fail_with = None  # lets hanging requests go
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.requests.append((self.command, unquote(path)))
        if self.hub.fail_with == "hang":
            while self.hub.fail_with == "hang":
                time.sleep(0.05)
            self.close_connection = True
        elif self.hub.fail_with:
            self._send(self.hub.fail_with, b"fault on demand")
        elif re.search("/api/repos/create|/preupload/|/commit/", path) and "Authorization" not in self.headers:
            self._refuse("Unauthorized", 401)
        elif path in _FIXED:
            self._json(_FIXED[path])
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := _FILE_URL.fullmatch(path) or _REPO_URL.fullmatch(path):
            self._repo(match, body)
        else:
            self._refuse("NotFound")

    do_HEAD = do_POST = do_GET

    def _repo(self, match: re.Match[str], body: bytes) -> None:
        """Answer a request about one repository: one of its files, or the API."""
        kind, repo_id = (match["kind"] or "models").strip("/"), match["id"]
        if "/" not in repo_id and (found := next((self.hub.root / kind).glob(f"*/{repo_id}"), None)):
            at = match.start("id")
            self._send(307, headers={"Location": f"{self.path[:at]}{found.parent.name}/{self.path[at:]}"})
            return
        repo, path = self.hub.root / kind / repo_id, unquote(match["path"] or "")
        verb = "file" if match.re is _FILE_URL else match["verb"]
        if "/" not in repo_id or not repo.is_dir():
            self._refuse("RepoNotFound")
        elif match["rev"] not in (None, "main", COMMIT):
            self._refuse("RevisionNotFound")
        elif (verb == "file" and not (repo / path).is_file()) or (verb == "tree" and not (repo / path).is_dir()):
            self._refuse("EntryNotFound")
        elif verb == "file":
            data = (repo / path).read_bytes()
            self._send(200, data, {"ETag": f'"{_git_oid(data)}"', "Content-Type": "application/octet-stream"})
        elif verb == "tree":
            below = (repo / path).glob("**/*" if "recursive=true" in self.path.lower() else "*")
            self._json([_entry(repo, each) for each in sorted(below)])
        elif verb == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            self._json([_entry(repo, repo / name) for name in wanted if (repo / name).exists()])
        elif verb == "preupload":  # "regular" whatever the size: the store for large files is not imitated
            self._json(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        elif verb == "commit":
            self._commit(repo, [json.loads(line) for line in body.splitlines()])
        else:
            names = sorted(each.relative_to(repo).as_posix() for each in repo.rglob("*") if each.is_file())
            self._json(
                {
                    "id": repo_id,
                    "sha": COMMIT,
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "siblings": [{"rfilename": name} for name in names],
                }
            )

    def _create(self, asked: dict[str, Any]) -> None:
        self.hub.created.append(asked)
        kind, repo_id = f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or 'tester'}/{asked['name']}"
        repo = self.hub.root / kind / repo_id
        status = 409 if repo.exists() else 200
        repo.mkdir(parents=True, exist_ok=True)
        self._json({"url": f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"}, status)

    def _commit(self, repo: Path, lines: list[dict[str, Any]]) -> None:
        for file in (line["value"] for line in lines if line["key"] == "file"):
            (repo / file["path"]).parent.mkdir(parents=True, exist_ok=True)
            (repo / file["path"]).write_bytes(base64.b64decode(file["content"]))
        url = f"{self.hub.url}/{repo.parent.name}/{repo.name}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def _refuse(self, code: str, status: int = 404) -> None:
        self._send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        common = {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), "Connection": "close"}
        for name, value in (common | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet: `StandInHub.requests` is the log."""


def _git_oid(data: bytes) -> str:
    """The git blob id of `data`: the hub's ETag and `oid` of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(repo: Path, path: Path) -> dict[str, Any]:
    data = b"" if path.is_dir() else path.read_bytes()
    return {
        "type": "directory" if path.is_dir() else "file",
        "oid": _git_oid(data),
        "size": len(data),
        "path": path.relative_to(repo).as_posix(),
    }


MODEL_ID = "distilbert/distilbert-base-uncased"
DATASETS = {  # as in the real repositories: hub id, folder of the data files, class names, splits
    "rotten_tomatoes": ("cornell-movie-review-data/rotten_tomatoes", "", "neg pos", "train validation test"),
    "sst2": ("stanfordnlp/sst2", "data/", "negative positive", "train validation test"),
    "imdb": ("stanfordnlp/imdb", "plain_text/", "neg pos", "train test unsupervised"),
    "ag_news": ("fancyzhx/ag_news", "data/", "World Sports Business Sci/Tech", "train test"),
}
FILLER = "the a this film movie story plot is was and with of it one scene actor".split()
TELLING = [
    "awful boring dull bad clumsy tedious".split(),
    "great moving funny good brilliant warm".split(),
    "shares profit bank merger".split(),
    "software chip orbit browser".split(),
]  # by label


def write_tiny_model(folder: Path | str) -> None:
    """Save a random 2-layer DistilBERT with its tokenizer to `folder`: a masked-LM checkpoint, as the real one is."""
    import torch
    from transformers import DistilBertConfig, DistilBertForMaskedLM, DistilBertTokenizer

    letters = [prefix + letter for prefix in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,!?'-", *letters, *FILLER, *sum(TELLING, [])]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    DistilBertTokenizer(vocab=vocabulary, model_max_length=512).save_pretrained(folder)
    config = DistilBertConfig(vocab_size=len(vocabulary), n_layers=2, dim=16, n_heads=2, hidden_dim=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        DistilBertForMaskedLM(config).save_pretrained(folder)


def _rows(name: str, split: str, n: int, n_classes: int) -> dict[str, list[Any]]:
    """`n` made-up rows, the same each time; the words of `TELLING[label]` in each make the label learnable."""
    rng, texts = random.Random(f"{name}/{split}"), []
    labels = [i % n_classes for i in range(n)]
    if name in ("rotten_tomatoes", "imdb"):  # sorted by label on the hub: positives first, negatives first
        labels.sort(reverse=name == "rotten_tomatoes")
    for label in labels:
        words = rng.choices(FILLER, k=rng.randint(3, 60 if name == "imdb" else 15))
        words += rng.choices(TELLING[label], k=1 + len(words) // 5)
        rng.shuffle(words)
        texts.append(" ".join(words) + " .")
    if (name, split) in (("sst2", "test"), ("imdb", "unsupervised")):
        labels = [-1] * n
    return {"idx": list(range(n)), "sentence" if name == "sst2" else "text": texts, "label": labels}


def write_tiny_dataset(folder: Path | str, name: str, n: int) -> None:
    """Write `n` training rows (n // 4 in other splits) of `name`, a key of `DATASETS`, laid out as the real ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    _, data, classes, splits = DATASETS[name]
    names, types = classes.split(), {"idx": "int32"} if name == "sst2" else {}
    types |= {"sentence" if name == "sst2" else "text": "string", "label": "int64"}
    features: dict[str, Any] = {key: {"dtype": kind, "_type": "Value"} for key, kind in types.items()}
    features["label"] = {"names": names, "_type": "ClassLabel"}
    schema = pa.schema(types.items(), metadata={"huggingface": json.dumps({"info": {"features": features}})})
    sizes = {split: n if split == "train" else max(len(names), n // 4) for split in splits.split()}
    for split, size in sizes.items():
        path = Path(folder) / f"{data}{split}{'-00000-of-00001' if data else ''}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(_rows(name, split, size, len(names)), schema=schema), path)
    config = {"config_name": "plain_text" if name == "imdb" else "default"}
    kinds: dict[str, Any] = types | {"label": {"class_label": {"names": {str(i): c for i, c in enumerate(names)}}}}
    card: dict[str, Any] = {
        "dataset_info": config
        | {
            "features": [{"name": key, "dtype": kind} for key, kind in kinds.items()],
            "splits": [{"name": split, "num_bytes": 0, "num_examples": size} for split, size in sizes.items()],
        }
    }
    if data:  # rotten_tomatoes has no `configs`
        card["configs"] = [config | {"data_files": [{"split": key, "path": f"{data}{key}-*"} for key in sizes]}]
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in card.items())  # JSON is YAML
    (Path(folder) / "README.md").write_text(f"---\n{front}\n---\n# {name}, made up for tests\n")


def fill(root: Path | str, n: int = 64) -> None:
    """Write the tiny model and the four tiny datasets under `root`, where the hub serves them."""
    write_tiny_model(Path(root) / "models" / MODEL_ID)
    for name, (hub_id, *_) in DATASETS.items():
        write_tiny_dataset(Path(root) / "datasets" / hub_id, name, n)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A stand-in for the Hugging Face hub on loopback.")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fill", type=int, metavar="N", help="first write tiny contents with N training rows")
    args = parser.parse_args()
    if args.fill:
        fill(args.root, args.fill)
    with StandInHub(args.root, args.port) as running:
        print(running.url, flush=True)
        Event().wait()
