# SPDX-License-Identifier: Apache-2.0
"""A tiny randomly initialised Qwen2 or Qwen3 with a byte-level ChatML tokenizer, as a Hugging Face folder.

It stands in for a pretrained model where only a CPU is at hand: every loader that reads a real checkpoint reads this
one. It knows nothing until `verl_gradalign.toy.warmup` has taught it the tasks.

    build_tiny_model("models/tiny")
    model = AutoModelForCausalLM.from_pretrained("models/tiny")
    tokenizer = AutoTokenizer.from_pretrained("models/tiny")
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer

END_OF_TURN = "<|im_end|>"
START_OF_TURN = "<|im_start|>"
PAD = "<|endoftext|>"
MAX_POSITIONS = 512
ROPE_THETA = 100.0  # prompts are some twenty tokens long; the usual 10,000 would leave most rotations unused
INITIALIZER_RANGE = 0.08
# One token each, as in the Qwen vocabularies: spelled out in bytes they would be half of every prompt.
ROLES = ("user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ARCHITECTURES = ("qwen2", "qwen3")


def build_tokenizer() -> Qwen2Tokenizer:
    """Return a tokenizer with one token per byte, three ChatML specials and two role names: 261 tokens.

    End of sequence is `<|im_end|>`, padding `<|endoftext|>`. The chat template adds no system message.
    """
    vocab = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token=PAD,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        extra_special_tokens=[START_OF_TURN],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(role, special=False, normalized=False) for role in ROLES])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny_model(
    path: str | Path,
    architecture: str = "qwen2",
    hidden_size: int = 128,
    num_layers: int = 3,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    intermediate_size: int = 384,
    tie_word_embeddings: bool = True,
    seed: int = 0,
) -> Path:
    """Write a randomly initialised model and its tokenizer to the folder `path`, and return the folder.

    The folder holds config, fp32 safetensors weights, generation config and tokenizer. No dropout anywhere; the
    vocabulary size equals the tokenizer's length, so that rollout and trainer normalise over the same logits. The
    weights depend on the arguments alone; the caller's random state is left as it was.

    Units: sizes are in features; positions are limited to MAX_POSITIONS tokens.
    Raises: ValueError for an unknown architecture or sizes that do not divide each other.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is unknown; choose one of {sorted(ARCHITECTURES)}")
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads}
    sizes |= {"num_key_value_heads": num_key_value_heads, "intermediate_size": intermediate_size}
    _check_sizes(sizes)
    tokenizer = build_tokenizer()
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_heads,  # Qwen3's default is 128 whatever the hidden size
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=tie_word_embeddings,
        attention_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        initializer_range=INITIALIZER_RANGE,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    folder = Path(path)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_untrained_policy(path: str | Path, seed: int = 0) -> Path:
    """Write the model that the demonstration and the miniatures start from: 230,000 parameters, quickly warmed up."""
    return build_tiny_model(path, hidden_size=96, num_layers=2, intermediate_size=256, seed=seed)


def _check_sizes(sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1; choose a positive size")
    hidden_size, num_heads, num_groups = (sizes[n] for n in ("hidden_size", "num_heads", "num_key_value_heads"))
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"num_heads={num_heads} does not cut hidden_size={hidden_size} into heads of one even size, which rotary "
            f"positions need; choose a hidden_size that is a multiple of {2 * num_heads}"
        )
    if num_heads % num_groups:
        raise ValueError(
            f"num_key_value_heads={num_groups} does not divide num_heads={num_heads}; choose a divisor of num_heads"
        )
