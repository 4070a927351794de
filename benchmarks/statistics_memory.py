"""Memory of collecting statistics of a LLaMA: all layers at once, and block by block.

    python -m benchmarks.statistics_memory

A random model of TinyLlama's widths in bfloat16, with few or many blocks. Each way runs in a process of its own. Its
peak is that of resident memory, minus the memory before the model was made. Next to it stands what follows from the
shapes: weights, moments, and activations. For LLaMA-2 7B there is only that. The table is written into
docs/mpo_core.md. The whole takes about 12 GB of temporary files.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from benchmarks.document import put_table
from benchmarks.measurement import THREADS, process_memory
from mpo_core import collect_statistics, next_token_losses

BATCHES, HELD_OUT = 4, 0.5
"""Both parts get two batches, so that all moments are in memory."""
GB = 1e9


class Sizes(NamedTuple):
    """Of a LLaMA whose head is a matrix of its own."""

    n_blocks: int
    width: int = 2048
    n_heads: int = 32
    key_value_width: int = 256
    d_ff: int = 5632
    vocabulary: int = 32_000

    @property
    def n_params(self) -> int:
        """All but those of norms."""
        per_block = 2 * self.width * (self.width + self.key_value_width) + 3 * self.width * self.d_ff
        return self.n_blocks * per_block + 2 * self.vocabulary * self.width

    @property
    def inputs(self) -> int:
        """Entries of the moments of a block's distinct inputs: of q, k, v; of the output; of gate and up; of down."""
        return 3 * self.width**2 + self.d_ff**2

    @property
    def gradients(self) -> int:
        """Entries of the moments of the gradients of a block's seven layers."""
        return 3 * self.width**2 + 2 * self.key_value_width**2 + 2 * self.d_ff**2

    def predicted(self, by_blocks: bool, tokens: int) -> float:
        """Bytes at the peak: weights, moments and activations for `tokens` tokens a batch.

        Moments are float32: those of both parts, and those of one batch's inputs. A token takes about 40 bytes for each
        of a block's width, and 30 for each of its feed-forward's, as long as the block's backward pass lasts and its
        samples are squared. The loss keeps the logits in bfloat16, and three times in float32.
        """
        moments = 4 * (2 * (self.inputs + self.gradients) + self.inputs)
        block = tokens * (40 * self.width + 30 * self.d_ff)
        loss = tokens * 14 * self.vocabulary
        if not by_blocks:
            return 2 * self.n_params + self.n_blocks * (moments + block) + loss
        # The first batch is checked with the inputs of all blocks in memory, but without moments.
        check = block + loss + tokens * 2 * self.width * self.n_blocks
        return 2 * self.n_params + max(moments + block, check)


SMALL, MEDIUM, LARGE = (Sizes(n_blocks) for n_blocks in (2, 4, 12))
LLAMA_7B = Sizes(32, 4096, 32, 4096, 11_008)


RUNS = ((SMALL, False, 64), (MEDIUM, False, 64), (SMALL, True, 64), (SMALL, True, 1024), (LARGE, True, 64))
"""Sizes, whether block by block, and tokens of a batch."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = []
    for run in RUNS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peak, seconds = pool.submit(measure, *run).result()
        lines.append(line("random", *run, f"{peak / GB:.2f}", f"{seconds:.0f}"))
        print(*lines[-1], sep=" | ", flush=True)
    lines += [line("LLaMA-2 7B", LLAMA_7B, by_blocks, 2048, "–", "–") for by_blocks in (False, True)]
    caption = (
        f"`python -m benchmarks.statistics_memory`: LLaMA in bfloat16, {BATCHES} batches, half of them held out, "
        "gradients of the loss; peak of resident memory above that before the model was made, and what follows from "
        f"the shapes; PyTorch {torch.__version__}, {THREADS} threads"
    )
    headings = ("model", "blocks", "parameters", "way", "tokens a batch", "weights GB", "predicted GB", "peak GB", "s")
    put_table("docs/mpo_core.md", "statistics_memory", caption, headings, lines)


def line(model: str, sizes: Sizes, by_blocks: bool, tokens: int, peak: str, seconds: str) -> list[str]:
    way = "block by block" if by_blocks else "all at once"
    row = [model, str(sizes.n_blocks), f"{sizes.n_params / 1e9:.2f} B", way, f"{tokens:,}"]
    numbers = (2 * sizes.n_params, sizes.predicted(by_blocks, tokens))
    return [*row, *(f"{number / GB:.2f}" for number in numbers), peak, seconds]


def measure(sizes: Sizes, by_blocks: bool, tokens: int) -> tuple[float, float]:
    """Peak bytes and seconds of one way."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(THREADS)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.d_ff,
        num_hidden_layers=sizes.n_blocks,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_heads * sizes.key_value_width // sizes.width,
        dtype=torch.bfloat16,
    )
    before = process_memory("VmRSS")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.02, generator=generator)
        else:
            parameter.data.fill_(1)
    batches = [torch.randint(sizes.vocabulary, (1, tokens), generator=generator) for _ in range(BATCHES)]
    names = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and "layers" in name]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        where = {"blocks": "model.layers", "folder": folder} if by_blocks else {}
        collect_statistics(model, batches, loss=next_token_losses, modules=names, held_out=HELD_OUT, **where)
    return process_memory("VmHWM") - before, time.perf_counter() - start


if __name__ == "__main__":
    main()
