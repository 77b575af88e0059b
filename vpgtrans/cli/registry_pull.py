"""`vpgtrans registry pull`: a checkpoint's files on this machine."""

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, index_option, json_option


@click.command(
    cls=Examples,
    short_help="Download a checkpoint and check every byte.",
    epilog="""
    vpgtrans registry pull openmoji-qformer-smollm2-135m
    vpgtrans registry pull openmoji-qformer-smollm2-135m@1.0 --index https://example.org/team/checkpoints_registry.yaml
    """,
)
@click.argument("name", metavar="NAME[@VERSION]")
@index_option
@json_option
def command(name: str, *, index: str | None, as_json: bool) -> None:
    """Bring a checkpoint into the cache and print its directory.

    Its locations are tried in order; sizes and hashes are compared while the files come. An interrupted pull goes on
    where it was, and one that is there already needs no network. $VPGTRANS_CACHE says where the cache is
    [~/.cache/vpgtrans], $VPGTRANS_STORE_TIMEOUT how many seconds a server may be silent [20].
    """
    with console.loading():
        from vpgtrans.progress import transfer
        from vpgtrans.registry.index import find
        from vpgtrans.registry.pull import pull
    entry, place = find(name, index=index)
    with transfer(entry.name, entry.size) as progress:
        path = pull(entry, index=place, progress=progress)
    if as_json:
        console.print_json({"name": entry.name, "path": path, "files": len(entry.files), "bytes": entry.size})
    else:
        console.print_line(str(path))
