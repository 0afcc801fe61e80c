"""Two ways to answer, each timed in a process of its own, which ``bench.py`` starts.

    python experiments/contenders.py NAME FOLDER BEGAN

The time to the first answer counts imports, so each imports only what it needs, where it needs it.
"""

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class PeakMemory:
    """Most memory in use while the block runs, in GB, polled 50 times a second.

    ``own`` is this process's without mapped files, ``added`` what came to that within the block,
    ``resident`` all with the parts of mapped files that it has read; ``gpu`` is what all processes
    take of the GPU beyond what was taken before, None on a CPU.
    """

    def __init__(self, device: str = "cpu"):
        self.device, self.own, self.resident = device, 0.0, 0.0
        self.gpu = None if device == "cpu" else 0.0

    def __enter__(self):
        self._measure()
        self._own_before, self._before, self._done = self.own, self._taken(), threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def _taken(self) -> float:
        if self.gpu is None:
            return 0.0
        import torch

        free, total = torch.cuda.mem_get_info(self.device)
        return (total - free) / 1e9

    @property
    def added(self) -> float:
        return self.own - self._own_before

    def _measure(self) -> None:
        words = Path("/proc/self/status").read_text().split()
        own, resident = (int(words[words.index(f"{key}:") + 1]) for key in ("RssAnon", "VmRSS"))
        self.own = max(self.own, own * 1024 / 1e9)
        self.resident = max(self.resident, resident * 1024 / 1e9)

    def _poll(self) -> None:
        while not self._done.wait(0.02):
            self._measure()
            if self.gpu is not None:
                self.gpu = max(self.gpu, self._taken() - self._before)

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


def clock(run: Callable) -> float:
    """Seconds that ``run`` takes, to the end of its work on the GPU."""
    import torch

    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ceiling(device: str, dtype) -> float:
    """Operations a second of a large matrix product: what shares of a machine are shares of."""
    import torch

    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    return 2 * size**3 / statistics.median(clock(lambda: a @ b) for _ in range(3))


def plan_of(out: Path) -> SimpleNamespace:
    """What all processes of a benchmark have in common."""
    import torch

    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    return SimpleNamespace(**plan | {"dtype": getattr(torch, plan["dtype"])})


def questions_of(out: Path, name: str = "test.csv") -> list:
    from bridgeblip.data.questions import read_questions

    return read_questions(out / "work" / "questions" / name, need_answers=name == "train.csv")


def prompt_of(question) -> str:
    """The text that the model reads for a question."""
    from bridgeblip.bridge.processing import render_prompt

    return render_prompt(question.question, question.choices)


def hugging_face_processor(folder):
    """The base's own, with the Pillow image processor, which is the default only where torchvision
    is missing."""
    from transformers import InstructBlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    processor = InstructBlipProcessor.from_pretrained(folder)
    processor.image_processor = BlipImageProcessorPil.from_pretrained(folder)
    return processor


class Generating:
    """``InstructBlipForConditionalGeneration.generate`` as a competent user writes it: batched, by
    length, in the machine's number format."""

    def __init__(self, base, device: str, dtype, batch_size: int, sliced: bool = False):
        from transformers import InstructBlipForConditionalGeneration

        self.batch_size, self.device, self.dtype = batch_size, device, dtype
        self.processor = hugging_face_processor(base)
        model = InstructBlipForConditionalGeneration.from_pretrained(base, dtype=dtype).eval()
        self.parameters = sum(p.numel() for p in model.parameters())
        # transformers sizes the decoder's cache by the encoder's depth
        text = model.config.text_config
        cache = text.num_layers >= text.num_decoder_layers
        self.settings = {"max_new_tokens": 2, "use_cache": cache}
        self.model = (_keep_layers(model) if sliced else model).to(device)

    def inputs(self, questions: Sequence) -> dict:
        from PIL import Image

        pictures = [Image.open(question.image).convert("RGB") for question in questions]
        texts = [prompt_of(question) for question in questions]
        inputs = self.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        return inputs.to(self.device, self.dtype)

    def answer(self, questions: Sequence) -> None:
        lengths = [len(self.processor.tokenizer(prompt_of(q)).input_ids) for q in questions]
        rows = sorted(range(len(questions)), key=lambda row: -lengths[row])
        for start in range(0, len(rows), self.batch_size):
            asked = [questions[row] for row in rows[start : start + self.batch_size]]
            tokens = self.model.generate(**self.inputs(asked), **self.settings)
            self.processor.batch_decode(tokens, skip_special_tokens=True)

    def logits(self, questions: Sequence, letter_ids: list[int]):
        asked = self.settings | {"output_logits": True, "return_dict_in_generate": True}
        output = self.model.generate(**self.inputs(questions), **asked)
        return output.logits[0][:, letter_ids].float()


def _keep_layers(model):
    """Cut the decoder as a user does: fewer blocks, numbered anew for the cache."""
    from torch import nn

    from bridgeblip.bridge.settings import DEFAULT_DECODER_LAYERS

    decoder = model.language_model.decoder
    decoder.block = nn.ModuleList(decoder.block[index] for index in DEFAULT_DECODER_LAYERS)
    for index, block in enumerate(decoder.block):
        block.layer[0].SelfAttention.layer_idx = block.layer[1].EncDecAttention.layer_idx = index
    return model


def answerer(name: str, plan: SimpleNamespace, out: Path) -> Callable:
    """What answers questions: Hugging Face's own class, or the bundle; "bundle, orders" in every
    order those below the plan's margin."""
    if name.startswith("generate"):
        sliced = name.endswith("sliced")
        return Generating(plan.base, plan.device, plan.dtype, plan.batch_size, sliced).answer
    from bridgeblip.bundle.format import load_bundle
    from bridgeblip.bundle.predict import predict

    bundle = load_bundle(out / "work" / "torchscript.pt", plan.device)
    margin = plan.margin if name.endswith("orders") else 0
    return lambda rows: predict(bundle, rows, plan.batch_size, permute_below=margin)


def main(name: str, out: Path, began: float) -> dict:
    """Time the first question alone, loading and all, then all of them; on a GPU these the second
    time, when its kernels are loaded and chosen."""
    with PeakMemory() as peak:
        plan, questions = plan_of(out), questions_of(out)
        answer = answerer(name, plan, out)
        answer(questions[:1])
        first = time.time() - began
        for _ in range(1 if plan.device == "cpu" else 2):
            seconds = clock(lambda: answer(questions))
    return {
        "first answer, s": first,
        "seconds": seconds,
        "own memory, GB": peak.own,
        "with mapped files, GB": peak.resident,
        "operations a second": ceiling(plan.device, plan.dtype),
    }


if __name__ == "__main__":
    import torch

    with torch.inference_mode():
        print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))))
