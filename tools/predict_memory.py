"""Peak memory of a prediction by number of rows: equal for 1,000 and 10,000, four questions a picture.

python tools/predict_memory.py --bundle checkpoint/torchscript.pt [--rows 1000 10000]

Each number of rows runs in a process of its own; the last line of the output is JSON, MiB by rows.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def write_questions(folder: Path, rows: int) -> Path:
    """Write ``rows`` questions, four on each of ``rows / 4`` pictures of noise."""
    generator = np.random.default_rng(0)
    lines = ["ID,img_path,Question,A,B,C,D"]
    for row in range(rows):
        name = f"{row // 4}.png"
        if row % 4 == 0:
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name)
        lines.append(f"{row},{name},Which of these words fits picture {row} best?,cat,dog,cow,owl")
    (folder / "test.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "test.csv"


def measure(bundle: Path, rows: int) -> float:
    """Predict in this process; return its peak memory in MiB."""
    from bridgeblip.inference import load_bundle, predict
    from bridgeblip.questions import read_questions
    from bridgeblip.submission import write_submission

    with tempfile.TemporaryDirectory() as folder:
        csv, out = write_questions(Path(folder), rows), Path(folder) / "submission.csv"
        questions = read_questions(csv, strict=False)
        write_submission(questions, predict(load_bundle(bundle), questions, out=out), None, out)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000])
    args = parser.parse_args()
    if len(args.rows) == 1:
        print(json.dumps({args.rows[0]: round(measure(args.bundle, args.rows[0]), 1)}))
        return
    peaks = {}
    for rows in args.rows:
        command = [sys.executable, __file__, "--bundle", str(args.bundle), "--rows", str(rows)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks |= json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
