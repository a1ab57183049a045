"""Whether the hub answers: asked of servers on loopback that answer, fail, hang and talk nonsense."""

import contextlib
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import standin_hub
from conftest import command

import hub
import tracker_process

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@contextlib.contextmanager
def http_server(status: int, headers: dict[str, str] | None = None):
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_HEAD  # urllib follows a redirected HEAD with a GET

        def log_message(self, *_):
            pass

    asked: list[str] = []
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def raw_server(answer: bytes | None):
    """Accepts a connection and sends `answer`; None: never says anything."""
    listening = socket.create_server(("127.0.0.1", 0))
    held = []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                held.append(connection)
                if answer is not None:
                    connection.recv(4096)
                    connection.sendall(answer)
                    connection.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()
        for connection in held:
            connection.close()


def refusing_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("status", "reached"),
    [
        (200, True),
        (204, True),
        (401, True),
        (404, True),
        (405, True),
        (429, True),
        (500, False),
        (502, False),
        (503, False),
    ],
)
def test_any_answer_but_a_server_error_counts(status, reached):
    with http_server(status) as (url, asked):
        assert hub.answers(url) is reached
    assert asked in ([""], ["/"])


def test_a_certificate_that_only_the_clients_trust_is_an_answer(monkeypatch):
    """They bring certificates of their own; Python's may be missing."""
    refused = urllib.error.URLError(ssl.SSLCertVerificationError("unable to get local issuer certificate"))

    def urlopen(*_, **__):
        raise refused

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert hub.answers("https://huggingface.co") and tracker_process._unreachable("https://api.wandb.ai") is None
    refused.reason = ssl.SSLError("wrong version number")
    assert not hub.answers("https://huggingface.co") and tracker_process._unreachable("https://api.wandb.ai")


def test_a_redirect_is_followed():
    with http_server(200) as (url, asked):
        with http_server(307, {"Location": f"{url}/there"}) as (first, _):
            assert hub.answers(first)
        assert asked == ["/there"]
        with http_server(307, {"Location": refusing_url()}) as (first, _):
            assert not hub.answers(first)


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\xff\xfe\0\0" * 999])
def test_what_is_no_http_does_not_count(answer):
    with raw_server(answer) as url:
        assert not hub.answers(url)


@pytest.mark.parametrize(
    "url", ["", "nonsense", "http://", "http://[", "http://127.0.0.1:99999", "gopher://x", "http://a b/"]
)
def test_a_bad_address_does_not_count(url):
    assert not hub.answers(url)


def test_a_server_that_hangs_is_given_up_in_time():
    with raw_server(None) as url:
        start = time.perf_counter()
        assert not hub.answers(url, timeout_s=0.3)
        assert 0.25 < time.perf_counter() - start < 1
    assert hub.TIMEOUT_S < 5


def test_a_name_look_up_that_hangs_is_given_up_in_time(monkeypatch):
    released = threading.Event()

    def look_up(*_args, **_kwargs):
        released.wait(10)
        raise OSError("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    start = time.perf_counter()
    assert not hub.answers("http://hub.invalid", timeout_s=0.3)
    assert time.perf_counter() - start < 1
    released.set()


@pytest.mark.parametrize(("status", "offline"), [(200, False), (503, True)])
def test_go_offline_if_unreachable(status, offline, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    with http_server(status) as (url, asked):
        monkeypatch.setenv("HF_ENDPOINT", url + "/")
        hub.go_offline_if_unreachable()
    assert len(asked) == 1 and hub.offline() is offline
    assert os.environ["HF_HUB_OFFLINE"] == ("1" if offline else "0")


@pytest.mark.parametrize(
    ("name", "value"),
    [("HF_HUB_OFFLINE", "1"), ("HF_HUB_OFFLINE", "true"), ("HF_HUB_OFFLINE", "on"), ("TRANSFORMERS_OFFLINE", "yes")],
)
def test_who_asked_for_offline_is_not_asked_about_the_hub(name, value, monkeypatch):
    for other in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with http_server(200) as (url, asked):
        monkeypatch.setenv("HF_ENDPOINT", url)
        hub.go_offline_if_unreachable()
    assert asked == [] and hub.offline()


def test_the_endpoint_is_the_clients_own(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hub.endpoint() == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror/hf/")
    assert hub.endpoint() == "http://mirror/hf"


LOGIN = {"HF_TOKEN": "hf_secret"}


@pytest.fixture
def pushing(tmp_path, tiny_model, tiny_data):
    """pushing(*words, **env) runs main against a stand-in hub; pushing.hub is that hub."""
    with standin_hub.StandInHub(tmp_path / "hub") as running:
        (tmp_path / "hub").mkdir()

        def call(*words: str, **env: str):
            env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": running.url, "HF_HOME": str(tmp_path / "home"), **env}
            where = ("--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"))
            return command(*words, *where, "--epochs", "1", "--output_dir", str(tmp_path / "runs"), **env)

        call.hub = running
        yield call


def test_a_model_is_pushed_to_the_hub(pushing, tmp_path):
    done = pushing("--finetune", "--push_to_hub", "me/mine", **LOGIN)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    pushed = {path.name: path.read_bytes() for path in (tmp_path / "hub/models/me/mine").iterdir()}
    assert pushed == {path.name: path.read_bytes() for path in (run / "model").iterdir()} | {
        name: content for name, content in pushed.items() if name == ".gitattributes"
    }
    assert "model.safetensors" in pushed and "README.md" in pushed
    assert [asked["visibility"] for asked in pushing.hub.created] == ["private"]
    assert not any(b"hf_secret" in path.read_bytes() for path in run.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("env", "name", "reason"),
    [
        ({}, "me/mine", "expected a login"),
        (LOGIN, "a/b/c", "--push_to_hub"),
        ({**LOGIN, "HF_HUB_OFFLINE": "1"}, "me/mine", "cannot be reached"),
    ],
)
def test_a_push_that_cannot_work_is_told_before_training(pushing, tmp_path, env, name, reason):
    done = pushing("--finetune", "--push_to_hub", name, **env)
    assert done.returncode == 2 and reason in done.stderr and not (tmp_path / "runs").exists()
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_push_that_fails_leaves_the_run_whole(pushing, tmp_path):
    pushing.hub.root.joinpath("models", "me").mkdir(parents=True)
    pushing.hub.root.joinpath("models", "me", "mine").write_text("no folder")  # the commit cannot be written
    done = pushing("--finetune", "--push_to_hub", "me/mine", **LOGIN)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "result.json").exists() and f"hf upload me/mine {run / 'model'}" in done.stderr.splitlines()[-1]
    assert not (run / "checkpoints").exists() and f"run folder: {run}" in done.stdout  # it is finished
    pushing.hub.root.joinpath("models", "me", "mine").unlink()
    again = command("--resume", str(run), HF_HUB_OFFLINE="0", HF_ENDPOINT=pushing.hub.url, **LOGIN)
    assert again.returncode == 0 and again.stdout.endswith("/me/mine\n"), again.stderr
