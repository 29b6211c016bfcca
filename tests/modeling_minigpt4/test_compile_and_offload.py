"""Compiling, recomputing, and models that do not fit into memory."""

import pytest
import torch
from transformers import AutoModel, StaticCache


def inputs_for(processor, pictures):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "What?"}]}
    ]
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def test_the_decode_step_compiles_without_a_graph_break(model, processor, pictures):
    inputs = inputs_for(processor, pictures)
    length = inputs["input_ids"].shape[1]
    caches = [StaticCache(config=model.config.get_text_config(), max_cache_len=length + 4) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for cache in caches:
            logits = model(**inputs, past_key_values=cache).logits[:, -1:]
        token = logits.argmax(dim=-1)
        for position in range(length, length + 3):
            step = {"input_ids": token, "position_ids": torch.tensor([[position]])}
            expected = model(**step, past_key_values=caches[0]).logits
            received = compiled(**step, past_key_values=caches[1]).logits
            torch.testing.assert_close(received, expected, atol=1e-4, rtol=1e-4)
            token = expected.argmax(dim=-1)


def test_the_prefill_compiles_without_a_graph_break(model, processor, pictures):
    inputs = inputs_for(processor, pictures)
    torch._dynamo.reset()
    with torch.no_grad():
        received = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
        torch.testing.assert_close(received, model(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", ["enabled before training", "enabled while training"])
def test_gradient_checkpointing_recomputes_the_frozen_language_model(model, processor, pictures, order):
    model.freeze_backbones()
    inputs = inputs_for(processor, pictures)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    gradients, calls = [], []
    layer = next(
        module
        for module in model.model.language_model.modules()
        if "Layer" in type(module).__name__ or "Block" in type(module).__name__
    )
    hook = next(layer.children()).register_forward_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing and order == "enabled before training":
            model.eval()
            model.gradient_checkpointing_enable()
        model.train()
        if checkpointing and order == "enabled while training":
            model.gradient_checkpointing_enable()
        model.zero_grad()
        calls.clear()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append(model.model.multi_modal_projector.weight.grad.clone())
        assert not any(module.training for module in model.modules() if isinstance(module, torch.nn.Dropout))
    hook.remove()
    torch.testing.assert_close(gradients[0], gradients[1])
    model.gradient_checkpointing_disable()
    calls.clear()


@pytest.mark.parametrize("projection_only", [False, True])
def test_a_device_map_may_leave_the_language_model_on_disk(model, processor, pictures, tmp_path, projection_only):
    model.save_pretrained(tmp_path / "saved", projection_only=projection_only)
    inputs = inputs_for(processor, pictures)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    parts = ["vision_tower", "multi_modal_projector", *(["qformer", "query_tokens"] if model.model.qformer else [])]
    device_map = {f"model.{part}": "cpu" for part in parts} | {"model.language_model": "disk", "lm_head": "disk"}
    offloaded = AutoModel.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    layers = [weight for name, weight in offloaded.named_parameters() if "language_model" in name]
    assert all(weight.is_meta for weight in layers)
    assert torch.equal(offloaded.generate(**inputs, do_sample=False, max_new_tokens=5), expected)


@pytest.mark.parametrize("projection_only", [False, True])
def test_device_map_auto_places_every_part(model, processor, pictures, tmp_path, projection_only):
    model.save_pretrained(tmp_path, projection_only=projection_only)
    placed = AutoModel.from_pretrained(tmp_path, device_map="auto")
    assert not any(weight.is_meta for weight in placed.parameters())
    inputs = inputs_for(processor, pictures)
    assert torch.equal(placed(**inputs).logits, model(**inputs).logits)
