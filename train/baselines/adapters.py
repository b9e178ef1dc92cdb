"""Small trainable things put into a frozen backbone or block: LoRA, bottleneck adapters, biases, virtual tokens.

Baselines put them into the whole live backbone, SHERL into its live tail (Fig. 5).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.store.errors import UserError

ATTENTION = (
    "query",
    "value",
    "qkv",
    "q_proj",
    "v_proj",
    "qkv_proj",
    "query_key_value",
    "q",
    "v",
)  # what LoRA is put on, by module name


def add_lora(module: nn.Module, what: str, rank: int = 8, alpha: int = 16, dropout: float = 0.1) -> None:
    """LoRA on the queries and values in `module`, in place (`peft`). `what`: names the module in errors.

    Raises UserError where peft is not installed, or the module has no attention.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("lora needs the peft package: pip install 'activation-pipeline[baselines]'") from None
    names = {n.rpartition(".")[2] for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    targets = [n for n in ATTENTION if n in names]
    if not targets:
        raise UserError(f"lora: {what} has no attention to put it on")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    inject_adapter_in_model(config, module)


def free_biases(module: nn.Module, what: str) -> None:
    """Make the biases in `module` trainable (BitFit). Raises UserError where there are none."""
    named = {n: p for n, p in module.named_parameters() if "pooler" not in n}
    # A Swin's tables of relative positions are added as biases are.
    biases = [p for n, p in named.items() if n.endswith(("bias", "relative_position_bias_table"))]
    if not biases:
        raise UserError(f"bitfit: {what} has no biases")
    for p in biases:
        p.requires_grad_(True)


def add_biases(module: nn.Module, norms: tuple[type[nn.Module], ...]) -> None:
    """A zero bias to every Linear in `module` and every module of the types `norms` that has none (BitFit on T5, which
    has no biases of its own). A norm adds its bias to what it returns."""
    for part in list(module.modules()):
        if getattr(part, "bias", None) is not None:
            continue
        if isinstance(part, nn.Linear):
            part.bias = nn.Parameter(part.weight.new_zeros(part.out_features))
        elif isinstance(part, norms):
            part.bias = nn.Parameter(torch.zeros_like(part.weight))  # type: ignore[arg-type]
            part.register_forward_hook(lambda norm, _args, out: out + norm.bias)


class Bottleneck(nn.Module):
    """x + up(GELU(down x)), the way up started at zero. `published`: as in LST's code instead, both ways started at
    N(0, 0.01²) with zero biases, and GELU in its tanh form."""

    def __init__(self, width: int, inner: int, published: bool = False) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        self.gelu = "tanh" if published else "none"
        for way in (self.down, self.up) if published else ():
            nn.init.normal_(way.weight, std=0.01)
            nn.init.zeros_(way.bias)
        if not published:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x), approximate=self.gelu))


def add_adapter(block: nn.Module, width: int, inner: int, published: bool = False) -> None:
    """A bottleneck of `inner` channels on what `block` returns, (…, `width`). `published`: see `Bottleneck`."""
    adapter = Bottleneck(width, inner, published)
    block.add_module("adapter", adapter)
    block.register_forward_hook(
        lambda _block, _args, out: (adapter(out[0]), *out[1:]) if isinstance(out, tuple) else adapter(out)
    )


class Beside(nn.Module):
    """s · up(ReLU(down x)), to be added to what a module makes of x; the way up started at zero."""

    def __init__(self, width: int, inner: int, scale: float) -> None:
        super().__init__()
        self.down, self.up, self.scale = nn.Linear(width, inner), nn.Linear(inner, width), scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(nn.functional.relu(self.down(x)))


def add_beside(module: nn.Module, width: int, inner: int = 64, scale: float = 0.1) -> None:
    """AdaptFormer's branch (Chen et al. 2022) beside an MLP of a block, (…, `width`): it reads what the MLP reads."""
    beside = Beside(width, inner, scale)
    module.add_module("beside", beside)
    module.register_forward_hook(lambda _module, args, out: out + beside(args[0]))


class VirtualTokens(nn.Module):
    """An embedding table whose ids from `size` on are trainable vectors, started at random rows of the table (prompt
    tuning, Lester et al. 2021)."""

    def __init__(self, table: nn.Embedding, count: int) -> None:
        super().__init__()
        self.table, self.size = table, table.num_embeddings
        picks = torch.randint(self.size, (count,))
        self.prompt = nn.Parameter(table.weight.detach()[picks.to(table.weight.device)].clone())

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        virtual = ids >= self.size
        rows = self.prompt[(ids - self.size).clamp(min=0)]
        return torch.where(virtual[..., None], rows, self.table(ids.masked_fill(virtual, 0)))
