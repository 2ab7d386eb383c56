"""`semcons parts`: prints the parts that settings can name, built in or of installed packages."""

from __future__ import annotations

import argparse
from typing import get_args

from semcons_ray.api.parts import Kind, describe_groups, render_parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semcons parts` to its parser."""
    kinds = f"only parts of this kind: {', '.join(get_args(Kind))}"
    parser.add_argument("kind", nargs="?", choices=get_args(Kind), metavar="KIND", help=kinds)
    parser.epilog = (
        "A setting takes module:object as well, for a part of your own. What it is to have, and the group of entry "
        f"points by\nwhich a package names its parts:\n\n{describe_groups()}"
    )


def run(args: argparse.Namespace) -> int:
    """Print a row for each part, on stdout."""
    print(render_parts([args.kind] if args.kind else [*get_args(Kind)]))
    return 0
