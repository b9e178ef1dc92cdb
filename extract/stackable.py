"""`Stackable`: autograd functions that serve one model and, under `torch.func`, several that are computed as one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch


class Stackable(torch.autograd.Function):
    """A function in the form that `torch.func` asks for: `forward` without a context, `setup_context`, and a rule for
    `vmap`. It is called by `run`: `apply` of this form reads the signature of `forward` each time, which takes longer
    than a small kernel does, so outside of transforms the same is applied in the older form."""

    _alone: ClassVar[type[torch.autograd.Function]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = cls.forward(*inputs)
            cls.setup_context(ctx, inputs, output)
            return output

        parts = {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)}
        cls._alone = type(cls.__name__, (torch.autograd.Function,), parts)

    @classmethod
    def run(cls, *inputs: Any) -> Any:
        """The output for `inputs`."""
        form = cls if torch._C._are_functorch_transforms_active() else cls._alone
        return form.apply(*inputs)
