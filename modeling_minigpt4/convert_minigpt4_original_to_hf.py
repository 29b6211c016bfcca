"""Converts a checkpoint of the original MiniGPT-4 or MiniGPT-v2 into an ordinary transformers folder.

```shell
python -m modeling_minigpt4.convert_minigpt4_original_to_hf \\
    --vision-encoder eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth --checkpoint pretrained_minigpt4_7b.pth \\
    --language-model vicuna-7b-v0 --prompt-style vicuna-v0 --output minigpt4-vicuna-7b
```

The result is opened by `AutoModel.from_pretrained` and `AutoProcessor.from_pretrained`. Sizes are read off the
tensors. With `--projection-only`, the folder holds the projection alone, and names where the frozen parts come from.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, save_torch_state_dict
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2Config,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file, is_peft_available

from processing import PROMPT_STYLES, MiniGPT4Processor, build_processor, configure_generation, stage2_instructions

from .backbones_minigpt4 import (
    CACHE_PREFIX,
    ORIGINAL_PREFIX,
    Backbone,
    cache_directory,
    load_config,
    load_language_model,
    load_qformer,
    load_vision_tower,
    tensor_shapes,
)
from .configuration_minigpt4 import MiniGPT4Config
from .modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from .original_minigpt4 import (
    OriginalCheckpoint,
    OriginalFile,
    OriginalQFormer,
    check_lora,
    read_checkpoint,
    read_qformer,
    read_vision_encoder,
)


# What `Chat.answer` of the original samples with (`conversation/conversation.py`).
CHAT_DEFAULTS = {
    "do_sample": True,
    "top_p": 0.9,
    "temperature": 1.0,
    "repetition_penalty": 1.05,
    "max_new_tokens": 300,
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ConversionArguments:
    """The original's files, and what to make of them."""

    checkpoint: str = field(metadata={"help": "The trained weights: the projection, and LoRA matrices if there are."})
    language_model: str = field(
        metadata={"help": "The language model, in transformers' format: repository or folder."}
    )
    prompt_style: str = field(metadata={"help": f"One of {', '.join(s for s in PROMPT_STYLES if s != 'native')}."})
    output: str = field(metadata={"help": "Folder to write."})
    vision_encoder: str | None = field(default=None, metadata={"help": "eva_vit_g.pth."})
    qformer: str | None = field(
        default=None, metadata={"help": "blip2_pretrained_flant5xxl.pth; to be left out where the model has none."}
    )
    blip2: str | None = field(
        default=None,
        metadata={"help": "Repository or folder of a BLIP-2 in transformers' format, instead of the two files."},
    )
    stage: int = field(
        default=2,
        metadata={"help": "What a picture alone is asked: a description in a conversation (2), or nothing (1)."},
    )
    dtype: str = field(default="float16", metadata={"help": "float32, bfloat16, or float16 as in the release."})
    projection_only: bool = field(default=False, metadata={"help": "Leave the frozen weights where they are."})
    image_size: int | None = field(
        default=None, metadata={"help": "Pixels: 448 for MiniGPT-v2. Default: the encoder's."}
    )
    lora_alpha: float = field(default=16.0, metadata={"help": "Of the LoRA matrices; the release has 16."})
    keep_lora: bool = field(
        default=False, metadata={"help": "Write LoRA matrices as a PEFT adapter in OUTPUT/adapter, do not merge them."}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository to upload the result to."})


@dataclass
class VisionSide:
    """The frozen vision side: sizes, and either files of the release or a BLIP-2 in transformers' format."""

    vision_config: Blip2VisionConfig
    qformer_config: Blip2QFormerConfig | None
    num_query_tokens: int
    blip2: str | None = None
    vision: OriginalFile | None = None
    qformer: OriginalQFormer | None = None


def convert(arguments: ConversionArguments) -> None:
    """Converts a checkpoint.

    Args:
        arguments ([`ConversionArguments`]): The original's files, and what to make of them.

    Raises:
        `OSError`: If a file or a repository cannot be opened.
        `ValueError`: If the files do not fit each other or the arguments. Nothing has been written then.
    """
    _check_arguments(arguments)
    checkpoint = read_checkpoint(arguments.checkpoint)
    side = _read_vision_side(arguments, checkpoint)
    config, processor = _configure(arguments, side, checkpoint)
    with _new_folder(Path(arguments.output)) as folder:
        if arguments.projection_only:
            model = _projection_alone(arguments, config, side)
        else:
            model = _whole_model(arguments, config, side, checkpoint, folder)
        model.model.multi_modal_projector.load_state_dict(checkpoint.tensors)
        model.generation_config = GenerationConfig()
        configure_generation(model, processor)
        model.generation_config.update(**CHAT_DEFAULTS)  # of the language model's own nothing is kept
        weights = model.model.multi_modal_projector.state_dict(prefix="model.multi_modal_projector.")
        model.save_pretrained(
            folder,
            projection_only=arguments.projection_only,
            state_dict=weights if arguments.projection_only else None,
        )
        processor.save_pretrained(folder)
        if checkpoint.lora and arguments.keep_lora:
            _save_adapter(checkpoint, arguments, folder / "adapter")
    print(f"The converted checkpoint is in {arguments.output}.")
    if arguments.push_to_hub:
        api = HfApi()
        repository = api.create_repo(arguments.push_to_hub, exist_ok=True).repo_id
        print(f"Uploaded: {api.upload_folder(repo_id=repository, folder_path=arguments.output)}")


def _check_arguments(arguments: ConversionArguments) -> None:
    choices: dict[str, tuple[str | int, list]] = {
        "prompt-style": (arguments.prompt_style, [style for style in PROMPT_STYLES if style != "native"]),
        "dtype": (arguments.dtype, list(_DTYPES)),
        "stage": (arguments.stage, [1, 2]),
    }
    for name, (value, expected) in choices.items():
        if value not in expected:
            raise ValueError(f"Got --{name} {value}. Expected one of {', '.join(map(str, expected))}.")
    if (arguments.blip2 is None) == (arguments.vision_encoder is None):
        raise ValueError("Expected either --vision-encoder (with --qformer where the model has one) or --blip2.")
    if arguments.blip2 is not None and arguments.qformer is not None:
        raise ValueError("Got --blip2 and --qformer. Expected one of them: BLIP-2 has the Q-Former.")
    sources = (arguments.blip2, arguments.language_model)
    if arguments.push_to_hub and arguments.projection_only and any(not one or Path(one).is_dir() for one in sources):
        raise ValueError(
            "Got --push-to-hub with --projection-only, and frozen parts that lie on this machine. Expected --blip2 "
            "and --language-model as repositories, which others can open too."
        )
    if arguments.keep_lora and not is_peft_available():
        raise ValueError("Got --keep-lora, which needs PEFT. Install it with `pip install peft`, or leave it out.")
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists. Expected a new folder: choose another --output, or remove it.")


def _read_vision_side(arguments: ConversionArguments, checkpoint: OriginalCheckpoint) -> VisionSide:
    if arguments.blip2 is not None:
        whole = load_config(Backbone("vision_tower", arguments.blip2))
        if not isinstance(whole, Blip2Config):
            raise ValueError(f"{arguments.blip2} holds a `{whole.model_type}`. Expected a `blip-2`.")
        # With a Q-Former, the projection is as wide as that.
        has_qformer = checkpoint.tensors["weight"].shape[1] == whole.qformer_config.hidden_size
        qformer_config = whole.qformer_config if has_qformer else None
        return VisionSide(whole.vision_config, qformer_config, whole.num_query_tokens, blip2=arguments.blip2)
    assert arguments.vision_encoder is not None
    vision_config, vision = read_vision_encoder(arguments.vision_encoder)
    qformer = None if arguments.qformer is None else read_qformer(arguments.qformer)
    if qformer is None or qformer.query_tokens is None:
        return VisionSide(vision_config, None, 0, vision=vision)
    return VisionSide(vision_config, qformer.config, qformer.query_tokens.shape[1], vision=vision, qformer=qformer)


def _configure(
    arguments: ConversionArguments, side: VisionSide, checkpoint: OriginalCheckpoint
) -> tuple[MiniGPT4Config, MiniGPT4Processor]:
    """The configuration and the processor.

    Raises:
        `ValueError`: If a tensor is missing, unexpected or of a wrong shape. All of them are listed.
    """
    text_config = load_config(Backbone("language_model", arguments.language_model))
    problems = [problem for file in (side.vision, side.qformer, checkpoint) if file for problem in file.problems]
    problems += _misfits(arguments, side, checkpoint, text_config)
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit, and nothing was written:\n  " + "\n  ".join(problems))
    files = (
        (arguments.vision_encoder, side.vision),
        (arguments.qformer, side.qformer),
        (arguments.checkpoint, checkpoint),
    )
    for path, file in files:
        if file is not None and file.unused:
            print(f"Not used of {path}: {', '.join(file.unused[:3])}{', ...' if len(file.unused) > 3 else ''}")
    if arguments.keep_lora and not checkpoint.lora:
        print(f"{arguments.checkpoint} holds no LoRA matrices to keep.")
    if checkpoint.lora and arguments.projection_only and not arguments.keep_lora:
        raise ValueError(
            f"{arguments.checkpoint} holds LoRA matrices, which cannot be merged into a language model that is not "
            "written. Add --keep-lora, or leave out --projection-only."
        )
    if arguments.image_size is not None:
        side.vision_config.image_size = arguments.image_size
    width = checkpoint.tensors["weight"].shape[1]
    config = MiniGPT4Config(
        vision_config=side.vision_config,
        qformer_config=side.qformer_config,
        text_config=text_config,
        num_query_tokens=side.num_query_tokens,
        token_merge_size=4 if side.qformer_config else width // side.vision_config.hidden_size,
        vision_post_layernorm_affine=side.qformer_config is not None,
        image_token_index=len(AutoTokenizer.from_pretrained(arguments.language_model)),
        dtype=_DTYPES[arguments.dtype],
    )
    processor = build_processor(
        arguments.language_model,
        config.image_seq_length or 0,
        side.vision_config.image_size,
        arguments.prompt_style,  # type: ignore[arg-type]
        default_instruction=stage2_instructions()[0] if arguments.stage == 2 else None,
    )
    _check_tokenizer(arguments, processor)
    return config, processor


def _misfits(
    arguments: ConversionArguments, side: VisionSide, checkpoint: OriginalCheckpoint, text_config: Any
) -> list[str]:
    """What does not fit between the files, a line for each."""
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(text_config)
    problems = check_lora(arguments.checkpoint, checkpoint, language_model)
    problems += _check_folder(arguments.language_model, "", language_model)
    if arguments.blip2 is not None:
        with torch.device("meta"):
            problems += _check_folder(arguments.blip2, "vision_model.", Blip2VisionModel(side.vision_config))
            if side.qformer_config is not None:
                problems += _check_folder(arguments.blip2, "qformer.", Blip2QFormerModel(side.qformer_config))
    ranks = {matrices["A"].shape[0] for matrices in checkpoint.lora.values() if "A" in matrices}
    if arguments.keep_lora and len(ranks) > 1:
        problems.append(
            f"{arguments.checkpoint}: LoRA matrices of the ranks {sorted(ranks)}, but an adapter has one; leave out "
            "--keep-lora to merge them"
        )
    rows, columns = checkpoint.tensors["weight"].shape
    if rows != text_config.get_text_config().hidden_size:
        problems.append(
            f"{arguments.checkpoint}: llama_proj.weight has the shape {(rows, columns)}, but the embeddings of "
            f"{arguments.language_model} have the size {text_config.get_text_config().hidden_size}"
        )
    patch_size = side.vision_config.hidden_size
    if side.qformer_config is not None:
        if side.qformer_config.encoder_hidden_size != patch_size:
            problems.append(
                f"The Q-Former reads features of size {side.qformer_config.encoder_hidden_size}, but the vision "
                f"encoder gives {patch_size}"
            )
        if columns != side.qformer_config.hidden_size:
            problems.append(
                f"{arguments.checkpoint}: llama_proj.weight has the shape {(rows, columns)}, but the Q-Former's width "
                f"is {side.qformer_config.hidden_size}; leave out --qformer if the model has none"
            )
    elif columns % patch_size:
        problems.append(
            f"{arguments.checkpoint}: llama_proj.weight has the shape {(rows, columns)}, whose second number is no "
            f"multiple of the vision encoder's width {patch_size}; give --qformer if the model has one"
        )
    if arguments.image_size is not None and (
        arguments.image_size <= 0 or arguments.image_size % side.vision_config.patch_size
    ):
        problems.append(
            f"--image-size {arguments.image_size} is no multiple of the patch, {side.vision_config.patch_size}"
        )
    elif side.qformer_config is None and not columns % patch_size:
        grid = (arguments.image_size or side.vision_config.image_size) // side.vision_config.patch_size
        if grid**2 % (columns // patch_size):
            problems.append(f"{grid}x{grid} patches cannot be merged by {columns // patch_size}; choose --image-size")
    return problems


def _check_folder(folder: str, prefix: str, model: PreTrainedModel) -> list[str]:
    """What is missing or of a wrong shape in a folder's safetensors files, a line for each. A repository is checked
    when its weights are opened."""
    found = tensor_shapes(folder, prefix) if Path(folder).is_dir() else {}
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}  # tied ones count once
    if not found.keys() & expected.keys():
        return []  # files of another format, or names of old, which `from_pretrained` knows
    problems = [f"{folder}: missing {prefix}{name}" for name in expected if name not in found]
    return problems + [
        f"{folder}: {prefix}{name} has the shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]


def _check_tokenizer(arguments: ConversionArguments, processor: MiniGPT4Processor) -> None:
    """
    Raises:
        `ValueError`: If transformers' tokenizer does not write a text as its SentencePiece model does, which the
            original used: one of another type than BPE, or with a normalizer.
    """
    path = cached_file(arguments.language_model, "tokenizer.model", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return
    original = SentencePieceProcessor(model_file=path)
    for text in (
        *stage2_instructions(),
        "###Human: ",
        "What is  in it?",
        "a café\n",
        "\ufb01 \uff21",
        "[INST] [/INST] ",
    ):
        received, expected = processor.tokenizer.encode(text, add_special_tokens=False), original.encode(text)
        if received != expected:
            raise ValueError(
                f"The tokenizer of {arguments.language_model} writes {text!r} as {received}, and its SentencePiece "
                f"model {path}, which the original used, as {expected}. Expected the same: transformers knows "
                "SentencePiece models of the type BPE without a normalizer, as LLaMA's."
            )


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder that takes its name when all of it is written, and is gone if that fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for left_over in output.parent.glob(f".{output.name}-????????"):
        if time.time() - left_over.stat().st_mtime > 3600:  # of a run that was killed, not of one beside this
            shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)  # `mkdtemp` makes it for its owner alone
        folder.replace(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _whole_model(
    arguments: ConversionArguments,
    config: MiniGPT4Config,
    side: VisionSide,
    checkpoint: OriginalCheckpoint,
    folder: Path,
) -> MiniGPT4ForConditionalGeneration:
    dtype = _DTYPES[arguments.dtype]
    blip2 = side.blip2
    if blip2 is None:
        blip2 = str(folder / "blip2")
        _save_vision_side(side, folder / "blip2")
    vision_tower = load_vision_tower(Backbone("vision_tower", blip2), arguments.image_size, dtype=dtype)
    qformer = load_qformer(Backbone("qformer", blip2), dtype=dtype) if side.qformer_config else None
    shutil.rmtree(folder / "blip2", ignore_errors=True)
    origin = Backbone("language_model", arguments.language_model)
    language_model = load_language_model(origin, cast_to=dtype)
    if not arguments.keep_lora:
        _merge_lora(language_model, checkpoint, arguments.lora_alpha)
    return MiniGPT4ForConditionalGeneration.from_parts(config, vision_tower, qformer, language_model, origin)


def _projection_alone(
    arguments: ConversionArguments, config: MiniGPT4Config, side: VisionSide
) -> MiniGPT4ForConditionalGeneration:
    """A model whose frozen parts have no weights here, and a configuration that says where they are."""
    source = side.blip2 if side.blip2 is not None else _cache_vision_side(arguments, side)
    sources = {"vision_tower": source, "qformer": source, "language_model": arguments.language_model}
    if side.qformer_config is None:
        del sources["qformer"]
    config.backbones = {
        part: {"source": str(Path(name).resolve()) if Path(name).is_dir() else name} for part, name in sources.items()
    }
    with torch.device("meta"):
        model = MiniGPT4ForConditionalGeneration(config).to(_DTYPES[arguments.dtype])
    model.model.multi_modal_projector.to_empty(device="cpu").float()
    return model


def _cache_vision_side(arguments: ConversionArguments, side: VisionSide) -> str:
    """Puts the release's vision side in transformers' format where all projection-only checkpoints can find it."""
    digest = hashlib.sha256()
    for path in (arguments.vision_encoder, arguments.qformer):
        if path is not None:
            with open(path, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
    name = f"{ORIGINAL_PREFIX}{digest.hexdigest()[:12]}"
    target = cache_directory() / name
    if not target.is_dir():
        with _new_folder(target) as folder:
            _save_vision_side(side, folder)
        print(f"The vision side in transformers' format is in {target}.")
    return f"{CACHE_PREFIX}{name}"


def _save_vision_side(side: VisionSide, folder: Path) -> None:
    """Writes a BLIP-2 without a language model, or its vision encoder alone, in the dtype of the original's files.
    Their tensors are gone afterwards: what was read of a file stays in memory as long as it is mapped."""
    assert side.vision is not None
    folder.mkdir(parents=True, exist_ok=True)
    if side.qformer is None or side.qformer.query_tokens is None:
        width = side.vision_config.hidden_size
        plain = {"post_layernorm.weight": torch.ones(width), "post_layernorm.bias": torch.zeros(width)}
        save_torch_state_dict({**side.vision.tensors, **plain}, folder)
        side.vision.tensors.clear()
        side.vision_config.save_pretrained(folder)
        return
    weight_map = _save_shard(side.vision.tensors, "vision_model.", folder / "model-00001-of-00002.safetensors")
    side.vision.tensors.clear()
    rest = {f"vision_model.{name}": weight for name, weight in side.qformer.layer_norm.items()}
    rest |= {f"qformer.{name}": weight for name, weight in side.qformer.tensors.items()}
    rest["query_tokens"] = side.qformer.query_tokens
    weight_map |= _save_shard(rest, "", folder / "model-00002-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
    Blip2Config(
        vision_config=side.vision_config.to_dict(),
        qformer_config=side.qformer.config.to_dict() if side.qformer.config else None,
        num_query_tokens=side.num_query_tokens,
    ).save_pretrained(folder)


def _save_shard(tensors: dict[str, torch.Tensor], prefix: str, path: Path) -> dict[str, str]:
    """Writes tensors, and says of each in which file it is."""
    named = {f"{prefix}{name}": weight.contiguous() for name, weight in tensors.items()}
    save_file(named, path, metadata={"format": "pt"})
    return dict.fromkeys(named, path.name)


@torch.no_grad()
def _merge_lora(language_model: PreTrainedModel, checkpoint: OriginalCheckpoint, alpha: float) -> None:
    for module, matrices in checkpoint.lora.items():
        weight = language_model.get_submodule(module).weight
        scale = alpha / matrices["A"].shape[0]
        weight.copy_(weight.float() + scale * (matrices["B"].float() @ matrices["A"].float()))


def _save_adapter(checkpoint: OriginalCheckpoint, arguments: ConversionArguments, folder: Path) -> None:
    """Writes the LoRA matrices as a PEFT adapter of the converted model."""
    from peft import LoraConfig  # which only this needs

    folder.mkdir()
    # A PEFT model calls what it wraps `base_model.model`; here the language model's body has no `model.` of its own.
    modules = {module: f"model.language_model.{module.removeprefix('model.')}" for module in checkpoint.lora}
    LoraConfig(
        r=next(iter(checkpoint.lora.values()))["A"].shape[0],
        lora_alpha=arguments.lora_alpha,  # type: ignore[arg-type]
        target_modules=sorted(modules.values()),
        base_model_name_or_path=arguments.push_to_hub or os.fspath(arguments.output),
        inference_mode=True,
    ).save_pretrained(str(folder))
    weights = {
        f"base_model.model.{modules[module]}.lora_{matrix}.weight": weight.contiguous()
        for module, matrices in checkpoint.lora.items()
        for matrix, weight in matrices.items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = HfArgumentParser(ConversionArguments, description=__doc__)
    (arguments,) = parser.parse_args_into_dataclasses()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))  # which cleans up
    try:
        convert(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
