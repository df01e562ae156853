"""FlashAttention-3 from the package flash-attn-3 on Hopper, and FlashAttention-4 by the same door.

The package is called directly. Torch's hook, `torch.nn.attention.activate_flash_attention_impl("FA3" or "FA4")`, needs
the same package installed: it imports it and puts it in the place of torch's own flash kernel, for every call of the
process. What it puts there raises on dropout, and padding, documents and windows could still not be said, since torch's
op hands its flash kernel no mask.
Source: flash-attention, `hopper/flash_attn_interface.py` (3.0.0) and `flash_attn/cute/interface.py` (4.0.0 beta);
Shah et al. (2024), "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision".
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from CMHA.implementations import flash_package
from CMHA.request import AttentionRequest, Reason, capability_of

SUMMARY = "FlashAttention-3 from the package `flash-attn-3` (Hopper), or -4 from `flash-attn-4`; no dropout"
ALIASES = ("flash_attn_3", "fa3")
PADDED_QUERIES_GIVE_ZERO = True


@dataclass(frozen=True)
class Door:
    """A package that leads to these kernels.

    Attributes:
        package: its name in `CMHA/packages.py`.
        majors: the compute capabilities that it serves, by their first number: 9 is Hopper, 10 Blackwell.
        max_head_dim: the widest head; for FlashAttention-4 the widest with a backward pass on both.
    """

    package: str
    majors: tuple[int, ...]
    max_head_dim: int


DOORS = (Door("flash_attn_3", (9,), 256), Door("flash_attn_4", (9, 10), 128))  # the preferred one first


def doors(capability: tuple[int, int] | None, head_dim: int) -> list[Door]:
    """The doors that serve a device of this capability (any, if it is not known), and such heads if one does."""
    fitting = [door for door in DOORS if capability is None or capability[0] in door.majors]
    return [door for door in fitting if head_dim <= door.max_head_dim] or fitting


def check(request: AttentionRequest) -> list[Reason]:
    """Why neither package can serve the request; empty when one can."""
    fitting = doors(request.capability, request.head_dim)
    widest = max(door.max_head_dim for door in fitting or DOORS)
    reasons = flash_package.reasons_of_call(request, widest, head_dim_step=8)
    if not fitting:
        message = f"it needs compute capability 9.x (Hopper) or 10.x (Blackwell), this device has {request.capability}"
        reasons.append(Reason("capability", message, "use flash_attention_2, or sdpa"))
    if request.dropout:
        reasons.append(Reason("dropout", "it has no dropout", "use flash_attention_2 or sdpa, or no dropout"))
    return reasons + flash_package.reasons_of_machine(*(door.package for door in fitting or DOORS))


def attention(
    queries: Float[Tensor, "batch heads query_len head_dim"],
    keys: Float[Tensor, "batch kv_heads key_len head_dim"],
    values: Float[Tensor, "batch kv_heads key_len head_dim"],
    mask,
    *,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "batch heads query_len head_dim"], None]:
    """Attention by flash-attn-3 or -4. The contract of the registry; the weights are None, and dropout must be 0."""
    if dropout:
        raise ValueError(f"FlashAttention-3 has no dropout, got {dropout}: use flash_attention_2 or sdpa.")
    fitting = doors(capability_of(queries.device), queries.shape[-1])
    module = flash_package.first_importable(*(door.package for door in fitting or DOORS))
    return flash_package.attend(module, queries, keys, values, mask, scale=scale)
