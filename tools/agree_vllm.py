"""Does vLLM read a checkpoint as Saccade does? Both answer the demo's questions about pictures, greedily, token by token.

    python tools/agree_vllm.py FOLDER [FOLDER ...] --vllm venvs/vllm/bin/python

FOLDER: the demo model, or what `saccade quantize demo FOLDER` wrote. vLLM sits in an environment of its own (docs/notes/peers.md says
how its CPU build gets there), as its pins exclude others'. Prompts, too, have to be equal: token ids are compared, pictures widened.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "{media}{question}<|im_end|>\n<|im_start|>assistant\n"
)
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
MAX_TOKENS = 48


def ours(folder: str, dtype: str) -> dict[str, Any]:
    from saccade import LLM, SamplingParams
    from saccade.demo import questions

    llm = LLM(folder, device="cpu", dtype=dtype)
    asked = [question for question in questions() if not question.videos and not question.options]
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, repetition_penalty=1.0)
    outputs = llm.chat([question.messages for question in asked], params)
    return {
        "questions": [question.question for question in asked],
        "images": [[str(path) for path in question.images] for question in asked],
        "prompts": [list(llm.prepare(question.messages).token_ids) for question in asked],
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "texts": [output.outputs[0].text for output in outputs],
    }


def theirs(folder: str, dtype: str, questions: list[str], images: list[list[str]]) -> dict[str, Any]:
    """In vLLM's environment."""
    import vllm
    from PIL import Image

    llm = vllm.LLM(
        folder,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=2,
        limit_mm_per_prompt={"image": 2, "video": 0},
        enforce_eager=True,
    )
    requests = []
    for question, paths in zip(questions, images, strict=True):
        prompt = TEMPLATE.format(media=PICTURE * len(paths), question=question)
        requests.append(
            {"prompt": prompt} | ({"multi_modal_data": {"image": [Image.open(p) for p in paths]}} if paths else {})
        )
    params = vllm.SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=MAX_TOKENS)
    outputs = llm.generate(requests, params, use_tqdm=False)
    return {
        "version": vllm.__version__,
        "prompts": [list(output.prompt_token_ids) for output in outputs],
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "texts": [output.outputs[0].text for output in outputs],
    }


def in_vllm(python: str, folder: str, dtype: str, found: dict[str, Any]) -> dict[str, Any]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    asked = json.dumps({"folder": folder, "dtype": dtype, "questions": found["questions"], "images": found["images"]})
    command = [python, __file__, "--inside"]
    done = subprocess.run(command, input=asked, env=environment, capture_output=True, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if "Error: " in line or "cannot implement" in line]
        raise RuntimeError("; ".join(line.removeprefix("[rank0]:").strip() for line in reasons) or done.stderr[-500:])
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--vllm", help="the interpreter of vLLM's environment")
    parser.add_argument("--dtype", default="float32", help="of both")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print("\n" + json.dumps(theirs(**json.load(sys.stdin))))
        return
    if not options.vllm or not options.folders:
        parser.error("name a folder, and vLLM's interpreter: --vllm venvs/vllm/bin/python")
    for folder in options.folders:
        found = ours(folder, options.dtype)
        try:
            other = in_vllm(options.vllm, str(Path(folder).resolve()), options.dtype, found)
        except RuntimeError as error:
            print(f"{folder}, {options.dtype}: vLLM does not run it: {error}", flush=True)
            continue
        prompts = sum(a == b for a, b in zip(found["prompts"], other["prompts"], strict=True))
        pairs = list(zip(found["answers"], other["answers"], strict=True))
        equal = sum(a == b for a, b in pairs)
        print(
            f"{folder}, {options.dtype}, vLLM {other['version']}: {prompts} of {len(pairs)} prompts and {equal} answers equal"
        )
        for text, their_text, (a, b) in zip(found["texts"], other["texts"], pairs, strict=True):
            if a != b:
                print(f"  {text!r}\n  {their_text!r} in vLLM")


if __name__ == "__main__":
    main()
