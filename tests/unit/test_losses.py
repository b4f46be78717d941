"""The chunked loss equals the plain one in float64, value and gradient, and never holds positions × vocabulary."""

import pytest
import torch

from lingraft import losses
from lingraft.losses import project, summed_cross_entropy
from tests.unit.largest import Largest

CHUNK, WIDTH, VOCABULARY = 20, 6, 37
SIZES = [1, 7, 8, 9, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 9]
"""Around the chunk, and around the 8 rows that a processor works on at a time."""
SOFTCAPS = [None, 2.0, 30.0]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", CHUNK)


def problem(positions: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States (which want a gradient), output embedding and labels."""
    random = torch.Generator().manual_seed(positions)
    states = torch.randn(positions, WIDTH, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=random).to(dtype)
    labels = torch.randint(VOCABULARY, (positions,), generator=random)
    return states, weight, labels


def plain(
    states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient from full logits in float64."""
    states = states.detach().double().requires_grad_()
    logits = states @ weight.double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, states)
    return loss.detach(), gradient


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("positions", SIZES)
def test_value_and_gradient_equal_full_logits_in_float64(positions: int, softcap: float | None) -> None:
    states, weight, labels = problem(positions)
    loss = summed_cross_entropy(states, weight, labels, softcap)
    loss.backward()
    expected, gradient = plain(states, weight, labels, softcap)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert states.grad is not None
    assert states.grad.dtype == torch.float32
    torch.testing.assert_close(states.grad.double(), gradient, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("chunk", [1, 3, 8, 11, 1000])
def test_any_size_of_chunk_gives_the_same(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    states, weight, labels = problem(29)
    loss = summed_cross_entropy(states, weight, labels)
    loss.backward()
    expected, gradient = plain(states, weight, labels, None)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert states.grad is not None
    torch.testing.assert_close(states.grad.double(), gradient, rtol=1e-5, atol=2e-6)


def test_no_positions_have_no_loss() -> None:
    states, weight, labels = problem(0)
    loss = summed_cross_entropy(states, weight, labels)
    loss.backward()
    assert loss.item() == 0
    assert states.grad is not None
    assert states.grad.shape == (0, WIDTH)


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_bfloat16_errs_by_the_rounding_of_its_logits_and_no_more(softcap: float | None) -> None:
    states, weight, labels = problem(2 * CHUNK + 9, torch.bfloat16)
    loss = summed_cross_entropy(states, weight, labels, softcap)
    loss.backward()
    expected, gradient = plain(states, weight, labels, softcap)
    logits = states.detach().double() @ weight.double().T
    assert loss.dtype == torch.float32, "a sum in bfloat16 would keep three digits"
    # A logit is off by at most 2⁻⁹ of itself, and cross-entropy by at most twice the largest error of its logits.
    assert abs(loss.item() - expected.item()) <= 2 * 2.0**-9 * logits.abs().amax(dim=1).sum().item()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    assert states.grad is not None
    assert states.grad.dtype == torch.bfloat16
    assert (states.grad.double() - gradient).norm() <= 0.01 * gradient.norm()


def test_float32_states_meet_a_bfloat16_embedding() -> None:
    states, weight, labels = problem(9)
    states = states.detach().bfloat16().float().requires_grad_()
    loss = summed_cross_entropy(states, weight.bfloat16(), labels)
    loss.backward()
    expected, gradient = plain(states, weight.bfloat16(), labels, None)
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    assert states.grad is not None
    assert states.grad.dtype == torch.float32
    assert (states.grad.double() - gradient).norm() <= 0.01 * gradient.norm()


@pytest.mark.parametrize("softcap", [None, 500.0])
def test_logits_in_the_thousands_do_not_overflow(softcap: float | None) -> None:
    states, weight, labels = problem(CHUNK + 1)
    large = (states.detach() * 1000).requires_grad_()
    loss = summed_cross_entropy(large, weight, labels, softcap)
    loss.backward()
    expected, gradient = plain(large, weight, labels, softcap)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert large.grad is not None
    torch.testing.assert_close(large.grad.double(), gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_the_gradient_is_the_slope_of_the_loss(softcap: float | None) -> None:
    states, weight, labels = problem(CHUNK + 1)
    summed_cross_entropy(states, weight, labels, softcap).backward()
    assert states.grad is not None
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()
    step = 0.02
    with torch.no_grad():
        up, down = (summed_cross_entropy(states + sign * step * direction, weight, labels, softcap) for sign in (1, -1))
    slope = (up.item() - down.item()) / (2 * step)
    assert abs(slope) > 0.01
    assert (states.grad * direction).sum().item() == pytest.approx(slope, abs=0.005)


def test_what_comes_from_above_multiplies_the_gradient() -> None:
    states, weight, labels = problem(CHUNK + 1)
    (summed_cross_entropy(states, weight, labels) * -0.25).backward()
    assert states.grad is not None
    _, gradient = plain(states, weight, labels, None)
    torch.testing.assert_close(states.grad.double(), -0.25 * gradient, rtol=1e-5, atol=1e-6)


def test_inputs_are_left_as_they_were_and_the_embedding_gets_no_gradient() -> None:
    states, weight, labels = problem(CHUNK + 1)
    weight.requires_grad_()
    copies = [t.detach().clone() for t in (states, weight, labels)]
    summed_cross_entropy(states, weight, labels, 2.0).backward()
    for tensor, copy in zip((states, weight, labels), copies, strict=True):
        assert torch.equal(tensor, copy)
    assert weight.grad is None


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_positions_times_vocabulary_is_never_held(softcap: float | None) -> None:
    states, weight, labels = problem(4 * CHUNK)
    with Largest() as seen:
        summed_cross_entropy(states, weight, labels, softcap).backward()
    assert seen.elements == CHUNK * VOCABULARY
    with Largest() as seen:  # The yardstick measures: the plain way does hold it.
        torch.nn.functional.cross_entropy(project(states, weight, softcap), labels).backward()
    assert seen.elements == len(states) * VOCABULARY


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_project_gives_bounded_logits_in_float32(softcap: float | None) -> None:
    states, weight, _ = problem(9, torch.bfloat16)
    logits = project(states, weight, softcap)
    exact = states.double() @ weight.double().T
    expected = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=2.0**-8, atol=1e-3)
    if softcap is not None:
        assert logits.abs().max() <= softcap
