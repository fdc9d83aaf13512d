"""The device's codec gives the host's streams and reads them: on CUDA where it is, else by Triton's interpreter."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from puna.errors import DataError
from puna.recsys.alltoall import Exchange
from puna.recsys.codec import planes, quantise
from puna.recsys.codec.api import Codec
from puna.recsys.codec.quantise import Grid
from puna.recsys.wires import Block, Bounded, Half, Int8

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed: the extra gpu")
gpu_codec, gpu_wires = import_module("puna.recsys.gpu_codec"), import_module("puna.recsys.gpu_wires")

DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
WIDTHS = [
    (0.4, 2),
    (0.2, 3),
    (0.05, 4),
    (0.03, 5),
    (0.01, 6),
    (0.005, 7),
    (0.002, 8),
    (1e-3, 9),
    (1e-4, 13),
    (9e-6, 16),
]


@pytest.fixture(autouse=True)
def _no_words_from_numpy():
    """The interpreter computes with numpy, which warns where a GPU gives infinity in silence."""
    with np.errstate(all="ignore"):
        yield


def on_device(array):
    return None if array is None else torch.from_numpy(np.array(array)).to(DEVICE)


def compare(host, rows, ids, bound):
    """Equal bytes, and equal rows from them; returns these."""
    stream = host.encode(rows, ids, bound or 0.5, "fixed" if bound else "raw")
    found = gpu_codec.encode(on_device(rows), on_device(ids), bound)
    assert found.cpu().numpy().tobytes() == stream
    again = gpu_codec.decode(on_device(np.frombuffer(stream, np.uint8)), on_device(ids)).cpu().numpy()
    assert (again.view(np.uint32) == host.decode(stream, ids).view(np.uint32)).all()
    return again


def sweep(case_of, check_bound, seeds):
    host = Codec()
    for seed in seeds:
        case = case_of(seed)
        check_bound(case.rows, compare(host, case.rows, case.ids, case.bound), case.bound)
        if seed % 4 == 0:
            again = compare(host, case.rows, case.ids, 0.0)
            assert (again.view(np.uint32) == case.rows.view(np.uint32)).all()


def test_slices_of_every_kind_have_the_hosts_bytes(case_of, check_bound):
    sweep(case_of, check_bound, range(64))


@pytest.mark.slow
def test_thousands_of_slices_have_the_hosts_bytes(case_of, check_bound):
    sweep(case_of, check_bound, range(64, 10_000))


@pytest.mark.parametrize(("bound", "bits"), WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_every_width(check_bound, bound, bits, offset):
    rows = (offset + np.random.default_rng(bits).random((150, 17)) - 0.5).astype(np.float32)
    if bound > 1e-4 or not offset:
        rows[[3, 77], 5] = np.nan, np.inf
    check_bound(rows, compare(Codec(), rows, None, bound), bound)
    if not offset:
        assert abs(8 * len(gpu_codec.encode(on_device(rows), None, bound)) / rows.size - bits) < 1


def test_lookups_share_rows(lookups, check_bound):
    for num_rows in (3, 700):
        rows, ids = lookups(num_rows, 16, num_lookups=512)
        for known in (ids, None):
            check_bound(rows, compare(Codec(), rows, known, 0.02), 0.02)


@pytest.mark.parametrize(
    "grid", [Grid(np.float32(0.0199), 0.0, -400, 801), Grid(np.float32(0.001), 1.0, 0, 1001)], ids=["zero", "base"]
)
def test_values_between_two_codes_fall_to_the_hosts_side(grid):
    """Half-way between codes, and next to it, where the last bit of the arithmetic decides."""
    halves = (grid.base + (np.arange(grid.num_codes - 1) + grid.low + 0.5) * float(grid.step)).astype(np.float32)
    values = np.concatenate([halves, np.nextafter(halves, np.float32(9)), np.nextafter(halves, np.float32(-9))])
    codes, width = np.empty(len(values), np.int64), planes.width_of(grid.num_codes)
    for error in (grid.step, grid.step / 2):
        num_broken = quantise.quantise_wide(values, grid, error, codes)
        broken = torch.zeros(len(values), dtype=torch.uint8, device=DEVICE)
        numbers = gpu_codec.numbers_of(grid, error, DEVICE)
        found = gpu_codec.packed(on_device(values), width, gpu_codec.kind_of(grid), numbers, broken)
        assert int(broken.sum()) == num_broken
        sound = ~broken.cpu().numpy().astype(bool)
        ours = np.empty_like(codes)
        planes.unpack(found.cpu().numpy(), 1 << width, ours)
        assert sound.any()
        assert (ours[sound] == codes[sound]).all()


def test_where_each_row_breaks_the_bound_all_are_sent_as_they_are():
    rows = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    rows[:, 1] = np.nan
    compare(Codec(), rows, None, 0.1)
    assert len(gpu_codec.encode(on_device(rows), None, 0.1)) < rows.nbytes + 10


def test_empty():
    compare(Codec(), np.zeros((0, 4), np.float32), None, 0.1)
    compare(Codec(), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 0.1)
    assert gpu_codec.encode_many([]) == gpu_codec.decode_many([], []) == []


def test_wrong_arguments_and_streams():
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids = torch.arange(40, device=DEVICE) // 2
    same = rows[ids]
    stream = gpu_codec.encode(same, ids, 0.02)
    for words, call in {
        r"rows are torch.float64 of shape \(40, 5\)": lambda: gpu_codec.encode(rows.double()),
        r"the bound is 0.6. It is a share": lambda: gpu_codec.encode(rows, None, 0.6),
        r"ids have shape \(3,\). They must have shape \(40,\)": lambda: gpu_codec.encode(rows, ids[:3]),
        r"made with ids that its receiver knows": lambda: gpu_codec.decode(stream),
        r"these ids are not those of 20 rows": lambda: gpu_codec.decode(stream, ids // 2),
        r"\d+ bytes for 100 codes of 5 bits": lambda: gpu_codec.decode(stream[:-1], ids),
        r"a code beyond the last": lambda: gpu_codec.decode(torch.cat((stream[:-40], stream[-40:] | 255)), ids),
        r"it has 2 bytes": lambda: gpu_codec.decode(stream[:2], ids),
        r"the checksum of its head": lambda: gpu_codec.decode(torch.cat((stream[:3], stream[3:] ^ 1)), ids),
    }.items():
        with pytest.raises(DataError, match=words):
            call()
    host = Codec().encode(same.cpu().numpy(), None, 0.02, "rans")
    with pytest.raises(DataError, match=r"of method rans. The device reads fixed and raw"):
        gpu_codec.decode(on_device(np.frombuffer(host, np.uint8)))


@pytest.mark.parametrize("unbiased", [False, True])
def test_wires_send_the_hosts_bytes(unbiased):
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(shape).astype(np.float32) for shape in ((60, 16), (7, 5), (0, 8), (33, 1))]
    parts[0][::2] *= 1e5
    blocks = [
        Block(*part.shape, bound, 0.0, seed)
        for part, bound, seed in zip(parts, (0.02, 0.05, 0.05, 0.0), (9, 2**64 - 5, 3, 4), strict=True)
    ]
    for wire, like in ((gpu_wires.DeviceBounded(), Bounded("fixed")), (gpu_wires.DeviceHalf(), Half())):
        streams = wire.encode(blocks, [on_device(part) for part in parts], unbiased)
        theirs = like.encode(blocks, parts, unbiased)
        assert [bytes(stream.cpu().numpy()) for stream in streams] == [bytes(stream) for stream in theirs]
        outs = [torch.empty(part.shape, device=DEVICE) for part in parts]
        again = [np.empty_like(part) for part in parts]
        wire.decode(blocks, streams, outs)
        like.decode(blocks, theirs, again)
        assert all((out.cpu().numpy() == other).all() for out, other in zip(outs, again, strict=True))


def test_int8_is_within_a_code_of_the_host():
    parts = [
        np.random.default_rng(n).normal(size=shape).astype(np.float32)
        for n, shape in enumerate(((40, 16), (5, 33), (0, 2)))
    ]
    blocks, wire, like = [Block(*part.shape) for part in parts], gpu_wires.DeviceInt8(), Int8()
    streams = wire.encode(blocks, [on_device(part) for part in parts], False)
    theirs, outs = like.encode(blocks, parts, False), [torch.empty(part.shape, device=DEVICE) for part in parts]
    assert (
        [len(stream) for stream in streams] == [wire.size(block) for block in blocks] == [like.size(b) for b in blocks]
    )
    wire.decode(blocks, streams, outs)
    for part, ours, host, out in zip(parts, streams, theirs, outs, strict=True):
        ours, host = (np.array(s).reshape(len(part), part.shape[1] + 8) for s in (ours.cpu(), host))
        assert (np.abs(ours[:, :-8].astype(int) - host[:, :-8]) <= 1).all()
        assert (ours[:, :-8] == host[:, :-8]).mean() > 0.99 if len(part) else True
        ends = [np.ascontiguousarray(table[:, -8:]).view(np.float32) for table in (ours, host)]
        np.testing.assert_allclose(*ends, rtol=1e-6)
        if len(part):
            spread = part.max(1, keepdims=True) - part.min(1, keepdims=True)
            assert (np.abs(out.cpu().numpy() - part) <= 0.51 * spread / 255 + 1e-6).all()


@pytest.mark.parametrize("name", ["bounded", "fp16", "int8"])
def test_an_exchange_of_tensors_on_the_device(name):
    blocks = [[Block(30, 8, 0.02, 0.05, 7), Block(4, 3, 0.05, 0.05, 1)]]
    x = torch.randn(252, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    exchange = Exchange(None, gpu_wires.device_wire(name), gpu_wires.device_wire(name), local=True)
    out = exchange(x, blocks, blocks)
    weights = torch.randn(252, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    (out * weights).sum().backward()
    assert out.device.type == x.grad.device.type == DEVICE.type
    for got, sent, bound in ((out.detach(), x.detach(), 0.02), (x.grad, weights, 0.1)):
        assert not torch.equal(got, sent)
        assert (got[:240] - sent[:240]).abs().max() <= bound * (sent[:240].max() - sent[:240].min())


@pytest.mark.slow
def test_kernels_compile_for_a_gpu():
    """To machine code, which needs no GPU; multiplications and additions that the host keeps apart stay apart."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_ALWAYS_COMPILE": "1"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines()]
    assert len(told) >= 18
    assert all(int(num_bytes) > 0 and fused == "0" for _, _, num_bytes, fused in told)
