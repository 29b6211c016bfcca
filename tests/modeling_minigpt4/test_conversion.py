"""The conversion of original checkpoints: other sizes and sources, what it refuses, what it leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import (
    AutoModel,
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from modeling_minigpt4.convert_minigpt4_original_to_hf import ConversionArguments, convert
from tests.recipes import ORIGINAL, original_files


# BLIP-2 comes with a language model; this is as little of one as fills a shard.
NO_TEXT = OPTConfig(
    hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=9000
)
MODULE = "modeling_minigpt4.convert_minigpt4_original_to_hf"


def as_original(blip2: Blip2ForConditionalGeneration) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of a BLIP-2 in transformers' format as the two files of the release hold them."""
    renamed_in_vision = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "layer_norm": "norm",
        "self_attn.projection": "attn.proj",
        "self_attn.qkv": "attn.qkv",
    }
    vision, qformer = {}, {"t5_proj.bias": torch.zeros(3), "query_tokens": blip2.query_tokens.data}
    for name, weight in blip2.vision_model.state_dict().items():
        if name.startswith("post_layernorm"):
            qformer[name.replace("post_layernorm", "ln_vision")] = weight
        for new, old in renamed_in_vision.items():
            name = name.replace(new, old)
        if name.endswith("qkv.bias"):
            query, _, value = weight.chunk(3)
            vision[name.replace("qkv.bias", "q_bias")], vision[name.replace("qkv.bias", "v_bias")] = query, value
        elif not name.startswith("post_norm"):
            vision[name] = weight
    vision.pop("post_layernorm.weight", None)
    vision.pop("post_layernorm.bias", None)
    for name, weight in blip2.qformer.state_dict().items():
        old = name.replace("attention.attention", "attention.self")
        old = f"embeddings.LayerNorm{name.removeprefix('layernorm')}" if name.startswith("layernorm") else old
        qformer[f"Qformer.bert.{old}"] = weight
    return vision, qformer


@pytest.fixture(scope="module")
def blip2():
    """A random BLIP-2, of other sizes than the files in `fixtures`."""
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=176,
            intermediate_size=200,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=40,
            patch_size=8,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=192,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=224,
            encoder_hidden_size=176,
            cross_attention_frequency=3,
            vocab_size=8,
            initializer_range=0.2,
        ).to_dict(),
        text_config=NO_TEXT.to_dict(),
        num_query_tokens=5,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        for layer in model.vision_model.encoder.layers:
            layer.self_attn.qkv.bias[176:352] = 0  # the original's keys have no bias
        model.query_tokens.normal_()
    return model


@pytest.fixture
def files(blip2, tmp_path):
    """Arguments for files of other sizes: a Q-Former of three layers, a square of five patches."""
    vision, qformer = as_original(blip2)
    torch.save(vision, tmp_path / "vit.pth")
    torch.save({"model": qformer}, tmp_path / "qformer.pth")
    projection = {"llama_proj.weight": torch.randn(32, 192), "llama_proj.bias": torch.randn(32)}
    torch.save({"model": projection, "epoch": 3}, tmp_path / "checkpoint.pth")
    return {
        "checkpoint": str(tmp_path / "checkpoint.pth"),
        "language_model": str(ORIGINAL / "llm"),
        "prompt_style": "vicuna-v0",
        "vision_encoder": str(tmp_path / "vit.pth"),
        "qformer": str(tmp_path / "qformer.pth"),
        "output": str(tmp_path / "converted"),
        "dtype": "float32",
    }


@pytest.fixture
def language_model(tmp_path):
    """A copy of the language model, to be changed."""
    return Path(shutil.copytree(ORIGINAL / "llm", tmp_path / "llm", copy_function=shutil.copyfile))


def edit(path, change):
    """Changes the tensors in a file of the release."""
    content = torch.load(path, weights_only=True)
    change(content.get("model", content))
    torch.save(content, path)


def features_of(blip2, size):
    """What BLIP-2 itself gives for a picture of noise, with its position embeddings interpolated where needed."""
    picture = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        blip2.vision_model.post_layernorm.eps = 1e-5  # the original's
        patches = blip2.vision_model(picture, interpolate_pos_encoding=True).last_hidden_state
        queries = blip2.query_tokens.expand(2, -1, -1)
        return picture, blip2.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state


@pytest.mark.parametrize("size", [None, 56])
@pytest.mark.parametrize("source", ["files", "blip2", "files, projection only", "blip2, projection only"])
def test_sizes_are_read_off_the_tensors(blip2, files, source, size, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_CACHE", str(tmp_path / "cache"))
    if source.startswith("blip2"):
        blip2.save_pretrained(tmp_path / "blip2", max_shard_size="500KB")
        files = files | {"vision_encoder": None, "qformer": None, "blip2": str(tmp_path / "blip2")}
        unneeded = {shard for name, shard in shards(tmp_path / "blip2").items() if name.startswith("language_model")}
        needed = {shard for name, shard in shards(tmp_path / "blip2").items() if not name.startswith("language_model")}
        for shard in unneeded - needed:
            (tmp_path / "blip2" / shard).unlink()
        assert unneeded - needed
    convert(ConversionArguments(**files, image_size=size, projection_only="only" in source))
    model, processor = AutoModel.from_pretrained(files["output"]), AutoProcessor.from_pretrained(files["output"])
    picture, expected = features_of(blip2, size or 40)
    features = model.get_image_features(picture).last_hidden_state
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    assert processor.image_processor.size["height"] == (size or 40)
    assert processor.num_image_tokens == model.config.image_seq_length == 5


def shards(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]


def test_without_qformer_the_merge_size_follows_from_the_projection(blip2, files):
    projection = {"llama_proj.weight": torch.randn(32, 5 * 176), "llama_proj.bias": torch.randn(32)}
    torch.save({"model": projection}, files["checkpoint"])
    convert(ConversionArguments(**files | {"qformer": None, "prompt_style": "llama-2"}))
    model = AutoModel.from_pretrained(files["output"])
    assert (model.config.token_merge_size, model.config.image_seq_length) == (5, 5)
    picture = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        patches = blip2.vision_model.encoder(blip2.vision_model.embeddings(picture)).last_hidden_state[:, 1:]
    normed = torch.nn.functional.layer_norm(patches, (176,), eps=1e-5)
    features = model.get_image_features(picture).last_hidden_state
    torch.testing.assert_close(features, normed.reshape(1, 5, 5 * 176), atol=1e-4, rtol=1e-4)


def test_the_last_block_of_the_whole_vit_g_is_left_out(monkeypatch, files):
    """The published file holds a block more than BLIP-2 reads. Its width gives it away."""
    monkeypatch.setattr("modeling_minigpt4.original_minigpt4._VIT_G_WIDTH", 176)
    monkeypatch.setattr("modeling_minigpt4.original_minigpt4._VIT_G_BLOCKS", 2)
    convert(ConversionArguments(**files))
    assert AutoModel.from_pretrained(files["output"]).config.vision_config.num_hidden_layers == 1


def test_a_file_in_the_format_before_torch_1_6_is_opened(files):
    content = torch.load(files["vision_encoder"], weights_only=True)
    torch.save(content, files["vision_encoder"], _use_new_zipfile_serialization=False)
    convert(ConversionArguments(**files))


def test_every_tensor_that_does_not_fit_is_listed_and_nothing_is_written(files, tmp_path):
    edit(files["vision_encoder"], lambda weights: weights.pop("blocks.1.attn.v_bias"))
    edit(files["vision_encoder"], lambda weights: weights.update({"blocks.0.mlp.fc2.bias": torch.zeros(3)}))
    edit(files["qformer"], lambda weights: weights.pop("ln_vision.bias"))
    edit(files["qformer"], lambda weights: weights.update({"Qformer.bert.surprise": torch.zeros(1)}))
    edit(files["checkpoint"], lambda weights: weights.update({"llama_proj.extra": torch.zeros(1)}))
    with pytest.raises(ValueError, match="5 tensors do not fit") as error:
        convert(ConversionArguments(**files))
    for line in (
        "missing blocks.1.attn.v_bias",
        "blocks.0.mlp.fc2.bias has the shape (3,), expected (176,)",
        "missing ln_vision.bias",
        "unexpected Qformer.bert.surprise",
        "unexpected llama_proj.extra",
    ):
        assert line in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "qformer.pth", "vit.pth"]


@pytest.mark.parametrize("projection_only", [False, True])
def test_folders_in_transformers_format_are_checked_too(blip2, files, language_model, tmp_path, projection_only):
    blip2.save_pretrained(tmp_path / "blip2")
    weights = load_file(tmp_path / "blip2" / "model.safetensors")
    del weights["vision_model.encoder.layers.1.mlp.fc1.bias"]
    weights["qformer.layernorm.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "blip2" / "model.safetensors", metadata={"format": "pt"})
    weights = load_file(language_model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, language_model / "model.safetensors", metadata={"format": "pt"})
    sources = {"vision_encoder": None, "qformer": None, "blip2": str(tmp_path / "blip2")}
    files = files | sources | {"language_model": str(language_model)}
    with pytest.raises(ValueError, match="3 tensors do not fit") as error:
        convert(ConversionArguments(**files, projection_only=projection_only))
    for line in (
        "missing vision_model.encoder.layers.1.mlp.fc1.bias",
        "qformer.layernorm.bias has the shape (3,), expected (192,)",
        "missing model.norm.weight",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qformer": None}, "no multiple of the vision encoder's width 176; give --qformer"),
        ({"prompt_style": "native"}, "--prompt-style native"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"stage": 3}, "--stage 3"),
        ({"vision_encoder": None}, "either --vision-encoder"),
        ({"blip2": "somewhere"}, "either --vision-encoder"),
        ({"blip2": "somewhere", "vision_encoder": None}, "--blip2 and --qformer"),
        ({"image_size": 41}, "--image-size 41 is no multiple of the patch, 8"),
        ({"image_size": 0}, "--image-size 0 is no multiple"),
        ({"projection_only": True, "push_to_hub": "me/mine"}, "frozen parts that lie on this machine"),
        ({"checkpoint": str(ORIGINAL / "vicuna" / "eva_vit_g.pth")}, "no tensor `llama_proj.weight`"),
        ({"qformer": str(ORIGINAL / "vicuna" / "blip2_pretrained_flant5xxl.pth")}, "gives 176"),
        ({"checkpoint": str(ORIGINAL / "llama2" / "checkpoint.pth")}, "leave out --qformer if the model has none"),
        ({"checkpoint": str(ORIGINAL / "vicuna" / "expected.json")}, "cannot be opened"),
    ],
)
def test_what_cannot_be_converted_is_refused(files, change, message):
    with pytest.raises(ValueError, match=message):
        convert(ConversionArguments(**files | change))
    assert not os.path.exists(files["output"])


def test_a_grid_that_cannot_be_merged_is_refused(files):
    projection = {"llama_proj.weight": torch.randn(32, 4 * 176), "llama_proj.bias": torch.randn(32)}
    torch.save({"model": projection}, files["checkpoint"])
    with pytest.raises(ValueError, match="5x5 patches cannot be merged by 4"):
        convert(ConversionArguments(**files | {"qformer": None}))


def test_a_tensor_without_its_dimensions_is_refused(files):
    edit(files["checkpoint"], lambda weights: weights.update({"llama_proj.weight": torch.zeros(32)}))
    with pytest.raises(ValueError, match=r"llama_proj.weight has the shape \(32,\), expected 2 dimensions"):
        convert(ConversionArguments(**files))


def test_buffers_that_the_originals_trainer_saved_are_left_out(files, capsys):
    buffers = {
        "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "llama_model.base_model.model.model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "Qformer.bert.embeddings.position_ids": torch.arange(9)[None],
    }
    edit(files["checkpoint"], lambda weights: weights.update(buffers))
    convert(ConversionArguments(**files))
    assert "inv_freq" in capsys.readouterr().out


@pytest.mark.parametrize("legacy", [None, False])
def test_the_originals_tokens_do_not_depend_on_what_the_folder_says(files, language_model, legacy):
    path = language_model / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["legacy"]
    path.write_text(json.dumps(settings | ({} if legacy is None else {"legacy": legacy})), encoding="utf-8")
    convert(ConversionArguments(**files | {"language_model": str(language_model)}))
    processor = AutoProcessor.from_pretrained(files["output"])
    text = processor.tokenizer.bos_token + "###Human: <Img>"
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert ids[0] == processor.tokenizer.bos_token_id
    assert ids[1:] == SentencePieceProcessor(model_file=str(language_model / "tokenizer.model")).encode(
        "###Human: <Img>"
    )


def test_a_sentencepiece_model_that_transformers_reads_differently_is_refused(files, language_model):
    texts = ["Describe this image in detail.", "Take a look at this image.", "a cat and a dog", "What is in it?"] * 9
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(language_model / "tokenizer"),
        model_type="unigram",
        vocab_size=60,
        byte_fallback=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"its SentencePiece model .* which the original used"):
        convert(ConversionArguments(**files | {"language_model": str(language_model)}))


def test_the_language_models_own_generation_settings_are_not_kept(files, language_model):
    settings = {"max_length": 4096, "top_k": 7, "temperature": 0.6}
    (language_model / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    convert(ConversionArguments(**files | {"language_model": str(language_model)}))
    generation = AutoModel.from_pretrained(files["output"]).generation_config.to_diff_dict()
    assert "max_length" not in generation
    assert "top_k" not in generation


def test_a_missing_file_is_named(files):
    with pytest.raises(OSError, match=r"There is no file .*nowhere\.pth"):
        convert(ConversionArguments(**files | {"qformer": "nowhere.pth"}))


def test_a_pickle_with_code_in_it_is_refused(files):
    class Surprise:
        def __reduce__(self):
            return os.mkdir, ("surprise",)

    torch.save({"model": Surprise()}, files["checkpoint"])
    with pytest.raises(ValueError, match="cannot be opened"):
        convert(ConversionArguments(**files))
    assert not os.path.exists("surprise")


def test_a_truncated_file_is_refused(files):
    with open(files["vision_encoder"], "r+b") as file:
        file.truncate(os.path.getsize(files["vision_encoder"]) // 2)
    with pytest.raises(ValueError, match=r"cannot be opened.*Is the download complete"):
        convert(ConversionArguments(**files))


def test_a_folder_with_something_in_it_is_not_written_to(files, tmp_path):
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="exists"):
        convert(ConversionArguments(**files))


def test_lora_matrices_need_a_language_model_to_be_merged_into(tmp_path):
    with pytest.raises(ValueError, match="Add --keep-lora"):
        convert(ConversionArguments(**original_files("v2"), output=str(tmp_path / "out"), projection_only=True))


def test_lora_matrices_that_fit_nothing_are_listed(tmp_path):
    checkpoint = torch.load(ORIGINAL / "v2" / "checkpoint.pth", weights_only=True)
    prefix = "llama_model.base_model.model.model.layers"
    weights = checkpoint["model"]
    weights[f"{prefix}.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    weights[f"{prefix}.0.self_attn.v_proj.lora_A.weight"] = torch.zeros(4, 31)
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    files = original_files("v2") | {"checkpoint": str(tmp_path / "checkpoint.pth")}
    with pytest.raises(ValueError, match="3 tensors do not fit") as error:
        convert(ConversionArguments(**files, output=str(tmp_path / "out")))
    assert "model.layers.7.self_attn.q_proj, which the language model does not have" in str(error.value)
    assert "missing lora_B of model.layers.7.self_attn.q_proj" in str(error.value)
    assert "lora_A (4, 31)" in str(error.value)


def test_the_scale_of_lora_can_be_set(tmp_path):
    weights = {}
    for alpha in (0.0, 16.0, 32.0):
        folder = tmp_path / str(alpha)
        convert(ConversionArguments(**original_files("v2"), output=str(folder), dtype="float32", lora_alpha=alpha))
        weights[alpha] = load_file(folder / "model.safetensors")[
            "model.language_model.layers.0.self_attn.q_proj.weight"
        ]
    torch.testing.assert_close(weights[32.0] - weights[0.0], 2 * (weights[16.0] - weights[0.0]))
    assert not torch.equal(weights[16.0], weights[0.0])


def test_stage_1_checkpoints_continue_a_picture(files):
    convert(ConversionArguments(**files, stage=1))
    processor = AutoProcessor.from_pretrained(files["output"])
    assert processor.image_prompt() == processor.tokenizer.bos_token + processor.image_token


def run(arguments: dict[str, object]) -> subprocess.Popen:
    """The conversion as a command, which an interrupt reaches even where the tests run in the background."""
    options = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", MODULE, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_the_command_says_what_is_wrong_without_a_traceback(files):
    process = run(files | {"checkpoint": "nowhere.pth"})
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "There is no file nowhere.pth" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_no_folder_and_can_be_repeated(files, tmp_path, with_signal):
    process = run(files)
    while not list(tmp_path.glob(".converted-*")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(with_signal)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0, errors
    assert not os.path.exists(files["output"])
    if with_signal != signal.SIGKILL:
        assert not list(tmp_path.glob(".converted-*"))
    process = run(files)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    AutoModel.from_pretrained(files["output"])


MEASURED = f"""
import resource, sys
from {MODULE} import ConversionArguments, convert
from transformers import HfArgumentParser
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
convert(*HfArgumentParser(ConversionArguments).parse_args_into_dataclasses())
print("peak", peak() - before)
"""


@pytest.mark.parametrize(
    ("projection_only", "dtype"), [(False, "float16"), (False, "bfloat16"), (False, "float32"), (True, "float16")]
)
def test_memory_stays_within_its_bounds(tmp_path, projection_only, dtype):
    """At most 1.3 times a full output; with the projection alone, the largest file and 300 MB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=8,
        vocab_size=1500,
        dtype="float16",
    )
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "llm")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "llm" / name).write_bytes((ORIGINAL / "llm" / name).read_bytes())
    vision_config = Blip2VisionConfig(
        hidden_size=704, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=8, image_size=56
    )
    config = Blip2Config(vision_config=vision_config.to_dict(), text_config=NO_TEXT.to_dict())
    vision, _ = as_original(Blip2ForConditionalGeneration(config).half())
    torch.save(vision, tmp_path / "vit.pth")
    projection = {"llama_proj.weight": torch.randn(1024, 4 * 704), "llama_proj.bias": torch.randn(1024)}
    torch.save({"model": projection}, tmp_path / "checkpoint.pth")
    output = tmp_path / "converted"
    command = [sys.executable, "-c", MEASURED, "--checkpoint", tmp_path / "checkpoint.pth"]
    command += ["--language-model", tmp_path / "llm", "--prompt-style", "llama-2", "--output", output]
    command += [
        "--dtype",
        dtype,
        "--vision-encoder",
        tmp_path / "vit.pth",
        *(["--projection-only"] if projection_only else []),
    ]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"MINIGPT4_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    if projection_only:
        assert peak < (tmp_path / "vit.pth").stat().st_size + 300e6
    else:
        assert peak < 1.3 * sum(path.stat().st_size for path in output.glob("*.safetensors"))
