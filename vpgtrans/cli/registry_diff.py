"""`vpgtrans registry diff`: what has changed from one version to another?"""

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, index_option, json_option


@click.command(
    cls=Examples,
    short_help="Say how two entries differ.",
    epilog="""
    vpgtrans registry diff eyes@1.0.0 eyes@1.1.0
    vpgtrans registry diff eyes@1.1.0 openmoji-qformer-smollm2-135m --json
    """,
)
@click.argument("a", metavar="A[@VERSION]")
@click.argument("b", metavar="B[@VERSION]")
@index_option
@json_option
def command(a: str, b: str, *, index: str | None, as_json: bool) -> None:
    """Compare what the indexes say of two entries: files, base, interface, licence, metrics, lineage."""
    with console.loading():
        from vpgtrans.registry.diff import diff
        from vpgtrans.registry.index import find
    first, second = (find(name, index=index).entry for name in (a, b))
    found = diff(first, second)
    if as_json:
        console.print_json([difference.to_json() for difference in found])
    elif found:
        rows = [{"what": each.what, first.name: each.a, second.name: each.b} for each in found]
        console.print_rows(rows, title=f"{first.name} and {second.name}")
    else:
        console.print_line(f"{first.name} and {second.name} say the same")
