"""Small transformers models of real shapes, randomly initialised and offline; shared by the tests of models and of adapters."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

IDS = torch.arange(3, 27).view(2, 12)


def t5(seed=0, **changes):
    """t5-small's dimensions, with 2 of its 6 layers and a vocabulary of 4096, so that a test takes a second."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 4096, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 2, "num_heads": 8}
    config = T5Config(**(sizes | changes), dropout_rate=0.0, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def llama(seed=0, dtype=torch.float32, **changes):
    """Two layers with grouped queries (4 heads on 2 keys) and biases."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    config = LlamaConfig(**(sizes | heads | {"initializer_range": 0.1, "pad_token_id": 0} | changes))
    # As from_pretrained(dtype=...) makes it: model.to(dtype) would also round the rotary frequencies.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero, which would hide a lost one
                p.normal_(0, 0.1)
    return model


def relative_error(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()
