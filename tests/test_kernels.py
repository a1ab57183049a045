"""The compiled kernels: made or done without, and against PyTorch's operations in their place."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from scipy import stats
from test_fast import adapted, batch, tiny

import device
import kernels
from fast import FastClassifier
from fused import FusedHead
from layers import Head, Layer
from tiles import FloatMatrix, gradient, matrix

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")


def library_in_a_new_process(tmp_path, monkeypatch, compiler: str) -> tuple[str, str]:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("DISTILBERT_SENTIMENT_CACHE", str(tmp_path))
    code = "import kernels; print(kernels.library() is None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_without_a_compiler_there_are_no_kernels_and_one_line_says_so(tmp_path, monkeypatch):
    found, said = library_in_a_new_process(tmp_path, monkeypatch, "no-such-compiler")
    assert found == "True" and len(said.splitlines()) == 1 and "no C++ compiler (no-such-compiler)" in said


def test_a_compiler_that_fails_is_one_line(tmp_path, monkeypatch):
    found, said = library_in_a_new_process(tmp_path, monkeypatch, "false")
    assert found == "True" and len(said.splitlines()) == 1 and not list(tmp_path.glob("*.so"))


@compiled
def test_a_damaged_library_is_made_again(tmp_path, monkeypatch):
    assert library_in_a_new_process(tmp_path, monkeypatch, "g++ -DNOTHING") == ("False", "")
    (library,) = tmp_path.iterdir()
    whole = library.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-4096] + bytes(4096), b""):
        library.write_bytes(damaged)
        assert library_in_a_new_process(tmp_path, monkeypatch, "g++ -DNOTHING") == ("False", "")
        assert len(library.read_bytes()) == len(whole)


@compiled
def test_what_the_compiler_found_wrong_is_said(tmp_path, monkeypatch):
    found, said = library_in_a_new_process(tmp_path, monkeypatch, "g++ -nostdinc")
    assert found == "True" and "error" in said and len(said.splitlines()) == 1


@compiled
def test_compiled_once_and_kept(tmp_path, monkeypatch):
    assert library_in_a_new_process(tmp_path, monkeypatch, "g++") == ("False", "")
    (library,) = tmp_path.iterdir()
    made = library.stat().st_mtime_ns
    assert library_in_a_new_process(tmp_path, monkeypatch, "g++")[0] == "False"
    assert library.stat().st_mtime_ns == made


@compiled
def test_random_bytes_are_uniform_and_unlike_for_other_seeds():
    draws = []
    for seed in (0, 1, 2**40, -(2**62)):
        found = torch.empty(1_000_000, dtype=torch.int8)
        limit = torch.empty(16, dtype=torch.int8)
        kernels.call("draw", torch.float32, torch.tensor(seed), len(found), found, len(limit), 0, 0, limit)
        draws.append(found.float())
        for part in (found, found[::4], found[3::4]):  # each byte of a word too
            assert stats.chisquare(torch.bincount(part.long() + 128, minlength=256).numpy()).pvalue > 1e-4
        for lag in (1, 2, 4, 384, 1536):  # neighbours in a row, the element below
            assert abs(torch.corrcoef(torch.stack([draws[-1][:-lag], draws[-1][lag:]]))[0, 1]) < 0.005
    assert (torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))).abs().max() < 0.005


@compiled
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_that_of_the_layers_in_pytorch(monkeypatch, lora, precision):
    """Dropout included: both read the same random bytes."""
    model = tiny(0.2, dim=32)  # as wide as a panel is with AVX512: else products are PyTorch's
    model = adapted(model, 0.2) if lora else model
    other, (ids, lengths, labels) = copy.deepcopy(model), batch()
    found = []
    for one in (model, other):
        fast = FastClassifier(one, precision)
        assert type(fast.head) is (FusedHead if one is model else Head)
        torch.manual_seed(1)
        loss = F.cross_entropy(fast(ids, lengths), labels)
        loss.backward()
        fast.arena.widen()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}))
        # the second model in PyTorch, but with the kernel's random bytes
        monkeypatch.setattr("fast.FusedLayer", Layer)
        monkeypatch.setattr("fast.FusedHead", Head)
    (loss, grads), (expected, reference) = found
    if precision == "fp32":
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for name in reference:
            torch.testing.assert_close(grads[name], reference[name], rtol=1e-4, atol=1e-5, msg=name)
    else:  # 8 bits of mantissa, rounded in other places, in a net of random weights: much alike as a whole
        assert loss.item() == pytest.approx(expected.item(), rel=0.05)
        both = [torch.cat([part[name].flatten() for name in reference]) for part in (grads, reference)]
        assert F.cosine_similarity(*both, dim=0) > 0.97


def test_caches_tell_processors_apart(monkeypatch):
    """Embeddings and prefixes are kept by what computed them: tile registers and vectors round differently."""
    monkeypatch.setattr(kernels, "library", lambda: {"any": None})
    seen = set()
    for tiles, amx in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(kernels, "tiles", lambda tiles=tiles: tiles)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_bf16": amx, "avx512_bf16": True})
        seen.add(device.arithmetic(torch.device("cpu"), "bf16"))
    assert len(seen) == 3


@compiled
@pytest.mark.parametrize("threads", [1, 2, 7, 40])
def test_fp32_products_are_the_library_s(threads: int):
    """For few rows, several blocks of rows, more than one stretch of the inner dimension, and threads to spare."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        unit = kernels.panel()
        sizes = [(1, 64, 96), (5, 64, 32), (45, 416, 64), (45, 25 * unit, 5 * unit), (210, 800, 96), (950, 64, 160)]
        for n, width, out in sizes:
            x, w, dy = torch.randn(n, width + 32)[:, :width], torch.randn(out, width), torch.randn(n, out)
            own = matrix(w)
            assert type(own) is FloatMatrix
            for found, expected in [
                (own.forward(x), x.double() @ w.double().t()),
                (own.backward(dy), dy.double() @ w.double()),
                (own.backward(dy, 32), (dy.double() @ w.double())[:, 32:]),
                (gradient(dy, x), dy.double().t() @ x.double()),
            ]:
                torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    finally:
        torch.set_num_threads(before)
