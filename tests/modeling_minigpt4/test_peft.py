"""LoRA on the language model, with the projection trained beside it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from tests.recipes import build, question


LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": r".*language_model.*\.(q_proj|v_proj|c_attn)",
    "modules_to_save": ["multi_modal_projector"],
    "task_type": "CAUSAL_LM",
}


@pytest.fixture
def inputs(processor, pictures):
    prompt = processor.apply_chat_template(question("What?"), add_generation_prompt=True)
    batch = processor(images=pictures[0], text=prompt, add_special_tokens=False, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, -100)
    return {**batch, "labels": labels}


@pytest.mark.parametrize("projection_only", [False, True])
def test_lora_and_projection_are_trained_saved_loaded_and_merged(backbones, recipe, inputs, tmp_path, projection_only):
    base = build(backbones, recipe)
    base.save_pretrained(tmp_path / "base", projection_only=projection_only)
    base = AutoModel.from_pretrained(tmp_path / "base")
    base.freeze_backbones()
    before = base(**inputs).loss.item()
    model = get_peft_model(base, LoraConfig(**LORA))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or "multi_modal_projector.modules_to_save" in name for name in trained)
    assert any("lora_" in name for name in trained)
    assert any("multi_modal_projector" in name for name in trained)

    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=1e-2)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    model.eval()
    after = model(**inputs)
    assert after.loss.item() < before
    model.save_pretrained(tmp_path / "adapter")

    again = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(again(**inputs).logits, after.logits)
    generated = again.generate(
        **{name: value for name, value in inputs.items() if name != "labels"}, do_sample=False, max_new_tokens=4
    )
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, after.logits, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    opened = AutoModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(opened(**inputs).logits, after.logits, atol=1e-4, rtol=1e-4)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
