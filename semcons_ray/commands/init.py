"""`semcons init`: writes a config.yaml to begin with, and beside it the schema by which editors complete it."""

from __future__ import annotations

import argparse
from pathlib import Path

from semcons_ray.api.schema import schema_text
from semcons_ray.config import describe_settings
from semcons_ray.errors import RunFolderError

PRESETS = {path.stem: path for path in sorted(Path(__file__).with_name("presets").glob("*.yaml"))}
"""The file of each preset, which holds only what differs from the defaults."""

SCHEMA = "config.schema.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `semcons init` to its parser."""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="NAME",
        help="write only what this preset changes, with the reasons and sources",
    )
    width = max(map(len, PRESETS)) + 2
    firsts = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in PRESETS.items()}
    lines = [f"  {name:{width}}{first.removeprefix('# ')}" for name, first in firsts.items()]
    parser.epilog = "\n".join(["presets:", *lines])


def run(args: argparse.Namespace) -> int:
    """Write DIR/config.yaml, and print its path.

    Raises:
        RunFolderError: DIR has a config.yaml.
    """
    path: Path = args.folder / "config.yaml"
    if path.exists():
        raise RunFolderError(f"{path} exists; remove it, or choose another folder")
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / SCHEMA).write_text(schema_text("run"), encoding="utf-8")
    path.write_text(_text(args.preset, path), encoding="utf-8")
    print(path)
    return 0


def _text(preset: str | None, path: Path) -> str:
    editors = f"# yaml-language-server: $schema={SCHEMA}\n"
    how = f"Run it with: semcons run {path} --out runs/first"
    if preset:
        return f"{editors}# {how}\n\n{PRESETS[preset].read_text(encoding='utf-8')}"
    return (
        f"{editors}# An experiment of semcons: every setting with its default. Change what you like; what you delete "
        f"keeps its\n# default. {how}\n\n{describe_settings(as_yaml=True)}\n"
    )
