"""The Hugging Face hub: whether it can be reached, asked once, before its clients are imported; and uploads to it.

The clients retry for about 23 s a call and read HF_HUB_OFFLINE when they are imported; so the question is
settled first, in at most three seconds.
"""

import http.client
import os
import shlex
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path

from config import UserError, first_line

TIMEOUT_S = 3.0


def endpoint() -> str:
    """The hub's address, as its own clients read it."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def offline() -> bool:
    """Whether the hub's clients will answer from their local cache alone."""
    chosen = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return chosen.upper() in {"1", "ON", "YES", "TRUE"}


def go_offline_if_unreachable() -> None:
    """Set HF_HUB_OFFLINE=1 for the clients if the hub gives no answer, or a server error, within 3 s."""
    if not offline() and not answers(endpoint()):
        os.environ["HF_HUB_OFFLINE"] = "1"


def answers(url: str, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether `url` gives an HTTP answer that is no server error, looked up and received in `timeout_s`."""
    found = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=timeout_s).close()
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                return
        except (OSError, ValueError, http.client.HTTPException) as error:
            # The hub's clients trust certificates of their own: they shall decide.
            if not isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                return
        found.set()

    # A thread, because the time-out of a socket does not cover looking up the name.
    worker = threading.Thread(target=ask, daemon=True)
    worker.start()
    worker.join(timeout_s)
    return found.is_set()


def reason(error: Exception) -> str:
    """Why a model or a data set could not be loaded from the hub, in words."""
    if offline():
        return f"the hub ({endpoint()}) cannot be reached and it is not in the local cache"
    return first_line(error)


def check_upload(name: str) -> None:
    """Whether an upload to `name` can be tried: told before hours of training, not after. UserError if not."""
    if offline():
        raise UserError(f"--push_to_hub {name}: the hub ({endpoint()}) cannot be reached")
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub: {error}") from error
    if not get_token():
        raise UserError(f"--push_to_hub {name}: expected a login; run `hf auth login` or set HF_TOKEN")


def upload(folder: Path, name: str) -> None:
    """Upload a model folder, to a private repository where there is none of that name yet."""
    from huggingface_hub import HfApi

    try:
        repo = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="distilbert-sentiment")
    except Exception as error:  # of many kinds
        again = f"to try again: hf upload {name} {shlex.quote(str(folder))}"
        raise UserError(f"--push_to_hub {name}: {first_line(error)}; {again}") from error
    print(f"uploaded: {repo}")
