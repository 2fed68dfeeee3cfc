"""GGUF files of a random checkpoint for benchmarks/cpu.py, by llama.cpp's own converter and quantizer.

    python convert_llama_cpp.py write  models 3b llama_cpp_python-0.3.36/vendor/llama.cpp   torch, transformers, sentencepiece
    python convert_llama_cpp.py shrink models 3b                                            llama-cpp-python

The first runs convert_hf_to_gguf.py out of llama.cpp's sources, the second calls llama_model_quantize. The converter knows a
tokenizer by a hash of what it makes of a text; the stand-in's is not among those it knows, so it is told that it splits text as
Qwen2's does, which is so.
"""

from __future__ import annotations

import argparse
import ctypes
import runpy
import sys
from pathlib import Path

QUANTIZED = ("Q4_0", "Q4_K_M", "Q8_0")
TOWERS = ("bf16", "q8_0")


def write(models: Path, preset: str, source: Path) -> None:
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    checkpoint = models / f"random-{preset}"
    wanted = [(["--outtype", "bf16"], models / f"random-{preset}-bf16.gguf")]
    wanted += [(["--mmproj", "--outtype", kind], models / f"random-{preset}-mmproj-{kind}.gguf") for kind in TOWERS]
    for arguments, file in wanted:
        sys.argv = ["convert_hf_to_gguf.py", str(checkpoint), *arguments, "--outfile", str(file)]
        runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


def shrink(models: Path, preset: str) -> None:
    import llama_cpp

    for name in QUANTIZED:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        files = (str(models / f"random-{preset}-{kind}.gguf").encode() for kind in ("bf16", name))
        status = llama_cpp.llama_model_quantize(*files, ctypes.byref(params))
        assert status == 0, f"llama_model_quantize answered {status} for {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["write", "shrink"])
    parser.add_argument("models", type=Path)
    parser.add_argument("preset")
    parser.add_argument("source", type=Path, nargs="?", help="llama.cpp's sources, for write")
    options = parser.parse_args()
    if options.step == "shrink":
        shrink(options.models, options.preset)
    elif options.source is None:
        parser.error("write needs llama.cpp's sources")
    else:
        write(options.models, options.preset, options.source)


if __name__ == "__main__":
    main()
