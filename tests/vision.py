"""Small image checkpoints with seeded random weights, image folders, and the real CIFAR networks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from pipeline.extract.backbones.cifar import CifarResNetConfig, CifarResNetModel

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _timm(folder: Path, name: str, side: int, seed: int = 0, **shape) -> Path:
    """A checkpoint as timm saves it to a folder: config.json with the architecture, model.safetensors."""
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False, num_classes=10, **shape)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as if trained: statistics that are not the identity
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    config = {
        "architecture": name,
        "num_classes": 10,
        "num_features": model.num_features,
        "model_args": shape,
        "pretrained_cfg": {"input_size": [3, side, side], "mean": MEAN, "std": STD, "interpolation": "bicubic"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def vit(folder: Path) -> Path:
    return _timm(folder, "vit_tiny_patch16_224", 32, img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4)


def resnet(folder: Path) -> Path:
    return _timm(folder, "resnet26", 64, channels=[8, 8, 16, 16], layers=[1, 1, 1, 2], stem_width=8)


def resnext(folder: Path) -> Path:
    shape = {"channels": [16, 16, 32, 32], "layers": [1, 1, 1, 3], "cardinality": 4, "base_width": 16}
    return _timm(folder, "resnext50_32x4d", 64, **shape)


def swin(folder: Path) -> Path:
    shape = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "window_size": 4}
    return _timm(folder, "swin_tiny_patch4_window7_224", 64, img_size=64, **shape)


def mobilenet(folder: Path) -> Path:
    return _timm(folder, "mobilenetv2_035", 64)


def convnext(folder: Path) -> Path:
    return _timm(folder, "convnext_tiny", 64, depths=[1, 1, 1, 2], dims=[8, 16, 16, 32])


def _hugging_face(folder: Path, model: torch.nn.Module, side: int) -> Path:
    model.save_pretrained(folder)
    spec = {"size": {"height": side, "width": side}, "image_mean": MEAN, "image_std": STD, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(spec))
    return folder


def vit_hf(folder: Path) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return _hugging_face(folder, ViTModel(ViTConfig(image_size=32, patch_size=8, **shape), add_pooling_layer=False), 32)


def clip(folder: Path) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return _hugging_face(folder, CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **shape)), 32)


SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def dinov2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**SMALL, num_register_tokens=2, layerscale_value=0.5)
    return _hugging_face(folder, Dinov2WithRegistersModel(config), 32)


def dinov3(folder: Path) -> Path:
    torch.manual_seed(0)
    shape = {**SMALL, "num_register_tokens": 2, "layerscale_value": 0.5, "intermediate_size": 64}
    return _hugging_face(folder, DINOv3ViTModel(DINOv3ViTConfig(**shape)), 32)


def dinov3_timm(folder: Path) -> Path:
    return _timm(folder, "vit_small_patch16_dinov3", 32, img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4)


def swin_hf(folder: Path) -> Path:
    torch.manual_seed(0)
    shape = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "window_size": 2}
    model = SwinModel(SwinConfig(image_size=64, **shape), add_pooling_layer=False)
    for name, values in model.named_parameters():
        if "relative_position_bias_table" in name:  # as if trained
            torch.nn.init.normal_(values)
    return _hugging_face(folder, model, 64)


def resnet_hf(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck")
    return _hugging_face(folder, ResNetModel(config), 32)


def cifar(folder: Path, depth: int = 20, weights: Path | None = None) -> Path:
    """A CIFAR ResNet: random, or the published weights (a PyTorch state dict with keys `module.…`)."""
    torch.manual_seed(0)
    model = CifarResNetModel(CifarResNetConfig(depth=depth))
    if weights is not None:
        raw = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
        state = {}
        for key, value in raw.items():
            parts = key.removeprefix("module.").split(".")
            if parts[0] in ("conv1", "bn1"):
                state[".".join(["embedder", "0" if parts[0] == "conv1" else "1", *parts[1:]])] = value
            elif parts[0].startswith("layer"):
                stage = str(int(parts[0][5:]) - 1)
                state[".".join(["encoder.stages", stage, "layers", *parts[1:]])] = value
        model.load_state_dict(state)
    return _hugging_face(folder, model.eval(), 32)


CHECKPOINTS = {
    "vit": vit, "vit_hf": vit_hf, "clip": clip, "resnet": resnet, "resnext": resnext, "resnet_hf": resnet_hf,
    "cifar": cifar, "swin": swin, "mobilenet": mobilenet, "convnext": convnext, "swin_hf": swin_hf, "dinov2": dinov2,
    "dinov3": dinov3, "dinov3_timm": dinov3_timm,
}  # fmt: skip


def write_folder(folder: Path, n: int = 60, side: int = 40, seed: int = 0) -> Path:
    """`n` images in two class folders: noise with a bright left or a bright upper half."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        name = ("left", "upper")[i % 2]
        picture = rng.integers(0, 120, (side, side, 3))
        picture[(slice(None), slice(0, side // 2)) if i % 2 == 0 else slice(0, side // 2)] += 100
        path = folder / name / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(path)
    return folder


def unpack_cifar(data: Path, folder: Path, classes: dict[int, str], start: int, stop: int) -> Path:
    """Images `start` to `stop` of the sheets whose label is in `classes`, as a folder a class."""
    labels = json.loads((data / "labels.json").read_text())
    for batch in range(start // 1000, -(-stop // 1000)):
        sheet = np.asarray(Image.open(data / f"cifar10_batch_{batch}.png").convert("RGB"))
        for row in range(1000):
            number = batch * 1000 + row
            if start <= number < stop and labels[number] in classes:
                path = folder / classes[labels[number]] / f"{number:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(sheet[row].reshape(32, 32, 3)).save(path)
    return folder
