import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, VERB, launch, one_gpu_each
from torch import nn

from bridgeblip import InputError
from bridgeblip.__main__ import main
from bridgeblip.bridge.export import restore
from bridgeblip.bundle import predict as inference
from bridgeblip.bundle.format import Bundle, load_bundle
from bridgeblip.bundle.predict import predict
from bridgeblip.data.questions import cyclic_orders, read_questions
from bridgeblip.embedded.digits import write_competition
from bridgeblip.evidence.answers import (
    choose_permutation_margin,
    kept_folder,
    letters_of,
    margins,
)
from bridgeblip.files import file_digest

KILLS = int(os.environ.get("BRIDGEBLIP_KILLS", 2))  # more of them for a long check
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}  # the same sums in every process


@pytest.fixture(scope="module")
def bundle_path(checkpoint):
    return checkpoint / "torchscript.pt"


@pytest.fixture(scope="module")
def bundle(bundle_path):
    return load_bundle(bundle_path)


@pytest.fixture(scope="module")
def asked(competition):
    return read_questions(competition / "test.csv")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The official layout: 852 rows on 213 pictures, each stored under four names."""
    folder = tmp_path_factory.mktemp("official") / "competition"
    write_competition(folder, folder.parent / "answers.csv", {"train": 1, "test": 213})
    return folder


class Watched(nn.Module):
    """The bundle's own model, with a record of what it is asked."""

    def __init__(self, bundle, memory=10**9):
        super().__init__()
        self.real, self.memory, self.encoded, self.scored = bundle.model, memory, [], []
        self.bundle = replace(bundle, model=self)

    def _allocate(self, rows):
        if rows > self.memory:
            torch.empty(2**60, dtype=torch.uint8)  # the allocator refuses in its own words

    def encode_image(self, pixels):
        self._allocate(len(pixels))
        self.encoded.append(len(pixels))
        return self.real.encode_image(pixels)

    def score(self, embeds, **texts):
        self._allocate(len(embeds))
        self.scored.append(tuple(texts["input_ids"].shape))
        return self.real.score(embeds, **texts)


def test_no_memory_for_the_file_is_not_called_damage(bundle_path, monkeypatch):
    def refuse(*args, **kwargs):
        torch.empty(2**60, dtype=torch.uint8)  # the allocator refuses in its own words

    monkeypatch.setattr(torch.jit, "load", refuse)
    with pytest.raises(
        InputError, match=r"no memory on cpu for .*torchscript\.pt, 0\.\d GB: restart this"
    ):
        load_bundle(bundle_path)


def test_answers_as_the_trained_model_does(bundle, bundle_path, asked):
    trained = restore(bundle_path.with_name("weights-0.pt")).model
    expected = predict(
        Bundle(trained, bundle.processor, {}, torch.device("cpu")), asked
    ).probabilities
    answers = predict(bundle, asked)
    assert (
        letters_of(answers.probabilities) == letters_of(expected)
        and len(set(letters_of(expected))) > 1
    )
    np.testing.assert_allclose(answers.probabilities, expected, atol=1e-4)
    np.testing.assert_allclose(answers.probabilities.sum(1), 1, atol=1e-5)
    assert not any(answers.flags) and not any(answers.problems)


def test_official_layout_is_encoded_once_a_picture_in_any_order_and_batch(bundle, official):
    rows = read_questions(official / "test.csv")
    assert len(rows) == 852 and len({q.image for q in rows}) == 852
    watched = Watched(bundle)
    expected = predict(watched.bundle, rows, batch_size=64).probabilities
    assert sum(watched.encoded) == 213 and max(watched.encoded) <= inference.PICTURES_A_WINDOW
    np.testing.assert_allclose(
        predict(bundle, rows, batch_size=1).probabilities, expected, atol=1e-4
    )
    shuffled = random.Random(0).sample(range(852), 852)
    again = predict(bundle, [rows[i] for i in shuffled], batch_size=7).probabilities
    assert letters_of(again) == [letters_of(expected)[i] for i in shuffled]
    np.testing.assert_allclose(again, expected[shuffled], atol=1e-4)


def test_long_prompts_come_in_smaller_batches(bundle, asked, monkeypatch):
    rows = [
        replace(asked[0], id=str(i), question="digit " * (1 if i % 2 else 80)) for i in range(20)
    ]
    monkeypatch.setattr(inference, "TOKENS_A_BATCH", 400)
    watched = Watched(bundle)
    predict(watched.bundle, rows, batch_size=8)
    assert all(size == 1 or size * length <= 400 for size, length in watched.scored)
    assert sum(size for size, _ in watched.scored) == 20 and {
        size for size, _ in watched.scored
    } >= {3, 8}


@pytest.mark.filterwarnings("ignore:no memory for")
def test_batches_that_do_not_fit_are_halved(bundle, asked):
    watched = Watched(bundle, memory=2)
    with pytest.warns(UserWarning, match="no memory for 20 rows at a time, halving"):
        answers = predict(watched.bundle, asked)
    assert sum(watched.encoded) == 5 and max(watched.encoded) <= 2
    assert max(size for size, _ in watched.scored) == 2
    np.testing.assert_allclose(
        answers.probabilities, predict(bundle, asked).probabilities, atol=1e-5
    )
    with pytest.raises(RuntimeError, match="allocate memory"):
        predict(Watched(bundle, memory=0).bundle, asked[:1])


def test_missing_choices_get_no_probability(bundle, asked):
    rows = [replace(q, choices=(*q.choices[:3], "")) for q in asked[:3]]
    rows += [replace(asked[0], choices=("", "one", "", "")), replace(asked[0], choices=("",) * 4)]
    answers = predict(bundle, rows, permute_below=2)
    assert (answers.probabilities[:3, 3] == 0).all() and (answers.probabilities[4] > 0).all()
    assert answers.probabilities[3].tolist() == [0, 1, 0, 0]
    assert answers.flags[3:] == [[], []]  # one choice, or none, has no other order
    np.testing.assert_allclose(answers.probabilities.sum(1), 1, atol=1e-5)


def test_blank_images_do_not_look(bundle, asked):
    answers = predict(bundle, asked, blank_images=True)
    assert not np.allclose(answers.probabilities, predict(bundle, asked).probabilities, atol=1e-3)
    assert all(flags == ["blank"] for flags in answers.flags) and not any(answers.problems)
    unseen = predict(bundle, [replace(asked[3], image=None)])
    np.testing.assert_allclose(unseen.probabilities[0], answers.probabilities[3], atol=1e-5)


def test_unsure_rows_are_averaged_over_the_orders_of_their_choices(bundle, asked):
    rows = [*asked[:7], replace(asked[7], choices=(asked[7].choices[0], "", *asked[7].choices[2:]))]
    single = predict(bundle, rows, permute_below=0)
    watched = Watched(bundle)
    every = predict(watched.bundle, rows, permute_below=2)
    assert sum(watched.encoded) == 2 and sum(size for size, _ in watched.scored) == 4 * 7 + 3
    for row, (question, averaged) in enumerate(zip(rows, every.probabilities, strict=True)):
        views = []
        for order in cyclic_orders(question.choices):
            (seen,) = predict(bundle, [question.reordered(order)], permute_below=0).probabilities
            views.append(
                {question.choices[order.get(place, place)]: p for place, p in enumerate(seen)}
            )
        mean = [np.mean([view[choice] for view in views]) for choice in question.choices]
        np.testing.assert_allclose(averaged, mean, atol=1e-5)
        first = {max(view, key=view.get) for view in views}
        assert every.flags[row] == (["permuted", "order"] if len(first) > 1 else ["permuted"])
    assert any("order" in flags for flags in every.flags)
    half = float(np.median(margins(single.probabilities)))
    some = predict(replace(bundle, manifest={"trained": {"permute_below": half}}), rows)
    asked_again = margins(single.probabilities) < half
    assert [
        bool(flags) for flags in some.flags
    ] == asked_again.tolist() and 0 < asked_again.sum() < 8
    np.testing.assert_allclose(
        some.probabilities[asked_again], every.probabilities[asked_again], atol=1e-5
    )
    np.testing.assert_allclose(
        some.probabilities[~asked_again], single.probabilities[~asked_again], atol=1e-5
    )


def test_permutation_margin_is_chosen_only_where_it_pays():
    def rows(margin, winner, count):
        table = np.full((count, 4), (1 - margin) / 4)
        table[:, winner] += margin
        return table

    answers = np.zeros(40, dtype=int)
    single = np.concatenate([rows(0.1, 1, 8), rows(0.3, 0, 12), rows(0.8, 0, 20)])
    averaged = np.concatenate([rows(0.1, 0, 8), rows(0.3, 0, 12), rows(0.8, 1, 20)])
    threshold = choose_permutation_margin(single, averaged, answers)
    assert 0.1 < threshold < 0.3 and (margins(single) < threshold).sum() == 8
    assert choose_permutation_margin(single, single, answers) is None
    assert choose_permutation_margin(averaged[8:], single[8:], answers[8:]) > 0.8  # it pays for all
    assert (
        choose_permutation_margin(single[5:], averaged[5:], answers[5:]) is None
    )  # three rows: that may be luck


def test_numbers_that_are_none_are_refused(bundle, asked):
    class Broken(Watched):
        def score(self, embeds, **texts):
            return super().score(embeds, **texts) * float("nan")

    with pytest.raises(
        InputError, match=r"gives .* no finite number: export it as bfloat16 or float32"
    ):
        predict(Broken(bundle).bundle, asked)


def test_finished_windows_are_not_answered_again(bundle, asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inference, "PICTURES_A_WINDOW", 1)
    expected = predict(bundle, asked, permute_below=0.2)
    out = tmp_path / "submission.csv"
    predict(bundle, asked, permute_below=0.2, out=out)
    kept = sorted(kept_folder(out).iterdir())
    assert len(kept) == 5 and "going on" not in capsys.readouterr().out
    kept[1].unlink()
    kept[2].write_text(kept[2].read_text()[:100])
    watched = Watched(bundle)
    again = predict(watched.bundle, asked, permute_below=0.2, out=out)
    printed = capsys.readouterr().out
    assert (
        sum(watched.encoded) == 2
        and "passing over 1 windows" in printed
        and "3 of 5 windows" in printed
    )
    assert (again.probabilities == expected.probabilities).all() and again.flags == expected.flags
    for settings in (
        {"permute_below": 0},
        {"batch_size": 4},
    ):  # the windows now belong to other settings
        watched = Watched(bundle)
        predict(watched.bundle, asked, **settings, out=out)
        assert sum(watched.encoded) == 5 and "passing over 5 windows" in capsys.readouterr().out
    watched = Watched(replace(bundle, fingerprint="another"))
    predict(watched.bundle, asked, batch_size=4, out=out)
    assert sum(watched.encoded) == 5


@pytest.mark.parametrize(
    "damage",
    ["missing", "weights only", "torn", "text", "flipped", "other hash", "foreign", "newer", "no manifest",
     "other processor", "other prompt"],
)  # fmt: skip
def test_unusable_bundles_are_one_clear_error(bundle, bundle_path, tmp_path, damage):
    path = tmp_path / "torchscript.pt"
    content = bundle_path.read_bytes()
    middle = len(content) // 2
    changes = {
        "newer": {"format": 99},
        "other processor": {"processor": "another"},
        "other prompt": {"prompt": "?"},
    }
    if damage == "weights only":
        (tmp_path / "weights-0.pt").write_bytes(b"")
    elif damage == "other hash":
        path.write_bytes(content)
        path.with_name("torchscript.pt.sha256").write_text(f"{'0' * 64}  torchscript.pt\n")
    elif damage in ("torn", "text", "flipped"):
        with zipfile.ZipFile(
            bundle_path
        ) as archive:  # a bit of a tensor: between the files there is only padding
            tensors = [part for part in archive.infolist() if "/data/" in part.filename]
            tensor = archive.read(max(tensors, key=lambda part: part.file_size))
        place = content.index(tensor) + len(tensor) // 2
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        path.write_bytes({"torn": content[:middle], "text": b"hello", "flipped": flipped}[damage])
    elif damage != "missing":
        manifest = json.dumps(bundle.manifest | changes.get(damage, {}))
        files = bundle.processor.files | {
            "manifest.json": "{}" if damage == "no manifest" else manifest
        }
        torch.jit.save(bundle.model, str(path), _extra_files={} if damage == "foreign" else files)
    messages = {
        "missing": "train.ipynb first", "weights only": "torchscript.ipynb first", "newer": "update bridgeblip",
        "torn": "no whole TorchScript", "text": "no whole TorchScript", "flipped": "is damaged",
        "other hash": r"not the SHA-256 that .*torchscript\.pt\.sha256 names", "foreign": "no "
                                                                                          "bridgeblip bundle",
        "no manifest": "no readable "
                       "manifest", "other processor": "processor inside", "other prompt": "prompt '\\?'",
    }  # fmt: skip
    with pytest.raises(InputError, match=rf"torchscript\.pt.*{messages[damage]}") as caught:
        load_bundle(path)
    assert "\n" not in str(caught.value)


def test_a_bundle_with_its_hash_beside_it_loads(bundle_path, tmp_path):
    path = tmp_path / "torchscript.pt"
    path.write_bytes(bundle_path.read_bytes())
    path.with_name("torchscript.pt.sha256").write_text(f"{file_digest(path)}  torchscript.pt\n")
    assert load_bundle(path).fingerprint == load_bundle(bundle_path).fingerprint != ""


def test_the_command_refuses_other_ids_early_and_tells_of_problems(
    bundle_path, competition, tmp_path, capsys
):
    table = pd.read_csv(competition / "test.csv", dtype=str).head(4)
    (tmp_path / "a.png").write_bytes((competition / table["img_path"][0]).read_bytes())
    table["img_path"] = ["a.png", "lost.png", "a.png", "a.png"]
    table.to_csv(tmp_path / "test.csv", index=False)
    arguments = [
        "predict",
        "--csv",
        str(tmp_path / "test.csv"),
        "--out",
        str(tmp_path / "submission.csv"),
    ]
    (tmp_path / "sample_submission.csv").write_text("ID,answer\nTEST_0000,-\n")
    (tmp_path / "empty.pt").touch()
    assert main([*arguments, "--model", str(tmp_path / "empty.pt")]) == 2  # never opened
    assert "differ in 3 IDs, one is 'TEST_0001'" in capsys.readouterr().err
    (tmp_path / "sample_submission.csv").unlink()
    assert main([*arguments, "--model", str(bundle_path)]) == 3
    printed = capsys.readouterr().out
    assert "the submission gets the columns ID and answer" in printed and "4 answers" in printed
    assert "1 rows could not be answered as they stand" in printed and printed.endswith(
        "line 3 (ID TEST_0001): picture lost.png not found\n"
    )
    assert len(pd.read_csv(tmp_path / "submission.csv")) == 4
    assert main([*arguments, "--model", str(bundle_path), "--allow-problems"]) == 0


def command(bundle_path, official, out):
    return ["predict", "--model", str(bundle_path), "--csv", str(official / "test.csv"), "--out", str(out),
            "--permute-below", "0.05"]  # fmt: skip


def written(out):
    return out.read_bytes(), out.with_name("probabilities.csv").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(bundle_path, official, tmp_path_factory):
    """The command in a process that can import none of the training libraries, beside nothing but
    the bundle."""
    alone = tmp_path_factory.mktemp("alone")
    (alone / "torchscript.pt").write_bytes(bundle_path.read_bytes())
    out = alone / "submission.csv"
    script = f"""
        import sys
        for name in ("transformers", "peft", "accelerate", "sklearn", "scipy", "matplotlib", "huggingface_hub"):
            sys.modules[name] = None
        sys.path.insert(0, {str(ROOT)!r})
        from bridgeblip.__main__ import main
        sys.exit(main({command(alone / "torchscript.pt", official, out)!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=alone, env=ALONE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "852 answers" in done.stdout and not kept_folder(out).exists()
    return out


def test_needs_neither_transformers_nor_peft(uninterrupted, bundle_path, official):
    trained = restore(bundle_path.with_name("weights-0.pt")).model
    eager = Bundle(trained, load_bundle(bundle_path).processor, {}, torch.device("cpu"))
    expected = predict(eager, read_questions(official / "test.csv"), permute_below=0.05)
    assert list(pd.read_csv(uninterrupted)["answer"]) == letters_of(expected.probabilities)


def test_killed_at_any_moment_and_run_again_gives_the_same_files(
    uninterrupted, bundle_path, official, tmp_path
):
    out = tmp_path / "submission.csv"
    arguments = [sys.executable, "-m", "bridgeblip", *command(bundle_path, official, out)]
    generator = random.Random(time.time_ns())
    for _ in range(KILLS):
        before = len(list(kept_folder(out).glob("*.json")))
        if before > 4:  # of 7: nothing would be left to interrupt
            shutil.rmtree(kept_folder(out))
            before = 0
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=ALONE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while len(list(kept_folder(out).glob("*.json"))) <= before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(generator.random() / 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():  # too late
            assert written(out) == written(uninterrupted)
            out.unlink()
    kept = list(kept_folder(out).glob("*.json"))
    done = subprocess.run(
        arguments, cwd=ROOT, env=ALONE, capture_output=True, text=True, check=True
    )
    assert ("going on after an interruption" in done.stdout) == bool(kept)
    assert written(out) == written(uninterrupted) and not kept_folder(out).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="other batches round otherwise there")
def test_two_processes_share_the_rows(uninterrupted, bundle_path, official, tmp_path):
    out = tmp_path / "submission.csv"
    # what ``accelerate launch`` runs on a machine with several GPUs; on CPUs alone it would start
    # one process
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    done = subprocess.run(
        [*launch, "-m", "bridgeblip", *command(bundle_path, official, out)],
        cwd=ROOT, env=ALONE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("852 answers") == 1
    assert written(out) == written(uninterrupted)


@one_gpu_each
def test_two_processes_evaluate(bundle_path, competition, tmp_path):
    """Answers are gathered twice, with the pictures and without."""
    pytest.importorskip("ipykernel")
    csv, page = competition / "train.csv", tmp_path / "report.html"
    printed = ""
    for process in launch(VERB, "evaluate", "--model", bundle_path, "--csv", csv, "--out", page):
        code, output = process.end()
        assert code == 0, output
        printed += output
    assert page.is_file() and printed.count("wrote") == 1


def test_large_tensors_get_large_pages():
    """Of a tensor of 64 MiB that is written to, not every 4 KiB is a page fault."""
    script = """
        import bridgeblip, resource, torch
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(2**26, dtype=torch.uint8).fill_(1)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not pages.is_file() or "[madvise]" not in pages.read_text():
        pytest.skip("this system gives large pages to all, or to none")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True
    )
    assert int(done.stdout) < 2**26 / 2**12 / 2, done
