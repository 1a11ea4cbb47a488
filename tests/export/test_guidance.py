"""What the kinds of guidance promise, on plain tensors."""

import numpy as np
import pytest
import torch

from snoopi_rt.errors import InputError
from snoopi_rt.export.guidance import GUIDANCE, Guidance, find_guidance
from snoopi_rt.export.presets.choose import default_preset
from snoopi_rt.export.presets.preset import override
from snoopi_rt.export.settings import changed
from snoopi_rt.export.training.recipe import StudentRecipe
from snoopi_rt.kernels import (
    attention,
    fused_attention,
    nag_attention,
    nasa_attention,
    projected_attention,
    transposed_attention,
    vsf_attention,
)

# (batch, heads, queries, positive tokens, negative tokens, head size)
SHAPES = [
    (1, 1, 1, 1, 1, 8),  # minimal
    (2, 4, 64, 9, 4, 64),  # the small backbone
    (3, 2, 7, 5, 11, 40),  # nothing aligned, negative longer than the prompt
]
KINDS = ["nasa", "nag", "vsf", "projected"]
ATTENTIONS = {"written out": attention, "fused": fused_attention, "transposed": transposed_attention}


def tensors(batch, heads, queries, t, u, size):
    random = torch.Generator().manual_seed(0)

    def draw(tokens):
        return torch.randn(batch, heads, tokens, size, generator=random)

    mask_pos = torch.arange(t) < torch.tensor([t - i % t for i in range(batch)])[:, None]
    mask_neg = torch.arange(u) < torch.tensor([u - i % u for i in range(batch)])[:, None]
    return draw(queries), draw(t), draw(t), mask_pos, draw(u), draw(u), mask_neg


def empty_prompt(kind, k, v):
    return (k[:1, :, :1], v[:1, :, :1]) if GUIDANCE[kind].measures_from_empty else ()


def softmax_mean(q, k, v, keep):
    """One query (d,) of one head over the kept rows of k and v (T, d)."""
    weights = np.array([np.exp(q @ key / np.sqrt(len(q))) if kept else 0.0 for key, kept in zip(k, keep, strict=True)])
    return weights @ np.asarray(v) / weights.sum()


def from_the_papers(kind, q, k_pos, v_pos, mask_pos, k_neg, v_neg, mask_neg, scale, k_null=None, v_null=None):
    """The formulas once more in float64, one query token of one image at a time; heads are rows (H, d)."""
    q, k_pos, v_pos, k_neg, v_neg = (x.double().numpy() for x in (q, k_pos, v_pos, k_neg, v_neg))
    keep_pos = np.ones(k_pos.shape[::2], bool) if mask_pos is None else mask_pos.numpy()
    keep_neg = np.ones(k_neg.shape[::2], bool) if mask_neg is None else mask_neg.numpy()
    result = np.empty_like(q)
    for b, i in np.ndindex(q.shape[0], q.shape[2]):
        a = float(scale[b])

        def branch(k, v, keep, b=b, i=i):
            return np.stack([softmax_mean(q[b, h, i], k[h], v[h], keep) for h in range(q.shape[1])])

        plus, minus = branch(k_pos[b], v_pos[b], keep_pos[b]), branch(k_neg[b], v_neg[b], keep_neg[b])
        match kind:
            case "nasa":
                z = plus - a * minus
            case "nag":
                tau, alpha = 2.5, 0.5
                z = plus + a * (plus - minus)
                ratio = np.abs(z).sum() / np.abs(plus).sum()
                z = alpha * (z * min(ratio, tau) / ratio) + (1 - alpha) * plus
            case "vsf":
                both = branch(
                    np.concatenate([k_pos[b], k_neg[b]], 1),
                    np.concatenate([v_pos[b], -a * v_neg[b]], 1),
                    [*keep_pos[b], *keep_neg[b]],
                )
                z = plus if a == 0 else both
            case "projected":
                null = branch(k_null[0].double().numpy(), v_null[0].double().numpy(), [True])
                d = minus - null
                z = plus - a * max(0.0, ((plus - null) * d).sum()) / ((d * d).sum() + 1e-6) * d
        result[b, :, i] = z
    return torch.from_numpy(result)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_equals_torch(name, shape):
    q, k, v, mask, *_ = tensors(*shape)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    torch.testing.assert_close(ATTENTIONS[name](q, k, v, mask), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_fully_masked_branch_gives_zero(name):
    q, k, v, mask, *_ = tensors(*SHAPES[1])
    assert torch.equal(ATTENTIONS[name](q, k, v, torch.zeros_like(mask)), torch.zeros_like(q))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_papers_formula(kind, name, masked, shape):
    q, k, v, mask, k_neg, v_neg, mask_neg = tensors(*shape)
    q, k_neg, v_neg = q[:, :, :5], k_neg, 4 * v_neg  # loops are slow; and large negatives reach NAG's cap
    if not masked:
        mask = mask_neg = None
    empty = empty_prompt(kind, k, v)
    for scale in (0.0, 0.2, 0.5, 1.0):
        arguments = (q, k, v, mask, k_neg, v_neg, mask_neg, torch.full((len(q),), scale), *empty)
        torch.testing.assert_close(
            GUIDANCE[kind].attend(*arguments, attention=ATTENTIONS[name]).double(),
            from_the_papers(kind, *arguments),
            atol=2e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_of_a_batch_has_its_own_scale(kind):
    q, k, v, mask, k_neg, v_neg, mask_neg = tensors(*SHAPES[2])
    empty = empty_prompt(kind, k, v)
    attend = GUIDANCE[kind].attend
    together = attend(q, k, v, mask, k_neg, v_neg, mask_neg, torch.tensor([0.0, 0.5, 1.0]), *empty)
    for i, scale in enumerate((0.0, 0.5, 1.0)):
        alone = attend(*(x[i : i + 1] for x in (q, k, v, mask, k_neg, v_neg, mask_neg)), torch.tensor([scale]), *empty)
        torch.testing.assert_close(together[i], alone[0], atol=2e-6, rtol=1e-5)
    assert (together[1] - together[0]).abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_equals_positive_only_bit_for_bit(kind, name, shape):
    q, k, v, mask, *negative = tensors(*shape)
    guided = GUIDANCE[kind].attend(q, k, v, mask, *negative, torch.zeros(len(q)), *empty_prompt(kind, k, v), attention=ATTENTIONS[name])
    assert torch.equal(guided, ATTENTIONS[name](q, k, v, mask))


@pytest.mark.parametrize("alpha", [0.125, 0.3, 0.375])  # one half would be exact by luck
def test_nag_is_off_at_scale_zero_whatever_its_constants(alpha):
    q, k, v, mask, *negative = tensors(*SHAPES[1])
    z = nag_attention(q, k, v, mask, *negative, torch.zeros(2), tau=1.0, alpha=alpha)
    assert torch.equal(z, attention(q, k, v, mask))


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_branches_without_any_token_never_give_nan(kind, name):
    q, k, v, mask, k_neg, v_neg, mask_neg = tensors(*SHAPES[2])
    none, none_neg = torch.zeros_like(mask), torch.zeros_like(mask_neg)
    for masks in ((mask, none_neg), (none, mask_neg), (none, none_neg)):
        z = GUIDANCE[kind].attend(
            q,
            k,
            v,
            masks[0],
            k_neg,
            v_neg,
            masks[1],
            torch.tensor([0.0, 0.5, 1.0]),
            *empty_prompt(kind, k, v),
            attention=ATTENTIONS[name],
        )
        assert torch.isfinite(z).all()


def test_nasa_with_the_prompt_as_its_own_negative_fades_it():
    q, k, v, mask, *_ = tensors(*SHAPES[1])
    faded = nasa_attention(q, k, v, mask, k, v, mask, torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(faded, 0.75 * attention(q, k, v, mask))


def test_nag_with_the_prompt_as_its_own_negative_changes_nothing():
    q, k, v, mask, *_ = tensors(*SHAPES[1])
    z = nag_attention(q, k, v, mask, k, v, mask, torch.tensor([2.0, 8.0]), tau=2.5, alpha=0.5)
    assert torch.equal(z, attention(q, k, v, mask))


def test_nag_never_exceeds_its_cap_and_a_larger_scale_is_still_capped():
    q, k, v, mask, k_neg, v_neg, mask_neg = tensors(*SHAPES[1])
    positive = attention(q, k, v, mask).abs().sum((1, 3))
    for scale in (1.0, 10.0):
        z = nag_attention(q, k, v, mask, k_neg, 9 * v_neg, mask_neg, torch.full((2,), scale), tau=2.5, alpha=1.0)
        assert (z.abs().sum((1, 3)) <= 2.5 * positive * (1 + 1e-5)).all()
    assert (z.abs().sum((1, 3)) > 2.4 * positive).all()


def test_nag_survives_fp16_where_a_sum_over_channels_would_overflow():
    q, k, v, mask, k_neg, v_neg, mask_neg = (x if x.dtype == torch.bool else x.half() for x in tensors(*SHAPES[1]))
    z = nag_attention(q, k, 1000 * v, mask, k_neg, -1000 * v_neg, mask_neg, torch.ones(2).half(), tau=2.5, alpha=0.5)
    assert torch.isfinite(z).all()


def test_vsf_is_nasa_behind_a_gate_of_the_attention():
    """Z = W Z+ - s (1 - W) Z-, W the prompt's share of VSF's one softmax over both prompts (kernels/ops/reference.py)."""
    q, k, v, _, k_neg, v_neg, _ = tensors(*SHAPES[1])
    scores = [torch.matmul(q, keys.transpose(-1, -2)) / q.shape[-1] ** 0.5 for keys in (k, k_neg)]
    share = torch.sigmoid(scores[0].logsumexp(-1, keepdim=True) - scores[1].logsumexp(-1, keepdim=True))
    expected = share * attention(q, k, v) - 0.7 * (1 - share) * attention(q, k_neg, v_neg)
    torch.testing.assert_close(vsf_attention(q, k, v, None, k_neg, v_neg, None, torch.full((2,), 0.7)), expected, atol=2e-6, rtol=1e-5)


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


def test_none_takes_no_negative_and_every_default_lies_in_its_range():
    assert GUIDANCE["none"].attend is None
    assert all(0 <= kind.default_scale <= kind.max_scale for kind in GUIDANCE.values())


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(InputError, match="choose from nasa, nag, vsf, projected, none"):
        find_guidance("cfg")


def test_presets_and_recipes_take_every_guidance_with_a_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GUIDANCE, "damped", Guidance("damped", "nasa_attention", default_scale=0.5, max_scale=4.0))
    preset = override(default_preset("pixart"), ["negative_kind=damped"])
    assert preset.guidance() == GUIDANCE["damped"]
    assert changed(StudentRecipe(), {"negative_kind": "damped"}).negative_kind == "damped"
    for kind in ("none", "nasal"):
        refused = f"unknown guidance '{kind}', choose from nasa, nag, vsf, projected, damped$"
        with pytest.raises(InputError, match=refused):
            override(preset, [f"negative_kind={kind}"])
        with pytest.raises(InputError, match=refused):
            changed(StudentRecipe(), {"negative_kind": kind})
