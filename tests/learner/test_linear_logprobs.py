"""Log-probabilities from hidden states against plain autograd."""

import pytest
import torch
from torch import nn

from mentor_serve.learner.linear_logprobs import linear_logprobs

N, D, V = 7, 5, 11


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(V, D, dtype=dtype, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    return hidden, weight, targets


def plain(hidden, weight, targets, temperature):
    logits = hidden @ weight.t() / temperature
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(chunk_size, temperature):
    hidden, weight, targets = inputs()
    options = {"temperature": temperature, "chunk_size": chunk_size, "dtype": torch.float64}
    found = linear_logprobs(hidden, weight, targets, **options)
    expected = plain(hidden, weight, targets, temperature)
    torch.testing.assert_close(found, expected)
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(found, (hidden, weight), upstream),
        torch.autograd.grad(expected, (hidden, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_numerical_gradient():
    hidden, weight, targets = inputs()

    def of(hidden, weight):
        return linear_logprobs(
            hidden, weight, targets, temperature=0.8, chunk_size=2, dtype=torch.float64
        )

    assert torch.autograd.gradcheck(of, (hidden, weight))


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, targets = inputs(torch.float32)
    found = linear_logprobs(hidden, weight.detach(), targets, temperature=1.0, chunk_size=3)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    (expected,) = torch.autograd.grad(plain(hidden, weight, targets, 1.0).sum(), hidden)
    torch.testing.assert_close(gradient, expected)


def test_large_logits_stay_finite():
    hidden, weight, targets = inputs(torch.float32)
    found = linear_logprobs(hidden * 1e4, weight, targets, temperature=1.0, chunk_size=3)
    expected = plain(hidden * 1e4, weight, targets, 1.0)
    torch.testing.assert_close(found, expected)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(found.sum(), (hidden, weight)))


def test_what_is_not_finite_is_not_hidden():
    hidden, weight, targets = inputs(torch.float32)
    with torch.no_grad():
        hidden[2, 0] = torch.nan
    found = linear_logprobs(hidden, weight, targets, temperature=1.0, chunk_size=3)
    assert torch.isnan(found).tolist() == [False, False, True, False, False, False, False]


def test_half_precision_products_keep_the_softmax_single():
    hidden, weight, targets = inputs(torch.float32)
    found = linear_logprobs(
        hidden, weight, targets, temperature=1.0, chunk_size=3, dtype=torch.bfloat16
    )
    assert found.dtype == torch.float32
    # Products of 8 bits: logits of size 4 are off by about 0.02.
    torch.testing.assert_close(found, plain(hidden, weight, targets, 1.0), atol=0.1, rtol=0)
    gradients = torch.autograd.grad(found.sum(), (hidden, weight))
    exact = torch.autograd.grad(plain(hidden, weight, targets, 1.0).sum(), (hidden, weight))
    for one, other in zip(gradients, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=0.1, rtol=0)


def test_no_logits_are_kept_for_the_backward_pass():
    hidden, weight, targets = inputs(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_logprobs(hidden, nn.Parameter(weight), targets, temperature=1.0, chunk_size=3)
    assert all(shape.numel() < N * V for shape in kept)
