"""What checkpoints are called."""

# Short names; anything else is a folder or a hub id.
SHORT_NAMES = {
    "t5-small": "google-t5/t5-small",
    "t5-base": "google-t5/t5-base",
    "t5-large": "google-t5/t5-large",
    "t5-3b": "google-t5/t5-3b",
    "t5-11b": "google-t5/t5-11b",
    "t5-v1.1-base": "google/t5-v1_1-base",
    "t5-v1.1-large": "google/t5-v1_1-large",
    "flan-t5-base": "google/flan-t5-base",
    "flan-t5-large": "google/flan-t5-large",
    "flan-t5-xl": "google/flan-t5-xl",
    "bert-base": "google-bert/bert-base-uncased",
    "bert-large": "google-bert/bert-large-uncased",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "vit-small": "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit-base": "timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
    "swin-base": "timm/swin_base_patch4_window12_384.ms_in22k",
    "swin-large": "timm/swin_large_patch4_window12_384.ms_in22k",
    "resnet50": "timm/resnet50.a1_in1k",
    "resnext50": "timm/resnext50_32x4d.a1h_in1k",
}
