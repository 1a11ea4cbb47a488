"""Precisions as people write them, and the variants that they select."""

from dataclasses import replace

import pytest

from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.errors import BundleError, InputError
from snoopi_rt.runtime.precision import format_precision, parse_precision, select_variants


@pytest.fixture
def mixed(original: Bundle) -> Bundle:
    """The tiny bundle with the text encoder in fp32 and int4, the generator in fp32, int8 and (openvino) bf16, the decoder in fp32."""

    def variant(graph: str, precision: str, engines: tuple[str, ...] = ("cpu", "openvino")) -> object:
        return replace(original.variant(graph, "cpu"), precision=precision, engines=engines)

    text_encoder = (variant("text_encoder", "fp32"), variant("text_encoder", "int4"))
    generator = (variant("generator", "fp32"), variant("generator", "int8"), variant("generator", "bf16", ("openvino",)))
    return replace(original, graphs={**original.graphs, "text_encoder": text_encoder, "generator": generator})


@pytest.mark.parametrize(
    ("text", "precisions"),
    [
        ("int8", {"text_encoder": "int8", "generator": "int8", "decoder": "int8"}),
        ("generator=int8", {"generator": "int8"}),
        (" generator = int8 , text_encoder=int4 ", {"generator": "int8", "text_encoder": "int4"}),
    ],
)
def test_a_precision_is_one_name_or_one_for_each_graph(text: str, precisions: dict[str, str]) -> None:
    assert parse_precision(text) == precisions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unet=int8", "precision 'unet=int8': unknown graph 'unet', choose from text_encoder, generator, decoder"),
        ("generator=int8,generator=fp32", "precision 'generator=int8,generator=fp32' names generator twice"),
        ("", "precision '' is neither one name, such as int8, nor graph=name,graph=name"),
        ("int8,fp32", "precision 'int8,fp32' is neither"),
        ("generator=", "precision 'generator=' is neither"),
        ("=int8", "precision '=int8' is neither"),
        ("generator=int8,", "precision 'generator=int8,' is neither"),
    ],
)
def test_what_is_no_precision_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_precision(text)
    assert str(caught.value).startswith(message)


def chosen(bundle: Bundle, engine: str, precision: str | dict[str, str] | None) -> list[str]:
    return [variant.precision for variant in select_variants(bundle, engine, precision).values()]


def test_without_a_precision_each_graph_takes_its_first_variant(mixed: Bundle) -> None:
    assert chosen(mixed, "cpu", None) == ["fp32", "fp32", "fp32"]


def test_one_name_is_taken_by_the_graphs_that_have_it(mixed: Bundle) -> None:
    assert chosen(mixed, "cpu", "int8") == ["fp32", "int8", "fp32"]
    assert chosen(mixed, "openvino", "bf16") == ["fp32", "bf16", "fp32"]
    with pytest.raises(InputError, match="bundle 'tiny' has no precision 'bf16' for engine 'cpu', choose from fp32, int4, int8"):
        chosen(mixed, "cpu", "bf16")


@pytest.mark.parametrize("given", ["generator=int8,text_encoder=int4", {"generator": "int8", "text_encoder": "int4"}])
def test_a_graph_that_is_named_gets_its_own(mixed: Bundle, given: str | dict[str, str]) -> None:
    assert chosen(mixed, "cpu", given) == ["int4", "int8", "fp32"]


@pytest.mark.parametrize("given", ["decoder=int8", {"decoder": "int8"}])
def test_a_graph_that_is_named_must_have_it(mixed: Bundle, given: str | dict[str, str]) -> None:
    with pytest.raises(InputError, match="bundle 'tiny' has no decoder in precision 'int8' for engine 'cpu', choose from fp32"):
        chosen(mixed, "cpu", given)


def test_a_graph_that_the_bundle_leaves_out_cannot_be_named(prompts_only: Bundle) -> None:
    assert chosen(prompts_only, "cpu", "fp32") == ["fp32", "fp32"]
    with pytest.raises(InputError, match="bundle 'tiny' has no graph 'text_encoder', choose from generator, decoder"):
        chosen(prompts_only, "cpu", "text_encoder=fp32")


def test_an_engine_that_the_bundle_does_not_serve_comes_before_the_precision(mixed: Bundle) -> None:
    with pytest.raises(BundleError, match="bundle 'tiny' has no generator for engine 'cuda', it supports cpu, openvino"):
        select_variants(mixed, "cuda", "int9")


@pytest.mark.parametrize("given", [None, "int8", "text_encoder=int4", "generator=int8,text_encoder=int4"])
def test_what_was_selected_is_written_so_that_it_selects_the_same(mixed: Bundle, given: str | None) -> None:
    variants = select_variants(mixed, "cpu", given)
    assert select_variants(mixed, "cpu", format_precision(variants)) == variants
    assert format_precision(select_variants(mixed, "cpu", "text_encoder=int4")) == "text_encoder=int4,generator=fp32,decoder=fp32"
    assert format_precision(select_variants(mixed, "cpu", None)) == "fp32"
