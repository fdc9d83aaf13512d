"""Statistics of Adam's state, against the theory (statements A to F) and against torch's own optimisers."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from puna.train.adam_sampler import Sampler, kind_of
from puna.train.adam_stats import RATIO_BINS, Watched, coordinates, statistics

WIDTH = 2048


class Watch:
    """A parameter of one tensor with its sampler: hands in gradients, steps, and gives the statistics of each step."""

    def __init__(
        self, make: Callable[[list[nn.Parameter]], Optimizer], width: int = WIDTH, dtype: Any = torch.float64
    ) -> None:
        self.parameter = nn.Parameter(torch.ones(width, dtype=dtype))
        self.optimizer = make([self.parameter])
        tensor = Watched("tensor", "layer 0", self.parameter, self.optimizer, self.optimizer.param_groups[0])
        self.sampler = Sampler(kind_of(tensor), [tensor], {"layer 0": 0}, WIDTH)
        self.histogram = np.zeros(RATIO_BINS)

    @torch.no_grad()
    def step(self, gradient: Tensor) -> dict[str, float]:
        self.parameter.grad = gradient.to(self.parameter.dtype).clone()
        totals, stalls, ratios = self.sampler.split(self.sampler.look().numpy())
        self.histogram = ratios[0]
        self.optimizer.step()
        rate = np.array([self.optimizer.param_groups[0]["lr"]])
        found = statistics(totals, stalls, rate, self.sampler.num_sampled)
        return {key: float(values[0]) for key, values in found.items()}


def adam(beta2: float = 0.95, eps: float = 1e-30, lr: float = 1e-9, **more: Any) -> Callable[..., Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=(0.9, beta2), eps=eps, **more)


def normal(seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(WIDTH, generator=generator, dtype=torch.float64)


def after(watch: Watch, gradients: Iterator[Tensor], num_steps: int = 100, last: int = 30) -> dict[str, float]:
    """Means over the last of some steps."""
    seen = [watch.step(next(gradients)) for _ in range(num_steps)][-last:]
    return {key: float(np.mean([one[key] for one in seen])) for key in seen[0]}


def correlated(rho: float) -> Iterator[Tensor]:
    noise = normal(1)
    g = next(noise)
    while True:
        yield g
        g = rho * g + math.sqrt(1 - rho**2) * next(noise)


def with_mean(q: float) -> Iterator[Tensor]:
    noise = normal(2)
    mean = q * next(noise).sign()
    while True:
        yield mean + next(noise)


def test_a_independent_gradients_give_a_bell() -> None:
    found = after(Watch(adam(0.999)), normal())
    assert found["u_rms"] == pytest.approx(math.sqrt(0.1 / 1.9), rel=0.03)
    found = after(Watch(adam(0.95)), normal())
    assert found["u_rms"] == pytest.approx(0.225, rel=0.03)
    assert found["bc"] == pytest.approx(0.37, rel=0.03)
    assert found["f9"] == 0
    assert found["surprise"] == pytest.approx(1, rel=0.03)
    assert found["lag_cosine"] == pytest.approx(0, abs=0.01)
    assert found["stable_rms"] == pytest.approx(1, rel=0.03)
    assert found["g_rms"] == pytest.approx(1, rel=0.03)


def test_b_a_constant_gradient_gives_its_sign() -> None:
    watch = Watch(adam())
    gradient = next(normal())
    found = after(watch, iter([gradient] * 300))
    assert found["u_rms"] == pytest.approx(1, rel=1e-6)
    assert found["bc"] == pytest.approx(1, rel=1e-3)
    assert found["f9"] == 1
    assert found["lag_cosine"] == pytest.approx(1, abs=1e-6)
    edges = (np.flatnonzero(watch.histogram) + 0.5) * 4 / RATIO_BINS - 2
    np.testing.assert_allclose(np.abs(edges), 1, atol=0.05)
    assert watch.histogram.sum() == WIDTH


@pytest.mark.parametrize(("rho", "table"), [(0.0, 0.225), (0.3, 0.291), (0.5, 0.353)])
def test_c_correlation_widens_the_bell(rho: float, table: float) -> None:
    theory = math.sqrt(0.1 / 1.9 * (1 + 0.9 * rho) / (1 - 0.9 * rho))
    found = after(Watch(adam(0.95)), correlated(rho))
    assert found["u_rms"] == pytest.approx(table, rel=0.03)
    assert found["u_rms"] == pytest.approx(theory, rel=0.1)
    assert found["lag_cosine"] == pytest.approx(rho, abs=0.02)
    slow = after(Watch(adam(0.999)), correlated(rho))
    assert slow["u_rms"] == pytest.approx(theory, rel=0.03)


@pytest.mark.parametrize(("rho", "u_rms", "f9", "bc"), [(0.9, 0.616, 0.14, 0.57), (0.99, 0.839, 0.48, 0.77)])
def test_c_with_much_correlation_the_shape_changes(rho: float, u_rms: float, f9: float, bc: float) -> None:
    found = after(Watch(adam(0.95)), correlated(rho), 250, 150)
    assert found["u_rms"] == pytest.approx(u_rms, rel=0.03)
    assert found["f9"] == pytest.approx(f9, rel=0.1)
    assert found["bc"] == pytest.approx(bc, abs=0.02)


@pytest.mark.parametrize(
    ("q", "u_rms", "f9", "bc"), [(0.5, 0.480, 0.0003, 0.69), (1, 0.714, 0.027, 0.91), (2, 0.896, 0.49, 0.985)]
)
def test_d_signal_over_noise_makes_two_peaks(q: float, u_rms: float, f9: float, bc: float) -> None:
    watch = Watch(adam(0.95))
    found = after(watch, with_mean(q))
    assert found["u_rms"] == pytest.approx(u_rms, rel=0.03)
    assert found["f9"] == pytest.approx(f9, rel=0.1, abs=5e-4)
    assert found["bc"] == pytest.approx(bc, rel=0.03)
    peak = abs((int(np.argmax(watch.histogram)) + 0.5) * 4 / RATIO_BINS - 2)
    assert peak == pytest.approx(q / math.sqrt(1 + q * q), abs=0.1)


@pytest.mark.parametrize(("a", "below"), [(10.0, 0.0), (1.0, 0.5), (0.1, 1.0)])
def test_e_epsilon_shrinks_the_update(a: float, below: float) -> None:
    signs = lambda: (g.sign() / a * 10 for g in normal())  # noqa: E731  v^ is (10 / a)^2 in every coordinate
    free, damped = after(Watch(adam(0.95)), signs(), 100), after(Watch(adam(0.95, eps=10 / a / a)), signs(), 100)
    assert damped["u_rms"] / free["u_rms"] == pytest.approx(a / (a + 1), rel=0.01)
    assert damped["stall"] == pytest.approx(a, rel=0.5)
    assert damped["below_eps"] == pytest.approx(below, abs=0.51)


BURST = {
    0.95: {1: 0.447, 2: 0.608, 5: 0.861, 10: 1.028, 20: 1.097, 50: 1.035, 100: 1.003},
    0.99: {1: 1.00, 2: 1.35, 5: 1.85, 10: 2.11, 20: 2.06, 50: 1.58, 100: 1.26},
    0.999: {1: 3.16, 2: 4.25, 5: 5.80, 10: 6.53, 20: 6.24, 50: 4.50, 100: 3.24},
}


@pytest.mark.parametrize("beta2", BURST)
def test_f_a_burst_after_a_stall(beta2: float) -> None:
    watch = Watch(adam(beta2), 64)
    watch.step(torch.full((64,), 1e-60, dtype=torch.float64))
    watch.optimizer.state[watch.parameter]["step"].fill_(1e6)  # late in training: no bias is left
    for k in range(1, 101):
        found = watch.step(torch.ones(64))
        theory = (1 - 0.9**k) / math.sqrt(1 - beta2**k)
        assert found["u_rms"] == pytest.approx(theory, rel=1e-6)
        if k in BURST[beta2]:
            assert found["u_rms"] == pytest.approx(BURST[beta2][k], rel=0.03)
        if k == 1:
            assert found["surprise"] > 1e20


def test_the_first_update_is_the_sign() -> None:
    watch = Watch(adam(0.999, eps=0.0))
    found = watch.step(next(normal()))
    assert found["u_rms"] == pytest.approx(1, rel=1e-12)
    assert found["f9"] == 1
    assert math.isnan(found["surprise"]), "nothing was expected yet"


def test_scale_does_not_matter_without_epsilon() -> None:
    """Bit-equal losses over 30 steps with the loss times 2^-20, and not with epsilon 1e-8."""

    def losses(scale: float, eps: float) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=eps, foreach=False)
        inputs, targets = torch.randn(32, 8).double(), torch.randint(4, (32,))
        found = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            found.append(loss.item())
            (loss * scale).backward()
            optimizer.step()
        return found

    assert losses(1.0, 0.0) == losses(2.0**-20, 0.0)
    assert losses(1.0, 1e-8) != losses(2.0**-20, 1e-8)


FAMILY: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in FAMILY),
    ("adam", {"amsgrad": True}),
    ("adamw", {"amsgrad": True, "maximize": True}),
    ("adam", {"weight_decay": 0.3}),
    ("adamw", {"weight_decay": 0.0, "fused": True}),
    ("adamw", {"weight_decay": 0.0, "foreach": True}),
    ("nadam", {"weight_decay": 0.3, "maximize": True}),
    ("radam", {"weight_decay": 0.3}),
    ("adamax", {"weight_decay": 0.3, "eps": 1e-3}),
    ("nadam", {"momentum_decay": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: str(value))
def test_r_is_the_update_that_torch_makes(name: str, options: dict[str, Any]) -> None:
    """u_rms and the cosine with the gradient, told before the step, are those of the weights' change over the rate."""
    if name == "adamw":
        options = {"weight_decay": 0.0} | options
    watch = Watch(lambda p: FAMILY[name](p, lr=1e-3, **options), 512)
    generator, decay = torch.Generator().manual_seed(3), options.get("weight_decay", 0.0)
    for step in range(12):
        gradient = torch.randn(512, generator=generator, dtype=torch.float64) * (0.1 if step % 5 else 3.0)
        before = watch.parameter.detach().clone()
        found = watch.step(gradient)
        change = (before - watch.parameter.detach()) / 1e-3
        used = (-gradient if options.get("maximize") else gradient) + decay * before
        cosine = torch.nn.functional.cosine_similarity(change, used, dim=0).item()
        assert found["u_rms"] == pytest.approx(change.square().mean().sqrt().item(), rel=1e-6)
        assert found["descent_cosine"] == pytest.approx(cosine, rel=1e-5)
        assert found["f9"] == pytest.approx((change.abs() > 0.9).double().mean().item())
        ratio = (change.norm() * 1e-3 / before.norm()).item()
        assert found["update_ratio"] == pytest.approx(ratio, rel=1e-6)


def test_what_never_had_a_gradient_is_counted_apart() -> None:
    watch = Watch(adam())
    rows = torch.zeros(WIDTH, dtype=torch.float64)
    rows[::10] = 1
    found = after(watch, (g * rows for g in normal()))
    assert found["unseen"] == pytest.approx(0.9, abs=1e-3)
    assert found["num_active"] == 205
    assert found["u_rms"] == pytest.approx(0.225, rel=0.05)
    assert found["surprise"] == pytest.approx(1, rel=0.05)
    assert found["below_eps"] == 0
    assert watch.histogram.sum() == 205
    late = watch.step(next(normal(9)))
    assert late["unseen"] == 0
    assert late["surprise"] == pytest.approx(1, rel=0.2), "rows that are seen for the first time surprise nobody"


@pytest.mark.parametrize("name", FAMILY)
def test_a_tensor_that_never_had_a_gradient_tells_nothing(name: str) -> None:
    watch = Watch(lambda p: FAMILY[name](p, lr=1e-3), 64)
    for _ in range(3):
        found = watch.step(torch.zeros(64))
    assert found["num_active"] == 0
    assert found["unseen"] == 1
    assert all(math.isnan(found[key]) for key in ("u_rms", "surprise", "stall", "below_eps", "bc", "f9"))
    assert watch.histogram.sum() == 0


def test_what_is_not_finite_is_told_and_left_out() -> None:
    watch = Watch(adam())
    after(watch, normal(), 50)
    gradient = next(normal(5))
    gradient[7], gradient[8] = math.nan, math.inf
    found = watch.step(gradient)
    assert found["num_nonfinite"] == 1
    assert found["g_rms"] == pytest.approx(1, rel=0.05)
    assert np.isfinite(watch.histogram).all()


def test_bf16_states_are_read_as_they_are() -> None:
    """v of 0.001 g^2 a step stands still in bf16 where float32 lets it decay: the reading follows the state."""
    watches = [Watch(adam(0.999, eps=1e-8, lr=1e-3), dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    for watch in watches:
        after(watch, normal(), 60)
        watch.optimizer.state[watch.parameter]["step"].fill_(1e4)
    coarse, fine = (after(watch, (g * 1e-3 for g in normal()), 60) for watch in watches)
    assert coarse["surprise"] < 0.985 * fine["surprise"]


def test_coordinates_are_spread_distinct_and_a_function_of_name_and_size() -> None:
    chosen = coordinates("a", 1_000_000, 4096)
    assert (np.diff(chosen) > 0).all()
    assert chosen[-1] < 1_000_000
    counts = np.histogram(chosen, 16, (0, 1_000_000))[0]
    assert (np.abs(counts - 256) <= 1).all()
    np.testing.assert_array_equal(chosen, coordinates("a", 1_000_000, 4096))
    assert (chosen != coordinates("b", 1_000_000, 4096)).mean() > 0.9
    np.testing.assert_array_equal(coordinates("a", 4096, 4096), np.arange(4096))
