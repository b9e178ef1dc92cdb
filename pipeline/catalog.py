"""What `pipeline tuners` and `pipeline models` list: said here, so that a list does not wait for torch.

The classes say the same of themselves; a test compares the two.
"""

from __future__ import annotations

import sys

# name → description, in the order of `train.tuners.tuner_names`
TUNERS = {
    "sherl-clip": "SHERL as on CLIP4Clip: a correction of the class token, no live layer",
    "unipt-clip": "UniPT as on CLIP4Clip: a correction of the class token",
    "sherl": "SHERL: multi-tiered sensing over all layers, then the live last layer",
    "unipt": "UniPT: parallel attention from the last state to all earlier ones; no live layer",
    "e3va": "E³VA: low-rank adapters on a highway beside a Swin; alpha 8, 16, 32 for E³VA, +, ++",
    "head2toe": "Head2Toe: a linear head on selected features of all layers",
    "lst": "LST: ladder side network, a narrow transformer fed from every kept layer",
    "probe": "linear probe on the mean of the last state: the floor",
    "qst": "QST: a ladder beside a language model, its output blended with the backbone's",
    "side-tuning": "Side-Tuning: the last state blended with a small network on the embedding",
    "fixed": "the head alone on the frozen backbone's feature pyramid: the floor of dense tasks",
    "sherl-vse": "SHERL in its form for image–text retrieval (VSE∞): side width from the joint space",
    "unipt-vse": "UniPT in its form for image–text retrieval (VSE∞): it maps to the joint space itself",
}

_DECODERS = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3_text",
    "phi", "phi3", "olmo", "olmo2", "olmo3", "olmoe", "smollm3", "granite", "granitemoe", "gpt2", "gpt_bigcode",
    "gpt_neox", "gpt_oss", "stablelm", "starcoder2", "cohere", "cohere2", "glm", "glm4", "helium", "nemotron",
    "ministral", "exaone4", "ernie4_5", "seed_oss", "arcee", "apertus", "hunyuan_v1_dense",
)  # fmt: skip

# name → description, model types; in the order of `extract.backbones.backbone_classes`
FAMILIES = {
    "bert": (
        "BERT-like encoders: BERT, RoBERTa, XLM-R, CamemBERT, MiniLM",
        ("bert", "roberta", "xlm-roberta", "camembert"),
    ),
    "vit": (
        "vision transformers: ViT, DeiT, DINOv2, DINOv3 (timm, transformers), CLIP vision tower (transformers)",
        ("vit", "clip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit"),
    ),
    "clip-text": ("the text tower of CLIP (transformers)", ("clip_text_model",)),
    "convnext": ("ConvNeXt and ConvNeXt V2 (timm)", ()),
    "efficientnet": ("MobileNetV2, MnasNet, EfficientNet (timm): inverted bottlenecks in stages", ()),
    "decoder": (
        "decoder-only language models: Llama, Mistral, Qwen, Gemma, Phi, OLMo, GPT-2, GPT-NeoX, gpt-oss",
        _DECODERS,
    ),
    "resnet": (
        "convolutional networks: ResNet, ResNeXt and kin (timm), ResNet (transformers), CIFAR ResNets",
        ("resnet", "cifar_resnet"),
    ),
    "swin": ("Swin transformers (timm, transformers): stages, attention and MLP branches, patch mergings", ("swin",)),
    "t5": ("T5 encoder-decoders: v1.0, v1.1, flan", ("t5",)),
}

# name → description of what trains inside the live backbone; `train.baselines.methods` says the same
BASELINES = {
    "full": "full fine-tuning",
    "lora": "LoRA of rank 8 on the attention's queries and values (peft)",
    "adapter": "a bottleneck adapter of width D / 8 after each block; on Swin two a block, of width 64",
    "adaptformer": "a bottleneck of width 64 beside each MLP of a vision transformer",
    "prompt": "prompt tuning: 20 virtual tokens before the text",
    "bitfit": "BitFit: the biases",
    "norm-tuning": "weights and biases of the norms",
    "partial-1": "the last block",
}


def is_baseline(name: str) -> bool:
    """Whether `name` is that of a baseline, of a size of its own perhaps: lora, lora:16, adapter:24@6."""
    return name.partition("@")[0].partition(":")[0] in BASELINES


def tuners() -> dict[str, str]:
    """name → description of every tuner: ours, and those that modules of the user's have registered by now."""
    register = sys.modules.get("pipeline.train.tuners")
    more = {} if register is None else {n: register.tuner_class(n).description for n in register.tuner_names()}
    return {**TUNERS, **more}


def families() -> dict[str, tuple[str, tuple[str, ...]]]:
    """name → description and model types of every family of backbones, likewise."""
    register = sys.modules.get("pipeline.extract.backbones")
    more = {} if register is None else {f.name: (f.description, f.model_types) for f in register.backbone_classes()}
    return {**FAMILIES, **more}
