"""The file: follows its inputs, is replaced whole or not at all, and says what is wrong with it."""

import json
import os
import random
import shutil
import signal
import time
import zipfile
from contextlib import suppress

import pytest
import torch
from conftest import VERB, Script, make_bundle, store_weights
from torch import nn

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.bridge.export import INPUTS, export_bundle
from bridgeblip.bundle import export as writing
from bridgeblip.bundle import format as bundle_format
from bridgeblip.bundle.export import save_traced
from bridgeblip.bundle.format import as_traced, load_bundle, read_header
from bridgeblip.bundle.trace import constants_of, graphs, trace
from bridgeblip.files import file_digest, is_out_of_memory
from bridgeblip.machine import process_rank
from bridgeblip.training.weights import load_weights, save_best, save_weights, stale_bundle


@pytest.fixture(scope="module")
def made(checkpoint):
    return checkpoint / "torchscript.pt"


@pytest.fixture
def pair(made, tmp_path):
    """A copy of a bundle and its SHA-256."""
    shutil.copy(made, tmp_path)
    shutil.copy(bundle_format.digest_path(made), tmp_path)
    return tmp_path / made.name


def test_no_device_and_no_tensor_constant_and_it_runs_where_its_inputs_are(made, batch):
    loaded = torch.jit.load(str(made), map_location="meta")
    for kind in ("DeviceObjType", "TensorType"):
        assert not [node for graph in graphs(loaded) for node in constants_of(graph, kind)]
    assert not any(graph.findAllNodes("aten::_convolution") for graph in graphs(loaded))
    with as_traced():
        logits = loaded(**{name: batch[name].to("meta") for name in INPUTS})
    assert logits.shape == (6, 4) and logits.device.type == "meta"


def test_numbers_on_the_host_change_no_bit(base, processor, batch, monkeypatch, tmp_path):
    """The same model, its trace cleaned and not."""
    inputs = {name: batch[name] for name in INPUTS}
    logits = []
    for clean in (True, False):
        if not clean:
            monkeypatch.setattr("bridgeblip.bundle.trace.free_numbers", lambda graph: None)
        (tmp_path / str(clean)).mkdir()
        bundle = load_bundle(make_bundle(base, processor, tmp_path / str(clean)))
        count = sum(len(constants_of(graph, "TensorType")) for graph in graphs(bundle.model))
        assert bool(count) != clean
        with as_traced():
            logits.append(bundle.model(**inputs))
    assert torch.equal(*logits)


class WithArray(nn.Module):
    def encode_image(self, pixel_values):
        return pixel_values + torch.tensor([1.0, 2.0])

    def score(self, image_embeds, input_ids):
        return image_embeds * input_ids

    def forward(self, pixel_values, input_ids):
        return self.score(self.encode_image(pixel_values), input_ids)


def test_an_array_in_a_trace_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2,\).*make it a buffer"):
        trace(WithArray(), {"pixel_values": torch.ones(3, 2), "input_ids": torch.ones(3, 2)})


@pytest.mark.parametrize(
    "words",
    ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: out of memory",
     "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
     "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This",
     "DefaultCPUAllocator: can't allocate memory: you tried to"],
)  # fmt: skip
def test_all_words_for_out_of_memory(words):
    assert is_out_of_memory(RuntimeError(words))
    assert is_out_of_memory(torch.OutOfMemoryError()) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_the_digest_is_remembered_until_the_file_changes(pair, monkeypatch):
    load_bundle(pair)
    monkeypatch.setattr(bundle_format, "SHA256", "raise SystemExit('read again')")
    assert load_bundle(pair).manifest["kind"] == "instructblip"  # nothing was read again
    content, stat = bytearray(pair.read_bytes()), pair.stat()
    content[len(content) // 2] ^= 1
    pair.write_bytes(content)
    os.utime(pair, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert pair.stat().st_mtime_ns == stat.st_mtime_ns  # and it is noticed all the same
    with pytest.raises(InputError, match="has not the SHA-256"):
        load_bundle(pair)


def test_a_large_bundle_that_crawls_here_says_so_when_it_is_loaded(pair, monkeypatch, recwarn):
    monkeypatch.setattr(bundle_format, "slow_format", lambda device, dtype: f"{device} crawls")
    load_bundle(pair)
    assert not [warning for warning in recwarn if "crawls" in str(warning.message)]  # it is small
    monkeypatch.setattr(bundle_format, "LARGE", 1000)
    with pytest.warns(match="cpu crawls, answering may take hours: take another machine"):
        load_bundle(pair)


def test_a_damaged_file_is_named_though_loading_fails_first(pair):
    pair.write_bytes(pair.read_bytes()[:-1000])
    with pytest.raises(InputError, match="has not the SHA-256 that") as caught:
        load_bundle(pair)
    assert "whole TorchScript" in str(caught.value.__cause__)


def test_a_home_that_can_not_be_written_is_no_obstacle(pair, monkeypatch):
    monkeypatch.setattr(bundle_format, "cache_folder", lambda: pair / "no folder")
    load_bundle(pair)


@pytest.mark.parametrize("form", ["capitals", "UTF-16", "UTF-16 without mark", "bare", "table"])
def test_a_digest_in_other_tools_forms_is_read(pair, form):
    digest = file_digest(pair)
    text = f"{digest}  torchscript.pt\n"
    content = {
        "capitals": text.upper().encode(),
        "UTF-16": text.encode("utf-16"),
        "UTF-16 without mark": text.encode("utf-16-be"),
        "bare": digest.encode(),
        "table": f"Algorithm Hash\r\nSHA256    {digest.upper()}  C:\\a\r\n".encode("utf-8-sig"),
    }
    bundle_format.digest_path(pair).write_bytes(content[form])
    load_bundle(pair)
    last, other = digest[-1], "1" if digest[-1] == "0" else "0"
    wrong = content[form]
    for digit in (last, last.upper()):
        wrong = wrong.replace(digit.encode(), other.encode())
    bundle_format.digest_path(pair).write_bytes(wrong)
    with pytest.raises(InputError, match="has not the SHA-256"):
        load_bundle(pair)
    bundle_format.digest_path(pair).write_bytes(content[form][: len(content[form]) // 3])
    with pytest.raises(InputError, match="holds no SHA-256"):
        load_bundle(pair)


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "null", '"text"', "{", {"format": "1"}, {"kind": "another"}, {"kind": 3},
     {"letters": None}, {"dtype": "float7"}, {"dtype": []}, {"trained": None}, {"config": "x"},
     {"trained": {"permute_below": "much"}}, {"prompt": 5}, {"letter_ids": "71"}],
)  # fmt: skip
def test_malformed_manifests_are_one_line(pair, manifest):
    with zipfile.ZipFile(pair) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    (place,) = (name for name in names if name.endswith("manifest.json"))
    if isinstance(manifest, dict):
        manifest = json.dumps(json.loads(names[place]) | manifest)
    with zipfile.ZipFile(pair, "w") as archive:
        for name, content in (names | {place: manifest.encode()}).items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match=r"manifest|of the kind") as caught:
        read_header(pair)
    assert "\n" not in str(caught.value)


def test_a_bundle_made_before_there_were_kinds_loads(made, tmp_path):
    header = read_header(made)
    assert header.manifest["kind"] == "instructblip"
    files = header.processor.files | {
        "manifest.json": json.dumps({k: v for k, v in header.manifest.items() if k != "kind"})
    }
    old = tmp_path / "old.pt"
    torch.jit.save(load_bundle(made).model, str(old), _extra_files=files)
    assert load_bundle(old).manifest["kind"] == "instructblip"


# ---------------------------------------------------------------- writing


def test_the_pipe_writes_what_torch_writes(made, tmp_path):
    model = load_bundle(made).model
    save_traced(model, tmp_path / "piped.pt", {"a.json": "{}"})
    (tmp_path / "bundle").mkdir()
    torch.jit.save(model, str(tmp_path / "bundle.pt"), _extra_files={"a.json": "{}"})
    with (
        zipfile.ZipFile(tmp_path / "piped.pt") as ours,
        zipfile.ZipFile(tmp_path / "bundle.pt") as theirs,
    ):
        assert [(p.filename, p.CRC) for p in ours.infolist()] == [
            (p.filename, p.CRC) for p in theirs.infolist()
        ]


LIMITED = """
import resource, signal, sys
from bridgeblip.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_fills_is_one_line_and_nothing_is_lost(pair, made):
    before = {path.name: path.read_bytes() for path in pair.parent.iterdir()}
    size = pair.stat().st_size
    export = ["export", "--weights", made.with_name("weights-0.pt"), "--out", pair]
    for share in (0, 0.6):
        code, printed = Script(LIMITED, int(share * size), *export).end()
        last = printed.strip().splitlines()[-1]
        assert code == 2 and last.startswith("error: "), (share, printed)
        assert "Traceback" not in printed and "terminate" not in printed
        assert {path.name: path.read_bytes() for path in pair.parent.iterdir()} == before


def test_too_little_space_is_said_before_writing(made, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"0\.0 GB free, the bundle takes 0\.0 GB: free some"):
        save_traced(load_bundle(made).model, tmp_path / "torchscript.pt", {})
    assert not list(tmp_path.iterdir())


def test_killed_at_any_moment_a_whole_pair_is_there(pair, made, base, processor, tmp_path):
    """Every moment at which the pair is touched: just before and just after each renaming."""
    kills = """
import os, signal, sys
moment, replace, count = int(sys.argv.pop(1)), os.replace, 0
def watched(source, target):
    global count
    for _ in range(2):
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        if count % 2 == 0:
            replace(source, target)
        count += 1
os.replace = watched
from bridgeblip.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    weights = store_weights(tmp_path / "other" / "weights-0.pt", base, processor)
    found = set()
    old = file_digest(pair)
    for moment in range(7):
        shutil.copy(made, pair)
        shutil.copy(bundle_format.digest_path(made), bundle_format.digest_path(pair))
        export = ["export", "--weights", weights, "--out", pair]
        env = {"BRIDGEBLIP_CACHE": str(tmp_path / "cache")}
        code, _ = Script(kills, moment, *export, env=env).end()
        found.add((code, file_digest(pair) == old))
        load_bundle(pair)
        assert file_digest(pair) in bundle_format.read_digests(pair)
    assert {(-signal.SIGKILL, True), (-signal.SIGKILL, False)} <= found


def test_ctrl_c_in_an_export_is_one_line(pair, made):
    before = {path.name: path.read_bytes() for path in pair.parent.iterdir()}
    export = ["export", "--weights", made.with_name("weights-0.pt"), "--out", pair]
    for _ in range(int(os.environ.get("BRIDGEBLIP_KILLS", 1))):
        process = Script(VERB, *export)
        process.wait_for(lambda p=process: "exporting" in p.output())
        time.sleep(random.uniform(0, 2))
        with suppress(ProcessLookupError):  # it may have ended
            process.send(signal.SIGINT)
        code, printed = process.end()
        assert code in (0, 130) and "Traceback" not in printed, printed
        names = {path.name for path in pair.parent.iterdir()}
        assert names == set(before) and load_bundle(pair)


# ---------------------------------------------------------------- the weights beside it


def test_a_bundle_of_other_weights_than_the_best_beside_it_is_named(made, tmp_path, capsys):
    shutil.copy(made.with_name("weights-0.pt"), tmp_path)
    path, _ = export_bundle(tmp_path / "weights-0.pt", tmp_path / "torchscript.pt")
    trained = read_header(path).manifest["trained"]
    assert stale_bundle(path, trained) == ""
    assert stale_bundle(tmp_path / "alone" / "torchscript.pt", trained) == ""
    loaded = load_weights(tmp_path / "weights-0.pt")
    tensors = {name: tensor + 1 for name, tensor in loaded.tensors.items()}
    save_weights(tmp_path / "weights-1.pt", tensors, loaded.manifest)
    save_best(tmp_path, [0.5, 0.6], [1.0, 1.0])
    assert "was not made from" in stale_bundle(path, trained)
    assert "was not made from" in stale_bundle(path, {"file": "weights-0.pt"})  # made before
    save_best(tmp_path, [0.7, 0.6], [1.0, 1.0])
    assert stale_bundle(path, trained) == "" == stale_bundle(path, {"file": "weights-0.pt"})
    save_weights(tmp_path / "weights-0.pt", tensors, loaded.manifest)  # trained again
    assert "export again" in stale_bundle(path, trained)


def test_what_the_weights_remember_travels_with_the_file(made, tmp_path):
    loaded = load_weights(made.with_name("weights-0.pt"))
    manifest = loaded.manifest | {"pictures": ["0123456789abcdef"]}
    save_weights(tmp_path / "weights-0.pt", loaded.tensors, manifest)
    path, _ = export_bundle(tmp_path / "weights-0.pt", tmp_path / "torchscript.pt")
    trained = read_header(path).manifest["trained"]
    assert trained["pictures"] == ["0123456789abcdef"]
    assert trained["sha256"] == file_digest(tmp_path / "weights-0.pt")


# ---------------------------------------------------------------- other processes


@pytest.mark.parametrize(
    "rank, world, own",
    [("x", "2", "0"), ("2", "2", "0"), ("1", None, None), ("-1", "3", "0"), ("0", "0", "0"),
     ("0", "1", "x"), (None, None, "0"), ("0", "2", None)],
)  # fmt: skip
def test_a_process_that_can_not_be_is_refused(monkeypatch, rank, world, own):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", own)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="unset them"):
        process_rank()


@pytest.mark.parametrize("place", [{}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}])
def test_processes_that_do_not_come_are_not_waited_for_after_the_work(
    made, competition, tmp_path, place
):
    script = """
from datetime import timedelta
from bridgeblip.bundle import predict
predict.PATIENCE = timedelta(seconds=2)
"""
    answer = ["predict", "--model", made, "--csv", competition / "test.csv"]
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"} | place
    process = Script(script + VERB, *answer, "--out", tmp_path / "submission.csv", env=env)
    code, printed = process.end(100)
    assert code == 2 and "unset WORLD_SIZE and RANK" in printed, printed
    assert "Traceback" not in printed and not list(tmp_path.iterdir())


def test_more_choices_than_letters_are_refused_before_the_work(made, competition, tmp_path, capsys):
    text = (competition / "test.csv").read_text(encoding="utf-8-sig").splitlines()
    rows = [text[0] + ",E", *(line + "," for line in text[1:3]), text[3] + ",more"]
    shutil.copytree(competition, tmp_path / "data")
    (tmp_path / "data" / "test.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "data" / "sample_submission.csv").unlink()
    out = tmp_path / "submission.csv"
    code = main(["predict", "--model", str(made), "--csv", str(tmp_path / "data" / "test.csv"), "--out",
                 str(out)])  # fmt: skip
    captured = capsys.readouterr()
    assert code == 2 and "answers only with A, B, C, D" in captured.err and not out.exists()
