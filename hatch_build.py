"""Build hook: a wheel carries recipes, the registry and its checkpoints as `vpgtrans/share`.

An editable install finds them in the repository, so nothing is copied there.
"""

from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShareHook(BuildHookInterface):
    """Adds the shared files that exist to a standard wheel."""

    def initialize(self, version: str, build_data: dict) -> None:
        if version != "standard":
            return
        for name in ("recipes", "checkpoints", "checkpoints_registry.yaml", "checkpoints_registry.schema.json"):
            source = Path(self.root) / name
            if source.exists():
                build_data["force_include"][str(source)] = f"vpgtrans/share/{name}"
