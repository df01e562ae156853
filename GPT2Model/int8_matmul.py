"""x Q^T with int8 weights Q and floating-point x, in three ways: the plain formula, and two that are faster on a CPU.

by_floats, the plain way, makes floats of Q and multiplies: correct everywhere, and slow for one row, since it writes
four bytes for each one that it reads.

by_digits leaves Q as it is and makes whole numbers of x: a row is written in fixed point, as digits to base 128 below
its largest magnitude, and each digit's product with Q is exact in int32. Nothing of Q is lost. Three digits hold 21
bits of a row's largest number and two hold 14, where the weights were rounded to 7.

by_packed is torch's own kernel for few rows of bfloat16, the fastest there. In torch 2.13 its float32 path was slower
than multiplying floats, and its bfloat16 path reads past the end of a row of odd length: wrong numbers, or a crash. So
it is called for nothing else.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8
from torch import Tensor

LEVELS = 127  # -128 is not used: then a row and its negative are rounded alike
BASE = 128
DIGITS = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 3}
SHIFTS = torch.tensor([1.0, BASE, BASE**2])  # what moves each digit before the point
PLACES = 1 / SHIFTS  # what each is worth
FEW, ALIGNED = 4, 32  # rows, and what d_in must be a multiple of, for by_packed
LONGEST = 2**17  # LEVELS * LEVELS * in_features must fit an int32


def int8_matmul(
    x: Float[Tensor, "rows d_in"], quantized: Int8[Tensor, "d_out d_in"], scale: Float[Tensor, " d_out"]
) -> Float[Tensor, "rows d_out"]:
    """x (quantized * scale)^T, in the dtype of x, by whichever way this machine, dtype and shape allow.

    Args:
        x: (rows, d_in). quantized: (d_out, d_in) whole numbers from -127 to 127. scale: (d_out,) float32.
    """
    # On a GPU torch's int8 product wants more than 16 rows; with one column its CPU product was wrong (torch 2.13).
    fits = x.device.type == "cpu" and x.dtype in DIGITS and len(x) and 2 <= x.shape[1] <= LONGEST
    packs = fits and x.dtype == torch.bfloat16 and len(x) <= FEW and x.shape[1] % ALIGNED == 0
    if packs and hasattr(torch, "_weight_int8pack_mm"):
        return by_packed(x, quantized, scale)
    if fits and int8_products_are_exact():
        return by_digits(x, quantized, scale)
    return by_floats(x, quantized, scale)


def by_floats(
    x: Float[Tensor, "rows d_in"], quantized: Int8[Tensor, "d_out d_in"], scale: Float[Tensor, " d_out"]
) -> Float[Tensor, "rows d_out"]:
    """The plain formula. Each scale is a power of two times a number near 1: the power goes into the weights, which
    loses nothing in any dtype and keeps the sums within float16's range, and the rest into the output."""
    power, rest = split(scale, x.dtype)
    return (F.linear(x, quantized.to(x.dtype) * power[:, None]) * rest).to(x.dtype)


def by_packed(
    x: Float[Tensor, "rows d_in"], quantized: Int8[Tensor, "d_out d_in"], scale: Float[Tensor, " d_out"]
) -> Float[Tensor, "rows d_out"]:
    """One call of torch's. It wants scales in the dtype of x, so it gets the powers of two: they lose nothing there."""
    power, rest = split(scale, x.dtype)
    return (torch._weight_int8pack_mm(x, quantized, power) * rest).to(x.dtype)


def split(scale: Float[Tensor, " d_out"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A power of two, exact in any dtype, and what it is to be multiplied with."""
    rest, _ = torch.frexp(scale)
    return (scale / rest).to(dtype), rest


def by_digits(
    x: Float[Tensor, "rows d_in"], quantized: Int8[Tensor, "d_out d_in"], scale: Float[Tensor, " d_out"]
) -> Float[Tensor, "rows d_out"]:
    """The product with each digit of x, in whole numbers. A row that holds NaN or infinity gives NaN.

    The last digit is rounded, so x is off by its row's largest magnitude / (254 * 128^(digits - 1)) at most.
    """
    digits, largest = to_digits(x, DIGITS[x.dtype])  # (count, rows, d_in)
    count, rows, _ = digits.shape
    products = torch._int_mm(digits.flatten(0, 1), quantized.t())  # (count * rows, d_out) int32, exact
    total = (PLACES[:count] @ products.view(count, -1).to(torch.float32)).view(rows, -1)
    return (total * (largest / LEVELS) * scale).to(x.dtype)


def to_digits(
    x: Float[Tensor, "rows d_in"], count: int
) -> tuple[Int8[Tensor, "count rows d_in"], Float[Tensor, "rows 1"]]:
    """x = largest / 127 * (digits[0] + digits[1] / 128 + ...), up to half of the last place; |digits[i]| <= 127."""
    x = x.to(torch.float32)
    largest = x.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    whole = (x * (LEVELS / largest) * SHIFTS[:count, None, None]).round_()  # what stands before each place
    digits = whole.clone()
    digits[1:] -= BASE * whole[:-1]
    return digits.to(torch.int8), largest


@lru_cache(maxsize=1)
def int8_products_are_exact() -> bool:
    """Whether torch multiplies whole numbers exactly here: on some processors sums of two products leave 16 bits."""
    numbers = torch.full((4, 64), LEVELS, dtype=torch.int8)
    numbers[1] = -LEVELS
    try:
        products: Int[Tensor, "4 4"] = torch._int_mm(numbers, numbers.t())
    except (AttributeError, RuntimeError, NotImplementedError):  # a torch without it
        return False
    return torch.equal(products.double(), numbers.double() @ numbers.double().t())
