"""The Triton kernels of NASA attention against their plain-torch meaning: on a GPU for real, elsewhere in Triton's interpreter."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from snoopi_rt.kernels import attention, nasa_attention

triton = pytest.importorskip("triton")
from snoopi_rt.kernels.nasa import fused_nasa_attention  # noqa: E402 - needs triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD_DIMS = (16, 40, 64, 72, 80, 128, 160)
LENGTHS = ((1, 1), (77, 77), (120, 13), (300, 300))
# Largest difference to the fp32 reference on the same rounded inputs, outputs being up to 3.2. Measured over all cases, in the interpreter:
# 1.7e-6, 9.8e-4 and 1.5e-2; weights and results are rounded to 11 and 8 bits.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}
GRADIENT_TOLERANCE = 2e-5  # of the largest gradient, in fp32; measured 9e-7


def arguments(batch=2, heads=2, queries=70, t=77, u=13, size=72, dtype=torch.float32, masked=True):
    random = torch.Generator().manual_seed(size)

    def draw(rows):
        # As split_heads gives them: rows of all heads lie together.
        return torch.randn(batch, rows, heads, size, generator=random).to(dtype).transpose(1, 2).to(DEVICE)

    def mask(tokens):
        return (torch.rand(batch, tokens, generator=random) > 0.3).to(DEVICE) if masked else None

    scale = torch.linspace(0.2, 1.0, batch, device=DEVICE)
    return [draw(queries), draw(t), draw(t), mask(t), draw(u), draw(u), mask(u), scale]


def in_fp32(values):
    return [x.float() if x is not None and x.is_floating_point() else x for x in values]


def worst(result, expected):
    return (result.float() - expected.float()).abs().max().item()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", HEAD_DIMS)
def test_the_kernel_is_the_formula(size, dtype, lengths):
    values = arguments(1, 2, 128, *lengths, size, dtype, masked=lengths[0] > 1)
    fused, expected = fused_nasa_attention(*values), nasa_attention(*in_fp32(values))
    assert fused.dtype == dtype and fused.shape == expected.shape
    assert worst(fused, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_zero_output_and_the_positive_branch_alone_are_outside_the_tolerance(dtype):
    values = arguments(dtype=dtype)
    expected = nasa_attention(*in_fp32(values))
    for wrong in (torch.zeros_like(expected), attention(*in_fp32(values[:4]))):
        assert worst(wrong, expected) > 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scale_zero_is_the_positive_branch_whatever_the_negative(dtype):
    values = arguments(dtype=dtype)
    values[7] = torch.zeros_like(values[7])
    fused = fused_nasa_attention(*values)
    assert worst(fused, attention(*in_fp32(values[:4]))) < TOLERANCE[dtype]
    other = [*values[:4], 3 * values[4], -values[5], None, values[7]]
    assert torch.equal(fused, fused_nasa_attention(*other))


def test_a_branch_without_any_token_is_zero():
    values = arguments()
    values[6] = torch.zeros_like(values[6])
    assert worst(fused_nasa_attention(*values), attention(*values[:4])) < TOLERANCE[torch.float32]
    values[3] = torch.zeros_like(values[3])
    assert torch.equal(fused_nasa_attention(*values), torch.zeros_like(values[0]))


def test_the_same_prompt_as_negative_at_scale_one_leaves_nothing():
    values = arguments()
    values[4:7] = values[1:4]
    values[7] = torch.ones_like(values[7])
    assert torch.equal(fused_nasa_attention(*values), torch.zeros_like(values[0]))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [40, 64, 72])
def test_gradients_are_those_of_the_formula(size, masked):
    values = arguments(2, 2, 100, 33, 13, size, masked=masked)
    if masked:
        values[6][0] = False  # and nothing becomes NaN
    ours, theirs = ([x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in values] for _ in range(2))
    do = torch.randn(values[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    fused_nasa_attention(*ours).backward(do)
    nasa_attention(*theirs).backward(do)
    for mine, reference in zip(ours, theirs, strict=True):
        if mine is not None and mine.is_floating_point():
            assert worst(mine.grad, reference.grad) < GRADIENT_TOLERANCE * reference.grad.abs().max().item()


def test_a_mask_that_all_images_share_is_read_for_each():
    values = arguments()
    values[3], values[6] = (values[place][1:].expand(2, -1) for place in (3, 6))
    assert worst(fused_nasa_attention(*values), nasa_attention(*values)) < TOLERANCE[torch.float32]


def test_keys_that_several_images_share_get_the_sum_of_their_gradients():
    values = arguments()
    shared = values[4][:1].clone().requires_grad_()
    alone = values[4][:1].clone().requires_grad_()
    for leaf, function in ((shared, fused_nasa_attention), (alone, nasa_attention)):
        function(*values[:4], leaf.expand(2, -1, -1, -1), *values[5:]).square().sum().backward()
    assert worst(shared.grad, alone.grad) < GRADIENT_TOLERANCE * alone.grad.abs().max().item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(2, 2, 5, 40)}, "keys .* of the prompt do not fit queries"),
        ({4: torch.zeros(2, 1, 13, 72)}, "keys .* of the negative do not fit queries"),
        ({3: torch.zeros(2, 5, dtype=torch.bool)}, "the prompt's mask must be bool"),
        ({6: torch.zeros(2, 13)}, "the negative's mask must be bool"),
        ({7: torch.zeros(1)}, "scale must be"),
        ({0: torch.zeros(2, 2, 70, 72, dtype=torch.float16)}, "of one dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    values = arguments()
    for place, value in change.items():
        values[place] = value.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        fused_nasa_attention(*values)


def test_heads_above_the_largest_and_a_cpu_without_the_interpreter_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="a head of 320 is too large"):
        fused_nasa_attention(*arguments(1, 1, 4, 2, 2, 320))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    values = [x if x is None else x.cpu() for x in arguments()]
    with pytest.raises(ValueError, match="runs on a GPU"):
        fused_nasa_attention(*values)


def test_the_kernels_compile_for_a_gpu_that_is_not_here():
    """To machine code of sm_80 and sm_90, in a process of its own: the interpreter cannot be left."""
    code = """
        import torch
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from snoopi_rt.kernels import nasa_kernel
        from snoopi_rt.kernels.nasa import meta_parameters

        FP32 = ("factor_ptr", "lse_ptr", "delta_ptr")
        def signature_of(name):
            if name.isupper():
                return "constexpr"
            if name.endswith("strides"):
                return ("i32",) * 3
            if name.endswith("ptr"):
                return "*i1" if "mask" in name else "*fp32" if name in FP32 else "*bf16"
            return "fp32" if name.endswith("scale") else "i32"

        for capability, kernel, backward in (
            (90, nasa_kernel.forward_kernel, False), (80, nasa_kernel.forward_kernel, False),
            (90, nasa_kernel.dq_kernel, True), (90, nasa_kernel.dk_dv_kernel, True),
        ):
            signature = {name: signature_of(name) for name in kernel.arg_names}
            meta = {**meta_parameters(72, torch.bfloat16, backward=backward), "MASKED": True, "MASKED_POS": True, "MASKED_NEG": False}
            options = {"num_warps": meta.pop("num_warps")}
            constants = {name: value for name, value in meta.items() if name in signature}
            compiled = compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32), options)
            print(kernel.fn.__name__, len(compiled.asm["cubin"]))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == 8 and all(int(size) > 10_000 for size in done.stdout.split()[1::2])
