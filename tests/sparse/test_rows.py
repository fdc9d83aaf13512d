"""Rows in blocks are those of torch, to the bit, and nothing beside them is touched."""

import pytest
import torch

from puna.sparse.rows import add_row, array_of, copy_row, step_row

DTYPES = [torch.float32, torch.bfloat16]


def numbers(count: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    x[2:8] = torch.tensor([torch.nan, torch.inf, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, -torch.inf])
    return x.to(dtype)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 37])
def test_rows_are_as_in_torch(width, target, source):
    before, x = numbers(width + 9, target, 1), numbers(width + 9, source, 2)
    old, new = before[5 : 5 + width].float(), x[2 : 2 + width].float()
    wanted = {
        "copy": new.to(target),
        "add": (old + new).to(target),
        "step": (old - torch.tensor(0.3) * new).to(target),
    }
    for name, row in wanted.items():
        found = before.clone()
        given = array_of(found), 5, array_of(x), 2, width
        if name == "copy":
            copy_row(*given)
        elif name == "add":
            add_row(*given)
        else:
            step_row(*given, torch.tensor(0.3).item())
        whole = before.clone()
        whole[5 : 5 + width] = row
        torch.testing.assert_close(found, whole, rtol=0, atol=0, equal_nan=True)
