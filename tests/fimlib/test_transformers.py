"""Models of transformers and adapters of peft, with random weights; skipped where they are missing.

Both are installed by hand: ``.venv/bin/python -m pip install transformers peft``.
"""

import pytest
import torch

from fimlib import Categorical, accumulate, estimate
from fimlib.families import Positions

transformers = pytest.importorskip("transformers")

WORDS, LENGTH = 50, 6
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=8
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        **SMALL,
        num_hidden_layers=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
    )
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=WORDS, **SMALL, num_hidden_layers=2, max_position_embeddings=8, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(
        **SMALL, num_hidden_layers=2, image_size=8, patch_size=4, num_channels=1, num_labels=3
    )
    return transformers.ViTForImageClassification(config)


def t5():
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def lora():
    peft = pytest.importorskip("peft")
    adapted = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
    model = peft.get_peft_model(gpt2(), adapted)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # 0 at first
            torch.nn.init.normal_(parameter)
    return model


def with_hooks():
    """Of accelerate, on every module, and of transformers, on the table of an adapted model."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = lora()
    model.enable_input_require_grads()
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook("cpu", io_same_device=True))
    for module in [m for m in model.modules() if not list(m.children())]:
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"))
    return model


def text():
    ids = torch.randint(1, WORDS, (4, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[1, 5:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def words(model, batch):
    return model(**batch).logits * batch["attention_mask"][..., None]


def logits(model, batch):
    return model(**batch).logits


TEXTS = Positions(Categorical(), WORDS)
CASES = {
    "GPT-2": (gpt2, text, TEXTS, words),
    "Llama": (llama, text, TEXTS, words),
    "BERT": (bert, text, Categorical(), logits),
    "ViT": (vit, lambda: {"pixel_values": torch.randn(4, 1, 8, 8)}, Categorical(), logits),
    "T5": (t5, lambda: {**text(), "decoder_input_ids": torch.ones(4, 3).long()}, TEXTS, logits),
    "LoRA": (lora, text, TEXTS, words),
    "LoRA with hooks": (with_hooks, text, TEXTS, words),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft
@pytest.mark.parametrize("name", CASES)
def test_estimates_agree_with_the_exact_information(name):
    torch.manual_seed(0)
    make, batch, family, forward = CASES[name]
    model, data = make().eval(), [batch()]  # float32: some round to it on the way
    layers = "trainable" if "LoRA" in name else None
    joint = accumulate(model, data, family, forward=forward, layers=layers, quantities=["V1"])
    found = estimate(model, data, family, forward=forward, layers=layers, passes=100)
    assert found.value.keys() == joint.fisher_information().keys()
    for layer, total in joint.layer_sums(joint.fisher_information()).items():
        one = found.layers[layer]
        assert abs(one.total - float(total)) <= 5 * one.standard_error + 1e-12
    if layers:
        assert all("lora" in parameter for parameter in found.value)
