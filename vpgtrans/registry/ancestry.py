"""What a checkpoint was made from, and what that was made from, as far as the indexes at hand know."""

from collections.abc import Callable, Sequence

from vpgtrans.errors import RegistryError, StoreError
from vpgtrans.registry.entry import Entry

MAX_DEPTH = 12

Branch = tuple[str, Sequence["Branch"]]
"""A line, and what hangs on it."""


def ancestry(entry: Entry, find: Callable[[str], Entry]) -> Branch:
    """The tree of an entry's parents, each with its own where `find` knows it."""
    return _tree(entry, f"{entry.name} ({entry.kind})", find, seen=frozenset())


def _tree(entry: Entry, line: str, find: Callable[[str], Entry], *, seen: frozenset[str]) -> Branch:
    lineage = entry.lineage
    made = [
        f"recipe {lineage.recipe}" if lineage.recipe else None,
        f"sha256 {lineage.recipe_sha256[:12]}…" if lineage.recipe_sha256 else None,
        f"first projector {lineage.initialiser}" if lineage.initialiser else None,
        f"seed {lineage.seed}" if lineage.seed is not None else None,
        f"vpgtrans {lineage.code_version}" if lineage.code_version else None,
    ]
    branches: list[Branch] = [(", ".join(filter(None, made)), ())] if any(made) else []
    branches += [(f"forced: {check}", ()) for check in lineage.forced]
    for parent in lineage.parents:
        said = f"{parent.relation}: {parent.reference}"
        scheme, _, name = parent.reference.partition(":")
        known = None
        if scheme == "registry" and len(seen) < MAX_DEPTH:
            try:
                known = find(name)
            except (RegistryError, StoreError):
                said += " (in no index at hand)"
        if known is None:
            branches.append((said, ()))
        elif known.name in seen | {entry.name}:
            branches.append((f"{said} (above)", ()))
        else:
            branches.append(_tree(known, f"{said} = {known.name}", find, seen=seen | {entry.name}))
    return line, branches
