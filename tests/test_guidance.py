"""What the kinds of guidance promise, on plain tensors."""

import pytest
import torch

from snoopi_rt.engines.base import InputError
from snoopi_rt.export.guidance import GUIDANCE, find_guidance
from snoopi_rt.kernels import attention, nasa_attention, projected_attention

# (batch, heads, queries, positive tokens, negative tokens, head size)
SHAPES = [
    (1, 1, 1, 1, 1, 8),  # minimal
    (2, 4, 64, 9, 4, 64),  # the small backbone
    (3, 2, 7, 5, 11, 40),  # nothing aligned, negative longer than the prompt
]


def tensors(batch, heads, queries, t, u, size):
    random = torch.Generator().manual_seed(0)

    def draw(tokens):
        return torch.randn(batch, heads, tokens, size, generator=random)

    mask_pos = torch.arange(t) < torch.tensor([t - i % t for i in range(batch)])[:, None]
    mask_neg = torch.arange(u) < torch.tensor([u - i % u for i in range(batch)])[:, None]
    return draw(queries), draw(t), draw(t), mask_pos, draw(u), draw(u), mask_neg


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_torch(shape):
    q, k, v, mask, *_ = tensors(*shape)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    torch.testing.assert_close(attention(q, k, v, mask), expected, atol=2e-6, rtol=1e-5)


def test_a_fully_masked_branch_gives_zero():
    q, k, v, mask, *_ = tensors(*SHAPES[1])
    assert torch.equal(attention(q, k, v, torch.zeros_like(mask)), torch.zeros_like(q))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nasa", "projected"])
def test_scale_zero_equals_positive_only_bit_for_bit(kind, shape):
    q, k, v, mask, *negative = tensors(*shape)
    empty = (k[:1, :, :1], v[:1, :, :1]) if GUIDANCE[kind].measures_from_empty else ()
    guided = GUIDANCE[kind].attend(q, k, v, mask, *negative, torch.zeros(len(q)), *empty)
    assert torch.equal(guided, attention(q, k, v, mask))


def test_nasa_is_the_papers_subtraction():
    q, k, v, mask, k_neg, v_neg, mask_neg = tensors(*SHAPES[1])
    scale = torch.tensor([0.5, 1.0])
    expected = attention(q, k, v, mask) - scale.view(2, 1, 1, 1) * attention(q, k_neg, v_neg, mask_neg)
    assert torch.equal(nasa_attention(q, k, v, mask, k_neg, v_neg, mask_neg, scale), expected)


def test_nasa_with_the_prompt_as_its_own_negative_fades_it():
    q, k, v, mask, *_ = tensors(*SHAPES[1])
    faded = nasa_attention(q, k, v, mask, k, v, mask, torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(faded, 0.75 * attention(q, k, v, mask))


def test_projected_removes_the_negatives_share_exactly_at_scale_one():
    q, k, v, mask, k_neg, v_neg, mask_neg = tensors(*SHAPES[1])
    k_null, v_null = k[:1, :, :2], v[:1, :, :2]
    z = projected_attention(q, k, v, mask, k_neg, v_neg, mask_neg, torch.ones(2), k_null, v_null)
    null = attention(q, k_null, v_null)
    left = ((z - null) * (attention(q, k_neg, v_neg, mask_neg) - null)).sum((1, 3))
    assert left.max() < 1e-4  # nothing of the negative's direction is left; what pointed away from it stays


def test_projected_with_the_empty_prompt_as_negative_changes_nothing():
    q, k, v, mask, *_ = tensors(*SHAPES[1])
    null = k[:1, :, :2], v[:1, :, :2]
    negative = [x.expand(2, -1, -1, -1) for x in null]
    z = projected_attention(q, k, v, mask, *negative, None, torch.ones(2), *null)
    torch.testing.assert_close(z, attention(q, k, v, mask), atol=1e-5, rtol=1e-5)


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(InputError, match="choose from nasa, projected, none"):
        find_guidance("cfg")
