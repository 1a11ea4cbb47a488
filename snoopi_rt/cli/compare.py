"""`snoopi-rt compare`. Polygraphy is imported inside it."""

import click

from snoopi_rt.cli.options import Number, complete_bundle, completed_by, once, say, threads_option
from snoopi_rt.engines import ENGINES
from snoopi_rt.errors import InputError, PackageMissing, how_to_install
from snoopi_rt.shell import visible


def _graphs() -> tuple[str, ...]:
    from snoopi_rt.bundle.manifest import GRAPHS

    return GRAPHS


@click.command(epilog="Example: snoopi-rt compare my-bundle --engine cpu --engine openvino --graph generator --layers")
@click.argument("bundles", nargs=-1, metavar="[BUNDLE] [OTHER]", shell_complete=complete_bundle)
@click.option(
    "--engine",
    "names",
    multiple=True,
    required=True,
    metavar="NAME",
    shell_complete=completed_by(lambda: ENGINES),
    help="Engine. Give two, of which the first is the reference, or one if there are two bundles.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    metavar="NAME",
    help="One for both sides, or one for each.  [default: the bundle's first]",
)
@click.option(
    "--graph",
    "graphs",
    multiple=True,
    metavar="NAME",
    shell_complete=completed_by(_graphs),
    help="Graph to compare; repeatable.  [default: all]",
)
@click.option("--layers", is_flag=True, help="Compare every node of the ONNX graph, and name the first that differs.")
@click.option("--tolerance", type=Number(0), default=0.01, metavar="X", help="Relative L2 distance above which an output differs.")
@click.option("--prompt", metavar="TEXT", help="Prompt to run the graphs with.  [default: that of bench]")
@click.option("--neg", metavar="TEXT", multiple=True, callback=once, help="Negative prompt.  [default: that of bench]")
@threads_option
def compare(
    bundles: tuple[str, ...],
    names: tuple[str, ...],
    precisions: tuple[str, ...],
    graphs: tuple[str, ...],
    layers: bool,
    tolerance: float,
    prompt: str | None,
    neg: str | None,
    threads: int | None,
) -> None:
    """Run the same graphs on two engines, or two bundles on one, and report how far their outputs differ: to debug black images, NaN, lost
    precision and damaged weights.

    BUNDLE is a folder, by default the embedded bundle. Two engines may read the same file, so that a wrong weight shows on neither: compare
    the bundle with OTHER, such as a fresh export. Both sides get the same inputs, so that errors do not carry over from graph to graph.
    Exits with 1 if an output differs. Needs the extra export.

    With --layers all outputs are in memory; POLYGRAPHY_ARRAY_SWAP_THRESHOLD_MB=100 moves arrays above 100 MB to disk.
    """
    from snoopi_rt.bundle.bundle import Bundle
    from snoopi_rt.diagnostics.bench import bench_prompts
    from snoopi_rt.pipeline import EMBEDDED

    if len(bundles) > 2:
        raise InputError("compare takes at most two bundles")
    if len(names) > 2 or len(names) + max(len(bundles), 1) < 3:
        raise InputError("compare needs two engines (--engine cpu --engine openvino), or two bundles and an engine")
    if len(precisions) > 2:
        raise InputError("give one --precision for both, or one each")
    opened = [Bundle.load(bundle) for bundle in bundles or (EMBEDDED,)]
    try:
        from snoopi_rt.diagnostics.compare import Side
        from snoopi_rt.diagnostics.compare import compare as run
    except ImportError as error:
        raise PackageMissing(f"compare needs {error.name}: {how_to_install('export')}") from error

    default_prompt, default_negative = bench_prompts(opened[0])
    first, second = (
        Side.of(
            opened[min(place, len(opened) - 1)],
            names[min(place, len(names) - 1)],
            precisions[min(place, len(precisions) - 1)] if precisions else None,
        )
        for place in range(2)
    )
    differs = False
    for comparison in run(
        first,
        second,
        graphs or tuple(first.variants),
        prompt or default_prompt,
        default_negative if neg is None else neg,
        layers,
        threads,
        say,
    ):
        beyond = comparison.first_beyond(tolerance)
        differs = differs or beyond is not None
        click.echo(f"{comparison.graph}: {comparison.first} against {comparison.second}")
        if not layers:
            for distance in comparison.distances:
                verdict = f"within {tolerance:g}" if distance.relative_l2 <= tolerance else "differs: --layers names the first node"
                click.echo(visible(f"  {distance.output}: {comparison.described(distance)}, {verdict}"))
        elif beyond is None:
            click.echo(f"  {len(comparison.distances)} node outputs compared, all within {tolerance:g}")
            if broken := comparison.first_broken():
                click.echo(visible(f"  the first broken node is {broken.node}, output {broken.output!r}: {comparison.described(broken)}"))
        else:
            click.echo(visible(f"  the first node to differ is {beyond.node}, output {beyond.output!r}: {comparison.described(beyond)}"))
    if differs:
        click.get_current_context().exit(1)
